"""AnchorAttention against its maths written with loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vecattention import methods

SHAPES = [(1, 2, 1, 1024, 1024), (2, 2, 1, 700, 700), (1, 2, 2, 600, 990), (1, 2, 1, 255, 255)]


def brute(q: Tensor, k: Tensor, theta: float, step: int) -> Tensor:
    """bool [Sq, Sk]."""
    q_len, k_len = q.shape[0], k.shape[0]
    offset, span = k_len - q_len, 128 * step
    logits = (q @ k.T / math.sqrt(q.shape[1])).tolist()
    mask = torch.zeros(q_len, k_len, dtype=torch.bool)
    for r in range(q_len // span):
        start = r * span + offset
        stripes = set()
        for tile in range(step):
            rows = range(r * span + tile * 128, r * span + tile * 128 + 128)
            anchors = []
            for i in rows:
                near = [j for j in range(i + offset + 1) if j < span or start <= j < start + span]
                anchors.append(max(logits[i][j] for j in near))
            for j in range(start):
                if sum(logits[i][j] for i in rows) / 128 + theta >= sum(anchors) / 128:
                    stripes.add(j)
        for i in range(r * span, (r + 1) * span):
            mask[i, : i + offset + 1] = torch.tensor(
                [j < span or start <= j or j in stripes for j in range(i + offset + 1)]
            )
    for i in range(q_len // span * span, q_len):
        mask[i, : i + offset + 1] = True
    return mask


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("theta, step", [(8.0, 1), (7.0, 2)])
def test_sets_equal_brute_force(case: Any, shape: tuple[int, ...], theta: float, step: int) -> None:
    problem = case(*shape)
    query, key, _ = problem.tensors(seed=shape[3])
    got = methods.get("anchorattention").select(query, key, causal=True, theta=theta, step=step)
    assert torch.equal(got.mask(), problem.brute(lambda q, k, _: brute(q, k, theta, step), query, key))


def test_published_super_blocks_and_their_rest(case: Any) -> None:
    query, key, _ = case(1, 1, 1, 4500, 4500).tensors(seed=3)
    selection = methods.get("anchorattention").select(query, key, causal=True, theta=-math.inf)
    assert selection.columns(0, 0, 15).tolist() == list(range(2048))
    assert selection.columns(0, 0, 31).tolist() == list(range(4096))
    assert selection.columns(0, 0, 32).tolist() == list(range(4224))  # rows after the last whole super-block


def test_keys_just_before_a_super_block_can_be_selected(case: Any) -> None:
    query, key, _ = case(1, 1, 1, 512, 512).tensors(seed=3)
    key[:, :, 250] = 40 * query[:, :, 256:384].mean(2)
    selection = methods.get("anchorattention").select(query, key, causal=True, theta=0.0, step=1)
    assert 250 in selection.columns(0, 0, 2).tolist()


def test_theta_orders_the_sets(case: Any) -> None:
    query, key, _ = case(1, 2, 1, 900, 900).tensors(seed=4)
    method = methods.get("anchorattention")
    sparse, dense = (method.select(query, key, causal=True, theta=t, step=1).mask() for t in (2.0, 8.0))
    assert not (sparse & ~dense).any() and (dense & ~sparse).any()
