"""Other sparse kernels beside ours: what they are given, and what is said where they are not installed."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from vecattention.bench import peers, record
from vecattention.bench.cases import Case, Source, lists

CAUSAL = Case("tiny-causal", 4, 2, 640, 640, True, head_dim=32)
FULL = Case("tiny-full", 2, 2, 768, 768, False, head_dim=32)


def source(case: Case) -> Source:
    return Source(case, "cpu", torch.float32)


def test_pages_hold_the_kept_keys() -> None:
    selection = lists(FULL, 0.2, device="cpu")
    table, counts = peers.pages(selection, FULL)
    for at, (row, count) in enumerate(zip(table.tolist(), counts.tolist(), strict=True)):
        head, block = divmod(at, selection.blocks)
        assert [x - head * FULL.k_len for x in row[:count]] == selection.columns(0, head, block).tolist()


@pytest.mark.parametrize(("module", "peer"), [("flash_attn", peers.paged), ("flashinfer", peers.vector_sparse)])
def test_a_peer_that_is_not_installed_is_recorded_as_such(tmp_path: Path, module: str, peer: Any) -> None:
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed here")
    step = ({"study": "peer"}, lambda: peer(source(FULL), 0.1, "random"))
    (found,) = record.run(tmp_path / "r.jsonl", [step])
    assert found["failed"].startswith(f"ModuleNotFoundError: No module named '{module}")


class Wrapper:
    """FlashInfer's `BlockSparseAttentionWrapper` as its documentation tells it, row by row."""

    def __init__(self, workspace: torch.Tensor) -> None:
        pass

    def plan(self, indptr: Any, indices: Any, m: int, n: int, r: int, c: int, *heads: int, **types: Any) -> None:
        assert len(indptr) == m // r + 1 and len(indices) == indptr[-1] and int(indices.max()) < n and c == 1
        assert indptr.dtype == indices.dtype == torch.int32 and heads == (1, 1, FULL.head_dim)
        self.parts = [(slice(i * r, i * r + r), indices[a:b]) for i, (a, b) in enumerate(itertools.pairwise(indptr))]

    def run(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        for rows, at in self.parts:
            q, k, v = (x.transpose(0, 1) for x in (query[rows], key[at], value[at]))
            out[rows] = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        return out


@pytest.mark.parametrize("block", [128, 64])
def test_each_head_and_block_is_a_row_of_blocks_of_one_key(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("flashinfer")
    stand_in.BlockSparseAttentionWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    found = peers.vector_sparse(source(FULL), 0.2, "random", block)
    assert found["error_ok"] and found["block"] == block and found["tflops"] > 0
    with pytest.raises(ValueError, match="wanted one that is not causal"):
        peers.vector_sparse(source(CAUSAL), 0.2, "random")
