"""The Triton kernels as they are launched, compiled for GPUs that are not here: no spills, matrix units, async copies.

What a compute capability calls its matrix instruction: HMMA on 8.0, HGMMA on 9.0, UTCHMMA on 10.0; 9.0 and 10.0 use
theirs for tiles of 64 rows and more. LDGSTS copies from global to shared memory behind the computation.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vecattention import spec
from vecattention.ops import rule_of

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the kernels are interpreted in this process, not compiled", allow_module_level=True)

from assembly import TOOLS, compiled  # noqa: E402

from vecattention.backends.triton import launch  # noqa: E402

MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes that one program may have
LENGTH = 2048
HALF, BRAIN, WHOLE = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (TOOLS / "cuobjdump").is_file():
        pytest.skip("this Triton brings no cuobjdump to read machine code with")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("capability", "dim", "dtype", "block", "causal"),
    [
        (80, 128, BRAIN, 64, True),
        (80, 128, BRAIN, 128, True),
        (80, 128, BRAIN, 64, False),
        (80, 64, HALF, 64, True),
        (89, 128, BRAIN, 64, True),
        (89, 128, BRAIN, 128, False),
        (89, 64, HALF, 64, True),
        (90, 128, BRAIN, 64, True),
        (90, 128, BRAIN, 128, True),
        (90, 64, HALF, 64, True),
        (100, 128, BRAIN, 64, True),
        (100, 128, BRAIN, 128, True),
        (100, 64, HALF, 64, True),
        (80, 128, BRAIN, 96, True),
        (90, 64, HALF, 48, False),
        (90, 128, BRAIN, 112, True),
    ],
)
def test_attention(capability: int, dim: int, dtype: torch.dtype, block: int, causal: bool) -> None:
    (kernel,) = compiled(launch, capability, lambda: attend(dim, dtype, block, causal))
    assert kernel.name == "attend_kernel"
    assert kernel.instructions[MATRIX[capability]] >= 16
    assert kernel.instructions["LDGSTS"] >= 8
    assert kernel.shared <= SHARED[capability]
    assert not kernel.spills, kernel.spills


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize(
    ("dim", "dtype", "rule"),
    [
        (128, BRAIN, {"max_scope": "row"}),
        (64, HALF, {"q_pooling_size": 32, "q_block_size": 128}),
        (128, BRAIN, {"q_pooling_size": 128, "k_local_size": 128, "causal": False}),
        (128, BRAIN, {"q_pooling_size": 32, "q_block_size": 96}),
        (64, HALF, {"q_pooling_size": 16, "q_block_size": 80}),
    ],
    ids=["row", "P32 R128", "P128 B128", "P32 R96", "P16 R80"],
)
def test_selection(capability: int, dim: int, dtype: torch.dtype, rule: dict[str, Any]) -> None:
    pool, *passes = compiled(launch, capability, lambda: select(dim, dtype, rule))
    assert pool.name == "pool_kernel" and not pool.spills
    assert [kernel.name for kernel in passes] == ["select_kernel"] * (2 if "max_scope" in rule else 1)
    for kernel in passes:
        assert kernel.instructions[MATRIX[capability]] >= 8
        assert kernel.instructions["LDGSTS"] >= 8
        assert kernel.shared <= SHARED[capability]
        assert not kernel.spills, kernel.spills


@pytest.mark.xfail(reason="float32 attention spills: 409 loads and 280 stores at head_dim 64", strict=True)
def test_attention_in_float32() -> None:
    """IEEE products, so no matrix unit: 9.0 stands for all."""
    (kernel,) = compiled(launch, 90, lambda: attend(64, WHOLE, 64, True))
    assert kernel.instructions["FFMA"] >= 256 and not kernel.instructions["HGMMA"]
    assert not kernel.spills, kernel.spills


def test_selection_in_float32() -> None:
    for kernel in compiled(launch, 90, lambda: select(64, WHOLE, {})):
        assert not kernel.spills, kernel.spills


def test_what_reads_the_code_can_tell_spills() -> None:
    """A kernel that is given too few registers."""
    _, wide = compiled(launch, 80, lambda: select(64, HALF, {}))
    _, narrow = compiled(launch, 80, lambda: select(64, HALF, {}), maxnreg=32)
    assert not wide.spills
    assert narrow.usage["REG"] <= 32 and "STL" in narrow.spills and "LDL" in narrow.spills


def attend(dim: int, dtype: torch.dtype, block: int, causal: bool) -> None:
    """What `vecattention.attend` launches for 4 heads of 2,048 queries and keys."""
    query, key = torch.zeros(1, 4, LENGTH, dim, dtype=dtype), torch.zeros(1, 2, LENGTH, dim, dtype=dtype)
    words = torch.zeros(1, 4, -(-LENGTH // block), LENGTH // 32, dtype=torch.int32)
    selection = spec.Selection(words, LENGTH, LENGTH, block, causal)
    launch.attend(query, key, key, selection, 1.0, torch.empty_like(query), torch.empty(1, 4, LENGTH))


def select(dim: int, dtype: torch.dtype, rule: dict[str, Any]) -> None:
    """What `vecattention.select` launches for them."""
    query, key = torch.zeros(1, 4, LENGTH, dim, dtype=dtype), torch.zeros(1, 2, LENGTH, dim, dtype=dtype)
    launch.select(query, key, torch.zeros(1, 4), rule_of(dim, **rule))
