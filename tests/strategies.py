"""Random problems: shapes, rules and thresholds drawn by Hypothesis, contents by a seeded generator.

`problems()` draws rough ones (normal numbers); ``exact=True`` draws small dyadic numbers, and powers of two for what is
divided by, so that every score is a float32 number and a tie is a real tie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

SIZES = (16, 32, 64, 128)
DIMS = (16, 32, 64, 80, 96, 128, 256)
HEADS = ((1, 1, 1), (1, 1, 3), (2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 3, 1))
"""Batch, KV heads and query heads to each of them."""
LAYOUTS = ("contiguous", "tokens first", "every other row", "expanded heads", "columns apart")


@dataclass(frozen=True, repr=False)
class Problem:
    """One call: its tensors, the keyword arguments of `select`, and what they mean in numbers."""

    query: Tensor
    key: Tensor
    value: Tensor
    shape: str
    arguments: dict[str, Any]
    exact: bool
    seed: int

    def __repr__(self) -> str:
        return f"Problem({self.shape}, {self.arguments}, exact={self.exact}, seed={self.seed})"

    @property
    def block(self) -> int:
        """R."""
        return self.arguments["q_block_size"] or self.arguments["q_pooling_size"]

    @property
    def causal(self) -> bool:
        return bool(self.arguments["causal"])

    @property
    def scale(self) -> float:
        return float(self.arguments["scale"] or self.query.shape[3] ** -0.5)

    @property
    def theta(self) -> Tensor:
        """float64 [B, H]."""
        return torch.as_tensor(self.arguments["threshold"]).double().expand(self.query.shape[:2])

    def brute(self) -> dict[str, Any]:
        """The keyword arguments of `brute.select`."""
        a = self.arguments
        return dict(pool=a["q_pooling_size"], block=self.block, tile=a["k_local_size"], group=a["group_k_block"],
                    scope=a["max_scope"], causal=a["causal"], scale=self.scale, exact=self.exact)  # fmt: skip


def lengths(most: int) -> st.SearchStrategy[int]:
    """Lengths around the edges of words, tiles and blocks, and any other."""
    edges = [n + d for n in (16, 32, 64, 128, 192, 256) for d in (-1, 0, 1) if n + d <= most]
    return st.one_of(st.integers(1, most), st.sampled_from([1, 2, *edges]))


@st.composite
def thresholds(draw: st.DrawFn, batch: int, heads: int, ties: bool) -> float | Tensor:
    """A number, or a tensor of shape [], [H], [B, H], [1, H] or [B, 1]; from dense to sparse; with ties also 1."""
    alphas = st.sampled_from([0.013, 0.052, 0.107, 0.31, 0.93, 2.9, 8.7, *([0.0, 0.0] if ties else [])])
    shape = draw(st.sampled_from([None, (), (heads,), (batch, heads), (1, heads), (batch, 1)]))
    if shape is None:
        return math.exp(-draw(alphas))
    count = math.prod(shape)
    values = draw(st.lists(alphas, min_size=count, max_size=count))
    return torch.tensor(values, dtype=draw(st.sampled_from([torch.float32, torch.float64]))).neg().exp().reshape(shape)


@st.composite
def problems(draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = (torch.float32,), exact: bool = False,
             dims: tuple[int, ...] = DIMS, blocks: tuple[int, ...] = tuple(range(16, 129, 16)),
             heads: tuple[tuple[int, int, int], ...] = HEADS, most: int = 280) -> Problem:  # fmt: skip
    """A `Problem` of up to ``most`` queries and half as many keys more (causal), or 1.5 times as many (non-causal)."""
    batch, kv_heads, group = draw(st.sampled_from(heads))
    causal = draw(st.booleans())
    pool = draw(st.sampled_from(SIZES))
    q_len = draw(lengths(most))
    if exact:
        q_len += -q_len % pool  # whole blocks: the mean divides by a power of two
    k_len = q_len + draw(st.one_of(st.just(0), st.integers(0, most // 2))) if causal else draw(lengths(most * 3 // 2))
    head_dim, dtype, seed = draw(st.sampled_from(dims)), draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**31))
    numbers = torch.Generator().manual_seed(seed)
    shapes = [(batch, kv_heads * group, q_len, head_dim), *2 * [(batch, kv_heads, k_len, head_dim)]]
    query, key, value = (
        laid_out(_numbers(shape, numbers, exact).to(dtype), draw(st.sampled_from(LAYOUTS))) for shape in shapes
    )
    arguments = dict(
        threshold=draw(thresholds(batch, kv_heads * group, ties=exact)),
        q_pooling_size=pool,
        q_block_size=draw(st.sampled_from([None, *(n for n in blocks if n % pool == 0)])),
        k_local_size=draw(st.sampled_from([n for n in SIZES if n <= pool])),
        group_k_block=draw(st.sampled_from([1, 2, 3, 5, 16, 8192])),
        max_scope=draw(st.sampled_from(["window", "row"])),
        causal=causal,
        scale=draw(st.sampled_from([0.0625, 0.25, 1.0] if exact else [None, 0.25, 1.0])),
    )
    shape = f"B={batch} H={kv_heads * group} Hkv={kv_heads} Sq={q_len} Sk={k_len} D={head_dim} {dtype}"
    return Problem(query, key, value, shape, arguments, exact, seed)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Numbers like those of x [B, H, S, D] in another memory layout; "expanded heads" repeats the first head's."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other row":
        wide = torch.full((*x.shape[:2], 2 * x.shape[2] + 1, x.shape[3] + 3), torch.nan, dtype=x.dtype)
        wide[:, :, 1::2, 2:-1] = x
        return wide[:, :, 1::2, 2:-1]
    if layout == "expanded heads":
        return x[:, :1].expand(x.shape)
    if layout == "columns apart":
        return x.mT.contiguous().mT
    return x


def _numbers(shape: tuple[int, ...], generator: torch.Generator, exact: bool) -> Tensor:
    """Normal numbers, or multiples of 1/4 from -2 to 2."""
    if exact:
        return torch.randint(-8, 9, shape, generator=generator) / 4.0
    return torch.randn(shape, generator=generator)


def sample(batch: int = 1, heads: int = 2, kv_heads: int = 1, q_len: int = 200, k_len: int | None = None,
           head_dim: int = 32, dtype: torch.dtype = torch.float32,
           seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Seeded normal query [batch, heads, q_len, head_dim], key and value [batch, kv_heads, k_len, head_dim]."""
    numbers = torch.Generator().manual_seed(seed)
    keys = (batch, kv_heads, k_len or q_len, head_dim)
    shapes = ((batch, heads, q_len, head_dim), keys, keys)
    query, key, value = (torch.randn(shape, generator=numbers).to(dtype) for shape in shapes)
    return query, key, value
