"""Records that can be taken up again, lists and inputs of the cases, errors against float64, the report of a file."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vecattention
from vecattention import cli, machine, profile
from vecattention.bench import figures, record, tune
from vecattention.bench.cases import CASES, Case, Source, case_of, lists
from vecattention.bench.exact import error_of

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "h200-2026-11-24.jsonl"
SMALL = Case("small", 4, 2, 300, 333, True, head_dim=32)


def step(name: str, done: list[str]) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    def call() -> dict[str, Any]:
        done.append(name)
        return {"value": name}

    return {"study": name}, call


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path, done = tmp_path / "deep" / "r.jsonl", []  # type: tuple[Path, list[str]]
    assert [r["value"] for r in record.run(path, [step("a", done)])] == ["a"]
    with path.open("a") as file:
        file.write('{"key": {"study": "b"}, "va')
    assert [r["value"] for r in record.read(path)] == ["a"]
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert [r["value"] for r in record.run(path, [step("a", done), step("b", done)])] == ["a", "b"]
    assert done == ["a", "b"], "what the file held was not measured again"
    assert {"schema", "made", "machine"} <= set(record.read(path)[1])
    list(record.run(path, [step("a", done)], now=True))
    assert done == ["a", "b", "a"]


def test_records_of_other_versions_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "r.jsonl", []  # type: tuple[Path, list[str]]
    steps, here = [step("a", done)], machine.versions()
    for name in ("torch", "triton", "vecattention", "numpy"):
        monkeypatch.setattr(machine, "versions", lambda name=name: {**here, name: "0.0.1"})
        assert record.remaining(path, steps) == ([] if name == "numpy" else steps), name
        list(record.run(path, steps))
        assert record.remaining(path, steps) == []
        monkeypatch.setattr(machine, "versions", lambda: here)
        list(record.run(path, steps))
        assert record.remaining(path, steps) == [], "a run on the machine that it began on goes on"
    assert len(done) == 4, "three other versions and these, whatever that of a package that decides nothing"
    assert len(record.made_here(record.read(path))) == 1


def test_a_damaged_record_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for line in ("5", "[" * 100_000):
        path.write_text('{"key": 1}\n' + line + '\n{"key": 2}\n')
        with pytest.raises(ValueError, match=r"r\.jsonl line 2 is no JSON record .*; remove that line"):
            record.read(path)
    path.write_text('{"key": 1}\nnonsense\n{"key": 2}\n{"key": 3}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl line 2 is no JSON record"):
        record.read(path)
    assert record.read(tmp_path / "none.jsonl") == []


def test_cases_are_the_models_shapes() -> None:
    wan = case_of("wan2.1-14b-720p")
    assert (wan.heads, wan.q_len, wan.causal) == (40, 75_600, False)
    assert wan.dense_flop == 4 * 40 * 128 * 75_600**2
    causal = CASES["qwen2.5-vl-32k"]
    assert causal.dense_flop == 4 * 28 * 128 * 32768 * 32769 // 2
    with pytest.raises(ValueError, match="case is 'sora', wanted one of"):
        case_of("sora")


@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_lists_have_the_density_asked_for(kind: str) -> None:
    case = Case("flat", 8, 8, 512, 8192, False)
    selection = lists(case, 0.2, kind, device="cpu")
    assert abs(float(selection.density().mean()) - 0.2) < 0.02
    shared = [set(selection.columns(0, 0, g).tolist()) for g in range(2)]
    overlap = len(shared[0] & shared[1]) / len(shared[0] | shared[1])
    assert overlap > 0.5 if kind == "clustered" else overlap < 0.2
    with pytest.raises(ValueError, match="kind is 'neat', wanted 'random' or 'clustered'"):
        lists(case, 0.2, "neat", device="cpu")


def test_errors_tell_right_from_wrong() -> None:
    query, key, value = Source(SMALL, "cpu", torch.float32, structure=1.0).tensors()
    selection = lists(SMALL, 0.3, device="cpu")
    out = vecattention.attend(query, key, value, selection)
    assert isinstance(out, torch.Tensor)
    assert error_of(out, query, key, value, selection, causal=True).passes
    wrong = out + 0.05 * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    assert not error_of(wrong, query, key, value, selection, causal=True).passes


def test_the_report_of_the_committed_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = record.read(RECORDS)
    assert all(r.get("error_ok", True) and r.get("repeats_equal", True) for r in found)
    calls = {(r["case"], r["pool"], round(r["density"], 2)): r["ratio"] for r in figures.speed_ups(found)}
    assert calls[("wan2.1-14b-720p", 64, 0.48)] > 1.6
    assert cli.main(["report", str(RECORDS), "--png", str(tmp_path / "p.png"), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "| hunyuanvideo-720p | 64 128 window | 38.0 % |" in said and "picture in" in said
    assert "| causal-8192 | 128 | 50 % | 0.927 | 0.689 | 1.35x | 1.53x |" in said
    assert cli.main(["report", str(RECORDS.with_name("h100-variants-2026-11-24.jsonl")), "--markdown"]) == 0
    assert "| and keys a tile ahead (chosen) | no | 529 |" in capsys.readouterr().out
    assert cli.main(["report", str(RECORDS.with_name("video-layers-h200-2026-11-24.jsonl")), "--markdown"]) == 0
    assert "| 64 128 | 323 | 47.7 % | 246 | 1.31x | 87.4 % | 396 | 0.82x |" in capsys.readouterr().out
    assert cli.main(["report", str(RECORDS.with_name("h200-trials-2026-11-24.jsonl")), "--markdown"]) == 0
    assert "| chunks of 3 heads x 929 blocks | 132.7 |" in capsys.readouterr().out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_readme_says_of_speed_is_in_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(RECORDS.with_name("h200-2026-11-28-4.jsonl")), "--markdown"]) == 0
    said = capsys.readouterr().out
    wanted = {
        "wan2.1-14b-720p | 64 128 window | 48.0 %": 1.76, "hunyuanvideo-720p | 64 128 window | 38.0 %": 2.23,
        "qwen2.5-vl-128k | 64 128 window | 21.6 %": 3.63, "qwen2.5-vl-128k | 64 128 window | 7.0 %": 9.07,
    }  # fmt: skip
    for case, ratio in wanted.items():
        line = next(line for line in said.splitlines() if line.startswith(f"| {case} |"))
        assert "flash-attn-4" in line and f"| {ratio:.2f}x |" in line
    readme = (RECORDS.parents[2] / "README.md").read_text()
    assert "| FlashAttention-4, dense | " + " | ".join(f"{ratio:.2f}" for ratio in wanted.values()) + " |" in readme


def test_the_calls_for_the_sanitizer() -> None:
    call = [sys.executable, str(RECORDS.parents[2] / "benchmarks" / "sanitize.py")]
    said = subprocess.run([*call, "--device", "cpu"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 24 and all(line.endswith(": equal") for line in said)
    if not torch.cuda.is_available():
        refused = subprocess.run(call, capture_output=True, text=True)
        assert refused.returncode == 2 and "--device is 'cuda', wanted a device that torch sees" in refused.stderr
    refused = subprocess.run([*call, "--control", "alone", "--device", "cpu"], capture_output=True, text=True)
    assert refused.returncode == 2 and "--control is a kernel for a GPU, --device is 'cpu'" in refused.stderr


def test_what_the_power_limit_costs_is_measured() -> None:
    path = RECORDS.parents[2] / "benchmarks" / "power.py"
    spec = importlib.util.spec_from_file_location("power", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for causal, density, block, of in ((True, 0.5, 64, "lists, R=64, random, 50 %"), (False, 1.0, 0, "dense, cuDNN")):
        source = Source(Case("tiny", 4, 2, 256, 256, causal), "cpu", torch.float32)
        found = module.measure(source, density, "random", block, 2, 1.0, 0.001)
        ways = [f"{values}, {how}" for values in ("random", "zeros") for how in ("1 ms of rest", "no rest")]
        assert [row["variant"] for row in found] == ways and {row["of"] for row in found} == {of}
        assert all(0 < row["ms_min"] <= row["ms"] and row["rounds"] == 2 for row in found)
    if not torch.cuda.is_available():
        refused = subprocess.run([sys.executable, str(path), "none.jsonl"], capture_output=True, text=True)
        assert refused.returncode == 2 and "torch sees no CUDA device" in refused.stderr


def test_source_trees_are_compared(tmp_path: Path) -> None:
    root, out = RECORDS.parents[2], tmp_path / "trees.jsonl"
    asked = [str(out), f"a={root / 'src'}", f"b={root / 'src'}", "--selections", "qwen2.5-vl-4k", "--device", "cpu"]
    asked += ["--backend", "cpu"]
    call = [sys.executable, str(root / "benchmarks" / "trees.py"), *asked, "--rounds", "2", "--ms", "1"]
    said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    held = record.read(out)
    assert [(r["variant"], r["equal"], r["rounds"]) for r in held] == [("a", True, 2), ("b", True, 2)]
    assert all(0 < r["ms_min"] <= r["ms"] for r in held) and said.count("selection, R=128, P=64, cpu") == 2
    assert cli.main(["report", str(out)]) == 0
    for asked, why in (
        (["a=nowhere", "--selections", "x"], "a is 'nowhere', wanted a folder that holds vecattention/"),
        ([call[3], "--calls", "qwen2.5-vl-4k"], "not of the form that --help shows"),
        ([call[3]], "nothing to measure"),
    ):
        wrong = subprocess.run([*call[:3], *asked], capture_output=True, text=True)
        assert wrong.returncode == 2 and why in wrong.stderr


def test_the_page_on_rounded_means_holds_its_records(capsys: pytest.CaptureFixture[str]) -> None:
    root = RECORDS.parents[2]
    spec = importlib.util.spec_from_file_location("rounded_means", root / "benchmarks" / "rounded_means.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (root / "docs" / "decisions" / "rounded-means.md").read_text()
    assert module.table(str(RECORDS.with_name("rounded-means.jsonl"))) in page


@pytest.mark.parametrize("path", sorted(RECORDS.parent.glob("*00-*.jsonl")), ids=lambda path: path.stem)
def test_every_committed_record_of_a_gpu_is_told_of(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(path), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "| NO |" not in said and ("\n| " in said or "No table for" in said)


def test_what_cannot_be_reported_or_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "none.jsonl")]) == 2
    assert "wanted a file that `vecattention bench` wrote" in capsys.readouterr().err
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"other": 1}) + "\n")
    assert cli.main(["report", str(empty)]) == 2
    assert "holds no record of bench" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["bench", "dense", "--out", str(tmp_path / "o.jsonl")]) == 2
        assert "no GPU that torch sees" in capsys.readouterr().err
        assert not (tmp_path / "o.jsonl").exists()


def test_what_apply_costs_calls_that_stay_dense_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    call = [sys.executable, str(RECORDS.parents[2] / "benchmarks" / "overhead.py"), str(tmp_path / "o.jsonl")]
    asked = ["--device", "cpu", "--tokens", "64", "--layers", "1", "--rounds", "2", "--ms", "1"]
    done = subprocess.run([*call, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = record.read(tmp_path / "o.jsonl")
    assert [(r["of"], r["variant"]) for r in found] == [
        (of, variant)
        for of in ("prompt of 64 tokens", "1 token after 4096 tokens")
        for variant in ("as it is", "under apply")
    ]
    assert all(r["ms"] > 0 for r in found) and done.stdout.count("times as long") == 2
    assert cli.main(["report", str(tmp_path / "o.jsonl")]) == 0


def test_the_gpu_script_asks_for_what_the_studies_take() -> None:
    """Each step of benchmarks/gpu.py, none of them run: its arguments are those of its function."""
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    steps = [step for name in module.CASES_OF["main"] for step in module.main_steps(name)]
    steps += [step for name in module.CASES_OF["peers"] for step in module.peer_steps(name)]
    steps += tune.crossover_steps(Source, {})
    if torch.cuda.is_available() or importlib.util.find_spec("triton"):
        steps += tune.steps("triton", [Source(CASES["square-32k"])])
    for _, step in steps:
        inspect.signature(step.func).bind(*step.args, **step.keywords)  # type: ignore[attr-defined]
    keys = [json.dumps(key, sort_keys=True) for key, _ in steps]
    assert len(set(keys)) == len(keys) - 2, "dense of two cases is asked for by two parts, and measured once"


def test_no_candidate_is_the_default_itself() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from vecattention.backends.hopper import launch as hopper
    from vecattention.backends.triton import launch as triton

    for kernel in tune.kernels("hopper", causal=True):
        shape = hopper.SelectShape if kernel.selects else hopper.AttendShape
        assert kernel.candidates and shape() not in [shape(**fields) for fields in kernel.candidates]
    for kernel in tune.kernels("triton", causal=True):
        default = triton.SelectShape() if kernel.selects else triton.attend_shape(kernel.block, 128, torch.bfloat16)
        given = {name: getattr(default, name) for name in kernel.candidates[0]}
        assert given in (tune.TRITON_SELECT if kernel.selects else tune.TRITON_ATTEND)
        assert given not in kernel.candidates


def test_triton_is_tuned_for_both_usual_head_dims() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    asked = tune.steps("triton", [Source(case_of(name)) for name in tune.CASES["triton"]])
    timed = {(str(key["kernel"]), bool(key["fields"])) for key, _ in asked}
    names = {f"triton.attend_r{rows}_d{head_dim}_half" for rows in (64, 128) for head_dim in (64, 128)}
    names |= {f"triton.select_d{head_dim}_half" for head_dim in (64, 128)}
    assert timed == {(name, candidate) for name in names for candidate in (False, True)}
    assert names <= profile.KERNELS
    for name in tune.CASES["hopper"]:
        assert {kernel.name for kernel in tune.kernels("hopper", case_of(name).causal)} <= profile.KERNELS


def test_the_state_of_a_gpu_is_what_the_driver_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1605, 696.48, 700.00, 64, Active'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    full = {"sm_mhz": 1605.0, "power_w": 696.48, "power_limit_w": 700.0, "temperature_c": 64.0, "power_capped": True}
    assert machine.gpu_state() == full
    tool.write_text("#!/bin/sh\necho '1605, [N/A], 700.00, 64, [N/A]'\n")
    assert machine.gpu_state() == {"sm_mhz": 1605.0, "power_limit_w": 700.0, "temperature_c": 64.0}
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpu_state() is None


def test_a_run_that_was_cut_off_within_a_line_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    steps = [({"at": i}, lambda i=i: {"found": i}) for i in range(3)]
    list(record.run(path, steps[:2]))
    whole = path.read_bytes()
    for cut, left in ((whole[:-1], 2), (whole[:-9], 1), (whole + b'{"key": {"at": 2}, "fo', 2)):
        path.write_bytes(cut)
        assert len(record.remaining(path, steps)) == 3 - left
        assert [row["found"] for row in record.run(path, steps)] == [0, 1, 2]
        assert [row["found"] for row in record.read(path)] == [0, 1, 2] and path.read_bytes().endswith(b"\n")
    for now, other in ((False, b"a note"), (True, b"a note"), (True, b"one\ntwo\nlast")):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="pass another file"):
            list(record.run(path, steps, now=now))
        assert path.read_bytes() == other
