"""FlexPrefill against its maths written with loops over plain numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vecattention import methods
from vecattention.methods.flexprefill import divergence

SHAPES = [(1, 2, 1, 384, 384), (2, 4, 2, 301, 301), (1, 2, 2, 200, 455), (1, 1, 1, 70, 300), (1, 2, 1, 256, 512)]


def scores(q: Tensor, k: Tensor) -> list[list[float]]:
    """softmax rows of the last queries, 0 in the future."""
    rows = []
    n = min(128, q.shape[0])
    products = (q[-n:] @ k.T / math.sqrt(q.shape[1])).tolist()
    for r in range(n):
        position = k.shape[0] - n + r
        logits = products[r][: position + 1]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        rows.append([w / math.fsum(weights) for w in weights] + [0.0] * (k.shape[0] - position - 1))
    return rows


def budget(share: list[float], gamma: float) -> int:
    total, entries = 0.0, 1
    for x in sorted(share, reverse=True):
        total += x
        entries += total <= gamma
    return math.floor(entries / 128) + 1


def best(sums: list[float], count: int) -> set[int]:
    order = sorted(range(1, len(sums)), key=lambda i: -sums[i])
    return {0, *order[: count - 1]}


def brute(q: Tensor, k: Tensor, gamma: float, tau: float, least: int, most: int) -> tuple[Tensor, bool]:
    """bool [Sq, Sk] and whether the head is query-aware. Key blocks are counted so that the diagonal is whole."""
    q_len, k_len = q.shape[0], k.shape[0]
    offset, scale = k_len - q_len, q.shape[1] ** -0.5
    lead = -offset % 128
    n_q, n_k = math.ceil(q_len / 128), math.ceil((k_len + lead) / 128)
    own = [(i * 128 + offset + lead) // 128 for i in range(n_q)]
    last = scores(q, k)
    n = len(last)
    vertical = [math.fsum(row[j] for row in last) / n for j in range(k_len)]
    slash = [
        math.fsum(last[r][k_len - n + r - o] for r in range(n) if k_len - n + r - o >= 0) / n for o in range(k_len)
    ]
    column_sums = [math.fsum(vertical[j] for j in range(k_len) if (j + lead) // 128 == v) for v in range(n_k)]
    slash_sums = [math.fsum(slash[o] for o in range(k_len) if o // 128 == t) for t in range(n_k)]
    k_means = [k[[j for j in range(k_len) if (j + lead) // 128 == v]].mean(0) for v in range(n_k)]
    q_means = [q[i * 128 : (i + 1) * 128].mean(0) for i in range(n_q)]
    guess = [float(q[-n:].mean(0) @ mean) * scale for mean in k_means]
    weights = [math.exp(x - max(guess)) for x in guess]
    guess = [w / sum(weights) for w in weights]
    js = 0.0
    for a, b in zip(guess, column_sums, strict=True):
        middle = (a + b) / 2
        js += sum(x * math.log(x / middle) for x in (a, b) if x > 0) / 2
    aware = math.sqrt(max(js, 0.0)) < tau
    counts = [least, least] if aware else [min(max(budget(x, gamma), least), most) for x in (vertical, slash)]
    columns, slashes = best(column_sums, counts[0]), best(slash_sums, counts[1])
    kept = {(i, v) for i in range(n_q) for v in columns if v <= own[i]}
    kept |= {(i, own[i] - t) for i in range(n_q) for t in slashes if own[i] >= t}
    if aware:
        entries = []
        for i in range(n_q):
            row = [float(q_means[i] @ k_means[v]) * scale for v in range(own[i] + 1)]
            weights = [math.exp(x - max(row)) for x in row]
            entries += [(w / sum(weights), i, v) for v, w in enumerate(weights)]
        total = 0.0
        for share, i, v in sorted(entries, reverse=True):
            total += share
            if total <= gamma * n_q:
                kept.add((i, v))
    mask = torch.zeros(q_len, k_len, dtype=torch.bool)
    for i in range(q_len):
        seen = [v for v in range(n_k) if (i // 128, v) in kept]
        for v in seen:
            mask[i, max(0, v * 128 - lead) : min(v * 128 + 128 - lead, i + offset + 1)] = True
    return mask, aware


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_sets_equal_brute_force(case: Any, shape: tuple[int, ...], gamma: float) -> None:
    problem = case(*shape)
    query, key, _ = problem.tensors(seed=shape[3])
    got = methods.get("flexprefill").select(query, key, causal=True, gamma=gamma).mask()
    assert torch.equal(got, problem.brute(lambda q, k, _: brute(q, k, gamma, 0.1, 1, 99)[0], query, key))


@pytest.mark.parametrize("shape", [(1, 2, 1, 640, 640), (1, 2, 1, 333, 460)], ids=str)
def test_query_aware_heads_equal_brute_force(case: Any, shape: tuple[int, ...]) -> None:
    problem = case(*shape)
    query, key, _ = problem.tensors(seed=5)
    results = [brute(query[0, h], key[0, 0], 0.6, 0.7, 1, 99) for h in range(2)]
    assert all(aware for _, aware in results)
    got = methods.get("flexprefill").select(query, key, causal=True, gamma=0.6, tau=0.7).mask()[0]
    assert torch.equal(got, torch.stack([mask for mask, _ in results]))


def test_budgets_bound_the_blocks(case: Any) -> None:
    problem = case(1, 2, 1, 700, 700)
    query, key, _ = problem.tensors(seed=2)
    method = methods.get("flexprefill")
    for arguments, least, most in [({"min_budget": 400}, 4, 99), ({"max_budget": 300, "gamma": 1.0}, 1, 2)]:
        gamma = arguments.get("gamma", 0.9)
        got = method.select(query, key, causal=True, **arguments).mask()

        def one(q: Tensor, k: Tensor, _: int, g: float = gamma, low: int = least, high: int = most) -> Tensor:
            return brute(q, k, g, 0.1, low, high)[0]

        assert torch.equal(got, problem.brute(one, query, key))


def test_short_sequences_stay_dense(case: Any) -> None:
    query, key, _ = case(1, 2, 1, 256, 256).tensors()
    assert methods.get("flexprefill").select(query, key, causal=True).density().eq(1).all()
    query, key, _ = case(1, 2, 1, 400, 400).tensors()
    assert methods.get("flexprefill").select(query, key, causal=True, gamma=0.1).density().lt(1).all()


def test_divergence_of_equal_and_disjoint_distributions() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    assert divergence(p, p).item() == 0.0
    assert divergence(p, p.flip(-1)).item() == pytest.approx(math.log(2))
