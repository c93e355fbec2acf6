"""Attention-mass recall, against dense attention in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vecattention
from vecattention.recall import recall
from vecattention.spec import Selection


def brute_force(query: Tensor, key: Tensor, selection: Selection, scale: float) -> Tensor:
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * scale
    if selection.causal:
        rows, keys = scores.shape[2:]
        scores = scores.masked_fill(~torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows), -torch.inf)
    mass = torch.where(selection.mask(), scores.softmax(-1), 0.0)
    return mass.sum(-1).mean(-1)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    causal = draw(st.booleans())
    q_len = draw(st.integers(1, 260))
    k_len = q_len + draw(st.integers(0, 200)) if causal else draw(st.integers(1, 300))
    kv_heads, group, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    draw_numbers = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    query = torch.randn(batch, kv_heads * group, q_len, 16, generator=draw_numbers) * 2
    key = torch.randn(batch, kv_heads, k_len, 16, generator=draw_numbers)
    block = draw(st.sampled_from([None, 64, 128]))
    selection = vecattention.select(
        query,
        key,
        threshold=draw(st.sampled_from([0.9, 0.3, 1e-3])),
        q_pooling_size=32,
        q_block_size=block,
        causal=causal,
    )
    return {"query": query, "key": key, "selection": selection, "scale": draw(st.sampled_from([None, 0.5]))}


@settings(max_examples=80, deadline=None)
@given(problems(), st.sampled_from([None, 1, 7, 64, 10**6]))
def test_it_is_the_mass_on_the_selected_keys(problem: dict[str, Any], step: int | None) -> None:
    got = recall(**problem, rows_per_step=step)
    wanted = brute_force(**{**problem, "scale": problem["scale"] or 0.25})
    assert got.dtype == torch.float32 and got.shape == problem["query"].shape[:2]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_it_is_one_when_all_is_kept_and_falls_with_the_threshold() -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 1, 32, generator=draw).expand(1, 4, 600, 32)  # a block of queries that agree
    key = torch.randn(1, 2, 600, 32, generator=draw)
    values = [
        recall(query, key, vecattention.select(query, key, threshold=theta, max_scope="row"))
        for theta in (1e-30, 0.1, 0.5, 0.9)
    ]
    torch.testing.assert_close(values[0], torch.ones(1, 4))
    for more, less in zip(values, values[1:], strict=False):
        assert (more > less).all() and (less > 0).all()


def test_the_steps_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(1, 2, 500, 16), torch.randn(1, 1, 500, 16)
    selection = vecattention.select(query, key)
    whole = recall(query, key, selection)
    sizes = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: (sizes.append(x.numel()), softmax(x, dim))[1])
    monkeypatch.setattr("vecattention.recall.SCORES", 50_000)
    torch.testing.assert_close(recall(query, key, selection), whole)
    assert len(sizes) == 10 and max(sizes) <= 50_000


def test_inputs_are_left_as_they_were() -> None:
    query, key = torch.randn(1, 2, 200, 16), torch.randn(1, 1, 200, 16)
    copies = query.clone(), key.clone()
    recall(query, key, vecattention.select(query, key))
    assert torch.equal(query, copies[0]) and torch.equal(key, copies[1])


@pytest.mark.parametrize("step", [0, -1, 1.5, True, "all"])
def test_steps_that_are_none(step: Any) -> None:
    query = torch.randn(1, 1, 100, 16)
    with pytest.raises(ValueError, match="rows_per_step is .*, wanted an integer of at least 1; pass None to leave it"):
        recall(query, query, vecattention.select(query, query), rows_per_step=step)


def test_arguments_that_do_not_fit() -> None:
    query = torch.randn(1, 1, 100, 16)
    selection = vecattention.select(query, query)
    with pytest.raises(ValueError, match="selection is for"):
        recall(query[:, :, :50], query, selection)
    with pytest.raises(TypeError, match="selection is a Tensor, wanted a Selection"):
        recall(query, query, query)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale is 0, wanted a finite number over 0"):
        recall(query, query, selection, scale=0)
    with pytest.raises(ValueError, match="key has head_dim 32, wanted 16"):
        recall(query, torch.randn(1, 1, 100, 32), selection)
