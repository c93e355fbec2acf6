r"""What the operation means: the rule, the set of keys, and the type that carries it.

Block ``g`` of ``P`` queries starts at position ``start(g) = g P + Sk - Sq`` (causal). Its pooled score of key ``j`` is

    s[g, j] = scale * < mean of the block's real queries, k_j >          (mean and product in float32)

(on Hopper the mean is then rounded to the dtype of the tensors) and key ``j`` is kept when it is a candidate and
``s[g, j] + alpha >= m[g, j]``  with ``alpha = -ln(theta)``:

* causal:      kept(g) = {0..P-1}  U  {start(g)..p}  U  { j : P <= j < start(g), s[g, j] + alpha >= m[g, j] },  j <= p;
* non-causal:  kept(g) = { j : s[g, j] + alpha >= m[g, j] } over all keys.

``m`` is the maximum over candidates: of the whole row (``max_scope="row"``), or (``"window"``) of the tiles of B keys
of j's window of B G keys, up to and including j's own tile. A score of NaN or -inf (from such inputs, or from overflow)
is not a candidate's: it is never kept and moves no maximum. A block of ``R >= P`` rows keeps the union of its pooled
rows. This is "min-p" on the pooled row: a key stays when its probability is at least theta times the largest.
`vecattention.targets` states which alpha reaches a coverage or a density instead.
Source: VecAttention (CVPR 2026, arXiv 2603.29494), section on TilingSelect with the minS filter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vecattention import bits

MASK_LIMIT = 2**28
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Rule:
    """The parameters that decide the set of keys; the thresholds come beside it, as ``alpha`` [B, H]."""

    q_pooling_size: int = 64
    q_block_size: int = 64
    k_local_size: int = 16
    group_k_block: int = 16
    max_scope: str = "window"
    causal: bool = True
    scale: float = 1.0

    @property
    def rows_per_block(self) -> int:
        """Pooled rows that share one list of keys: R / P."""
        return self.q_block_size // self.q_pooling_size


@dataclass(frozen=True)
class Problem:
    """Everything that decides which backend can run a call; no tensor, so that it can be asked about without one."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    rule: Rule

    @classmethod
    def of(cls, query: Tensor, key: Tensor, rule: Rule) -> Problem:
        """The problem that these tensors pose."""
        batch, heads, q_len, head_dim = query.shape
        return cls(batch, heads, key.shape[1], q_len, key.shape[2], head_dim, query.dtype, query.device, rule)


@dataclass(frozen=True)
class Selection:
    """The keys that each block of queries attends.

    Attributes:
        words: int32 [B, H, ceil(Sq / block), ceil(Sk / 32)]; bit i of word w says that the block attends key 32 w + i.
        q_len: Sq.
        k_len: Sk.
        block: R, the queries that share one list.
        causal: when true, query row i (position i + Sk - Sq) attends only the listed keys at or before its position.
        order: None, or int64 [B, H, Sq], a permutation of the rows of each head: block g holds the query rows
            order[g R : g R + R], so that rows which lie apart can share a list. Keys keep their positions. Not with
            causal, where a block's rows are consecutive.

    Example:
        >>> import torch, vecattention
        >>> q, k = torch.randn(1, 2, 200, 16), torch.randn(1, 1, 200, 16)
        >>> selection = vecattention.select(q, k, threshold=0.5)
        >>> selection.mask().shape, selection.density().shape, selection.columns(0, 0, 1)[:3].tolist()
        (torch.Size([1, 2, 200, 200]), torch.Size([1, 2]), [0, 1, 2])
    """

    words: Tensor
    q_len: int
    k_len: int
    block: int
    causal: bool
    order: Tensor | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks of queries, ceil(Sq / R)."""
        return -(-self.q_len // self.block)

    def starts(self) -> Tensor:
        """int64 [blocks]: position of each block's first query (causal), on the device of the words."""
        offset = self.k_len - self.q_len if self.causal else 0
        return torch.arange(self.blocks, device=self.words.device) * self.block + offset

    def mask(self) -> Tensor:
        """bool [B, H, Sq, Sk], causality applied: for looking and testing.

        Raises:
            ValueError: the mask would hold more than 2**28 entries.
        """
        size = self.words.shape[0] * self.words.shape[1] * self.q_len * self.k_len
        if size > MASK_LIMIT:
            raise ValueError(
                f"mask() wanted at most 2**28 = {MASK_LIMIT} entries, got {size} for Sq={self.q_len}, Sk={self.k_len}; "
                "look at single blocks with columns(b, h, g), or at density()"
            )
        kept = bits.unpack(self.words, self.k_len).repeat_interleave(self.block, dim=2)[:, :, : self.q_len]
        kept = self.restore(kept)
        return kept & causal_mask(self.q_len, self.k_len, kept.device) if self.causal else kept

    def columns(self, b: int, h: int, g: int) -> Tensor:
        """int64 [n]: ascending positions of all keys that block g of (batch b, query head h) attends.

        Raises:
            IndexError: there is no such batch element, head or block.
        """
        for name, at, size in zip("bhg", (b, h, g), self.words.shape, strict=False):
            if not 0 <= at < size:
                raise IndexError(
                    f"{name} is {at}, wanted 0 to {size - 1} of (batch, heads, blocks) = "
                    f"{tuple(self.words.shape[:3])}; blocks hold {self.block} rows"
                )
        index = bits.unpack(self.words[b, h, g], self.k_len).nonzero().squeeze(-1)
        return index[index < self._end(g)] if self.causal else index

    def density(self) -> Tensor:
        """float32 [B, H]: kept pairs over allowed pairs (causal pairs, or Sq * Sk); no host synchronisation."""
        return (self.kept_pairs().double() / allowed_pairs(self.q_len, self.k_len, self.causal)).float()

    def kept_pairs(self) -> Tensor:
        """int64 [B, H]: number of (query, key) pairs that are attended."""
        start = self.starts()
        rows = (self.q_len - torch.arange(self.blocks, device=start.device) * self.block).clamp(max=self.block)
        if not self.causal:
            return (bits.popcount(self.words).sum(-1) * rows).sum(-1)
        before = bits.popcount(self.words & bits.below(start, self.k_len)).sum(-1)
        # The block's own span: key start + i is seen by the rows at or after it, rows - i of them.
        span = torch.arange(self.block, device=start.device)
        position = (start[:, None] + span).clamp(max=self.k_len - 1)
        word = self.words.gather(-1, (position // bits.WORD).expand(*self.words.shape[:2], -1, -1))
        own = ((word >> (position % bits.WORD)) & 1) * (rows[:, None] - span).clamp(min=0)
        return (before * rows + own.sum(-1)).sum(-1)

    def arrange(self, rows: Tensor) -> Tensor:
        """[B, H, Sq, n] -> the same rows in the order of the blocks; the tensor itself when there is no order."""
        if self.order is None:
            return rows
        return rows.gather(2, self.order[..., None].expand(*self.order.shape, rows.shape[3]))

    def restore(self, rows: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        if self.order is None:
            return rows
        return torch.empty_like(rows).scatter_(2, self.order[..., None].expand_as(rows), rows)

    def _end(self, g: int) -> int:
        last = min((g + 1) * self.block, self.q_len)
        return last + self.k_len - self.q_len


def causal_mask(q_len: int, k_len: int, device: torch.device) -> Tensor:
    """bool [Sq, Sk]: key j is at or before the position i + Sk - Sq of query row i."""
    position = torch.arange(q_len, device=device) + (k_len - q_len)
    return torch.arange(k_len, device=device) <= position[:, None]


def allowed_pairs(q_len: int, k_len: int, causal: bool) -> int:
    """Pairs that dense attention would compute: Sq * Sk, or those with j <= i + Sk - Sq.

    >>> allowed_pairs(2, 3, causal=True), allowed_pairs(2, 3, causal=False)
    (5, 6)
    """
    return q_len * k_len - q_len * (q_len - 1) // 2 if causal else q_len * k_len


def head_chunks(batch: int, heads: int, kv_heads: int, most: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices (batch, query heads, key heads) that split a problem into smaller ones of the same kind.

    None has more than ``most`` (at least 1) query heads, all batch rows counted, and they are of much the same size.
    Query heads that share a key head stay together as far as that allows.

    >>> [(q, k) for _, q, k in head_chunks(1, 6, 2, 4)]
    [(slice(0, 3, None), slice(0, 1, None)), (slice(3, 6, None), slice(1, 2, None))]
    """
    group = heads // kv_heads
    if most >= heads:
        for rows in even(batch, most // heads):
            yield rows, slice(0, heads), slice(0, kv_heads)
        return
    for b in range(batch):
        if most >= group:
            for keys in even(kv_heads, most // group):
                yield slice(b, b + 1), slice(keys.start * group, keys.stop * group), keys
            continue
        for k in range(kv_heads):
            for part in even(group, most):
                yield slice(b, b + 1), slice(k * group + part.start, k * group + part.stop), slice(k, k + 1)


def even(count: int, most: int) -> Iterator[slice]:
    """As few slices of ``count`` things as hold at most ``most`` each, of sizes that differ by one at most.

    >>> list(even(7, 3))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
    """
    parts = -(-count // most)
    for i in range(parts):
        yield slice(i * count // parts, (i + 1) * count // parts)


def query_chunks(q_len: int, k_len: int, chunk: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Slices (queries, keys) that split a problem into smaller problems of the same kind with the same answer.

    A chunk of queries with the keys up to its last position is again bottom-right aligned, so nothing else changes.
    ``chunk`` must be a multiple of R.
    """
    for first in range(0, q_len, chunk):
        last = min(first + chunk, q_len)
        yield slice(first, last), slice(0, last + k_len - q_len if causal else k_len)
