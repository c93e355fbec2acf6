"""Dealing heads to ranks, and the small functions that sharding rests on."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vecattention
from vecattention import bits
from vecattention.integrations.context_parallel import head_order, imbalance
from vecattention.integrations.ring import columns, merge


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_an_order_deals_every_head_once_and_as_many_to_each_rank(ranks: int, share: int, seed: int) -> None:
    cost = torch.rand(ranks * share, generator=torch.Generator().manual_seed(seed)).exp()
    order = head_order(cost, ranks)
    assert sorted(order.tolist()) == list(range(ranks * share))
    dealt = cost[order].view(ranks, share)
    top = set(cost.topk(ranks).values.tolist())
    assert all(len(top & set(row.tolist())) == 1 for row in dealt)  # the costliest share no rank
    loads = dealt.double().sum(1)
    assert float(loads.max() - loads.min()) <= float(cost.max()) + 1e-6


def test_equal_costs_keep_a_fixed_order() -> None:
    assert head_order(torch.zeros(6), 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert head_order(torch.ones(6), 2).tolist() == [0, 2, 4, 1, 3, 5]


def test_layers_are_dealt_together() -> None:
    cost = torch.rand(5, 12)
    assert torch.equal(head_order(cost, 4), torch.stack([head_order(row, 4) for row in cost]))


def test_the_order_is_near_the_best_one() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        cost = torch.rand(6) ** 2 + 0.05
        splits = (set(split) for split in itertools.combinations(range(6), 3))
        best = min(max(float(cost[list(s)].sum()), float(cost.sum() - cost[list(s)].sum())) for s in splits)
        mine = imbalance(cost, 2, head_order(cost, 2)) * float(cost.sum()) / 2
        assert mine <= 1.2 * best


@pytest.mark.parametrize(("ranks", "asis", "dealt"), [(2, 1.08, 1.00), (4, 1.25, 1.01), (8, 1.53, 1.03)])
def test_densities_as_sparse_heads_have_them_are_balanced(ranks: int, asis: float, dealt: float) -> None:
    """A few dense heads beside many sparse ones: the figures of docs/many-gpus.md."""
    torch.manual_seed(0)
    costs = torch.distributions.LogNormal(-1.5, 0.8).sample((50, 40)).clamp(max=1.0)
    before = torch.tensor([imbalance(cost, ranks) for cost in costs]).mean()
    after = torch.tensor([imbalance(cost, ranks, head_order(cost, ranks)) for cost in costs]).mean()
    assert (round(float(before), 2), round(float(after), 2)) == (asis, dealt)


def test_ranks_that_do_not_divide_the_heads() -> None:
    with pytest.raises(ValueError, match="cost has 10 heads, wanted a multiple of the 4 ranks"):
        head_order(torch.rand(10), 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 130), st.data())
def test_columns_are_the_bits_of_a_range(keys: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, keys - 1))
    stop = data.draw(st.integers(start + 1, keys))
    kept = torch.rand(2, 3, keys, generator=torch.Generator().manual_seed(keys)) < 0.5
    part = columns(bits.pack(kept), start, stop)
    assert torch.equal(bits.unpack(part, stop - start), kept[..., start:stop])
    assert torch.equal(part, bits.pack(kept[..., start:stop]))


def test_merging_two_halves_is_the_whole() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 70, 16) for _ in range(3))
    arguments = {"causal": False, "threshold": 1e-30, "return_lse": True}
    whole, lse = vecattention.vec_attention(query, key, value, **arguments)
    halves = [
        vecattention.vec_attention(query, key[:, :, part], value[:, :, part], **arguments)
        for part in (slice(0, 30), slice(30, 70))
    ]
    out, merged = merge(*halves[0], *halves[1])
    assert (out - whole).abs().max() < 1e-6 and (merged - lse).abs().max() < 1e-6


def test_merging_nothing_with_something() -> None:
    nothing, none = torch.zeros(1, 2), torch.full((1,), -torch.inf)
    something, lse = torch.ones(1, 2), torch.full((1,), 3.0)
    for out, total in (merge(nothing, none, something, lse), merge(something, lse, nothing, none)):
        assert torch.equal(out, something) and torch.equal(total, lse)
    out, total = merge(nothing, none, nothing, none)
    assert torch.equal(out, nothing) and torch.equal(total, none)
