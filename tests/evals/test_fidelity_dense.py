"""Dense attention in float64, the mass of units, and the curves made of them, against brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vecattention
from vecattention.evals.fidelity import curves
from vecattention.evals.fidelity.dense import GRANULARITIES, SINGLE, dense
from vecattention.evals.fidelity.samples import Sample
from vecattention.recall import recall
from vecattention.spec import Rule

SHAPES = [(300, 300, True), (200, 333, True), (300, 300, False), (130, 257, False)]


def sample(q_len: int, k_len: int, causal: bool, seed: int = 0) -> Sample:
    dice = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(1, 4, q_len, 16, generator=dice)
    key, value = (torch.randn(1, 2, k_len, 16, generator=dice) for _ in range(2))
    return Sample("random", query, key, value, causal)


def weights(one: Sample, head: int) -> tuple[Tensor, Tensor]:
    """Softmax and allowed pairs of a head, float64 and bool [Sq, Sk]."""
    logits = one.query[0, head].double() @ one.key[0, head // 2].double().T / 4
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if one.causal:
        allowed = allowed.tril(one.key.shape[2] - one.query.shape[2])
    return torch.softmax(logits.masked_fill(~allowed, -math.inf), -1), allowed


def in_unit(name: str, i: int, j: int) -> tuple[int, ...]:
    """Which unit the pair (i, j) belongs to."""
    return {
        "1 key x 64 queries": (i // 64, j),
        "64 keys x 1 query": (i, j // 64),
        "slash of 64 queries": (i // 64, j - i),
        "64 keys x 64 queries": (i // 64, j // 64),
        "128 keys x 128 queries": (i // 128, j // 128),
    }[name]


@pytest.mark.parametrize("q_len, k_len, causal", SHAPES)
def test_output_lse_and_units(q_len: int, k_len: int, causal: bool) -> None:
    one = sample(q_len, k_len, causal)
    head = dense(one, 3)
    weight, allowed = weights(one, 3)
    torch.testing.assert_close(head.out, weight @ one.value[0, 1].double(), rtol=0, atol=1e-12)
    logits = one.query[0, 3].double() @ one.key[0, 1].double().T / 4
    torch.testing.assert_close(head.lse, logits.masked_fill(~allowed, -math.inf).logsumexp(-1), rtol=0, atol=1e-12)
    assert set(head.units) == {g.name for g in GRANULARITIES} | {SINGLE}
    pairs = [(i, j) for i, j in itertools.product(range(q_len), range(k_len)) if allowed[i, j]]
    numbers = weight.tolist()
    for g in GRANULARITIES:
        wanted: dict[tuple[int, ...], list[float]] = {}
        for i, j in pairs:
            wanted.setdefault(in_unit(g.name, i, j), []).append(numbers[i][j])
        mass, count = head.units[g.name]
        got = sorted(zip(count.tolist(), mass.tolist(), strict=True))
        expected = sorted((float(len(values)), math.fsum(values)) for values in wanted.values())
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=0, atol=1e-6)
    mass, count = head.units[SINGLE]
    assert float(count.sum()) == len(pairs) and float(mass.sum()) == pytest.approx(q_len, abs=1e-9)
    for block in range(-(-q_len // 64)):
        torch.testing.assert_close(
            head.columns[block].double(), weight[block * 64 : block * 64 + 64].sum(0), rtol=0, atol=1e-5
        )


def test_oracle_is_the_best_choice_of_units() -> None:
    one = sample(128, 128, True)
    weight, allowed = weights(one, 0)
    curve = curves.oracle(*dense(one, 0).units[SINGLE], one)
    best = weight[allowed].sort(descending=True).values.cumsum(0) / 128
    total = 128 * 129 / 2
    for density in (0.01, 0.05, 0.2, 0.6):
        # Single pairs lie in bins of 2 ** (1 / 32): their order inside a bin is lost, 2.2 % of one bin's mass.
        assert curve.recall([density])[0] == pytest.approx(float(best[round(density * total) - 1]), abs=0.01)
    blocks = curves.oracle(torch.tensor([3.0, 8.0, 1.0]), torch.tensor([2.0, 4.0, 4.0]), sample(4, 3, False))
    assert blocks.recall([4 / 12, 5 / 12, 6 / 12, 1.0]) == pytest.approx([8 / 4, 9.5 / 4, 11 / 4, 12 / 4])


def test_oracle_of_several_heads_ranks_their_units_together() -> None:
    one = sample(256, 256, True, seed=5)
    best = curves.Best(one, (0.1, 0.3))
    heads = [dense(one, h) for h in range(4)]
    for head in heads:
        best.add(head.units)
    row: Any = best.row()
    for name in ("1 key x 64 queries", "64 keys x 64 queries"):
        mass, pairs = (torch.cat([head.units[name][i] for head in heads]) for i in range(2))
        exact = curves.Curve.of(mass / pairs, mass, pairs, 4 * 256 * 257 / 2, 4 * 256).recall((0.1, 0.3))
        # Bins of 2 ** (1 / 8): inside one, the order is lost.
        assert curves.together([row["bins"][name]], (0.1, 0.3)) == pytest.approx(exact, abs=0.01)
        alone = [sum(head[i] for head in row["recall"][name]) / 4 for i in range(2)]
        assert all(a <= t + 0.005 for a, t in zip(alone, exact, strict=True))


def test_a_curve_has_no_recall_below_its_floor() -> None:
    gap = torch.tensor([-math.inf, 0.0, 1.0])
    units = curves.Units(gap, torch.tensor([0.5, 0.3, 0.2]), torch.tensor([2.0, 2.0, 4.0]), 8.0, 1)
    assert units.curve().recall([0.2, 0.25, 0.5, 0.75, 1.0]) == [
        None,
        *(pytest.approx(x) for x in (0.5, 0.8, 0.9, 1.0)),
    ]


RULES = [
    Rule(64, 64, 16, 16, "row", True, 0.25), Rule(32, 128, 16, 16, "row", True, 0.25),
    Rule(16, 64, 16, 4, "window", True, 0.25), Rule(64, 64, 16, 2, "window", False, 0.25),
    Rule(64, 128, 16, 8192, "window", True, 0.25), Rule(32, 64, 16, 16, "row", False, 0.25),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("theta", [0.9, 0.3, 0.05])
def test_units_agree_with_select_and_recall(rule: Rule, theta: float) -> None:
    one = sample(500, 700, rule.causal, seed=1)
    selection = vecattention.select(
        one.query, one.key, threshold=theta, q_pooling_size=rule.q_pooling_size, q_block_size=rule.q_block_size,
        group_k_block=rule.group_k_block, max_scope=rule.max_scope, causal=rule.causal,
    )  # fmt: skip
    densities, recalls = selection.density()[0], recall(one.query, one.key, selection)[0]
    for h in range(4):
        units = curves.units(one, h, rule, dense(one, h, ()).columns)
        density, kept = units.at(curves.alpha_of(theta))
        assert density == pytest.approx(float(densities[h]), abs=1e-6)
        assert kept == pytest.approx(float(recalls[h]), abs=1e-5)
        assert units.curve().recall([density])[0] == pytest.approx(kept, abs=1e-9)
        assert units.curve().recall([1.0])[0] == pytest.approx(1.0, abs=1e-5)


def test_final_maximum_and_top_p() -> None:
    one = sample(192, 512, False, seed=2)
    rule = Rule(64, 64, 16, 4, "window", False, 0.25)
    columns = dense(one, 0, ()).columns
    pooled = one.query[0, 0].view(3, 64, 16).mean(1)
    score = pooled @ one.key[0, 0].T / 4
    final = curves.units(one, 0, rule, columns, "final").gap.view(3, 512)
    wanted = score.view(3, 8, 64).amax(-1).repeat_interleave(64, 1) - score
    torch.testing.assert_close(final, wanted, rtol=0, atol=1e-5)
    share = curves.units(one, 0, rule, columns, "share").gap.view(3, 512)
    p = torch.softmax(score, -1)
    for g, j in itertools.product(range(3), range(0, 512, 37)):
        assert float(share[g, j]) == pytest.approx(float(p[g][p[g] > p[g, j]].sum()), abs=1e-5)


def test_heads_under_one_cut_off() -> None:
    one = sample(300, 300, True, seed=3)
    rule = curves.rule_for(one)
    parts = [curves.units(one, h, rule, dense(one, h, ()).columns) for h in range(4)]
    joined = curves.Units.join(parts)
    each = [part.at(1.0) for part in parts]
    density, kept = joined.at(1.0)
    assert density == pytest.approx(sum(d for d, _ in each) / 4) and kept == pytest.approx(sum(r for _, r in each) / 4)
