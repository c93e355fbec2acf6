r"""XAttention: blocks of 128 by the sums of antidiagonals, taken until they hold a share of each row's mass.

With stride s, for groups of s queries r and of s keys c:

    S[r, c] = scale / (s norm) sum_{t<s} <q_{r s + s - 1 - t}, k_{c s + t}>,   P = softmax_c S   (causal: c <= r)
    A[I, J] = sum of P over the (128 / s)^2 entries of block (I, J)

and block row I keeps the fewest blocks J, largest A first, that hold ``threshold`` of its sum: J is kept while the mass
before it is less than required. In causal mode blocks 0 and I are always kept and count first.

Parameters: threshold (0.9; a float, or a tensor that broadcasts to [B, H]), stride (16; the published video-generation
runs use 8), norm (1). Lengths need not be multiples of anything: groups without a real key take no part in the softmax,
groups without a real query have no mass. With Sq < Sk, causal, the groups of keys are aligned to the queries' blocks.

Source: XAttention, ICML 2025, arXiv 2503.16428.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vecattention import checks
from vecattention.methods.blocks import BLOCK, Grid, groups, number, steps, whole
from vecattention.methods.method import Knob, Method
from vecattention.spec import Selection


def select(query: Tensor, key: Tensor, *, causal: bool, scale: float, threshold: float | Tensor = 0.9,
           stride: int = 16, norm: float = 1.0) -> Selection:  # fmt: skip
    """The blocks of the module's equation."""
    batch, heads, q_len, _ = query.shape
    grid = Grid(q_len, key.shape[2], causal)
    stride = _stride(stride)
    factor = scale / (stride * number("norm", norm, 1e-30, 1e30, "a factor over 0"))
    required = checks.threshold(threshold, batch, heads).to(query.device).expand(batch, heads)
    kept = torch.empty(batch, heads, grid.q_blocks, grid.k_blocks, dtype=torch.bool, device=query.device)
    for b, span, q, k in groups(query, key):
        mass = block_mass(q, k, grid, stride, factor)
        kept[b, span] = cover(mass, required[b, span], grid.distance(q.device) if causal else None)
    return grid.selection(grid.words(kept))


def block_mass(q: Tensor, k: Tensor, grid: Grid, stride: int, factor: float) -> Tensor:
    """A [G, q_blocks, k_blocks] of the equation for query heads [G, Sq, D] of one key head [Sk, D]."""
    per_block = BLOCK // stride
    rows = grid.padded_queries(q).unflatten(1, (-1, stride)).flip(2).flatten(2)
    columns = grid.padded_keys(k).unflatten(0, (-1, stride)).flatten(1)
    place = torch.arange(columns.shape[0], device=q.device)
    empty = ((place + 1) * stride <= grid.lead) | (place * stride >= grid.lead + grid.k_len)
    mass = q.new_empty(q.shape[0], grid.q_blocks, grid.k_blocks)
    for blocks in steps(grid.q_blocks, q.shape[0] * per_block * columns.shape[0]):
        row = torch.arange(blocks.start * per_block, blocks.stop * per_block, device=q.device)
        hidden = empty[None]
        if grid.causal:
            hidden = hidden | (place > row[:, None] + grid.first * per_block)
        scores = (rows[:, row] @ columns.mT).mul_(factor).masked_fill_(hidden, -torch.inf)
        share = torch.softmax(scores, -1) * (row * stride < grid.q_len)[:, None]
        mass[:, blocks] = share.unflatten(2, (-1, per_block)).sum(-1).unflatten(1, (-1, per_block)).sum(2)
    return mass


def cover(mass: Tensor, threshold: Tensor, distance: Tensor | None) -> Tensor:
    """bool like mass [G, n, m]: the fewest blocks of each row that hold threshold [G] of its sum.

    ``distance`` [n, m] (causal) tells how far each block lies before its row's own; block 0 and the own come first.
    """
    needed = threshold.to(mass.dtype)[:, None, None] * mass.sum(-1, keepdim=True)
    rank_by = mass
    if distance is not None:
        forced = (distance == 0) | (torch.arange(mass.shape[2], device=mass.device) == 0)
        rank_by = mass.masked_fill(forced, torch.inf).masked_fill(distance < 0, -torch.inf)
    order = rank_by.argsort(dim=-1, descending=True, stable=True)
    ranked = mass.gather(-1, order)
    taken = ranked.cumsum(-1) - ranked < needed
    kept = torch.zeros_like(taken).scatter_(-1, order, taken)
    return kept if distance is None else (kept | forced) & (distance >= 0)


def _stride(value: object) -> int:
    stride = whole("stride", value, 1, f"a divisor of {BLOCK}")
    if BLOCK % stride:
        raise ValueError(f"stride is {stride}, wanted a divisor of {BLOCK}; the published ones are 8 and 16")
    return stride


METHOD = Method(
    "xattention", "arXiv 2503.16428", (True, False), {"threshold": 0.9, "stride": 16, "norm": 1.0},
    Knob("threshold", (0.15, 0.5, 0.8, 0.9, 0.95, 0.99), 1e-9, 1.0), select,
)  # fmt: skip
