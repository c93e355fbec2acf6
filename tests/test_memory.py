"""What is said where a device runs out of memory: what is free, what is needed, and what to do."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch

import vecattention
from vecattention import dispatch
from vecattention.backends import cpu
from vecattention.ops import rule_of
from vecattention.spec import Problem

FULL = "CUDA out of memory. Tried to allocate 2 GiB.\nMore lines."


def full(*_: object) -> None:
    raise torch.OutOfMemoryError(FULL)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("vecattention.machine.free_memory", lambda device: size)


def test_a_chunk_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 512, 32)
    problem = Problem.of(query, query, rule_of(32))
    block = dispatch.workspace(problem, dispatch.Chunk(2, 64))
    monkeypatch.setattr(cpu, "select", full)
    free(monkeypatch, 2 * block)
    said = (
        r"^CUDA out of memory\. Tried to allocate 2 GiB\. In vec_attention \d+ MiB are free beside the output, "
        r"512 queries of 2 heads at once take about \d+; chunk_size=64 would fit"
    )
    with pytest.raises(torch.OutOfMemoryError, match=said):
        vecattention.vec_attention(query, query, query, chunk_size=512, backend="cpu")
    free(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="free memory, or pass fewer heads a call"):
        vecattention.vec_attention(query, query, query, chunk_size=512, backend="cpu")


def test_advice_is_for_where_a_smaller_chunk_helps() -> None:
    problem = Problem(1, 28, 4, 2**17, 2**17, 128, torch.bfloat16, torch.device("cuda"), rule_of(128))
    chunk, out = dispatch.chunk_for(problem, 0), 28 * 2**17 * (128 * 2 + 4)
    wanted = dispatch.workspace(problem, chunk) + dispatch.SCRATCH["cuda"]
    assert chunk.heads < 28 and chunk.rows == 2**17 and dispatch.output_size(problem) == out
    for has_output in (True, False):
        besides = 0 if has_output else out
        said = dispatch.out_of_memory(problem, chunk, besides + 4 * wanted // 5, has_output)
        fits = int(re.search(r"of \d+ heads at once take about \d+; chunk_size=(\d+) would", said)[1])  # type: ignore[index]
        taken = dispatch.workspace(problem, dispatch.Chunk(28, fits)) + dispatch.SCRATCH["cuda"]
        assert fits % 64 == 0 and taken <= 0.8 * (4 * wanted / 5)
        assert ("beside the output" in said) == has_output and (f"output takes {out / 2**20:.0f}" in said) != has_output
        for left in (0, besides + 2 * wanted):  # no room at all; room enough, so that it was not the chunk
            assert "free memory, or pass fewer heads" in dispatch.out_of_memory(problem, chunk, left, has_output)


def test_what_a_call_held_until_then_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the chunk that failed, too: else the advice is for what is left beside them."""
    held: list[Any] = []
    select = cpu.select

    class Words(torch.Tensor):
        def __del__(self) -> None:
            held.append("gone")

    monkeypatch.setattr(cpu, "select", lambda *given: select(*given).as_subclass(Words))
    monkeypatch.setattr(cpu, "attend", full)
    monkeypatch.setattr("vecattention.machine.free_memory", lambda device: held.append("asked") or 0)
    query = torch.randn(1, 2, 128, 32)
    with pytest.raises(torch.OutOfMemoryError, match="In vec_attention"):
        vecattention.vec_attention(query, query, query, backend="cpu")
    assert held.index("gone") < held.index("asked")


def test_what_attend_made_until_then_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 512, 32)
    ready = vecattention.select(query, query, threshold=0.5, backend="cpu")
    made: list[Any] = []
    gone: list[bool] = []

    def attend(*given: Any) -> None:
        made.append(weakref.ref(given[5]))
        full()

    monkeypatch.setattr(cpu, "attend", attend)
    monkeypatch.setattr("vecattention.machine.free_memory", lambda device: gone.append(made[0]() is None) or 2**20)
    size = dispatch.output_size(Problem.of(query, query, rule_of(32)))
    monkeypatch.setitem(dispatch.SCRATCH, "cpu", 7 * 2**20 - size)
    said = "In attend 1 MiB are free, the output and what the kernels need take about 7; free"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        vecattention.attend(query, query, query, ready, backend="cpu")
    assert gone == [True]


def test_select_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 512, 32)
    free(monkeypatch, 3 * 2**20)
    monkeypatch.setitem(dispatch.SCRATCH, "cpu", 5 * 2**20)
    monkeypatch.setattr(cpu, "select", full)
    said = "In select 3 MiB are free, the bits of 512 queries of 2 heads and their pooled queries take about 5; pass"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        vecattention.select(query, query, threshold=0.5, backend="cpu")
