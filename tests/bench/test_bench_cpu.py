"""Every study of `vecattention bench` on a CPU: small shapes in float32, the same code that a GPU runs."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import vecattention
from vecattention import bits, cli, methods, profile
from vecattention.backends import cpu, reference
from vecattention.bench import exact, figures, peers, record, report, studies, timer, tune
from vecattention.bench.cases import CASES, Case, Source, lists
from vecattention.bench.exact import error_of
from vecattention.commands import bench
from vecattention.ops import rule_of
from vecattention.recall import recall

CAUSAL = Case("tiny-causal", 4, 2, 640, 640, True, head_dim=32)
FULL = Case("tiny-full", 2, 2, 768, 768, False, head_dim=32)
OBLONG = Case("tiny-oblong", 2, 2, 512, 768, False, head_dim=32)


def source(case: Case, structure: float = 0.0) -> Source:
    return Source(case, "cpu", torch.float32, structure=structure)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (CAUSAL, FULL):
        monkeypatch.setitem(CASES, case.name, case)


@pytest.mark.parametrize("case", [CAUSAL, FULL], ids=lambda case: case.name)
def test_all_of_it_and_its_report(case: Case, cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.jsonl"
    asked = ["bench", "all", "--device", "cpu", "--case", case.name, "--density", "0.5", "--out", str(out)]
    assert cli.main(asked) == 0
    found = record.read(out)
    assert not [r["failed"] for r in found if "failed" in r]
    kinds = {r["study"] for r in found}
    assert kinds == {"dense", "attention", "peer", "selection", "call", "method"}
    assert {r["method"] for r in found if r["study"] == "method"} == {
        name for name in methods.names() if name != "full" and case.causal in methods.get(name).modes
    }
    assert all(r["error_ok"] for r in found if "error_ok" in r)
    calls = [r for r in found if r["study"] == "call"]
    assert len(calls) == 4 and all(abs(r["density"] - 0.5) < 0.08 for r in calls)
    before = out.read_bytes()
    assert cli.main(asked) == 0 and out.read_bytes() == before, "nothing is measured twice"
    capsys.readouterr()
    assert cli.main(["report", str(out), "--markdown", "--png", str(tmp_path / "p.png")]) == 0
    said = capsys.readouterr().out
    assert "methods at equal recall" in said and "other sparse kernels" in said and "| flex_attention |" in said
    assert (tmp_path / "p.png").stat().st_size > 20_000


def test_layers_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "l.jsonl"
    asked = ["bench", "layer", "--device", "cpu", "--tokens", "512", "--layers", "1", "--density", "0.3"]
    assert cli.main([*asked, "--recall", "0.8", "--out", str(out)]) == 0
    found = record.read(out)
    assert not [r["failed"] for r in found if "failed" in r]
    assert {r["study"] for r in found} == {"dense", "selection", "call", "method"}
    assert {r["case"] for r in found} == {"testbed 512 movie0-layer1"}
    mine = next(r for r in found if r["study"] == "method" and r["method"] == "vecattention")
    assert abs(mine["recall"] - 0.8) < 0.05


def test_recall_over_sampled_rows_is_the_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ROWS", 10_000)
    for case, name in ((CAUSAL, "xattention"), (FULL, "svg"), (FULL, "vecattention")):
        made = source(case, 1.0)
        query, key, value = made.tensors()
        given = {"value": value} if methods.get(name).takes_value else {}
        selection = methods.get(name).select(query, key, causal=case.causal, **given)
        mine = peers._recall(selection, *peers._sampled(query, key, case))
        assert mine == pytest.approx(float(recall(query, key, selection).mean()), abs=1e-5)


def test_selections_are_compared_with_the_reference_on_a_sample() -> None:
    """The first, middle and last blocks of each head, with queries after other keys and heads that share keys."""
    case = Case("late", 4, 2, 1000, 1500, True, head_dim=32)
    query, key, _ = source(case, 1.0).tensors()
    for causal, scope, rounded in ((True, "window", False), (False, "row", False), (True, "row", True)):
        asked = rule_of(32, q_pooling_size=16, q_block_size=32, max_scope=scope, causal=causal)
        alpha = torch.tensor([[0.1, 0.2, 0.5, 1.0]])
        given = (query.bfloat16(), key.bfloat16()) if rounded else (query, key)
        means = exact._rounded_means(given[0], 16) if rounded else query
        words = reference.select(means, given[1], alpha, asked)
        compare = functools.partial(exact.agreement_of, words, *given, alpha, asked, rounded)
        sampled = (0, 1, 2, 14, 15, 16, 29, 30, 31)
        kept = int(bits.popcount(words[:, (0, 3)][:, :, sampled]).sum())
        assert compare((0, 3), 3) == exact.Agreement(kept, 0) and compare((0, 3), 3).passes
        assert compare(range(4)) == exact.Agreement(int(bits.popcount(words).sum()), 0)
        for head, block, seen in ((3, 0, 1), (0, 16, 1), (0, 31, 1), (0, 8, 0), (1, 0, 0)):
            words[0, head, block, -1] ^= 6
            assert compare((0, 3), 3).differ == 2 * seen, (head, block)
            words[0, head, block, -1] ^= 6


@pytest.mark.parametrize("how", ["right", "wrong", "unsteady"])
def test_a_wrong_selection_is_seen(
    how: str, cases: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    select, calls, before = cpu.select, 0, []  # type: ignore[var-annotated]

    def other(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return select(*given) ^ {"right": 0, "wrong": 2, "unsteady": 2 * (calls % 2 == 0)}[how]

    def measure(call: Callable[[], object], **more: Any) -> timer.Timing:
        before.append(calls)
        return timer.Timing(1.0, 1.0, 1.0, 1)

    monkeypatch.setattr(cpu, "select", other)
    monkeypatch.setattr(studies, "measure", measure)
    out = tmp_path / "b.jsonl"
    asked = ["bench", "selection", "--device", "cpu", "--case", "tiny-causal", "--out", str(out)]
    assert cli.main(asked) == (0 if how == "right" else 1)
    assert before[0] == 2, "compared with the reference and a second run before it was timed"
    said, found = capsys.readouterr().out, record.read(out)
    assert [(r["right"], r["repeats_equal"]) for r in found] == [(how != "wrong", how != "unsteady")] * 4
    assert all(r["kept_compared"] > 1000 and (r["differ"] > 20) == (how == "wrong") for r in found)
    assert all(report.wrong(r) == (how != "right") for r in found)
    assert ("ITS RESULT IS WRONG" in said) == (how == "wrong") and " keys differ" in said
    assert cli.main(["report", str(out), "--markdown"]) == 0
    assert f"| - | {'yes' if how == 'right' else 'NO'} |" in capsys.readouterr().out


def test_two_runs_of_attention_are_compared_before_one_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, calls, before = vecattention.attend, 0, []  # type: ignore[var-annotated]

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return attend(*given, **more) + (calls == 2)

    def measure(call: Callable[[], object], **more: Any) -> timer.Timing:
        before.append(calls)
        return timer.Timing(1.0, 1.0, 1.0, 1)

    monkeypatch.setattr(vecattention, "attend", counted)
    monkeypatch.setattr(studies, "measure", measure)
    found = studies.attention(source(FULL), 0.2, "random", "auto")
    assert before == [2] and found["error_ok"] and found["repeats_equal"] is False


def held(study: str, **fields: Any) -> record.Record:
    """A record as a file holds it."""
    use = {"use": "crossover"} if str(fields.get("case", "")).startswith("causal-") else {}
    return {"key": {"study": study, "device": "cpu", **use}, "study": study, **fields}


CALL = {"pool": 64, "block": 128, "scope": "window", "density": 0.2, "asked": 0.2, "ms": 4.0, "ms_graph": 3.0}
ALONE = {
    "method": [held("method", case="x", method="svg", recall=0.9, density=0.3, select_ms=1.0, attend_ms=2.0, ms=3.0)],
    "call": [held("call", case="x", extra_mib=2.0, **CALL)],
    "call and selection": [
        held("call", case="x", extra_mib=2.0, **CALL),
        held("selection", case="x", pool=64, block=128, scope="window", ms=1.0),
    ],
    "lengths": [held("call", case=f"causal-{n}", extra_mib=2.0, **CALL) for n in (1024, 2048, "long")],
}


@pytest.mark.parametrize("name", ALONE)
def test_records_without_a_dense_kernel_are_told_of(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times alone, "-" for what a dense record is needed for; no warnings, which are errors here, no empty panels."""
    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.extend(self.axes), save(self, *a, **k)))
    path, png = tmp_path / "r.jsonl", tmp_path / "p.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in ALONE[name]))
    assert cli.main(["report", str(path), "--markdown", "--png", str(png)]) == 0
    said = capsys.readouterr().out
    wanted = {
        "method": ["| x | svg | 0.900 | 30.0 % | 1.000 | 2.000 | - |"],
        "call": ["| x | 64 128 window | 20.0 % | - | - | 4.00 | - | 2 |"],
        "call and selection": ["| - | - | 4.00 | - | 2 |", "| x | 64 128 window | auto | 1.000 | - | not compared |"],
        "lengths": ["| causal-1024 | 128 | 20 % | - | 4.000 | - | - |", "| causal-2048 |"],
    }[name]
    assert all(line in said for line in wanted)
    shown = [place for place in drawn if place.axison]
    assert shown and all(place.lines or place.patches for place in shown)
    assert all("dense" not in place.get_xlabel() + place.get_ylabel() + place.get_title() for place in shown)
    whole = held("dense", case="x", kernel="flash", ms=8.0)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ALONE[name], whole]))
    assert cli.main(["report", str(path), "--markdown"]) == 0
    ratio = {"method": "2.67x", "call": "2.00x", "call and selection": "2.00x", "lengths": "causal-1024"}[name]
    assert ratio in capsys.readouterr().out


def test_a_picture_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, png = tmp_path / "r.jsonl", tmp_path / "p.png"
    path.write_text(json.dumps(held("dense", case="x", kernel="flash", ms=8.0)) + "\n")
    assert cli.main(["report", str(path), "--png", str(png)]) == 2
    assert "p.png, wanted records that are drawn" in capsys.readouterr().err and not png.exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"study": "dense", "case": "x", "kernel": "f"}, "line 2: a record of dense lacks 'ms', wanted a number in it"),
        ({"study": "dense", "case": "x", "kernel": "f", "ms": 0}, "of dense has ms 0, wanted milliseconds above 0"),
        ({"study": "dense", "case": 7, "kernel": "f", "ms": 1}, "of dense has case 7, wanted a text"),
        ({"study": "dense", "case": "x", "kernel": "f", "ms": 1, "missing": "all"}, "missing 'all', wanted an object"),
        ({"study": "call", "case": "x", **CALL}, "of call lacks 'extra_mib', wanted a number in it"),
        ({"study": "trials", "run": 1, "case": "x", "of": "y", "variant": "z"}, "of trials lacks 'ms', wanted one, or"),
        ({"study": "layer", "case": "x", "coverage": {}}, "of layer lacks 'pool'"),
        ({"study": "variants", "case": "x", "right": "so"}, "of variants has right 'so', wanted true or false"),
        ({"study": "dense", "key": 3}, "of dense has key 3, wanted an object"),
    ],
)
def test_a_record_that_lacks_a_field_is_named(
    wrong: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(ALONE["call"][0]) + "\n" + json.dumps({"key": {}} | wrong) + "\n")
    assert cli.main(["report", str(path)]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and "r.jsonl line 2: " in complaint
    assert "; remove that line, or measure it again with vecattention bench" in complaint


def test_times_of_two_versions_are_not_set_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    rows = [
        held("dense", case="x", kernel="flash", ms=ms) | {"machine": {"versions": {"torch": torch}}}
        for ms, torch in ((1.0, "1"), (8.0, "2"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *ALONE["call"]]))
    assert cli.main(["report", str(path), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "Left out: 1 records of other versions than torch 2" in said and "| flash | 8.00 | 4.00 | 2.00x |" in said


def test_methods_are_turned_to_the_recall_asked_for() -> None:
    for name in ("vecattention", "flexprefill"):
        found = peers.method(source(CAUSAL, 1.0), name, 0.8)
        assert abs(found["recall"] - 0.8) < 0.08 and found["error_ok"]
        assert found["ms"] == pytest.approx(found["select_ms"] + found["attend_ms"], abs=2e-4)


def test_errors_follow_the_order_of_permuted_rows() -> None:
    """SVG's temporal heads list rows that lie apart."""
    query, key, value = source(FULL).tensors()
    order = torch.randperm(FULL.q_len, generator=torch.Generator().manual_seed(0)).expand(1, 2, -1).contiguous()
    made = lists(FULL, 0.2, device="cpu")
    selection = vecattention.Selection(made.words, made.q_len, made.k_len, made.block, False, order)
    out = vecattention.attend(query, key, value, selection)
    assert error_of(out, query, key, value, selection, False).passes
    assert not error_of(out, query, key, value, made, False).passes


@pytest.mark.parametrize("case", [CAUSAL, FULL, OBLONG], ids=lambda case: case.name)
def test_random_blocks_are_what_flex_attention_computes(case: Case) -> None:
    found = peers.flex(source(case), 0.4, compiled=False)
    assert found["error_ok"] and found["error"] < 1e-5


def test_a_shape_that_a_method_does_not_take_ends_no_run(tmp_path: Path) -> None:
    step = ({"study": "method"}, lambda: peers.method(source(OBLONG), "svg", 0.9))
    (found,) = record.run(tmp_path / "r.jsonl", [step])
    assert found["failed"].startswith("ValueError: query has Sq=512 rows")


def test_a_dense_kernel_that_was_not_measured_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed here")
    rows = record.run(
        tmp_path / "r.jsonl", [({"study": "dense", "case": FULL.name}, lambda: studies.dense(source(FULL)))]
    )
    assert all(row["missing"]["flash-attn-4"].startswith("ModuleNotFoundError: No module named") for row in rows)
    assert cli.main(["report", str(tmp_path / "r.jsonl")]) == 0
    assert f"Dense kernel not measured: flash-attn-4 on {FULL.name} (ModuleNotFoundError" in capsys.readouterr().out


def test_crossovers_are_read_off_the_records() -> None:
    def rows(k_len: int, dense: float, **calls: float) -> list[record.Record]:
        base = {"case": f"causal-{k_len}", "key": {"use": "crossover"}, "block": 64}
        made: list[record.Record] = [
            {"study": "dense", "ms": ms, **base} for ms in ((dense, 2 * dense) if dense else ())
        ]
        for name, ms in calls.items():
            density = float(name[1:]) / 100
            made.append({"study": "call", "asked": density, "density": density, "ms": ms, **base})
        return made

    found = [
        *rows(1024, 1.0, d10=0.9, d50=3.0), *rows(2048, 2.0, d10=2.1, d50=3.0), *rows(4096, 4.0, d10=4.05, d50=5.0),
        *rows(8192, 0.0, d10=1.0),
    ]  # fmt: skip
    # Not from 1024: at 2048 it lost; 4096 is within 2 %; 8192 had no dense kernel.
    expected = (
        profile.Crossover(True, 64, 0.1, 4096, 3584),
        profile.Crossover(True, 64, 0.5, None, 3584),
    )
    assert tune.crossovers(found) == expected
    missed = [r | {"density": 0.3} if r.get("asked") == 0.1 else r for r in found]
    assert tune.crossovers(missed) == expected[1:], "a call that missed its density tells nothing"
    held_up = [*rows(4096, 4.0, d10=3.0, d50=3.0), *rows(8192, 8.0, d10=9.0, d50=7.0)]
    assert [c.k_len for c in tune.crossovers(held_up)] == [4096, 4096], "what is fast denser is fast"
    held_up = [r | {"density": 0.3} if (r.get("asked"), r["case"]) == (0.1, "causal-4096") else r for r in held_up]
    assert [c.k_len for c in tune.crossovers(held_up)] == [8192, 4096], "of lengths that were measured"


def test_crossover_steps_run(tmp_path: Path) -> None:
    small = {True: CAUSAL, False: FULL}
    steps = tune.crossover_steps(lambda case: source(small[case.causal]), {}, lengths=(1,), densities=(0.5,))
    found = list(record.run(tmp_path / "r.jsonl", steps))
    assert [r["study"] for r in found if "failed" not in r].count("call") == 4
    again = tune.crossover_steps(lambda case: source(small[case.causal]), {"k": {"step": 64}}, (1,), (0.5,))
    assert len(record.remaining(tmp_path / "r.jsonl", again)) == 4, "other launch shapes are measured anew"


def test_launch_shapes_that_gain_are_kept() -> None:
    def row(kernel: str, case: str, ratio: float, **fields: int) -> record.Record:
        machine = {"gpu": "Other" if case == "z" else "Mine"}
        return {"study": "tune", "kernel": kernel, "case": case, "fields": fields, "ratio": ratio, "machine": machine}

    found = [
        row("a", "x", 1.0), row("a", "y", 1.01), row("a", "x", 0.5, step=32), row("a", "y", 1.25, step=32),
        row("a", "x", 0.2, step=64), {**row("a", "y", 0.1, step=64), "failed": "no"},
        row("a", "x", 0.1, step=16), row("a", "x", 0.1, step=16),
        {k: v for k, v in row("a", "x", 0.1).items() if k != "ratio"},
        row("b", "x", 1.0), row("b", "x", 0.985, step=32), row("c", "z", 1.0), row("c", "z", 0.1, step=32),
    ]  # fmt: skip
    made = tune.profile_of("Mine", found, "here")
    assert made.shapes == {"a": {"step": 32}}, "the mean over cases counts, a gain of 2 percent or more, and this GPU"


def test_two_calls_are_compared_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that takes ever longer."""
    now = [0.0]

    def taking(seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds * (1 + now[0])

        return call

    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    time, ratio = timer.compare(taking(0.004), taking(0.001), 300.0, "cpu")
    assert 3.9 < ratio < 4.1 and 4 < time.low < time.median < time.high < 8
    _, same = timer.compare(taking(0.004), taking(0.004), 300.0, "cpu")
    assert 0.97 < same < 1.03 and now[0] > 0.5


def test_what_fails_is_recorded_and_tried_again(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    kernel = tune.Kernel("triton.attend_r64_d32_single", 64, ())
    step = ({"study": "tune", "fields": {"step": 48}}, lambda: tune.trial(source(CAUSAL), kernel, {"step": 48}))
    (found,) = record.run(tmp_path / "r.jsonl", [step])
    assert found["failed"] == "ValueError: step is 48, wanted a power of 2 from 16 to 256; correct the launch shape"
    assert not report.wrong(found), "a launch shape may not be to be had"
    assert len(list(record.run(tmp_path / "r.jsonl", [step]))) == 1 and len(record.read(tmp_path / "r.jsonl")) == 2


def test_a_broken_gpu_ends_a_run_and_leaves_no_record(tmp_path: Path) -> None:
    def broken() -> record.Record:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        list(record.run(tmp_path / "r.jsonl", [({"study": "tune"}, broken)]))
    assert record.read(tmp_path / "r.jsonl") == []


def test_wrong_and_missing_results_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str], cases: None) -> None:
    key = {"study": "tune", "fields": {}}
    assert report.wrong({"key": key, "failed": "OutOfResources"}), "the default shape has to run"
    assert report.wrong({"key": {"study": "tune", "fields": {"step": 64}}, "failed": report.WRONG})
    assert not report.wrong({"key": {"study": "peer"}, "failed": "ModuleNotFoundError"})
    assert report.wrong({"key": {"study": "call"}, "error_ok": False})
    asked = ["bench", "selection", "--device", "cpu", "--case", "tiny-full", "--backend", "hopper"]
    assert cli.main([*asked, "--out", str(tmp_path / "b.jsonl")]) == 1
    assert "which cannot run this" in capsys.readouterr().out


def test_records_of_two_machines_are_not_reported_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    base = {"study": "dense", "case": "x", "kernel": "flash", "ms": 1.0}
    rows = [{**base, "key": {"study": "dense"}, "machine": {"gpu": gpu}} for gpu in ("A", "B")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["report", str(path)]) == 2
    assert "holds those of A, B, wanted one; pass a file for each" in capsys.readouterr().err


def test_tuning_in_the_interpreter(tmp_path: Path) -> None:
    """Trials, profile and its use, through the command line, with Triton's interpreter in a process of its own."""
    pytest.importorskip("triton", reason="Triton is not installed")
    script = tmp_path / "small.py"  # a file, so that the processes that compile ahead can start from it
    script.write_text(
        "import sys, torch; from vecattention import cli; from vecattention.bench import tune, cases\n"
        "cases.CASES['t'] = cases.Case('t', 1, 1, 128, 128, True, head_dim=32)\n"
        "tune.TRITON_ATTEND = ({'step': 16},)\n"
        "tune.TRITON_SELECT = ({'segment': 64},)\n"
        "tune.crossover_steps.__defaults__ = ((), ())\n"
        "if __name__ == '__main__': sys.exit(cli.main(sys.argv[1:]))\n"
    )
    out, path = tmp_path / "t.jsonl", tmp_path / "p.json"
    asked = ["bench", "tune", "--device", "cpu", "--case", "t", "--processes", "2", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(script), *asked, "--profile", str(path)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = record.read(out)
    assert [(r["kernel"], r["fields"]) for r in found] == [
        *((f"triton.attend_r{block}_d32_single", fields) for block in (64, 128) for fields in ({}, {"step": 16})),
        *(("triton.select_d32_single", fields) for fields in ({}, {"segment": 64})),
    ]
    assert not [r["failed"] for r in found if "failed" in r]
    assert "compiled 6 of 6" in done.stdout and "[6/6] tune" in done.stdout
    assert "faster than dense at half density, causal, q_block_size=64: not known" in done.stdout
    made = profile.read(path)
    assert made.gpu == "CPU" and set(made.shapes) <= {r["kernel"] for r in found}
    assert json.loads(path.read_text())["schema"] == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["call", "--density", "-1"], "--density is -1.0, wanted a share of all pairs in (0, 1]; correct it"),
        (["attention", "--density", "0.1", "--density", "nan"], "--density is nan, wanted a share"),
        (["tune", "--density", "0.1"], "--density is 0.1, wanted none for tune, which does not heed it; leave it out"),
        (["tune", "--backend", "triton"], "--backend is triton, wanted none for tune"),
        (["tune", "--lists", "random"], "--lists is random, wanted none for tune"),
        (["layer", "--case", "square-8k"], "--case is square-8k, wanted none for layer"),
        (["call", "--lists", "random"], "--lists is random, wanted none for call"),
        (["call", "--backend", "cpu"], "--backend is cpu, wanted none for call"),
        (["selection", "--density", "0.2"], "it is for attention, call, layer, all"),
        (["dense", "--recall", "0.9"], "--recall is 0.9, wanted none for dense"),
        (["call", "--tokens", "512"], "--tokens is 512, wanted none for call"),
        (["layer", "--processes", "2"], "--processes is 2, wanted none for layer"),
    ],
)
def test_options_that_are_not_heeded_are_refused(
    asked: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *asked, "--device", "cpu", "--out", str(tmp_path / "o.jsonl")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()


def test_every_option_of_bench_is_for_some_studies_or_for_all() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    options = {action.dest for action in parser._actions} - {"help", "study", "device", "out", "again"}
    assert options == set(bench.OPTIONS) and all(set(found) <= set(bench.STUDIES) for found in bench.OPTIONS.values())


def test_the_time_left_is_told(
    cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0, 100)
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(studies, "selection", lambda *given: {"ms": 1.0, "ms_q1": 1.0, "ms_q3": 1.0})
    asked = ["bench", "selection", "--device", "cpu", "--case", "tiny-full", "--out", str(tmp_path / "b.jsonl")]
    assert cli.main(asked) == 0
    heads = [line.partition("]")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert heads == ["[1/4, 5 min left", "[2/4, 3 min left", "[3/4, 2 min left", "[4/4"]
    assert cli.main(asked) == 0
    assert " left]" not in capsys.readouterr().out, "nothing was measured"


def test_bad_recall_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "breakdown", "--device", "cpu", "--recall", "1.5"]) == 2
    assert "--recall is 1.5, wanted a share of the softmax mass in (0, 1]" in capsys.readouterr().err


def test_useful_work_is_that_of_the_kept_pairs() -> None:
    selection = lists(FULL, 0.25, device="cpu")
    assert studies.useful_flop(FULL, selection) == 4 * 32 * int(selection.mask().sum())
    assert figures.methods([]) == []
