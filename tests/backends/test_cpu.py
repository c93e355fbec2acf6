"""What the CPU backend promises beyond the rule: bits that depend on nothing but the inputs."""

from __future__ import annotations

import pytest
import torch

from vecattention.backends import cpu


@pytest.mark.parametrize("dim", [16, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rounding_of_a_score_does_not_depend_on_how_many_are_computed(dim: int, dtype: torch.dtype) -> None:
    """Chunks change how many rows and keys a product has; sets of keys must not follow."""
    numbers = torch.Generator().manual_seed(0)
    pooled = torch.randn(40, dim, generator=numbers, dtype=dtype)
    keys = torch.randn(700, dim, generator=numbers, dtype=dtype)
    whole = cpu._product(pooled, keys)
    for rows in (1, 2, 3, 4, 15, 16, 17, 40):
        for columns in (1, 2, 7, 11, 12, 16, 31, 64, 333, 699):
            assert torch.equal(cpu._product(pooled[:rows], keys[:columns]), whole[:rows, :columns])
    for first in (1, 5, 39):
        assert torch.equal(cpu._product(pooled[first:], keys), whole[first:])
