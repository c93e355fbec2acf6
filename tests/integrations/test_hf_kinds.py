"""Every real class that is served: dense as before, exact near threshold 0, and sparse in chunks and batches alike."""

from __future__ import annotations

from typing import Any

import hf_tiny
import pytest
import torch
from hf_tiny import KINDS, Inputs, Kind

import vecattention

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # the models' norms and rotary tables compute in float32 whatever the weights
LAYERS = 2


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model(kind: Kind) -> Any:
    return kind.make()


def logits(model: Any, inputs: Inputs, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, **more).logits
    return out


def test_dense_is_what_the_model_had(model: Any, kind: Kind) -> None:
    stock = logits(model, kind.inputs())
    with vecattention.apply(model, min_length=10**6) as run:
        assert torch.equal(logits(model, kind.inputs()), stock)
    assert (run.stats.dense_calls, run.stats.sparse_calls, run.stats.mean_density) == (LAYERS, 0, 1.0)


def test_near_zero_is_dense_attention(model: Any, kind: Kind) -> None:
    stock = logits(model, kind.inputs())
    with vecattention.apply(model, threshold=1e-30) as run:
        torch.testing.assert_close(logits(model, kind.inputs()), stock, **CLOSE)
    assert (run.stats.dense_calls, run.stats.sparse_calls, run.stats.mean_density) == (0, LAYERS, 1.0)


def test_sparse_leaves_keys_out_in_every_layer_and_head(model: Any, kind: Kind) -> None:
    stock = logits(model, kind.inputs())
    with vecattention.apply(model) as run:
        assert not torch.allclose(logits(model, kind.inputs()), stock, **CLOSE)
    assert run.stats.density.shape == (LAYERS, 4)
    assert (run.stats.density > 0.3).all() and (run.stats.density < 0.9).all()
    assert torch.equal(run.stats.density, run.stats.sparse_density)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks_is_one_prefill(model: Any, kind: Kind, cache: str) -> None:
    from transformers import DynamicCache, StaticCache

    ids = hf_tiny.text(330)["input_ids"]
    with vecattention.apply(model) as run:
        whole = logits(model, {"input_ids": ids})
        kept = DynamicCache() if cache == "dynamic" else StaticCache(model.config.get_text_config(), max_cache_len=400)
        places = torch.arange(330)[None]
        parts = [
            logits(model, {"input_ids": ids[:, part]}, past_key_values=kept, position_ids=places[:, part])
            for part in (slice(0, 128), slice(128, 192), slice(192, 330))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    assert run.stats.sparse_calls == LAYERS * 3, "the whole, and two chunks of the three: the first is too short"
    assert run.stats.mean_density < 0.9


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_prefills_sparsely_and_decodes_densely(model: Any, kind: Kind, cache: str) -> None:
    wish = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    stock = model.generate(**kind.inputs(), **wish)
    with vecattention.apply(model, threshold=1e-30) as run:
        assert torch.equal(model.generate(**kind.inputs(), **wish), stock)
    assert (run.stats.sparse_calls, run.stats.decode_calls, run.stats.dense_calls) == (LAYERS, LAYERS * 4, 0)


@pytest.mark.parametrize("name", [name for name in KINDS if "-VL" not in name])
def test_generate_in_chunks(name: str) -> None:
    """Without the Qwen VL models, whose `prefill_chunk_size` transformers 5.17 does not serve with any attention."""
    model, inputs = KINDS[name].make(), hf_tiny.text(330)
    with vecattention.apply(model) as run:
        whole = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, prefill_chunk_size=128), whole)
    assert run.stats.sparse_calls == LAYERS * 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_sequences_alone(model: Any, kind: Kind, side: str) -> None:
    sequences = [kind.inputs(words=words, seed=words) for words in (90, 40, 61)]
    batch = hf_tiny.padded(sequences, side)
    with vecattention.apply(model) as alone:
        wanted = [logits(model, s, attention_mask=torch.ones_like(s["input_ids"])) for s in sequences]
    with vecattention.apply(model) as together:
        got = logits(model, batch)
    for row, mask, want in zip(got, batch["attention_mask"].bool(), wanted, strict=True):
        torch.testing.assert_close(row[mask], want[0], **CLOSE)
    assert torch.equal(together.stats.density, alone.stats.density)
    assert together.stats.density.max() < 0.9
    assert together.stats.reasons == {}


def test_a_padded_batch_generates_what_its_sequences_do(model: Any, kind: Kind) -> None:
    sequences = [kind.inputs(words=words, seed=words) for words in (90, 40)]
    batch = hf_tiny.padded(sequences, "left")
    batch.pop("position_ids", None)  # generate makes them
    with vecattention.apply(model):
        wanted = [model.generate(**s, max_new_tokens=4, do_sample=False)[0, -4:] for s in sequences]
        got = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:]
    assert torch.equal(got, torch.stack(wanted))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.pixels is not None])
def test_vision_towers_keep_their_attention(name: str) -> None:
    model = KINDS[name].make()
    with vecattention.apply(model) as run:
        assert model.config.text_config._attn_implementation == "vecattention"
        assert model.config.vision_config._attn_implementation == "sdpa"
        logits(model, KINDS[name].inputs())
    assert run.stats.calls == LAYERS
