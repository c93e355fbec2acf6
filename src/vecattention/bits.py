"""Sets of keys as bits: 32 keys to an int32 word, key ``32 * w + i`` in bit ``i`` of word ``w``."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
_GATHER_BYTES = 0x0102040810204080  # moves bit 0 of byte i to bit 56 + i of the 64-bit product


def words_for(keys: int) -> int:
    """Number of words that hold ``keys`` bits."""
    return -(-keys // WORD)


def pack(kept: Tensor) -> Tensor:
    """bool [..., n] -> int32 [..., ceil(n / 32)]; the bits past n are 0.

    >>> pack(torch.tensor([True, False, True])).tolist()
    [5]
    """
    pad = -kept.shape[-1] % WORD
    kept = torch.nn.functional.pad(kept, (0, pad)).contiguous() if pad else kept.contiguous()
    if kept.storage_offset() % 8:
        kept = kept.clone()  # a view as 64-bit numbers has to start at one
    octets = (kept.view(torch.int64) * _GATHER_BYTES) >> 56
    return octets.to(torch.uint8).view(torch.int32)


def unpack(words: Tensor, n: int) -> Tensor:
    """int32 [..., W] -> bool [..., n], the inverse of `pack` for n <= 32 * W.

    >>> unpack(torch.tensor([5], dtype=torch.int32), 3).tolist()
    [True, False, True]
    """
    octets = words.contiguous().view(torch.uint8)
    table = _octet_table(words.device)
    flat = table.index_select(0, octets.reshape(-1).int())
    return flat.view(torch.bool).view(*words.shape[:-1], words.shape[-1] * WORD)[..., :n]


def popcount(words: Tensor) -> Tensor:
    """Number of set bits of each int32 word, int32 of the same shape.

    >>> popcount(torch.tensor([5, -1], dtype=torch.int32)).tolist()
    [2, 32]
    """
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


def below(limits: Tensor, keys: int) -> Tensor:
    """Words with bit j set for each j < limit: int64 [n] -> int32 [n, ceil(keys / 32)].

    >>> below(torch.tensor([0, 3, 33]), 64).tolist()
    [[0, 0], [7, 0], [-1, 1]]
    """
    first = torch.arange(words_for(keys), device=limits.device) * WORD
    count = (limits[:, None] - first).clamp(0, WORD)
    ones = (torch.ones_like(count) << count) - 1  # 64-bit, so that a shift by 32 is defined
    return ones.to(torch.int64).where(ones < 2**31, ones - 2**32).to(torch.int32)


def _octet_table(device: torch.device) -> Tensor:
    """int64 [256]: entry b holds bit i of b as its i-th byte."""
    octet = torch.arange(256, device=device)[:, None]
    return ((octet >> torch.arange(8, device=device)) & 1).bool().view(torch.int64).squeeze(-1)
