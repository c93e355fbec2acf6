"""What the block methods share: a grid of blocks over queries and keys, single heads, and blocks as a `Selection`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention import bits
from vecattention.spec import Selection

BLOCK = 128
"""Queries and keys per block of every published block method."""

SLAB = 2**24
"""Most scores or flags held at once."""


@dataclass(frozen=True)
class Grid:
    """Blocks of BLOCK queries and BLOCK keys of one call.

    In causal mode the first block of keys is cut short where Sk - Sq is no multiple of BLOCK, so that a block's own
    keys are again one block: query block i meets its own keys in key block i + first.
    """

    q_len: int
    k_len: int
    causal: bool

    @property
    def lead(self) -> int:
        """Positions by which the first block of keys is cut short."""
        return (self.q_len - self.k_len) % BLOCK if self.causal else 0

    @property
    def q_blocks(self) -> int:
        """Number of blocks of queries."""
        return -(-self.q_len // BLOCK)

    @property
    def k_blocks(self) -> int:
        """Number of blocks of keys."""
        return -(-(self.k_len + self.lead) // BLOCK)

    @property
    def first(self) -> int:
        """Key block that holds the first query's position (causal)."""
        return (self.k_len - self.q_len + self.lead) // BLOCK

    def distance(self, device: torch.device) -> Tensor:
        """int64 [q_blocks, k_blocks]: how many blocks a key block lies before the query block's own (causal)."""
        own = torch.arange(self.q_blocks, device=device) + self.first
        return own[:, None] - torch.arange(self.k_blocks, device=device)

    def padded_queries(self, query: Tensor) -> Tensor:
        """[..., Sq, D] -> [..., q_blocks * BLOCK, D], zeros at the end."""
        return F.pad(query, (0, 0, 0, self.q_blocks * BLOCK - self.q_len))

    def padded_keys(self, key: Tensor) -> Tensor:
        """[..., Sk, D] -> [..., k_blocks * BLOCK, D], zeros at both ends."""
        return F.pad(key, (0, 0, self.lead, self.k_blocks * BLOCK - self.k_len - self.lead))

    def block_sums(self, vector: Tensor) -> Tensor:
        """[..., Sk] -> [..., k_blocks]: sums over the keys of each block."""
        return torch.unflatten(self.padded_keys(vector[..., None]).squeeze(-1), -1, (-1, BLOCK)).sum(-1)

    def mean_queries(self, query: Tensor) -> Tensor:
        """[..., Sq, D] -> [..., q_blocks, D]: mean of each block's real queries."""
        rows = (self.q_len - torch.arange(self.q_blocks, device=query.device) * BLOCK).clamp(max=BLOCK)
        return torch.unflatten(self.padded_queries(query), -2, (-1, BLOCK)).sum(-2) / rows[:, None]

    def mean_keys(self, key: Tensor) -> Tensor:
        """[..., Sk, D] -> [..., k_blocks, D]: mean of each block's real keys."""
        count = self.block_sums(key.new_ones(self.k_len))
        return torch.unflatten(self.padded_keys(key), -2, (-1, BLOCK)).sum(-2) / count[:, None]

    def words(self, kept: Tensor) -> Tensor:
        """bool [..., q_blocks, k_blocks] -> the words of a `Selection`, int32 [..., q_blocks, ceil(Sk / 32)]."""
        if not self.lead:
            whole = torch.where(kept, -1, 0).to(torch.int32).repeat_interleave(BLOCK // bits.WORD, dim=-1)
            end = torch.tensor([self.k_len], device=kept.device)
            return whole[..., : bits.words_for(self.k_len)] & bits.below(end, self.k_len)[0]
        flat = kept.reshape(-1, self.k_blocks)
        keys = slice(self.lead, self.lead + self.k_len)
        packed = [bits.pack(rows.repeat_interleave(BLOCK, dim=1)[:, keys]) for rows in flat.split(_rows(self.k_len))]
        return torch.unflatten(torch.cat(packed), 0, kept.shape[:-1])

    def selection(self, words: Tensor) -> Selection:
        """The `Selection` of these words [B, H, q_blocks, ceil(Sk / 32)]."""
        return Selection(words, self.q_len, self.k_len, BLOCK, self.causal)


def groups(query: Tensor, key: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Each key head with its query heads: (b, heads, query [G, Sq, D], key [Sk, D]), float32 or float64."""
    share = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for kv_head in range(key.shape[1]):
            heads = slice(kv_head * share, (kv_head + 1) * share)
            yield b, heads, wide(query[b, heads]), wide(key[b, kv_head])


def every_key(q_len: int, k_len: int, causal: bool, batch: int, heads: int, device: torch.device) -> Selection:
    """The selection that leaves nothing out: dense attention."""
    line = bits.below(torch.tensor([k_len], device=device), k_len)
    words = line.expand(batch, heads, -(-q_len // BLOCK), -1)
    return Selection(words, q_len, k_len, BLOCK, causal)


def steps(total: int, each: int) -> Iterator[slice]:
    """Slices that cut ``total`` things, of ``each`` numbers each, into pieces of at most SLAB numbers."""
    size = max(1, SLAB // max(each, 1))
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))


def wide(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def number(name: str, value: object, low: float, high: float, wanted: str) -> float:
    """A finite number with low <= value <= high, as a float.

    Raises:
        TypeError: no real number.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}), wanted {wanted}; pass a number")
    if not low <= float(value) <= high:
        raise ValueError(f"{name} is {value}, wanted {wanted}; pass a value inside")
    return float(value)


def whole(name: str, value: object, low: int, wanted: str) -> int:
    """An integer of at least ``low``.

    Raises:
        TypeError: no integer.
        ValueError: too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}), wanted {wanted}; pass an int")
    if value < low:
        raise ValueError(f"{name} is {value}, wanted {wanted}; pass a larger one")
    return value


def _rows(keys: int) -> int:
    return max(1, SLAB // keys)
