"""Errors against float64 on sampled rows, selections beside the reference: measured before anything is timed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention import bits
from vecattention.backends import reference
from vecattention.spec import Rule, Selection

ALLOWED = 2.0  # times the error of torch's own attention in the same dtype
FLOOR = 1e-3
STRAY = 2e-5  # of the keys that the reference keeps, those that may differ: their scores meet the cut-off in rounding


@dataclass(frozen=True)
class Error:
    """Relative L2 errors against float64 over the same rows: ours, and of torch's attention in the same dtype."""

    ours: float
    torch: float

    @property
    def passes(self) -> bool:
        """Whether ours is at most twice torch's (and never judged by less than 1e-3)."""
        return self.ours <= max(ALLOWED * self.torch, FLOOR)

    def record(self) -> dict[str, float | bool]:
        """JSON-ready values."""
        return {"error": self.ours, "error_torch": self.torch, "error_ok": self.passes}


def error_of(out: Tensor, query: Tensor, key: Tensor, value: Tensor, selection: Selection | None, causal: bool,
             rows: int = 48, seed: int = 0) -> Error:  # fmt: skip
    """The error of an attention's output on random rows of random heads; selection None: dense attention."""
    generator = torch.Generator().manual_seed(seed)
    heads, q_len, k_len = query.shape[1], query.shape[2], key.shape[2]
    group = heads // key.shape[1]
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    exact: list[Tensor] = []
    for _ in range(rows):
        head, row = (int(torch.randint(n, (), generator=generator)) for n in (heads, q_len))
        kept = torch.ones(k_len, dtype=torch.bool, device=query.device)
        if selection is not None:
            block = int(blocks_of(selection, head, torch.tensor([row], device=query.device)))
            kept = bits.unpack(selection.words[0, head, block], k_len).clone()
        if causal:
            kept[row + k_len - q_len + 1 :] = False
        q = query[0, head, row : row + 1]
        k, v = key[0, head // group][kept], value[0, head // group][kept]
        if not len(k):
            ours.append(out[0, head, row].double())
            exact.append(torch.zeros_like(ours[-1]))
            theirs.append(exact[-1])
            continue
        exact.append(torch.softmax(q.double() @ k.double().mT * q.shape[-1] ** -0.5, -1)[0] @ v.double())
        theirs.append(F.scaled_dot_product_attention(q[None], k[None], v[None])[0, 0].double())
        ours.append(out[0, head, row].double())
    truth = torch.stack(exact)
    scale = truth.norm().clamp(min=1e-30)
    return Error(*(float((torch.stack(x) - truth).norm() / scale) for x in (ours, theirs)))


@dataclass(frozen=True)
class Agreement:
    """Of the lists that were compared: keys that the reference keeps, and keys that are in one of the two alone."""

    kept: int
    differ: int

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.kept + other.kept, self.differ + other.differ)

    @property
    def passes(self) -> bool:
        """Whether no more keys differ than rounding of their scores explains."""
        return self.differ <= STRAY * self.kept + 1

    def record(self) -> dict[str, int | bool]:
        """JSON-ready values."""
        return {"kept_compared": self.kept, "differ": self.differ, "right": self.passes}


def agreement_of(words: Tensor, query: Tensor, key: Tensor, alpha: Tensor, rule: Rule, rounded: bool,
                 heads: Iterable[int], blocks: int = 0) -> Agreement:  # fmt: skip
    """How a selection agrees with the reference, on some heads of the first batch element and some of their blocks.

    Args:
        words: int32 [B, H, blocks, ceil(Sk / 32)], of query [B, H, Sq, D], key [B, Hkv, Sk, D] and alpha [B, H].
        rounded: whether the means of the queries were rounded to their dtype, as Hopper's selection does.
        heads: query heads that are compared.
        blocks: that many at the start of each head, in its middle and at its end; 0: all.
    """
    found = Agreement(0, 0)
    q_len, k_len, size = query.shape[2], key.shape[2], rule.q_block_size
    for head in heads:
        own = key[:1, head // (query.shape[1] // key.shape[1])][:, None]
        for run in _runs(words.shape[2], blocks):
            # Queries with the keys up to their last position are a problem of the same kind: the lists are the same.
            end = min(run.stop * size, q_len)
            rows = query[:1, head : head + 1, run.start * size : end]
            keys = own[:, :, : end + k_len - q_len] if rule.causal else own
            rows = _rounded_means(rows, rule.q_pooling_size) if rounded else rows
            law = reference.select(rows, keys, alpha[:1, head : head + 1], rule)
            law = F.pad(law, (0, words.shape[3] - law.shape[3]))
            differ = bits.popcount(words[:1, head : head + 1, run] ^ law).sum()
            found += Agreement(int(bits.popcount(law).sum()), int(differ))
    return found


def _runs(count: int, blocks: int) -> Iterator[slice]:
    """The first, middle and last so many of ``count`` blocks, none twice; 0, or too few to leave some out: all."""
    if not blocks or count <= 3 * blocks:
        yield slice(0, count)
        return
    for first in (0, (count - blocks) // 2, count - blocks):
        yield slice(first, first + blocks)


def _rounded_means(query: Tensor, pool: int) -> Tensor:
    """The queries, each replaced by its block's mean as Hopper's selection rounds it: to their dtype."""
    means = reference.pooled_queries(query, pool).to(query.dtype)
    return means.repeat_interleave(pool, dim=2)[:, :, : query.shape[2]]


def blocks_of(selection: Selection, head: int, rows: Tensor) -> Tensor:
    """int64 [n]: the blocks whose lists these query rows of a head of the first batch element share."""
    if selection.order is not None:
        order = selection.order[0, head]
        rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))[rows]
    return rows // selection.block
