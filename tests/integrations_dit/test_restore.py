"""`apply` leaves no trace: after the block, after errors and interrupts, nested, and with several pipelines at once."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from integrations_dit.tiny_generators import generate_wan, wan_pipeline, wan_transformer

import vecattention
from vecattention.integrations.dit.processors import SparseProcessor


def _traces(model: torch.nn.Module) -> dict[str, object]:
    """Whatever apply could leave behind; the registry that cache_context itself makes is left out."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs")
    return {
        "processors": {name: id(processor) for name, processor in model.attn_processors.items()},
        "modules": [name for name, _ in model.named_modules()],
        "state": list(model.state_dict()),
        "attributes": {
            name: sorted(set(vars(part)) - {"_diffusers_hook"}) for name, part in model.named_modules()
        },
        "hooks": {name: [len(getattr(part, hook)) for hook in hooks] for name, part in model.named_modules()},
        "forward": {name: "forward" in vars(part) for name, part in model.named_modules()},
        "methods": {name: value for name, value in vars(type(model)).items()},
    }  # fmt: skip


def test_the_model_is_as_before(case) -> None:
    pipe, generate, stock = case
    before = _traces(pipe.transformer)
    with vecattention.apply(pipe, threshold=0.9, dense_steps=0):
        inside = _traces(pipe.transformer)
        generate(pipe)
    assert inside["processors"] != before["processors"] and inside["state"] == before["state"]
    assert _traces(pipe.transformer) == before
    assert torch.equal(generate(pipe), stock)


def test_only_self_attention_of_the_video_is_replaced(case) -> None:
    pipe, _, _ = case
    with vecattention.apply(pipe):
        ours = {name for name, p in pipe.transformer.attn_processors.items() if isinstance(p, SparseProcessor)}
        others = set(pipe.transformer.attn_processors) - ours
    assert all(".attn1." in name or "transformer_blocks" in name for name in ours) and len(ours) in (2, 3)
    assert all(".attn2." in name or "refiner" in name for name in others) and others


class Interrupted(BaseException):
    """Something like KeyboardInterrupt."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
def test_restored_after_an_error_or_an_interrupt_within_a_generation(wan, error) -> None:
    pipe, stock = wan
    before = _traces(pipe.transformer)

    def stop(pipe, step, timestep, tensors):
        if step == 1:
            raise error("now")
        return tensors

    with pytest.raises(error, match="now"), vecattention.apply(pipe, threshold=0.9, dense_steps=1):
        generate_wan(pipe, callback_on_step_end=stop)
    assert _traces(pipe.transformer) == before
    assert torch.equal(generate_wan(pipe), stock)


def test_restored_after_an_error_within_a_layer(wan) -> None:
    pipe, stock = wan
    before = _traces(pipe.transformer)

    def fail(*_):
        raise MemoryError("no room")

    handle = pipe.transformer.blocks[1].ffn.register_forward_hook(fail)
    with pytest.raises(MemoryError), vecattention.apply(pipe, dense_steps=0):
        generate_wan(pipe)
    handle.remove()
    assert _traces(pipe.transformer) == before
    assert torch.equal(generate_wan(pipe), stock)


def test_a_generation_that_the_pipeline_interrupts_keeps_its_counts(wan) -> None:
    pipe, stock = wan

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    with vecattention.apply(pipe, dense_steps=1) as run:
        generate_wan(pipe, callback_on_step_end=stop)
        assert (run.stats.dense_calls, run.stats.sparse_calls) == (4, 4)
    assert torch.equal(generate_wan(pipe), stock)


def test_nested_the_innermost_counts(wan) -> None:
    pipe, stock = wan
    before = _traces(pipe.transformer)
    with vecattention.apply(pipe, threshold=0.9, dense_steps=0, q_pooling_size=16) as outer:
        first = generate_wan(pipe)
        with vecattention.apply(pipe, dense_steps=1.0) as inner:
            assert torch.equal(generate_wan(pipe), stock)
        assert torch.equal(generate_wan(pipe), first)
    assert (outer.stats.sparse_calls, inner.stats.dense_calls, inner.stats.sparse_calls) == (32, 16, 0)
    assert _traces(pipe.transformer) == before


def test_blocks_may_end_in_any_order(wan) -> None:
    pipe, stock = wan
    before = _traces(pipe.transformer)
    first, second = vecattention.apply(pipe, dense_steps=1.0), vecattention.apply(pipe, threshold=0.9, dense_steps=0)
    one, two = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.equal(generate_wan(pipe), stock)
    second.__exit__(None, None, None)
    assert one.stats.calls == 0 and two.stats.sparse_calls == 16
    assert _traces(pipe.transformer) == before


def test_processors_that_somebody_else_set_meanwhile_stay(wan) -> None:
    pipe, _ = wan
    kept = pipe.transformer.attn_processors
    theirs = WanAttnProcessor()
    with vecattention.apply(pipe):
        pipe.transformer.blocks[1].attn1.set_processor(theirs)
    assert pipe.transformer.blocks[1].attn1.processor is theirs
    assert pipe.transformer.blocks[0].attn1.processor is kept["blocks.0.attn1.processor"]
    pipe.transformer.set_attn_processor(kept)


def test_two_pipelines_at_once() -> None:
    one, two = wan_pipeline(), wan_pipeline(seed=7)
    alone = []
    for pipe, threshold in ((one, 0.9), (two, 0.5)):
        with vecattention.apply(pipe, threshold=threshold, dense_steps=1, q_pooling_size=16) as run:
            alone.append((generate_wan(pipe), run.stats.density))
    with ExitStack() as stack:
        runs = [
            stack.enter_context(vecattention.apply(one, threshold=0.9, dense_steps=1, q_pooling_size=16)),
            stack.enter_context(vecattention.apply(two, threshold=0.5, dense_steps=1, q_pooling_size=16)),
        ]
        both = [generate_wan(one), generate_wan(two)]
    for (latents, density), made, run in zip(alone, both, runs, strict=True):
        assert torch.equal(made, latents) and torch.equal(run.stats.density, density)


def test_two_pipelines_that_share_a_transformer(wan) -> None:
    pipe, stock = wan
    other = WanPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with vecattention.apply(pipe, threshold=0.9, dense_steps=0), vecattention.apply(other, dense_steps=1.0) as inner:
        assert torch.equal(generate_wan(other), stock)
    assert inner.stats.dense_calls == 16
    assert torch.equal(generate_wan(pipe), stock)


def test_both_transformers_of_a_wan_2_2_pipeline() -> None:
    pipe = wan_pipeline()
    pipe = WanPipeline(**{**pipe.components, "transformer_2": wan_transformer(seed=9)}, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    stock = generate_wan(pipe)
    with vecattention.apply(pipe, threshold=1e-30, dense_steps=0.25) as run:
        made = generate_wan(pipe)
    parts = run.transformers
    assert (made - stock).abs().max() < 2e-5
    assert set(parts) == {"transformer", "transformer_2"}
    assert sum(part.sparse_calls for part in parts.values()) == run.stats.sparse_calls == 12
    assert run.stats.dense_calls == 4


def test_a_copy_within_the_block_is_refused_by_name(wan) -> None:
    pipe, _ = wan
    with vecattention.apply(pipe), pytest.raises(TypeError, match="the model is inside vecattention.apply"):
        copy.deepcopy(pipe.transformer)
    copy.deepcopy(pipe.transformer)


def test_inference_mode_within_and_outside(wan) -> None:
    pipe, _ = wan
    arguments = (torch.randn(1, 4, 3, 16, 16), torch.tensor([500.0]), torch.randn(1, 8, 16))
    with vecattention.apply(pipe.transformer, threshold=0.9, dense_steps=0) as run:
        with torch.inference_mode():
            inside = pipe.transformer(*arguments).sample.clone()
        with torch.no_grad():
            outside = pipe.transformer(*arguments).sample
    assert torch.equal(inside, outside) and run.stats.sparse_calls == 4


def test_recording_gradients_stays_dense_and_says_so(wan, caplog) -> None:
    pipe, _ = wan
    arguments = (torch.randn(1, 4, 3, 16, 16), torch.tensor([500.0]), torch.randn(1, 8, 16))
    stock = pipe.transformer(*arguments).sample
    with vecattention.apply(pipe.transformer, threshold=0.9, dense_steps=0) as run:
        made = pipe.transformer(*arguments).sample
        pipe.transformer(*arguments)
    made.sum().backward()
    assert torch.equal(made, stock) and pipe.transformer.blocks[0].attn1.to_q.weight.grad is not None
    pipe.transformer.zero_grad()
    assert run.stats.sparse_calls == 0
    assert [text for text in run.stats.reasons if "gradients are being recorded" in text]
    assert sum("gradients" in record.message for record in caplog.records) == 1
