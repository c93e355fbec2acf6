"""Queries, keys and values taken from a dense prefill."""

from __future__ import annotations

from typing import Any

import hf_tiny
import pytest
import torch
from transformers import DynamicCache

import vecattention
from vecattention.integrations.capture import capture

IDS = hf_tiny.text(330)["input_ids"]


@pytest.fixture(scope="module")
def model() -> Any:
    return hf_tiny.Kind(hf_tiny.llama).make()


def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids, **more).logits
    return out


def test_it_is_what_attention_was_given(model: Any) -> None:
    stock = logits(model, IDS)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with capture(model) as maps:
        assert torch.equal(logits(model, IDS), stock)
    handle.remove()
    assert sorted(maps) == [0, 1]
    entry = maps[1]
    assert entry.query.shape == (1, 4, 330, 16) and entry.key.shape == entry.value.shape == (1, 2, 330, 16)
    out = torch.nn.functional.scaled_dot_product_attention(
        entry.query, entry.key, entry.value, is_causal=True, scale=entry.scaling, enable_gqa=True
    )
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), seen[0])


def test_chunks_are_joined_and_a_new_sequence_replaces(model: Any) -> None:
    with capture(model, layers=[1]) as maps:
        logits(model, IDS[:, :77])
        logits(model, IDS)
    with capture(model, layers=[1]) as joined:
        cache = DynamicCache()
        for part in IDS.split(100, dim=1):
            logits(model, part, past_key_values=cache)
        logits(model, IDS[:, :1], past_key_values=cache)
    assert sorted(maps) == sorted(joined) == [1]
    for name in ("query", "key", "value"):
        torch.testing.assert_close(getattr(joined[1], name), getattr(maps[1], name), rtol=1e-6, atol=1e-6)


def test_at_most_so_many_tokens(model: Any) -> None:
    with capture(model) as whole:
        logits(model, IDS)
    for parts in ((IDS,), IDS.split(100, dim=1)):
        cache = DynamicCache()
        with capture(model, max_tokens=150) as maps:
            for part in parts:
                logits(model, part, past_key_values=cache)
        for name in ("query", "key", "value"):
            first = getattr(whole[0], name)[:, :, :150]
            torch.testing.assert_close(getattr(maps[0], name), first, rtol=1e-6, atol=1e-6)


def test_inside_of_a_run_it_is_dense(model: Any) -> None:
    with vecattention.apply(model) as run, capture(model):
        logits(model, IDS)
    assert run.stats.calls == 0


def test_arguments_that_do_not_fit(model: Any) -> None:
    with pytest.raises(ValueError, match="layers holds 2, wanted 0 to 1 of this model; leave it out"):
        with capture(model, layers=[2]):
            pass
    with pytest.raises(ValueError, match="max_tokens is 0, wanted at least 1; pass None to keep all"):
        with capture(model, max_tokens=0):
            pass
    with pytest.raises(TypeError, match="wanted a transformers model"):
        with capture(torch.nn.Linear(2, 2)):
            pass
