"""Every bad argument is a named error before the first step, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from integrations_dit.tiny_generators import generate_wan, wan_transformer

import vecattention
from vecattention import ThresholdTable


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"table": ThresholdTable.uniform(0.5, 3, 2, causal=False)}, ValueError,
     r"table has shape \(3, 2\), wanted \(2, 2\) = \(layers, heads\) of this model"),
    ({"table": ThresholdTable.uniform(0.5, 2, 4, causal=False, model="wan")}, ValueError,
     r"table has shape \(2, 4\) of wan, wanted \(2, 2\)"),
    ({"table": ThresholdTable.uniform(0.5, 2, 2)}, ValueError, "was tuned for causal=True, got causal=False"),
    ({"table": ThresholdTable.uniform(0.5, 2, 2, causal=False), "k_local_size": 32}, ValueError,
     "was tuned for k_local_size=16, got k_local_size=32"),
    ({"table": ThresholdTable.uniform(0.5, 2, 2, causal=False), "threshold": 0.5}, ValueError,
     "threshold is 0.5 beside a table"),
    ({"table": [[0.5, 0.5]] * 2}, TypeError, "table is a list, wanted a ThresholdTable"),
    ({"threshold": 0.5, "density": 0.5}, ValueError, "threshold and density are both given, wanted one of them"),
    ({"density": 0.5, "table": ThresholdTable.uniform(0.5, 2, 2, causal=False)}, ValueError,
     "density is 0.5 beside a table"),
    ({"coverage": 1.5}, ValueError, "coverage is 1.5, wanted a number in"),
    ({"density": torch.tensor([0.5, 0.0])}, ValueError, "density is 0.0, wanted a number in"),
    ({"threshold": 0.0}, ValueError, "threshold is 0.0, wanted a number in"),
    ({"threshold": torch.full((3,), 0.5)}, ValueError, r"threshold has shape \(3,\), wanted"),
    ({"dense_steps": 1.5}, ValueError, "dense_steps is 1.5"),
    ({"dense_layers": 3}, ValueError, "dense_layers is 3, wanted at most the 2 layers"),
    ({"dense_layers": -0.1}, ValueError, "dense_layers is -0.1, wanted a share of the layers"),
    ({"q_pooling_size": 48}, ValueError, "q_pooling_size is 48, wanted one of"),
    ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
    ({"min_length": -1}, ValueError, "min_length is -1"),
    ({"balance_heads": 1}, TypeError, "balance_heads is 1, wanted True or False"),
    ({"vision_span": "auto"}, TypeError, r"apply got \['vision_span'\], wanted names among"),
    ({"dense_step": 3}, TypeError, r"apply got \['dense_step'\], wanted names among .*'dense_steps'"),
])  # fmt: skip
def test_bad_arguments(wan, arguments, error, message) -> None:
    pipe, _ = wan
    before = pipe.transformer.attn_processors
    with pytest.raises(error, match=message), vecattention.apply(pipe, **arguments):
        raise AssertionError("the block began")
    assert all(before[name] is processor for name, processor in pipe.transformer.attn_processors.items())


def test_other_transformers_are_refused_by_name() -> None:
    model = CogVideoXTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, num_layers=1,
        text_embed_dim=8, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=4,
    )  # fmt: skip
    message = "is a CogVideoXTransformer3DModel, wanted a WanTransformer3DModel or HunyuanVideoTransformer3DModel"
    with pytest.raises(TypeError, match=message), vecattention.apply(model):
        pass


def test_other_pipelines_are_refused_by_name(wan) -> None:
    pipe, _ = wan
    kept = pipe.transformer
    pipe.transformer = None
    try:
        with (
            pytest.raises(TypeError, match="is a WanPipeline, wanted a Wan"),
            vecattention.apply(pipe),
        ):
            pass
    finally:
        pipe.transformer = kept


def test_head_dims_that_are_not_served() -> None:
    with pytest.raises(ValueError, match="transformer has attention_head_dim 12, wanted one of"):
        with vecattention.apply(wan_transformer(attention_head_dim=12)):
            pass


def test_processors_of_other_kinds_are_refused_by_name() -> None:
    model = wan_transformer()

    class Own(type(model.blocks[0].attn1.processor)):
        pass

    model.blocks[1].attn1.set_processor(Own())
    with pytest.raises(TypeError, match="blocks.1.attn1.processor is a Own, wanted the stock WanAttnProcessor"):
        with vecattention.apply(model):
            pass
    assert "Sparse" not in str(model.attn_processors)


def test_the_width_of_the_model_decides_from_which_length_on_it_pays(wan, monkeypatch) -> None:
    from vecattention.integrations.dit import settings

    pipe, stock = wan
    monkeypatch.setattr(settings, "pays_from", lambda device, causal, block, width: 1000 + width)
    config = pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    with vecattention.apply(pipe, threshold=0.9, dense_steps=0) as run:
        assert torch.equal(generate_wan(pipe), stock)
    assert list(run.stats.reasons) == [f"the sequence has fewer than min_length={1000 + width} keys"]


def test_short_sequences_stay_dense_on_demand(wan, caplog) -> None:
    pipe, stock = wan
    with vecattention.apply(pipe, threshold=0.9, dense_steps=0, min_length=193) as run:
        assert torch.equal(generate_wan(pipe), stock)
    assert list(run.stats.reasons) == ["the sequence has fewer than min_length=193 keys"]
    assert run.stats.dense_calls == 16 == run.stats.reasons["the sequence has fewer than min_length=193 keys"]
    with vecattention.apply(pipe, threshold=0.9, dense_steps=0, min_length=192) as run:
        generate_wan(pipe)
    assert run.stats.sparse_calls == 16


def test_numbers_are_read_only_when_asked(wan) -> None:
    pipe, _ = wan
    with vecattention.apply(pipe, threshold=0.5, dense_steps=1) as run:
        assert run.stats.layers == {} and run.branches == {} and str(run)
        generate_wan(pipe)
    text = str(run)
    assert "branch cond" in text and "branch uncond" in text and "by dense_steps=1" in text
    assert run.stats.seconds > 0
