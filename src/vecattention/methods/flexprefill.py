r"""FlexPrefill: blocks under the strongest verticals and slashes of the last queries; pooled blocks where that fails.

Per head, with A = softmax(scale Q_last K^T) over the last n = min(128, Sq) queries (row r at position p_r, causal):

    vertical[j] = (1/n) sum_r A[r, j]                     slash[o] = (1/n) sum_r A[r, p_r - o]
    budget(x)   = floor((1 + #{k : sum of the k largest x <= gamma}) / 128) + 1 blocks, within [min_budget, max_budget]
    kept(i)     = the budget(vertical) best vertical blocks v <= i, the first always among them,
                  U the blocks i - t of the budget(slash) best slash blocks t, the main diagonal always among them.

Blocks hold the sums of 128 entries. The head is "query-aware" when sqrt(JS(a, vertical blocks)) < tau, with
a = softmax(scale <mean Q_last, mean of key block>) and JS in nats: both budgets fall to min_budget, and the largest
entries of softmax(scale <mean q block, mean k block>), causal over blocks, join as long as the running sum of the
sorted entries is at most gamma times the number of query blocks. Up to 256 keys everything is kept.

Parameters: gamma (0.9, in the published comparison's configuration; its function's own default is 0.95), tau (0.1),
min_budget and max_budget in keys (None: one block, and no limit). Causal only. With Sq < Sk the blocks of keys are
aligned to the queries' blocks.

Source: FlexPrefill, ICLR 2025, arXiv 2502.20766, in the variant that VecAttention's comparison ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vecattention.methods.blocks import BLOCK, Grid, every_key, groups, number, steps, whole
from vecattention.methods.method import Knob, Method
from vecattention.spec import Selection

DENSE = 256
"""Up to so many keys everything is kept."""

KEYS = "keys, at least 1, or None"


@dataclass(frozen=True)
class _Settings:
    gamma: float
    tau: float
    least: int  # blocks
    most: int  # blocks
    scale: float


def select(query: Tensor, key: Tensor, *, causal: bool, scale: float, gamma: float = 0.9, tau: float = 0.1,
           min_budget: int | None = None, max_budget: int | None = None) -> Selection:  # fmt: skip
    """The blocks of the module's equation."""
    batch, heads, q_len, _ = query.shape
    grid = Grid(q_len, key.shape[2], causal)
    settings = _Settings(
        number("gamma", gamma, 0.0, 1.0, "a share of the attention in [0, 1]"),
        number("tau", tau, 0.0, 1.0, "a divergence in [0, 1]"),
        1 if min_budget is None else -(-whole("min_budget", min_budget, 1, KEYS) // BLOCK),
        grid.k_blocks if max_budget is None else max(1, whole("max_budget", max_budget, 1, KEYS) // BLOCK),
        scale,
    )
    if grid.k_len <= DENSE:
        return every_key(q_len, grid.k_len, causal, batch, heads, query.device)
    kept = torch.empty(batch, heads, grid.q_blocks, grid.k_blocks, dtype=torch.bool, device=query.device)
    for b, span, q, k in groups(query, key):
        kept[b, span] = _group(q, k, grid, settings)
    return grid.selection(grid.words(kept))


def _group(q: Tensor, k: Tensor, grid: Grid, settings: _Settings) -> Tensor:
    """bool [G, q_blocks, k_blocks]: kept blocks of the query heads of one key head."""
    last = q[:, -BLOCK:]
    vertical, slash = estimate(last, k, settings.scale)
    columns, diagonals = grid.block_sums(vertical), _slash_sums(slash, grid)
    pooled_keys = grid.mean_keys(k)
    guess = torch.softmax(last.mean(1) @ pooled_keys.mT * settings.scale, -1)
    aware = divergence(guess, columns).sqrt() < settings.tau
    n_columns = _budget(vertical, settings).where(~aware, settings.least)
    n_diagonals = _budget(slash, settings).where(~aware, settings.least)
    distance = grid.distance(q.device)
    on_slash = _best(diagonals, n_diagonals)[:, distance.clamp(min=0)]
    kept = _best(columns, n_columns)[:, None, :] | on_slash
    for head in range(q.shape[0]):  # one map of blocks at a time
        pooled = grid.mean_queries(q[head]) @ pooled_keys.mT * settings.scale
        kept[head] |= aware[head] & _largest(pooled, distance, settings.gamma)
    return kept & (distance >= 0)


def estimate(last: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """vertical [G, Sk] and slash [G, Sk] of the last queries [G, n, D]; never more than SLAB scores at once."""
    group, n, _ = last.shape
    k_len = k.shape[0]
    position = torch.arange(k_len - n, k_len, device=k.device)[:, None]

    def scores(keys: slice) -> Tensor:
        future = torch.arange(keys.start, keys.stop, device=k.device) > position
        return (last @ k[keys].mT * scale).masked_fill_(future, -torch.inf)

    pieces = list(steps(k_len, group * n))
    only = scores(pieces[0]) if len(pieces) == 1 else None  # else computed twice, so that one slab is held at a time
    sums = [(scores(keys) if only is None else only).logsumexp(-1) for keys in pieces]
    lse = torch.stack(sums).logsumexp(0)[..., None]
    vertical = last.new_empty(group, k_len)
    slash = last.new_zeros(group, k_len + n)  # entry n - 1 + o, so that offsets in the future have a place
    for keys in pieces:
        weight = ((scores(keys) if only is None else only) - lse).exp_()
        vertical[:, keys] = weight.mean(1)
        end = k_len - 1 - keys.start + n - 1  # largest offset of the piece, and its place
        slash[:, end - (keys.stop - keys.start + n - 2) : end + 1] += _diagonal_sums(weight).flip(-1) / n
    return vertical, slash[:, n - 1 : n - 1 + k_len]


def _diagonal_sums(weight: Tensor) -> Tensor:
    """[G, n, C] -> [G, C + n - 1]: entry c sums weight[r, j] over j - r + n - 1 = c, by skewing the rows."""
    group, n, count = weight.shape
    skewed = torch.nn.functional.pad(weight.flip(1), (0, n)).flatten(1)[:, : n * (count + n - 1)]
    return skewed.view(group, n, count + n - 1).sum(1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions over the last axis, not below 0."""
    middle = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny).log()
    terms = torch.xlogy(p, p) - p * middle + torch.xlogy(q, q) - q * middle
    return terms.sum(-1).clamp(min=0) / 2


def _slash_sums(slash: Tensor, grid: Grid) -> Tensor:
    """[G, Sk] by offset -> [G, k_blocks] by block offset, the main diagonal's first."""
    short = grid.k_blocks * BLOCK - slash.shape[-1]
    return torch.unflatten(torch.nn.functional.pad(slash, (0, short)), -1, (-1, BLOCK)).sum(-1)


def _budget(share: Tensor, settings: _Settings) -> Tensor:
    """int64 [G]: blocks that the entries making up gamma are worth."""
    entries = 1 + (share.sort(-1, descending=True).values.cumsum(-1) <= settings.gamma).sum(-1)
    return (entries // BLOCK + 1).clamp(settings.least, max(settings.most, settings.least))


def _best(sums: Tensor, count: Tensor) -> Tensor:
    """bool [G, n]: the ``count`` largest entries, the first always among them."""
    forced = sums.clone()
    forced[:, 0] = torch.inf
    rank = forced.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < count[:, None]


def _largest(pooled: Tensor, distance: Tensor, gamma: float) -> Tensor:
    """bool [q_blocks, k_blocks]: the largest entries of the pooled map up to gamma of its mass."""
    share = torch.softmax(pooled.masked_fill(distance < 0, -torch.inf), -1).flatten()
    top = share.sort(descending=True, stable=True)
    within = top.values.cumsum(0) <= gamma * pooled.shape[0]
    return torch.zeros_like(within).scatter_(0, top.indices, within).view_as(pooled)


METHOD = Method(
    "flexprefill", "arXiv 2502.20766", (True,), {"gamma": 0.9, "tau": 0.1, "min_budget": None, "max_budget": None},
    Knob("gamma", (0.5, 0.7, 0.9, 0.95, 0.99), 0.0, 1.0), select,
)  # fmt: skip
