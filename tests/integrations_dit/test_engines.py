"""Together with torch.compile, CPU offload, LoRA, caches and attention backends."""

from __future__ import annotations

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import attention_backend
from integrations_dit.tiny_generators import (
    generate_hunyuan,
    generate_wan,
    hunyuan_pipeline,
    wan_pipeline,
    wan_transformer,
)
from torch._dynamo.testing import CompileCounterWithBackend

import vecattention

SPARSE = {"threshold": 0.7, "dense_steps": 1, "q_pooling_size": 16}
NEAR = 2e-5


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def _sparse(pipe, generate, settings=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with vecattention.apply(pipe, **(SPARSE if settings is None else settings)) as run:
        made = generate(pipe)
    return made, [run.stats.density, *(part.density for part in run.branches.values())]


@pytest.mark.parametrize("way", ["wrapped", "in place", "blocks"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_wan_is_the_same(way: str, backend: str) -> None:
    wanted, density = _sparse(wan_pipeline(layers=3), generate_wan)
    pipe = wan_pipeline(layers=3)
    if way == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    elif way == "in place":
        pipe.transformer.compile(backend=backend, fullgraph=True)
    else:
        pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    made, counted = _sparse(pipe, generate_wan)
    assert (made - wanted).abs().max() < NEAR
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(counted, density, strict=True))


@pytest.mark.parametrize("make, generate", [(wan_pipeline, generate_wan), (hunyuan_pipeline, generate_hunyuan)])
def test_a_compiled_coverage_is_the_same(make, generate) -> None:
    """What a pipeline does when nothing is asked for but an early start."""
    wanted, density = _sparse(make(), generate, {"dense_steps": 1})
    pipe = make()
    pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    made, counted = _sparse(pipe, generate, {"dense_steps": 1})
    assert (made - wanted).abs().max() < NEAR
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(counted, density, strict=True))


def test_a_block_is_compiled_once_for_all_layers_branches_and_steps() -> None:
    pipe = wan_pipeline(layers=6)
    counter = CompileCounterWithBackend("eager")
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    _sparse(pipe, generate_wan)
    assert counter.frame_count == 2  # one dense, one sparse
    _sparse(pipe, generate_wan)
    assert counter.frame_count == 2


@pytest.mark.parametrize("way", ["wrapped", "in place", "blocks"])
def test_compiled_hunyuan_is_the_same(way: str) -> None:
    wanted, density = _sparse(hunyuan_pipeline(), generate_hunyuan)
    pipe = hunyuan_pipeline()
    if way == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    elif way == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    made, counted = _sparse(pipe, generate_hunyuan)
    assert (made - wanted).abs().max() < NEAR
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(counted, density, strict=True))


def test_restored_after_compilation() -> None:
    pipe = wan_pipeline()
    stock = generate_wan(pipe)
    pipe.transformer.compile(backend="eager")
    _sparse(pipe, generate_wan)
    assert torch.equal(generate_wan(pipe), stock)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("kind", ["sequential", "whole"])
def test_offload_hooks_before_or_within_the_block(kind: str, within: bool) -> None:
    wanted, _ = _sparse(wan_pipeline(), generate_wan)
    pipe = wan_pipeline()

    def offload() -> None:
        if kind == "sequential":
            accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
        else:
            accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))

    if not within:
        offload()
    with vecattention.apply(pipe, **SPARSE):
        if within:
            offload()
        for _ in range(2):
            assert torch.equal(generate_wan(pipe), wanted)
    assert hasattr(pipe.transformer, "_hf_hook")
    accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(generate_wan(pipe), generate_wan(wan_pipeline()))


def test_offload_of_the_pipeline_which_takes_its_hooks_off_after_each_generation(hunyuan) -> None:
    wanted, density = _sparse(hunyuan[0], generate_hunyuan)
    pipe = hunyuan_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        made, counted = _sparse(pipe, generate_hunyuan)
        assert torch.equal(made, wanted) and torch.equal(counted[0], density[0])


def test_group_offload() -> None:
    wanted, _ = _sparse(wan_pipeline(), generate_wan)
    pipe = wan_pipeline()
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    made, _ = _sparse(pipe, generate_wan)
    assert torch.equal(made, wanted)


def test_lora() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pipe = wan_pipeline()
    plain = generate_wan(pipe)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    pipe.transformer.eval()
    stock = generate_wan(pipe)
    assert not torch.equal(stock, plain)
    with vecattention.apply(pipe, threshold=0.9, dense_steps=1.0):
        assert torch.equal(generate_wan(pipe), stock)
    with vecattention.apply(pipe, threshold=1e-30, dense_steps=0) as run:
        assert (generate_wan(pipe) - stock).abs().max() < NEAR
        halved = generate_wan(pipe, attention_kwargs={"scale": 0.5})
    assert run.stats.dense_calls == 0
    assert (halved - generate_wan(pipe, attention_kwargs={"scale": 0.5})).abs().max() < NEAR
    pipe.transformer.delete_adapters("default")
    assert torch.equal(generate_wan(pipe), plain)


def test_a_step_cache_hears_its_announcements_too(wan) -> None:
    pipe = wan_pipeline(layers=4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    stock = generate_wan(pipe)
    with vecattention.apply(pipe, threshold=1e-30, dense_steps=0) as run:
        made = generate_wan(pipe)
    assert (made - stock).abs().max() < NEAR
    # After the first step the cache skips all blocks but the first, in both branches.
    assert [layer.sparse_calls for layer in run.stats.layers.values()] == [8, 2, 2, 2]
    assert torch.equal(generate_wan(pipe), stock)


def test_an_attention_backend_chosen_for_the_model_serves_what_is_dense() -> None:
    model = wan_transformer()
    with attention_backend("native"), vecattention.apply(model, dense_steps=0):  # the choice is global in diffusers
        model.set_attention_backend("_native_math")
        assert model.blocks[0].attn1.processor.stock._attention_backend == "_native_math"
    assert model.blocks[0].attn1.processor._attention_backend == "_native_math"


def test_saving_within_the_block_saves_the_model_alone(tmp_path) -> None:
    model = wan_transformer()
    with vecattention.apply(model):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), again.parameters(), strict=True))
