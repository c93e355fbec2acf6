"""Random problems in float64, where no two decisions of a method are closer than rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

Brute = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Case:
    """Shapes of one problem: batch, query heads, key heads, queries, keys, head size."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int = 16

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query (peaked, with a slow drift, so that neighbours agree), key with a few loud ones, value; float64."""
        dice = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=dice, dtype=torch.float64)

        drift = draw(self.batch, self.heads, self.q_len // 50 + 2, self.dim).repeat_interleave(50, dim=2)
        query = 2 * draw(self.batch, self.heads, self.q_len, self.dim) + 2 * drift[:, :, : self.q_len]
        key = draw(self.batch, self.kv_heads, self.k_len, self.dim)
        loud = torch.rand(self.batch, self.kv_heads, self.k_len, 1, generator=dice) < 0.02
        return query, torch.where(loud, 3 * key, key), draw(self.batch, self.kv_heads, self.k_len, self.dim)

    def brute(self, one_head: Brute, query: Tensor, key: Tensor) -> Tensor:
        """bool [B, H, Sq, Sk]: a head's brute-force mask for every head, with the key head it reads."""
        share = self.heads // self.kv_heads
        masks = [[one_head(query[b, h], key[b, h // share], h) for h in range(self.heads)] for b in range(self.batch)]
        return torch.stack([torch.stack(row) for row in masks])


@pytest.fixture(scope="session")
def case() -> type[Case]:
    return Case
