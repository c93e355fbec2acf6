"""XAttention against its maths written with loops over plain numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vecattention import methods

CAUSAL = [(1, 2, 1, 384, 384), (2, 4, 2, 301, 301), (1, 2, 2, 200, 455), (1, 1, 1, 1, 300), (1, 2, 1, 256, 512)]
FREE = [(1, 2, 1, 384, 384), (2, 2, 1, 300, 415), (1, 1, 1, 415, 130)]


def brute(q: Tensor, k: Tensor, threshold: float, stride: int, norm: float, causal: bool) -> Tensor:
    """bool [Sq, Sk] from scores of groups of real tokens, groups of keys counted so that the diagonal is whole."""
    q_len, k_len = q.shape[0], k.shape[0]
    offset = k_len - q_len
    lead = -offset % 128 if causal else 0
    n_q, n_k = math.ceil(q_len / 128), math.ceil((k_len + lead) / 128)
    products = q @ k.T
    mass = [[0.0] * n_k for _ in range(n_q)]
    for r in range(math.ceil(q_len / stride)):
        own = (r * stride + offset + lead) // stride
        logits = {}
        for c in range((own + 1) if causal else math.ceil(k_len / stride)):
            pairs = [(r * stride + stride - 1 - t, c * stride + t - lead) for t in range(stride)]
            if not any(0 <= j < k_len for _, j in pairs):
                continue
            real = [float(products[i, j]) for i, j in pairs if i < q_len and 0 <= j < k_len]
            logits[c] = sum(real) / (math.sqrt(q.shape[1]) * stride * norm)
        top = max(logits.values())
        total = math.fsum(math.exp(x - top) for x in logits.values())
        for c, x in logits.items():
            mass[r * stride // 128][c * stride // 128] += math.exp(x - top) / total
    mask = torch.zeros(q_len, k_len, dtype=torch.bool)
    for i_block, row in enumerate(mass):
        own_block = i_block + (offset + lead) // 128
        forced = sorted({0, own_block}) if causal else []
        rest = sorted(
            (v for v in range(n_k) if v not in forced and not (causal and v > own_block)), key=lambda v: -row[v]
        )
        needed, before, kept = threshold * math.fsum(row), sum(row[v] for v in forced), set(forced)
        for v in rest:
            if before < needed:
                kept.add(v)
            before += row[v]
        for v in kept:
            mask[i_block * 128 : i_block * 128 + 128, max(0, v * 128 - lead) : v * 128 + 128 - lead] = True
    if causal:
        mask &= torch.arange(k_len) <= torch.arange(q_len)[:, None] + offset
    return mask


@pytest.mark.parametrize("shape, causal", [(s, True) for s in CAUSAL] + [(s, False) for s in FREE], ids=str)
@pytest.mark.parametrize("threshold, stride, norm", [(0.5, 16, 1.0), (0.8, 8, 0.25)])
def test_sets_equal_brute_force(
    case: Any, shape: tuple[int, ...], causal: bool, threshold: float, stride: int, norm: float
) -> None:
    problem = case(*shape)
    query, key, _ = problem.tensors(seed=shape[4])
    arguments = {"threshold": threshold, "stride": stride, "norm": norm}
    got = methods.get("xattention").select(query, key, causal=causal, **arguments).mask()
    wanted = problem.brute(lambda q, k, _: brute(q, k, threshold, stride, norm, causal), query, key)
    assert torch.equal(got, wanted)


def test_a_threshold_for_each_head(case: Any) -> None:
    problem = case(1, 2, 1, 600, 600)
    query, key, _ = problem.tensors(seed=1)
    method = methods.get("xattention")
    both = method.select(query, key, causal=True, threshold=torch.tensor([0.3, 0.95])).mask()
    for head, threshold in enumerate((0.3, 0.95)):
        alone = method.select(query, key, causal=True, threshold=threshold).mask()
        assert torch.equal(both[:, head], alone[:, head])
    assert not torch.equal(both[:, 0], both[:, 1])


def test_padding_has_no_mass(case: Any) -> None:
    """Non-causal keys past the end would win against keys of negative score if they counted as zeros."""
    query, key, _ = case(1, 1, 1, 128, 129).tensors(seed=0)
    query, key = query.abs(), -key.abs()
    kept = methods.get("xattention").select(query, key, causal=False, threshold=0.4)
    assert kept.columns(0, 0, 0).numel() in (1, 128)


@pytest.mark.parametrize("stride", [0, 7, 256, 2.0, True])
def test_stride_must_divide_a_block(case: Any, stride: object) -> None:
    query, key, _ = case(1, 1, 1, 128, 128).tensors()
    with pytest.raises((TypeError, ValueError), match="stride is .*, wanted a divisor of 128"):
        methods.get("xattention").select(query, key, causal=True, stride=stride)
