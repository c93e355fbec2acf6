"""Profiles of GPUs: what a file may hold, which one is taken, what a damaged or foreign one leads to."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vecattention import dispatch, profile
from vecattention.integrations.dit.settings import dit_settings_of
from vecattention.integrations.settings import _tell, settings_of
from vecattention.ops import rule_of
from vecattention.profile import Crossover, Profile, ProfileError
from vecattention.spec import Problem


@dataclasses.dataclass(frozen=True)
class Shape:
    step: int = 64
    stages: int = 3

    def __post_init__(self) -> None:
        if self.step not in (64, 128):
            raise ValueError(f"step is {self.step}, wanted 64 or 128")


def write(path: Path, **held: Any) -> Path:
    path.write_text(json.dumps({"schema": 1, "gpu": "Some GPU"} | held))
    return path


def with_crossover(**other: Any) -> str:
    entry = {"causal": True, "q_block_size": 64, "density": 0.5, "k_len": 5} | other
    return json.dumps({"schema": 1, "gpu": "g", "crossovers": [entry]})


def with_kernel(name: str) -> str:
    return json.dumps({"schema": 1, "gpu": "g", "shapes": {name: {"stages": 3}}})


@pytest.fixture(autouse=True)
def forgetful() -> None:
    profile.for_gpu.cache_clear()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = Profile(
        "Some GPU",
        {"hopper.attend": {"step": 128}},
        (Crossover(True, 64, 0.5, 4096), Crossover(False, 64, 0.1, None)),
        "me",
    )
    path = tmp_path / "p.json"
    path.write_text(json.dumps(profile.as_json(made)))
    assert profile.read(path) == dataclasses.replace(made, path=path)
    assert made.shape("hopper.attend", Shape()) == Shape(128, 3)
    assert made.shape("hopper.select", Shape()) == Shape()


def test_crossovers_are_of_the_next_higher_density_and_their_own_kind() -> None:
    known = Profile(
        "g",
        crossovers=(
            Crossover(True, 64, 0.5, 8192), Crossover(True, 64, 0.1, 2048), Crossover(True, 128, 0.5, 3000),
            Crossover(False, 64, 0.5, None),
        ),
    )  # fmt: skip
    assert known.pays_from(True, 64, 0.05) == 2048
    assert known.pays_from(True, 64, 0.1) == 2048
    assert known.pays_from(True, 64, 0.2) == 8192
    assert known.pays_from(True, 64, 0.6) == 0, "not known"
    assert known.pays_from(True, 128) == 3000
    assert known.pays_from(False, 64) == profile.NEVER, "dense was faster everywhere"
    assert known.pays_from(False, 128) == 0


def test_narrow_calls_pay_from_more_keys_on() -> None:
    """Four heads of 64 do a fourteenth of the work of 28 heads of 128, and so do so at a root of that times as many."""
    known = Profile("g", crossovers=(Crossover(True, 128, 0.5, 8192, 3584), Crossover(True, 64, 0.5, None, 3584)))
    assert known.pays_from(True, 128) == known.pays_from(True, 128, width=3584) == 8192
    assert known.pays_from(True, 128, width=5120) == 8192, "never fewer than were measured"
    narrow = known.pays_from(True, 128, width=256)
    assert 256 * (narrow - 1) ** 2 < 3584 * 8192**2 <= 256 * narrow**2
    assert known.pays_from(True, 64, width=256) == profile.NEVER


def test_apply_leaves_narrow_models_dense_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """28 heads of 128 gain from 16,384 keys on, causal, 40 not causal from 8,192; fewer and smaller ones from more.

    On an H200; the default are lists of 64 rows causal, of 128 not.
    """
    gpu(monkeypatch, "NVIDIA H200")
    where = torch.device("cuda")
    for heads, dim, causal, full in ((28, 128, 16384, 9792), (40, 128, 16384, 8192), (4, 64, 61304, 36636)):
        text = settings_of(layers=1, heads=heads, device=where, head_dim=dim)
        video = dit_settings_of(layers=1, heads=heads, device=where, head_dim=dim)
        assert (text.min_length, video.base.min_length) == (causal, full)
        wide = settings_of(layers=1, heads=heads, device=where, head_dim=dim, q_block_size=128)
        assert wide.min_length == causal // 2, "lists of 128 rows"
    assert settings_of(layers=1, heads=4, device=where, head_dim=64, min_length=500).min_length == 500


def test_shipped_crossovers_say_for_which_width_they_are() -> None:
    held = [c for path in profile.SHIPPED.glob("*.json") for c in profile.read(path).crossovers]
    assert held and all(c.width == (28 * 128 if c.causal else 40 * 128) for c in held)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("{", "it cannot be read"),
        ("[]", "its schema is None, wanted 1"),
        ('{"schema": 2, "gpu": "g"}', "its schema is 2, wanted 1"),
        ('{"schema": 1}', "gpu is None, wanted the name of one"),
        ('{"schema": 1, "gpu": "g", "shapes": {"a": {"step": "64"}}}', "wanted integers by field by kernel"),
        ('{"schema": 1, "gpu": "g", "shapes": {"a": 3}}', "wanted integers by field by kernel"),
        (
            '{"schema": 1, "gpu": "g", "shape": {}}',
            "it has 'shape', wanted schema, gpu, source, shapes, crossovers alone",
        ),
        (with_kernel("hopper.atend"), "shapes has 'hopper.atend', wanted hopper.attend, hopper.attend_causal"),
        (with_kernel("triton.select"), "shapes has 'triton.select', wanted"),
        (
            with_kernel("triton.attend_r64_d65_half"),
            "or, with _half or _single, triton.attend_rR_dD and triton.select_dD for lists of R rows",
        ),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"schema": 1, "gpu": "g", "shapes": ' + "[" * 900 + "]" * 900 + "}", "wanted integers by field by kernel"),
        ('{"schema": 1, "gpu": "g", "crossovers": ' + "[" * 900 + "]" * 900 + "}", "wanted a list of"),
        ('{"schema": 1, "gpu": "g", "source": 5}', "source is 5, wanted a text"),
        ('{"schema": 1, "gpu": "g", "crossovers": 7}', "wanted a list of"),
        ('{"schema": 1, "gpu": "g", "crossovers": [{"causal": true}]}', "wanted a list of"),
        (with_crossover(density=2), "a value is out of range"),
        (with_crossover(k_len=-5), "a value is out of range"),
        (with_crossover(causal=1), "a value is out of range"),
        (with_crossover(q_block_size=0), "a q_block_size is out of range"),
        (with_crossover(width=-1), "a width is out of range"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, held: str, said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(held)
    with pytest.raises(ProfileError, match=r"p\.json.*bench tune") as caught:
        profile.for_gpu("g", str(path))
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="none.json' cannot be used: it cannot be read"):
        profile.for_gpu("g", str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"step": 100}, "shapes['hopper.attend'] does not fit: step is 100, wanted 64 or 128"),
        ({"stage": 3, "step": 64}, "shapes['hopper.attend'] has 'stage', wanted some of step, stages"),
    ],
)
def test_shapes_that_do_not_fit_are_named(tmp_path: Path, fields: dict[str, int], said: str) -> None:
    found = profile.read(write(tmp_path / "p.json", shapes={"hopper.attend": fields}))
    with pytest.raises(ProfileError, match=r"p\.json.*bench tune") as caught:
        found.shape("hopper.attend", Shape())
    assert said in str(caught.value)


def test_the_kernels_of_a_profile_are_those_that_ask_one() -> None:
    pytest.importorskip("triton.experimental.gluon", reason="Triton is not installed")
    from vecattention import spec
    from vecattention.backends.hopper import launch as hopper
    from vecattention.backends.triton import launch as triton

    both = (False, True)
    asked = {f"hopper.{hopper.attend_kind(pair, causal)}" for pair in both for causal in both}
    asked |= {f"hopper.{hopper.select_kind(causal)}" for causal in both}
    asked |= {
        f"triton.{triton.attend_kind(rows, head_dim, dtype)}"
        for rows in range(16, 129, 16)  # what q_block_size can be
        for head_dim in spec.HEAD_DIMS
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    }
    asked |= {
        f"triton.{triton.select_kind(head_dim, dtype)}"
        for head_dim in spec.HEAD_DIMS
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    }
    assert asked == profile.KERNELS
    names = re.compile(r'shape\(\s*f?"(\w+)\.')
    read = [names.findall(inspect.getsource(launch)) for launch in (hopper, triton)]
    assert read == [["hopper", "hopper"], ["triton", "triton"]], "nothing else asks"


@pytest.mark.parametrize(
    ("backend", "kind", "fields", "said"),
    [
        ("hopper", "AttendShape", {"stages": 99}, "stages is 99, wanted 2 to 8; correct"),
        ("hopper", "AttendShape", {"step": 96}, "step is 96, wanted 64 or 128; correct"),
        ("hopper", "SelectShape", {"span": 100}, "span is 100, wanted a multiple of 128 from 0 to 16777088; correct"),
        ("triton", "AttendShape", {"step": 65536}, "step is 65536, wanted a power of 2 from 16 to 256; correct"),
        ("triton", "AttendShape", {"words": 1048576}, "words is 1048576, wanted a power of 2 from 1 to 256; correct"),
        ("triton", "AttendShape", {"warps": 3}, "warps is 3, wanted a power of 2 from 1 to 16; correct"),
        ("triton", "AttendShape", {"stages": 9}, "stages is 9, wanted 1 to 8; correct"),
        ("triton", "SelectShape", {"segment": 32}, "segment is 32, wanted a power of 2 from 64 to 65536; correct"),
    ],
)  # fmt: skip
def test_launch_shapes_out_of_range_are_named(backend: str, kind: str, fields: dict[str, int], said: str) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="Triton is not installed")
    launch = importlib.import_module(f"vecattention.backends.{backend}.launch")
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        getattr(launch, kind)(**fields)


def test_a_profile_of_another_gpu_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "p.json", shapes={"hopper.attend": {"step": 128}})
    with caplog.at_level(logging.WARNING, "vecattention"):
        for _ in range(2):
            assert profile.for_gpu("Other GPU", str(path)) == profile.EMPTY
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, "each thing once"
    assert "a profile of Some GPU; it is not used for Other GPU" in said[0]
    assert "no profile of Other GPU; the default launch shapes are used" in said[1]
    assert profile.for_gpu("Some GPU", str(path)).shapes


def test_shipped_profiles_fit_the_kernels() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    shipped = sorted(profile.SHIPPED.glob("*.json"))
    assert shipped
    for path in shipped:
        found = profile.read(path)
        assert path.stem == profile.slug(found.gpu) and found.source
        for kernel in found.shapes:
            backend, _, kind = kernel.partition(".")
            launch = importlib.import_module(f"vecattention.backends.{backend}.launch")
            default = launch.SelectShape() if kind.startswith("select") else launch.AttendShape()
            found.shape(kernel, default)


def test_the_selection_takes_a_profile_s_shape_where_it_holds_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from vecattention.backends.triton import launch

    query = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
    known = profile.Profile("g", {"triton.select_d128_half": {"rows": 128, "segment": 4096, "warps": 8}})
    monkeypatch.setattr(profile, "of", lambda device: known)

    def shape(query: torch.Tensor, **rule: int) -> launch.SelectShape:
        return launch._select_shape(rule_of(128, **rule), query)

    tuned = launch.SelectShape(rows=128, segment=4096, warps=8)
    assert shape(query) == shape(query, q_pooling_size=16, q_block_size=128) == shape(query, k_local_size=64) == tuned
    assert shape(query, q_pooling_size=128, k_local_size=128) == launch.SelectShape(step=128, stages=2), (
        "a tile that it does not hold"
    )
    assert shape(query.float()) == launch.SelectShape(warps=8, stages=1), "of another precision"


def test_a_cpu_has_no_profile() -> None:
    assert profile.of(torch.device("cpu")) == profile.EMPTY


def gpu(monkeypatch: pytest.MonkeyPatch, name: str = "Some GPU") -> None:
    """As on a machine with this GPU: the questions that a profile asks of torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(profile, "_name", lambda index: name)


KNOWN = [
    {"causal": True, "q_block_size": 64, "density": 0.5, "k_len": 5000},
    {"causal": True, "q_block_size": 64, "density": 0.1, "k_len": 2048},
    {"causal": True, "q_block_size": 128, "density": 0.5, "k_len": None},
    {"causal": False, "q_block_size": 128, "density": 0.5, "k_len": 9000},
]


def test_models_stay_dense_below_the_crossover_of_a_shipped_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vecattention.integrations.dit.settings import dit_settings_of

    gpu(monkeypatch)
    monkeypatch.setattr(profile, "SHIPPED", tmp_path)
    write(tmp_path / "some-gpu.json", crossovers=KNOWN)
    device, cpu = torch.device("cuda"), torch.device("cpu")
    assert settings_of(layers=1, heads=2, device=device).min_length == 5000
    assert settings_of(layers=1, heads=2, device=device, q_block_size=128).min_length == profile.NEVER
    assert settings_of(layers=1, heads=2, device=cpu).min_length == 129
    assert settings_of(layers=1, heads=2, device=device, min_length=7).min_length == 7
    assert dit_settings_of(layers=1, heads=2, device=device).base.min_length == 9000
    assert dit_settings_of(layers=1, heads=2, device=cpu).base.min_length == 0
    assert dit_settings_of(layers=1, heads=2, device=device, min_length=0).base.min_length == 0


def test_the_environment_decides_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A profile that it names gives launch shapes; which calls stay dense, it does not."""
    gpu(monkeypatch)
    path = write(tmp_path / "p.json", crossovers=KNOWN, shapes={"hopper.attend": {"step": 128}})
    monkeypatch.setenv(profile.VARIABLE, str(path))
    assert profile.of(torch.device("cuda")).shape("hopper.attend", Shape()) == Shape(128)
    _tell.cache_clear()
    for _ in range(2):
        assert settings_of(layers=1, heads=2, device=torch.device("cuda")).min_length == 129
    assert [m for m in caplog.messages if "min_length" in m] == [
        "vecattention: by the profile that VECATTENTION_PROFILE names such calls are faster than dense ones from 5000 "
        "keys on; pass min_length=5000 to leave others dense"
    ]


def test_explain_tells_the_crossover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    monkeypatch.setenv(profile.VARIABLE, str(write(tmp_path / "p.json", crossovers=KNOWN)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("vecattention.machine.multiprocessors", lambda device: 132)

    def said(**rule: Any) -> str:
        asked = rule_of(128, **rule)
        problem = Problem(1, 2, 2, 4096, 4096, 128, torch.bfloat16, torch.device("cuda"), asked)
        return str(dispatch.explain(problem, "auto", 0))

    assert "with 4096 keys a dense kernel is slower at 10 % density (crossover 2048), faster at 50 %" in said()
    assert "faster at 50 % density (crossover beyond what was measured)" in said(q_block_size=128)
    assert "not known for this GPU; vecattention bench tune measures it" in said(causal=False, q_block_size=64)
    narrow = [entry | {"width": 16 * 256} for entry in KNOWN]  # 2 heads of 128 need 4 times as many keys
    monkeypatch.setenv(profile.VARIABLE, str(write(tmp_path / "narrow.json", crossovers=narrow)))
    assert "with 4096 keys a dense kernel is faster at 10 % density (crossover estimated at 8192), faster at" in said()
    assert "hint       lists for 128 rows" in said() and "hint" not in said(q_block_size=128)


def test_shapes_that_want_too_much_shared_memory_are_named() -> None:
    pytest.importorskip("triton.experimental.gluon", reason="Triton is not installed")
    from vecattention.backends.hopper import launch

    launch.fitting(launch.AttendShape(), 128)
    launch.fitting(launch.SelectShape(), 128)
    for shape in (launch.AttendShape(stages=4), launch.SelectShape(stages=8)):
        with pytest.raises(ValueError, match=r"wants \d+ bytes of shared memory at head_dim 128.*VECATTENTION_PROFILE"):
            launch.fitting(shape, 128)
        launch.fitting(shape, 64)
