"""HunyuanVideo: prompt lengths are read once per forward; padding never reaches the video."""

from __future__ import annotations

import pytest
import torch
from integrations_dit.tiny_generators import generate_hunyuan, hunyuan_transformer

import vecattention
from vecattention.integrations.dit import attachment
from vecattention.integrations.dit.attachment import prompt_lengths


def _arguments(lengths: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    batch = len(lengths)
    return {
        "hidden_states": torch.randn(batch, 4, 3, 16, 16), "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 8, 16),
        "encoder_attention_mask": (torch.arange(8) < torch.tensor(lengths)[:, None]).float(),
        "pooled_projections": torch.randn(batch, 8), "guidance": torch.full((batch,), 6000.0),
    }  # fmt: skip


@pytest.mark.parametrize("lengths", [(5,), (1,), (8,), (3, 3), (3, 7)])
def test_any_prompt_length(lengths: tuple[int, ...]) -> None:
    model, arguments = hunyuan_transformer(), _arguments(lengths)
    with torch.no_grad():
        stock = model(**arguments).sample
        with vecattention.apply(model, threshold=1e-30, dense_steps=0) as run:
            sparse = model(**arguments).sample
    assert (sparse - stock).abs().max() < 1e-5
    layer = run.stats.layers[0]
    assert layer.sparse_pairs == sum(192 * (192 + n) for n in lengths) == int(layer.kept[0])
    assert layer.dense_pairs == sum(n * (192 + n) for n in lengths)


def test_batch_elements_do_not_depend_on_each_other() -> None:
    model, arguments = hunyuan_transformer(), _arguments((3, 7))
    limits = torch.tensor([[0.9, 0.3], [0.5, 1e-30]])
    with torch.no_grad():
        with vecattention.apply(model, threshold=limits, dense_steps=0, q_pooling_size=16):
            both = model(**arguments).sample
        for b in range(2):
            one = {name: x[b : b + 1] for name, x in arguments.items()}
            with vecattention.apply(model, threshold=limits[b], dense_steps=0, q_pooling_size=16):
                assert (model(**one).sample - both[b : b + 1]).abs().max() < 1e-5


def test_padding_never_reaches_the_video() -> None:
    model, arguments = hunyuan_transformer(), _arguments((3, 7))
    with torch.no_grad(), vecattention.apply(model, threshold=0.9, dense_steps=0, q_pooling_size=16):
        once = model(**arguments).sample
        pads = arguments["encoder_attention_mask"] == 0
        arguments["encoder_hidden_states"][pads] = 100.0
        assert torch.equal(model(**arguments).sample, once)


def test_lengths_are_read_once_per_forward_not_per_layer(hunyuan, monkeypatch) -> None:
    pipe, _ = hunyuan
    calls = []
    monkeypatch.setattr(attachment, "prompt_lengths", lambda mask: calls.append(1) or prompt_lengths(mask))
    with vecattention.apply(pipe, dense_steps=1) as run:
        generate_hunyuan(pipe)
    assert len(calls) == 4 and run.stats.calls == 12


@pytest.mark.parametrize("mask", [[[1, 0, 1, 1]], [[0, 1, 1, 1]], [[1, 1, 1, 0], [0, 0, 0, 1]]])
def test_a_mask_that_is_no_prefix_is_an_error_before_the_first_step(hunyuan, mask) -> None:
    pipe, stock = hunyuan
    mask = torch.tensor(mask)
    embeds = {"prompt_embeds": torch.randn(len(mask), 4, 16), "pooled_prompt_embeds": torch.randn(len(mask), 8)}
    forwards = []
    handle = pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    message = r"encoder_attention_mask\[\d\] has \d ones up to position 4, wanted a prefix"
    with pytest.raises(ValueError, match=message), vecattention.apply(pipe, dense_steps=2):
        generate_hunyuan(pipe, prompt=None, prompt_attention_mask=mask, **embeds)
    handle.remove()
    assert not forwards
    assert torch.equal(generate_hunyuan(pipe), stock)


def test_no_mask_is_an_error() -> None:
    with pytest.raises(ValueError, match="encoder_attention_mask is None, wanted a tensor"):
        prompt_lengths(None)
    with pytest.raises(ValueError, match=r"encoder_attention_mask is of shape \(4,\)"):
        prompt_lengths(torch.ones(4))
