"""`apply` leaves no trace: after it, after an exception, nested, from several threads, copied, compiled."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import hf_tiny
import pytest
import torch

import vecattention
from vecattention.integrations.attach import _entered
from vecattention.integrations.capture import capture

MAKERS = [kind.build for kind in hf_tiny.KINDS.values()] + [hf_tiny.gemma2, hf_tiny.whisper]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def build(make: Callable[[], Any] = hf_tiny.llama) -> Any:
    return hf_tiny.Kind(make).make()


def state(model: Any) -> dict[str, Any]:
    """All that can be seen of a model but the values of its weights: attributes and hooks of its modules, configs."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {
            key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")
        }
        seen[name] = {key: _shown(value) for key, value in plain.items()}
        seen[f"{name}: forward"] = type(module).forward
    return seen


def _shown(value: object) -> object:
    if hasattr(value, "to_dict") and hasattr(value, "_attn_implementation"):
        inner = {key: _shown(part) for key, part in vars(value).items()}
        return (id(value), value.to_dict(), inner)
    if isinstance(value, dict):
        return {key: _shown(part) for key, part in value.items()}
    return value if isinstance(value, (str, int, float, bool, tuple, type(None))) else id(value)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids).logits
    return out


IDS = hf_tiny.text(300)["input_ids"]


@pytest.mark.parametrize("make", MAKERS)
def test_everything_is_restored(make: Callable[[], Any]) -> None:
    model = build(make)
    span = "auto" if hasattr(model.config, "image_token_id") else None
    before = state(model)
    with vecattention.apply(model, vision_span=span):
        assert state(model) != before
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), vecattention.apply(model, vision_span=span):
        raise KeyboardInterrupt
    assert state(model) == before
    with capture(model):
        assert state(model) != before
    assert state(model) == before and _entered.get() == ()


def test_restored_after_an_exception_inside_the_model() -> None:
    model = build()
    stock, before = logits(model, IDS), state(model)
    with pytest.raises(IndexError), vecattention.apply(model):
        logits(model, IDS + 1000)
    assert state(model) == before
    assert torch.equal(logits(model, IDS), stock)


def test_a_wrong_argument_is_refused_at_once_and_changes_nothing() -> None:
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match="threshold is 2.0, wanted a number in"):
        vecattention.apply(model, threshold=2.0)
    assert state(model) == before


def test_entering_is_what_switches() -> None:
    model = build()
    before = state(model)
    context = vecattention.apply(model)
    assert state(model) == before
    with context:
        assert state(model) != before
    assert state(model) == before


def test_the_innermost_run_counts() -> None:
    model = build()
    with vecattention.apply(model, threshold=0.9) as outer:
        first = logits(model, IDS)
        with vecattention.apply(model, threshold=1e-30) as inner:
            logits(model, IDS)
        assert model.config._attn_implementation == "vecattention"
        assert torch.equal(logits(model, IDS), first)
    assert (outer.stats.sparse_calls, inner.stats.sparse_calls) == (4, 2)
    assert inner.stats.mean_density == 1.0 > outer.stats.mean_density
    assert model.config._attn_implementation == "sdpa"


def test_runs_may_end_in_any_order() -> None:
    model = build()
    before = state(model)
    one, two = vecattention.apply(model, threshold=0.9), vecattention.apply(model, threshold=1e-30)
    one.__enter__()
    second = two.__enter__()
    one.__exit__(None, None, None)
    assert model.config._attn_implementation == "vecattention"
    logits(model, IDS)
    assert second.stats.sparse_calls == 2
    two.__exit__(None, None, None)
    assert state(model) == before


def test_threads_with_their_own_runs_do_not_mix() -> None:
    model = build()
    before = state(model)
    thresholds = [0.9, 0.5, 1e-30, 0.99]
    wanted = []
    for threshold in thresholds:
        with vecattention.apply(model, threshold=threshold):
            wanted.append(logits(model, IDS))
    ready, same = threading.Barrier(len(thresholds)), [False] * len(thresholds)

    def work(i: int) -> None:
        ready.wait()
        for _ in range(5):
            with vecattention.apply(model, threshold=thresholds[i]) as run:
                good = torch.equal(logits(model, IDS), wanted[i]) and run.stats.sparse_calls == 2
            same[i] = good and (same[i] or _ == 0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(thresholds))]
    with vecattention.apply(model):  # keeps the model switched between the threads' runs
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert same == [True] * len(thresholds)
    assert state(model) == before


def test_a_thread_without_a_run_of_its_own_gets_the_switched_model() -> None:
    model = build()
    with vecattention.apply(model, threshold=0.9) as run:
        thread = threading.Thread(target=logits, args=(model, IDS))
        thread.start()
        thread.join()
    assert run.stats.sparse_calls == 2


def test_two_models_at_once() -> None:
    one, two = build(), build(hf_tiny.qwen3)
    with vecattention.apply(one, threshold=0.9) as first, vecattention.apply(two, threshold=1e-30) as second:
        logits(one, IDS)
        logits(two, IDS)
        logits(two, IDS)
    assert (first.stats.sparse_calls, second.stats.sparse_calls) == (2, 4)


def test_a_switched_model_can_be_copied() -> None:
    model = build()
    with vecattention.apply(model, threshold=0.9) as run:
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, IDS), logits(model, IDS))
    assert run.stats.sparse_calls == 4


def test_a_module_that_wraps_a_model_and_a_pipeline_of_one() -> None:
    from transformers import pipeline

    from vecattention.testbed import words

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor) -> Any:
            return self.inner(ids)

    model = build()
    with torch.no_grad(), vecattention.apply(Wrapper(model)) as run:
        Wrapper(model)(IDS)
    assert run.stats.sparse_calls == 2
    speaker = pipeline("text-generation", model=model, tokenizer=words.tokenizer())
    with vecattention.apply(speaker) as run:
        speaker("star " * 200, max_new_tokens=2)
    assert run.stats.sparse_calls == 2 and model.config._attn_implementation == "sdpa"


def test_a_compiled_model_steps_out_of_its_graph_for_attention() -> None:
    model, ids = build(), IDS
    torch._dynamo.reset()
    with vecattention.apply(model, threshold=0.9) as plain:
        wanted = logits(model, ids)
    with torch.no_grad(), vecattention.apply(model, threshold=0.9) as run:
        compiled = torch.compile(model, backend="aot_eager")
        out = compiled(ids, use_cache=True)
        torch.testing.assert_close(out.logits, wanted, **CLOSE)
        chunk = compiled(ids[:, :64], past_key_values=out.past_key_values)
        assert chunk.logits.shape == (1, 64, hf_tiny.VOCABULARY)
        compiled(ids[:, :1], past_key_values=chunk.past_key_values)
    assert run.stats.sparse_calls == 4 and run.stats.dense_calls == 0
    assert plain.stats.mean_density == pytest.approx(run.stats.mean_density, rel=0.2)
    torch._dynamo.reset()


def test_the_vision_span_of_a_compiled_model() -> None:
    model, ids = build(hf_tiny.qwen25_vl), hf_tiny.text(300)["input_ids"]
    ids[0, 100], ids[0, 250] = hf_tiny.MARKS["vision_start_token_id"], hf_tiny.MARKS["vision_end_token_id"]
    torch._dynamo.reset()
    with vecattention.apply(model, vision_span=(100, 251)) as wanted:
        logits(model, ids)
    with torch.no_grad(), vecattention.apply(model, vision_span="auto") as run:
        torch.compile(model, backend="eager")(ids)
    assert wanted.stats.sparse_calls == run.stats.sparse_calls == 2
    torch.testing.assert_close(run.stats.density, wanted.stats.density, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
