"""Dense attention in float64, one head at a time: its output, its log-sum-exp and the mass of every unit of keys.

A unit is what a selection of some granularity takes or leaves as a whole; `Granularity.reduce` adds up a map over it.
Memory: [128, Sk] numbers at once, and for each head one number a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention.evals.fidelity.samples import Sample

ROWS = 128
"""Query rows handled at once."""

FINEST = 2**12
"""Bins of log2 probability, 32 to a factor of two, in which single pairs are sorted."""


@dataclass(frozen=True)
class Granularity:
    """Units of a map. ``reduce`` sums [ROWS, n ROWS] over its units, to any shape."""

    name: str
    reduce: Callable[[Tensor], Tensor]


def _blocks(x: Tensor, rows: int, keys: int) -> Tensor:
    tall, wide = x.shape[0] // rows, x.shape[1] // keys
    return x.view(tall, rows, wide, keys).sum((1, 3))


def _slashes(x: Tensor) -> Tensor:
    """[2, n + 63]: sums along the diagonals of each half of 64 rows."""
    halves = x.view(2, 64, -1).flip(1)
    keys = halves.shape[2]
    return F.pad(halves, (0, 64)).flatten(1)[:, : 64 * (keys + 63)].view(2, 64, keys + 63).sum(1)


GRANULARITIES = (
    Granularity("1 key x 64 queries", lambda x: _blocks(x, 64, 1)),
    Granularity("64 keys x 1 query", lambda x: _blocks(x, 1, 64)),
    Granularity("slash of 64 queries", _slashes),
    Granularity("64 keys x 64 queries", lambda x: _blocks(x, 64, 64)),
    Granularity("128 keys x 128 queries", lambda x: _blocks(x, 128, 128)),
)
"""Equal areas of 64 pairs in three directions, and the two usual blocks."""

SINGLE = "1 key x 1 query"


@dataclass(frozen=True)
class Head:
    """Dense attention of one head.

    Attributes:
        out: float64 [Sq, D].
        lse: float64 [Sq].
        units: for each granularity the mass and the allowed pairs of every unit that has any, float64 [n].
        columns: float32 [ceil(Sq / 64), Sk], the mass of 1 key x 64 queries in place.
    """

    out: Tensor
    lse: Tensor
    units: dict[str, tuple[Tensor, Tensor]]
    columns: Tensor


def dense(sample: Sample, head: int, granularities: Sequence[Granularity] = GRANULARITIES) -> Head:
    """Dense attention of a query head of the sample's first batch element, on the sample's device."""
    share = sample.query.shape[1] // sample.key.shape[1]
    query, key = sample.query[0, head].double() * sample.factor, sample.key[0, head // share].double()
    value = sample.value[0, head // share].double()
    q_len, k_len = query.shape[0], key.shape[0]
    out, lse = torch.empty_like(query), query.new_empty(q_len)
    sums: dict[str, list[tuple[Tensor, Tensor]]] = {g.name: [] for g in granularities}
    columns, single = [], _Single(query.device)
    for first in range(0, q_len, ROWS):
        rows = slice(first, min(first + ROWS, q_len))
        logits = query[rows] @ key.mT
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if sample.causal:
            position = torch.arange(rows.start, rows.stop, device=query.device) + (k_len - q_len)
            allowed = torch.arange(k_len, device=query.device) <= position[:, None]
            logits.masked_fill_(~allowed, -torch.inf)
        lse[rows] = logits.logsumexp(-1)
        weight = (logits - lse[rows, None]).exp_()
        out[rows] = weight @ value
        single.add(weight, allowed)
        padded, pairs = _padded(weight), _padded(allowed.float())
        for g in granularities:
            mass, count = g.reduce(padded).flatten(), g.reduce(pairs).flatten()
            sums[g.name].append((mass[count > 0], count[count > 0].double()))
        columns.append(_blocks(padded, 64, 1)[: -(-(rows.stop - rows.start) // 64), :k_len].float())
    units = {name: (torch.cat([m for m, _ in parts]), torch.cat([n for _, n in parts])) for name, parts in sums.items()}
    return Head(out, lse, units | {SINGLE: single.units()}, torch.cat(columns))


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[1] % ROWS, 0, ROWS - x.shape[0]))


class _Single:
    """Mass and number of single pairs by bins of log2 probability: too many to keep each."""

    def __init__(self, device: torch.device) -> None:
        self.mass, self.count = (torch.zeros(FINEST, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, weight: Tensor, allowed: Tensor) -> None:
        flat = weight[allowed]
        place = (-flat.float().log2() * 32).clamp_(0, FINEST - 1).int()
        self.mass += torch.bincount(place, flat, FINEST)
        self.count += torch.bincount(place, minlength=FINEST)

    def units(self) -> tuple[Tensor, Tensor]:
        return self.mass[self.count > 0], self.count[self.count > 0]
