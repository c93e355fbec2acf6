"""Which step, which branch, which layers are dense: as announced, never guessed."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, WanVideoToVideoPipeline
from integrations_dit.tiny_generators import (
    generate_hunyuan,
    generate_wan,
    hunyuan_transformer,
    tokenizer,
    umt5,
    wan_transformer,
    wan_vae,
)

import vecattention
from vecattention import ThresholdTable
from vecattention.integrations.steps import Place, Schedule, leading, schedule_of

DENSE = 1e-30


def test_the_published_share_of_50_steps_is_3() -> None:
    warm = [Schedule(0.06).warming(Place("cond", step, 50)) for step in range(50)]
    assert warm == [True] * 3 + [False] * 47


@pytest.mark.parametrize(("share", "total", "count"), [(0.29, 100, 29), (0.07, 100, 7), (0.0, 9, 0), (1.0, 9, 9),
                                                       (0.5, 5, 2), (4, 9, 4), (0, 9, 0)])  # fmt: skip
def test_shares_are_rounded_down_without_loss(share: float, total: int, count: int) -> None:
    assert leading("dense_steps", share, total, "steps") == count


def _watch(pipe) -> tuple[list[tuple[bool, ...]], object]:
    """The list of which layers are sparse, one entry for each forward, and the handle that ends it."""
    seen: list[tuple[bool, ...]] = []

    def before(module, args, kwargs) -> None:
        processors = [p for p in module.attn_processors.values() if hasattr(p, "orders")]
        seen.append(tuple(p.orders.sparse for p in processors))

    return seen, pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)


@pytest.mark.parametrize(("dense_steps", "dense_layers", "wanted"), [
    (2, 0, [(0, 0)] * 4 + [(1, 1)] * 4), (0.5, 1, [(0, 0)] * 4 + [(0, 1)] * 4), (0, 0.5, [(0, 1)] * 8),
    (0.24, 0, [(1, 1)] * 8), (4, 0, [(0, 0)] * 8),
])  # fmt: skip
def test_first_steps_and_layers_of_wan(wan, dense_steps, dense_layers, wanted) -> None:
    pipe, _ = wan
    with vecattention.apply(pipe, dense_steps=dense_steps, dense_layers=dense_layers) as run:
        seen, handle = _watch(pipe)
        generate_wan(pipe)
        handle.remove()
    assert [tuple(map(int, entry)) for entry in seen] == wanted  # cond and uncond forward of each step
    sparse = sum(map(sum, wanted))
    assert (run.stats.sparse_calls, run.stats.dense_calls) == (sparse, 16 - sparse)


def test_hunyuan_announces_no_step_and_its_scheduler_tells(hunyuan) -> None:
    pipe, _ = hunyuan
    with vecattention.apply(pipe, dense_steps=0.5):
        for _ in range(2):  # the second generation begins anew
            seen, handle = _watch(pipe)
            generate_hunyuan(pipe)
            handle.remove()
            assert [entry[0] for entry in seen] == [False, False, True, True]


def test_each_step_of_a_two_stage_scheduler_counts(wan) -> None:
    pipe, _ = wan
    kept = pipe.scheduler
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    try:
        with vecattention.apply(pipe, dense_steps=0.5):
            seen, handle = _watch(pipe)
            generate_wan(pipe, guidance_scale=1.0)
            handle.remove()
    finally:
        pipe.scheduler = kept
    assert [entry[0] for entry in seen] == [False] * 3 + [True] * 4  # 2 * 4 - 1 evaluations


def _video_pipeline() -> WanVideoToVideoPipeline:
    pipe = WanVideoToVideoPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=wan_vae(), transformer=wan_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _edit(pipe: WanVideoToVideoPipeline, **more) -> torch.Tensor:
    frames = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return pipe(
        **{"video": list(frames), "prompt": "a red circle", "height": 64, "width": 64, "num_inference_steps": 4,
           "strength": 1.0, "guidance_scale": 3.0, "output_type": "latent", "max_sequence_length": 16,
           "generator": torch.Generator().manual_seed(0), **more}
    ).frames  # fmt: skip


def test_a_pipeline_that_announces_nothing_is_told_by_its_scheduler() -> None:
    pipe = _video_pipeline()
    stock = _edit(pipe)
    with vecattention.apply(pipe, threshold=DENSE, dense_steps=0.5) as run:
        seen, handle = _watch(pipe)
        made = _edit(pipe)
        handle.remove()
    assert (made - stock).abs().max() < 2e-5
    steps = [entry[0] for entry in seen]
    assert steps == sorted(steps) and steps.count(False) == 4  # two steps of two forwards
    assert list(run.branches) == ["(not announced)"]


def test_a_table_of_two_branches_needs_an_announcement() -> None:
    pipe, table = _video_pipeline(), ThresholdTable.uniform(0.9, 2, 2, causal=False)
    both = ThresholdTable(table.cond, uncond=table.cond, causal=False)
    with (
        vecattention.apply(pipe, table=both),
        pytest.raises(ValueError, match="'cond' and 'uncond', wanted to be told"),
    ):
        _edit(pipe)
    with vecattention.apply(pipe, table=table), pytest.raises(ValueError, match="'cond' alone, wanted both"):
        _edit(pipe)
    with vecattention.apply(pipe, table=table) as run:
        _edit(pipe, guidance_scale=1.0)
    assert run.stats.sparse_calls > 0


def test_branches_have_thresholds_and_counts_of_their_own(wan) -> None:
    pipe, _ = wan
    rows = ThresholdTable.uniform(DENSE, 2, 2, causal=False, q_pooling_size=16)
    other = [[0.9, DENSE], [0.9, 0.9]]
    table = ThresholdTable(rows.cond, uncond=other, causal=False, q_pooling_size=16)
    with vecattention.apply(pipe, table=table, dense_steps=0) as run:
        generate_wan(pipe)
    cond, uncond = run.branches["cond"], run.branches["uncond"]
    assert (cond.sparse_calls, uncond.sparse_calls, run.stats.sparse_calls) == (8, 8, 16)
    assert cond.mean_density == 1.0
    assert (uncond.density < 0.9).tolist() == [[True, False], [True, True]] and uncond.density[0, 1] == 1.0
    assert torch.allclose(run.stats.density, (cond.density + uncond.density) / 2)


def test_a_table_of_one_branch_is_refused_before_the_first_step_of_a_guided_generation(wan) -> None:
    pipe, _ = wan
    table = ThresholdTable.uniform(0.9, 2, 2, causal=False)
    forwards = []
    handle = pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    with vecattention.apply(pipe, table=table, dense_steps=0):
        with pytest.raises(ValueError, match="table has thresholds of the branch 'cond' alone"):
            generate_wan(pipe)
        assert not forwards
        generate_wan(pipe, guidance_scale=1.0)
        assert len(forwards) == 4
    handle.remove()


def test_hunyuan_true_guidance_has_two_branches(hunyuan) -> None:
    pipe, _ = hunyuan
    with vecattention.apply(pipe, dense_steps=0) as run:
        generate_hunyuan(pipe, steps=2, negative_prompt="plain dots", true_cfg_scale=3.0)
    assert {name: stats.sparse_calls for name, stats in run.branches.items()} == {"cond": 6, "uncond": 6}
    table = ThresholdTable.uniform(0.9, 3, 2, causal=False)
    with vecattention.apply(pipe, table=table), pytest.raises(ValueError, match="'cond' alone"):
        generate_hunyuan(pipe, steps=2, negative_prompt="plain dots", true_cfg_scale=3.0)


def test_more_dense_steps_than_steps_is_an_error_before_the_first_step(case) -> None:
    pipe, generate, _ = case
    forwards = []
    handle = pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    message = "dense_steps is 5, wanted at most the 3 steps"
    with vecattention.apply(pipe, dense_steps=5), pytest.raises(ValueError, match=message):
        generate(pipe, steps=3)
    handle.remove()
    assert not forwards


def test_a_transformer_alone_must_be_told_the_step() -> None:
    model = wan_transformer()
    arguments = (torch.randn(1, 4, 3, 16, 16), torch.tensor([500.0]), torch.randn(1, 8, 16))
    with torch.no_grad(), vecattention.apply(model, dense_steps=0.5) as run:
        with pytest.raises(ValueError, match="dense_steps is 0.5, wanted the index of the step"):
            model(*arguments)
        with pytest.raises(ValueError, match="wanted the number of steps"), model.cache_context("cond", step_index=1):
            model(*arguments)
        for step in range(2):
            with model.cache_context("cond", step_index=step, num_inference_steps=2):
                model(*arguments)
        assert (run.stats.dense_calls, run.stats.sparse_calls) == (2, 2)


def test_hunyuan_alone_counts_steps_only_where_it_is_told() -> None:
    model = hunyuan_transformer()
    with vecattention.apply(model), pytest.raises(ValueError, match="pass the pipeline to apply"):
        with model.cache_context("cond"):
            pass


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"dense_steps": -1}, ValueError, "dense_steps is -1, wanted at least 0 steps"),
    ({"dense_steps": 1.5}, ValueError, "dense_steps is 1.5, wanted a share of the steps from 0.0 to 1.0"),
    ({"dense_steps": float("nan")}, ValueError, "dense_steps is nan, wanted a share"),
    ({"dense_steps": True}, TypeError, "dense_steps is True"),
    ({"dense_steps": "3"}, TypeError, "dense_steps is '3' .str., wanted a number of steps"),
    ({"dense_layers": 41}, ValueError, "dense_layers is 41, wanted at most the 40 layers"),
])  # fmt: skip
def test_bad_schedules(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        schedule_of(**{"dense_steps": 0.06, "dense_layers": 0, "layers": 40, **arguments})
