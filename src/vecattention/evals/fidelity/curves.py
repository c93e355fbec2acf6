r"""Recall at every density at once: of an oracle, and of a rule that keeps a key when its gap is small.

The oracle takes units in order of mass per pair, the best that any selection of that granularity can do:
recall(d) = max { mass of a set of units : its pairs <= d allowed pairs }, units cut where they do not fit.

A rule "s + alpha >= m" keeps key j of block g when its gap m[g, j] - s[g, j] is at most alpha; one sort of the gaps
gives density and recall for every alpha. A block of R rows takes the smallest gap of its pooled rows. Keys that are
always kept (sink, own) have gap -inf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention.backends import reference
from vecattention.evals.fidelity.samples import Sample
from vecattention.spec import Rule, allowed_pairs


@dataclass(frozen=True)
class Curve:
    """Density and recall of growing sets.

    Attributes:
        pairs: float64 [n], pairs of the first 1, 2, ... units, as shares of all allowed pairs.
        mass: float64 [n], their share of all mass.
        floor: the least density; what is always kept, as a share of all allowed pairs.
    """

    pairs: Tensor
    mass: Tensor
    floor: float = 0.0

    @classmethod
    def of(cls, worth: Tensor, mass: Tensor, pairs: Tensor, allowed: float, rows: int) -> Curve:
        """Units taken in descending order of ``worth`` [n]; those of infinite worth are always taken."""
        order = worth.argsort(descending=True, stable=True)
        floor = float(pairs[worth == torch.inf].sum()) / allowed
        return cls(pairs[order].double().cumsum(0) / allowed, mass[order].double().cumsum(0) / rows, floor)

    def recall(self, densities: Sequence[float]) -> list[float | None]:
        """Recall at these densities, linear between sets; None below the floor."""
        at = torch.tensor(densities, dtype=torch.float64, device=self.pairs.device).clamp(max=float(self.pairs[-1]))
        high = torch.searchsorted(self.pairs, at).clamp(max=self.pairs.numel() - 1)
        before = [F.pad(x, (1, 0)) for x in (self.pairs, self.mass)]
        part = (at - before[0][high]) / (self.pairs[high] - before[0][high]).clamp(min=1e-30)
        found = (before[1][high] + part * (self.mass[high] - before[1][high])).tolist()
        return [None if d < self.floor else x for d, x in zip(densities, found, strict=True)]


def oracle(mass: Tensor, pairs: Tensor, sample: Sample) -> Curve:
    """The best curve of these units of one head."""
    q_len, k_len = sample.query.shape[2], sample.key.shape[2]
    return Curve.of(mass / pairs, mass, pairs, allowed_pairs(q_len, k_len, sample.causal), q_len)


OCTAVES, FINE = 44, 8
"""Bins of mass per pair, FINE to a factor of two, in which the units of several heads are put together."""


class Best:
    """Oracles of a sample's heads: each with a budget of its own, and all of them with one.

    Under one budget the units of all heads are ranked together; they are sorted into bins of mass per pair, so that
    samples can be put together later by adding their bins.
    """

    def __init__(self, sample: Sample, densities: Sequence[float]) -> None:
        self._sample, self._densities = sample, densities
        self._alone: dict[str, list[list[float | None]]] = {}
        self._bins: dict[str, Tensor] = {}

    def add(self, units: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a head: mass and pairs of its units for each granularity."""
        heads, q_len = self._sample.query.shape[1:3]
        allowed = allowed_pairs(q_len, self._sample.key.shape[2], self._sample.causal)
        for name, (mass, pairs) in units.items():
            self._alone.setdefault(name, []).append(oracle(mass, pairs, self._sample).recall(self._densities))
            shares = torch.stack((pairs.double() / allowed, mass.double() / q_len)) / heads
            place = (-(mass / pairs).clamp(min=1e-300).log2() * FINE).clamp(0, OCTAVES * FINE - 1).int()
            bins = torch.stack([torch.bincount(place, share, OCTAVES * FINE) for share in shares])
            self._bins[name] = self._bins.get(name, 0) + bins

    def row(self) -> dict[str, object]:
        """JSON-ready: recall of each head alone, and shares of pairs and of mass by bin for the heads together."""
        return {
            "densities": list(self._densities),
            "recall": {name: [rounded(head) for head in heads] for name, heads in self._alone.items()},
            "bins": {name: [rounded(line) for line in bins.tolist()] for name, bins in self._bins.items()},
        }


def together(bins: Sequence[Sequence[Sequence[float]]], densities: Sequence[float]) -> list[float | None]:
    """Recall under one budget for all heads of several samples, from their bins."""
    pairs, mass = torch.tensor(bins, dtype=torch.float64).mean(0)
    there = pairs > 0
    return Curve(pairs[there].cumsum(0), mass[there].cumsum(0)).recall(densities)


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """The values to 6 digits."""
    return [None if x is None else float(f"{x:.6g}") for x in values]


@dataclass(frozen=True)
class Units:
    """1 key x R queries of one head: gap, mass and allowed pairs of each, flat."""

    gap: Tensor
    mass: Tensor
    pairs: Tensor
    allowed: float
    rows: int

    def curve(self) -> Curve:
        """Density and recall for every cut-off; units of equal gap come one by one."""
        return Curve.of(-self.gap, self.mass, self.pairs, self.allowed, self.rows)

    def at(self, alpha: float) -> tuple[float, float]:
        """Density and recall of the set with gap <= alpha."""
        kept = self.gap <= alpha
        return float(self.pairs[kept].sum()) / self.allowed, float(self.mass[kept].sum()) / self.rows

    @staticmethod
    def join(parts: Sequence[Units]) -> Units:
        """Several heads under one cut-off."""
        gap, mass, pairs = (torch.cat([getattr(u, name) for u in parts]) for name in ("gap", "mass", "pairs"))
        return Units(gap, mass, pairs, sum(u.allowed for u in parts), sum(u.rows for u in parts))


def units(sample: Sample, head: int, rule: Rule, columns: Tensor, measure: str = "gap") -> Units:
    """The units of a rule on one head.

    Args:
        sample: of the head.
        rule: pooling, blocks (R a multiple of 64), scope and windows.
        columns: [ceil(Sq / 64), Sk], dense mass of 1 key x 64 queries.
        measure: "gap", the distance to the rule's maximum; "final", the same to the maximum of the whole window; or
            "share", the softmax mass of the pooled row on larger keys (top-p).
    """
    q_len, k_len = sample.query.shape[2], sample.key.shape[2]
    gap = _gaps(sample, head, rule, measure)
    share = rule.q_block_size // 64
    mass = F.pad(columns, (0, 0, 0, -columns.shape[0] % share)).view(-1, share, k_len).sum(1)
    first = torch.arange(mass.shape[0], device=mass.device)[:, None] * rule.q_block_size
    rows = (q_len - first).clamp(max=rule.q_block_size)
    pairs = rows.expand(-1, k_len).double()
    if rule.causal:
        late = torch.arange(k_len, device=mass.device) - (first + k_len - q_len)  # rows of the block before the key
        pairs = (rows - late.clamp(min=0)).clamp(min=0).double()
    seen = pairs > 0
    allowed = allowed_pairs(q_len, k_len, rule.causal)
    return Units(gap[seen], mass[seen].double(), pairs[seen], allowed, q_len)


def _gaps(sample: Sample, head: int, rule: Rule, measure: str) -> Tensor:
    """float32 [blocks of R, Sk]: gap of each key, -inf where it is always kept, +inf where it never is."""
    share = sample.query.shape[1] // sample.key.shape[1]
    query, key = sample.query[:, head : head + 1].float(), sample.key[0, head // share].float()
    q_len, k_len, pool = query.shape[2], key.shape[0], rule.q_pooling_size
    score = reference.pooled_queries(query, pool)[0, 0] @ key.mT * rule.scale
    start = torch.arange(score.shape[0], device=key.device)[:, None] * pool + (k_len - q_len)
    position = torch.arange(k_len, device=key.device)
    candidate = (position >= pool) & (position < start) if rule.causal else torch.ones_like(score, dtype=torch.bool)
    score = score.masked_fill(~candidate, -torch.inf)
    if measure == "share":
        gap = _mass_before(score)
    elif measure == "final":
        gap = _window_top(score, rule) - score
    else:
        gap = reference.cut_off(score, rule) - score
    gap = gap.masked_fill(~candidate, torch.inf)
    if rule.causal:
        forced = (position < pool) | ((position >= start) & (position < start + pool))
        gap = gap.masked_fill(forced, -torch.inf)
    short = -gap.shape[0] % rule.rows_per_block
    return F.pad(gap, (0, 0, 0, short), value=torch.inf).view(-1, rule.rows_per_block, k_len).amin(1)


def _window_top(score: Tensor, rule: Rule) -> Tensor:
    """The maximum of each key's whole window."""
    width = min(rule.k_local_size * rule.group_k_block, -(-score.shape[1] // rule.k_local_size) * rule.k_local_size)
    tops = F.pad(score, (0, -score.shape[1] % width), value=-torch.inf).view(score.shape[0], -1, width).amax(-1)
    return tops.repeat_interleave(width, dim=1)[:, : score.shape[1]]


def _mass_before(score: Tensor) -> Tensor:
    """Softmax mass of each row on keys of a larger score; rows without a candidate give nan, which nobody reads."""
    ranked = torch.softmax(score, -1).sort(stable=True, dim=-1, descending=True)
    before = ranked.values.cumsum(-1) - ranked.values
    return torch.empty_like(before).scatter_(-1, ranked.indices, before)


def rule_for(sample: Sample, pool: int = 64, block: int | None = None, scope: str = "row", group: int = 16) -> Rule:
    """The `Rule` of these settings for a sample."""
    return Rule(pool, max(pool, 64) if block is None else block, 16, group, scope, sample.causal, sample.factor)


def alpha_of(theta: float) -> float:
    """-ln theta."""
    return -math.log(theta)
