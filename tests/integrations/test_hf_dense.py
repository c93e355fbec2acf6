"""What stays dense: each reason is given once, and the answer is the one that the model had before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import hf_tiny
import pytest
import torch
from transformers import DynamicCache, StaticCache

import vecattention
from vecattention.integrations.call import Call
from vecattention.integrations.clock import Interval
from vecattention.integrations.run import Run
from vecattention.integrations.serve import no_backend, why_dense
from vecattention.integrations.settings import settings_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def build(make: Callable[[], Any]) -> Any:
    return hf_tiny.Kind(make).make()


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs).logits
    return out


def ids(length: int = 300, batch: int = 1) -> torch.Tensor:
    return torch.cat([hf_tiny.text(length, seed)["input_ids"] for seed in range(batch)])


def with_a_hole() -> dict[str, Any]:
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, 100:110] = 0
    return {"input_ids": ids(batch=2), "attention_mask": mask}


def packed() -> dict[str, Any]:
    places = torch.cat((torch.arange(140), torch.arange(160)))[None]
    return {"input_ids": ids(), "position_ids": places, "use_cache": False}


def own_mask() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": torch.ones(1, 1, 300, 300, dtype=torch.bool).tril().triu(-200)}


MASK = "the mask is not plain causal"
REASONS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], str]] = {
    "hole": (hf_tiny.llama, with_a_hole, MASK),
    "packed": (hf_tiny.llama, packed, MASK),
    "own mask": (hf_tiny.llama, own_mask, MASK),
    "short": (hf_tiny.llama, lambda: {"input_ids": ids(128)}, "the sequence has fewer than min_length=129 keys"),
    "window": (hf_tiny.mistral, lambda: {"input_ids": ids()}, MASK),
    "head size": (lambda: hf_tiny.mistral(None, 24), lambda: {"input_ids": ids()}, "head_dim is 24 for keys and 24"),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_reason_is_given_once_and_the_answer_is_stock(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, inputs, reason = REASONS[case]
    model = build(make)
    stock = logits(model, **inputs())
    with caplog.at_level(logging.WARNING), vecattention.apply(model, threshold=0.9) as run:
        for _ in range(2):
            assert torch.equal(logits(model, **inputs()), stock)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("vecattention: attention stays dense in ")
    assert reason in record.message
    assert list(run.stats.reasons.values()) == [4] and next(iter(run.stats.reasons)) in record.message
    assert (run.stats.dense_calls, run.stats.sparse_calls, run.stats.mean_density) == (4, 0, 1.0)


def test_another_run_gives_the_reason_again(caplog: pytest.LogCaptureFixture) -> None:
    model = build(hf_tiny.llama)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with vecattention.apply(model):
                logits(model, input_ids=ids(100))
    assert len(caplog.records) == 2


def test_short_calls_are_counted_and_timed() -> None:
    """Padded in front or not, alone or before a longer one."""
    model = build(hf_tiny.llama)
    padded = torch.ones(2, 100, dtype=torch.long)
    padded[0, :40] = 0
    with vecattention.apply(model) as run:
        logits(model, input_ids=ids(100).repeat(2, 1), attention_mask=padded)
        before = run.stats.seconds
        assert before > 0 and run.stats.untimed_calls == 0
        logits(model, input_ids=ids(100))
        logits(model, input_ids=ids(300))
    pairs = [n * (n + 1) // 2 for n in (60, 100, 100)]
    for layer in run.stats.layers.values():
        assert (layer.dense_calls, layer.sparse_calls, layer.dense_pairs) == (2, 1, sum(pairs))
    assert run.stats.seconds > before


@pytest.mark.parametrize(("keys", "untimed"), [(1023, 1), (1024, 0)])
def test_on_a_gpu_very_short_calls_are_not_timed(keys: int, untimed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vecattention.integrations import run as module

    made: list[Any] = []
    monkeypatch.setattr(module, "Interval", lambda device: (made.append(device), Interval(torch.device("cpu")))[1])
    layer = torch.nn.Module().eval()
    layer.layer_idx = 0
    gpu = SimpleNamespace(shape=(1, 2, keys, 16), device=torch.device("cuda"), requires_grad=False)
    call = Call(layer, gpu, gpu, gpu, None, None, 0.0, True, {})
    monkeypatch.setattr(Call, "dense", lambda self: (self.query, None))
    run = Run(settings_of(layers=1, heads=2, min_length=10**6))
    assert run.forward(call) == (gpu, None)
    assert run.stats.untimed_calls == untimed and len(made) == 1 - untimed
    assert (" 1 short calls not timed" in str(run)) == bool(untimed)


@pytest.mark.parametrize("case", [name for name in REASONS if name not in ("short", "head size")])
def test_a_short_call_has_another_reason_where_there_is_one(case: str) -> None:
    """To lower min_length would be no help. Nor does it matter what calls came before."""
    make, inputs, reason = REASONS[case]
    model = build(make)
    with vecattention.apply(model, min_length=10**6) as run:
        logits(model, input_ids=ids(50))
        logits(model, **inputs())
        logits(model, **inputs())
    (short,) = (said for said in run.stats.reasons if said.startswith("the sequence has fewer than"))
    said = {other: count for other, count in run.stats.reasons.items() if other != short}
    assert run.stats.reasons[short] == 2
    ((other, count),) = said.items()
    assert other.startswith(reason) and count == 4


def test_training_is_the_reason_of_short_calls_too() -> None:
    model = build(hf_tiny.llama)
    with vecattention.apply(model, min_length=10**6) as run:
        for training in (False, True, False):
            model.train(training)
            logits(model, input_ids=ids())
    assert [(said[:24], count) for said, count in run.stats.reasons.items()] == [
        ("the sequence has fewer t", 4), ("the model is in training", 2)
    ]  # fmt: skip


def test_a_call_that_fails_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(hf_tiny.llama)

    def fails(self: Call) -> Any:
        raise torch.OutOfMemoryError("no room")

    with vecattention.apply(model, min_length=10**6) as run:
        with monkeypatch.context() as patch:
            patch.setattr(Call, "dense", fails)
            with pytest.raises(torch.OutOfMemoryError):
                logits(model, input_ids=ids(100))
        assert run.stats.calls == 0 and len(run.stats.reasons) == 1, "but why it was dense is said"


def test_decoding_is_dense_by_design_and_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = build(hf_tiny.llama)
    with caplog.at_level(logging.INFO), vecattention.apply(model) as run:
        model.generate(ids(), max_new_tokens=3, do_sample=False)
    ours = [record for record in caplog.records if record.name.startswith("vecattention")]
    assert [(record.levelname, record.message) for record in ours] == [
        ("INFO", "vecattention: one-token decoding stays dense, by design: there is nothing to gain")
    ]
    assert run.stats.decode_calls == 4 and run.stats.dense_calls == 0


def test_training_and_gradients_stay_dense_and_flow() -> None:
    model = build(hf_tiny.llama)
    stock = torch.autograd.grad(model(ids()).logits.sum(), model.lm_head.weight)[0]
    with vecattention.apply(model) as run:
        assert torch.equal(torch.autograd.grad(model(ids()).logits.sum(), model.lm_head.weight)[0], stock)
        model.train()
        logits(model, input_ids=ids())
        model.eval()
        logits(model, input_ids=ids())
    assert [reason.partition(",")[0].partition(";")[0] for reason in run.stats.reasons] == [
        "gradients are being recorded",
        "the model is in training mode",
    ]
    assert (run.stats.dense_calls, run.stats.sparse_calls) == (4, 2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_with_soft_caps_stays_as_it_was(implementation: str) -> None:
    """With "sdpa" transformers leaves the cap out, with "eager" it does not; neither is for us to change."""
    model = build(lambda: hf_tiny.gemma2(implementation))
    stock = logits(model, input_ids=ids())
    with vecattention.apply(model) as run:
        assert torch.equal(logits(model, input_ids=ids()), stock)
        assert torch.equal(model.generate(ids(), max_new_tokens=3)[:, :300], ids())
    assert set(run.stats.reasons) >= {"the layer adds softcap to the scores"} and run.stats.sparse_calls == 0
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_layers_with_windows_stay_dense_beside_sparse_ones(cache: str) -> None:
    model = build(hf_tiny.gemma3)
    wish = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": cache}
    stock, said = logits(model, input_ids=ids()), model.generate(ids(), **wish)
    with vecattention.apply(model, threshold=1e-30) as run:
        torch.testing.assert_close(logits(model, input_ids=ids()), stock, **CLOSE)
        assert torch.equal(model.generate(ids(), **wish), said)
    assert [layer.sparse_calls for layer in run.stats.layers.values()] == [0, 2]
    assert [layer.dense_calls for layer in run.stats.layers.values()] == [2, 0]
    assert any(reason.startswith(MASK) for reason in run.stats.reasons)


def test_a_model_with_sinks_stays_as_it_was() -> None:
    model = build(hf_tiny.gpt_oss).float()  # its experts take nothing wider
    stock = logits(model, input_ids=ids())
    with vecattention.apply(model) as run:
        assert torch.equal(logits(model, input_ids=ids()), stock)
    assert any("s_aux" in reason for reason in run.stats.reasons) and run.stats.sparse_calls == 0


@pytest.mark.parametrize("make", [hf_tiny.llama, hf_tiny.mistral])
def test_an_eager_model_is_answered_eagerly_with_its_weights(make: Callable[[], Any]) -> None:
    model = build(make)
    model.set_attn_implementation("eager")
    wish = {"input_ids": ids(), "output_attentions": True}
    with torch.no_grad():
        stock = model(**wish)
        with vecattention.apply(model) as run:
            got = model(**wish)
    assert torch.equal(got.logits, stock.logits) and len(got.attentions) == 2
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, stock.attentions, strict=True))
    assert run.stats.sparse_calls == 0
    assert model.config._attn_implementation == "eager"


def test_a_window_longer_than_the_sequence_is_no_window() -> None:
    model = build(lambda: hf_tiny.mistral(window=301))
    stock = logits(model, input_ids=ids())
    with vecattention.apply(model, threshold=1e-30) as run:
        torch.testing.assert_close(logits(model, input_ids=ids()), stock, **CLOSE)
    assert run.stats.sparse_calls == 2 and run.stats.dense_calls == 0


def test_an_empty_static_cache_with_windows_is_read_from_its_start() -> None:
    """transformers gives no mask then, although there are more keys than rows: the first row is at the first key."""
    model = build(lambda: hf_tiny.mistral(window=500))
    stock = logits(model, input_ids=ids())
    for threshold in (1e-30, 0.9):
        with vecattention.apply(model, threshold=threshold) as run:
            wanted = stock if threshold < 0.1 else logits(model, input_ids=ids())
            cache = StaticCache(model.config, max_cache_len=400)
            torch.testing.assert_close(logits(model, input_ids=ids(), past_key_values=cache), wanted, **CLOSE)
        assert run.stats.dense_calls == 0


def test_whisper_keeps_its_encoder_and_cross_attention() -> None:
    model = build(hf_tiny.whisper)
    sound = torch.randn(2, 8, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wish = {"input_features": sound, "decoder_input_ids": ids(300, batch=2)}
    stock = logits(model, **wish)
    with vecattention.apply(model, threshold=1e-30) as run:
        torch.testing.assert_close(logits(model, **wish), stock, **CLOSE)
    assert list(run.stats.reasons) == ["the attention is not causal (an encoder, a vision tower or cross-attention)"]
    assert run.stats.reasons.popitem()[1] == 3, "one encoder layer and two cross-attentions"
    assert (run.stats.sparse_calls, run.stats.dense_calls, run.stats.density.shape) == (2, 0, (2, 2))
    with vecattention.apply(model, threshold=0.9) as run:
        assert not torch.allclose(logits(model, **wish), stock, **CLOSE)
    assert run.stats.mean_density < 0.9


def test_whisper_generates_what_it_did() -> None:
    model = build(hf_tiny.whisper)
    sound = torch.randn(1, 8, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wish = {"max_new_tokens": 6, "do_sample": False, "return_timestamps": False}
    stock = model.generate(sound, **wish)
    with vecattention.apply(model) as run:
        assert torch.equal(model.generate(sound, **wish), stock)
    assert run.stats.sparse_calls == 0


def test_a_named_backend_never_falls_back() -> None:
    model = build(hf_tiny.llama)
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run this"):
        with vecattention.apply(model, backend="triton"):
            logits(model, input_ids=ids())
    assert model.config._attn_implementation == "sdpa"


def test_without_a_fast_backend_it_stays_dense() -> None:
    query, key = torch.empty(1, 4, 300, 16, device="meta"), torch.empty(1, 2, 300, 16, device="meta")
    module = torch.nn.Module().eval()
    module.layer_idx = 0
    call = Call(module, query, key, key, None, None, 0.0, True, {})
    assert why_dense(call) is None
    reason = no_backend(call, settings_of(layers=1, heads=4))
    assert reason is not None and reason.startswith("no fast backend can run it (")
    assert reason.endswith("pass backend='reference' to run it all the same")
    assert no_backend(call, settings_of(layers=1, heads=4, backend="reference")) is None


def test_a_layer_without_index_stays_dense() -> None:
    x = torch.randn(1, 4, 300, 16)
    call = Call(torch.nn.Module().eval(), x, x, x, None, None, 0.0, True, {})
    assert why_dense(call) == "the attention module has no layer_idx"


def test_a_mask_shorter_than_the_cache_hides_the_rest() -> None:
    """What "sdpa" does with a padding mask that covers only the first keys."""
    model = build(hf_tiny.llama)
    whole, mask = ids(300), torch.ones(1, 280, dtype=torch.long)
    results = []
    for threshold in (None, 1e-30):
        cache = DynamicCache()
        logits(model, input_ids=whole[:, :250], past_key_values=cache)
        wish = {"input_ids": whole[:, 250:], "past_key_values": cache, "attention_mask": mask}
        if threshold is None:
            results.append(logits(model, **wish))
        else:
            with vecattention.apply(model, threshold=threshold):
                results.append(logits(model, **wish))
    torch.testing.assert_close(results[1][:, :30], results[0][:, :30], **CLOSE)


def test_a_layer_that_asks_for_a_window_stays_dense_whatever_its_mask() -> None:
    x = torch.randn(1, 4, 300, 16)
    module = torch.nn.Module().eval()
    module.layer_idx = 0
    for window, reason in ((299, "the layer has a sliding window shorter than the sequence"), (300, None)):
        call = Call(module, x, x, x, None, None, 0.0, True, {"sliding_window": window})
        assert why_dense(call) == reason


def test_the_backends_are_asked_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from vecattention.integrations import serve

    asked: list[Any] = []
    explain = serve.ops.explain
    monkeypatch.setattr(serve.ops, "explain", lambda *a, **k: (asked.append(a[0].shape[2]), explain(*a, **k))[1])
    model = build(hf_tiny.llama)
    with vecattention.apply(model) as run:
        for length in (300, 300, 310):
            logits(model, input_ids=ids(length))
    assert asked == [300, 310] and run.stats.sparse_calls == 6
