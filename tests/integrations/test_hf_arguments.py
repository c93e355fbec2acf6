"""Bad input of `apply`: a named error before anything is changed."""

from __future__ import annotations

from typing import Any

import hf_tiny
import pytest
import torch

import vecattention
from vecattention import ThresholdTable


@pytest.fixture(scope="module")
def model() -> Any:
    return hf_tiny.Kind(hf_tiny.llama).make()


def table(layers: int = 2, heads: int = 4, **settings: Any) -> ThresholdTable:
    return ThresholdTable.uniform(0.8, layers, heads, **settings)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tresh": 1, "another": 2}, TypeError, r"apply got \['another', 'tresh'\], wanted names among \('threshold', "),
    ({"dense_steps": 0.1}, TypeError, r"apply got \['dense_steps'\], wanted names among"),
    ({"threshold": 0.0}, ValueError, r"threshold is 0.0, wanted a number in \(0, 1\]"),
    ({"threshold": float("nan")}, ValueError, r"threshold is nan, wanted a number in \(0, 1\]"),
    ({"threshold": "high"}, TypeError, r"threshold is 'high' \(str\), wanted a number"),
    ({"threshold": torch.ones(3)}, ValueError, r"threshold has shape \(3,\), wanted \(\) or \(4,\)"),
    ({"threshold": torch.tensor([0.5, 0.5, 2.0, 0.5])}, ValueError, "threshold is 2.0, wanted a number"),
    ({"threshold": 0.9, "table": table()}, ValueError, "threshold is 0.9 beside a table, wanted one of the two"),
    ({"table": "table.json"}, TypeError, r"table is a str, wanted a ThresholdTable; pass ThresholdTable.load\(path\)"),
    ({"table": table(28, 28)}, ValueError, r"table has shape \(28, 28\), wanted \(2, 4\) = \(layers, heads\)"),
    ({"table": table(causal=False)}, ValueError, "was tuned for causal=False, got causal=True"),
    ({"table": table(), "q_pooling_size": 32}, ValueError, "tuned for q_pooling_size=64, got q_pooling_size=32"),
    ({"q_pooling_size": 48}, ValueError, "q_pooling_size is 48, wanted one of"),
    ({"q_block_size": 96}, ValueError, "q_block_size is 96, wanted a multiple of q_pooling_size=64"),
    ({"k_local_size": 128}, ValueError, "k_local_size is 128, wanted at most q_pooling_size=64"),
    ({"group_k_block": 0}, ValueError, "group_k_block is 0, wanted at least 1"),
    ({"max_scope": "all"}, ValueError, "max_scope is 'all', wanted one of"),
    ({"chunk_size": 0}, ValueError, "chunk_size is 0, wanted at least 1"),
    ({"backend": "cuda"}, ValueError, "backend is 'cuda', wanted 'auto' or one of"),
    ({"min_length": -1}, ValueError, "min_length is -1, wanted at least 0 keys"),
    ({"min_length": 1.5}, TypeError, r"min_length is 1.5 \(float\), wanted an integer"),
    ({"vision_span": "all"}, TypeError, r"vision_span is 'all', wanted 'auto', \(start, end\) or None"),
    ({"vision_span": (1, 2, 3)}, TypeError, r"vision_span is \(1, 2, 3\), wanted 'auto'"),
    ({"vision_span": (1, 2.5)}, TypeError, r"vision_span is \(1, 2.5\), wanted 'auto'"),
    ({"vision_span": (5, 5)}, ValueError, r"vision_span is \(5, 5\), wanted 0 <= start < end"),
    (
        {"vision_span": "auto"},
        ValueError,
        r"vision_span is 'auto', wanted a model whose config has one of .*LlamaConfig",
    ),
]


@pytest.mark.parametrize("arguments, error, message", WRONG, ids=[str(list(case[0])) for case in WRONG])
def test_arguments_that_do_not_fit(model: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        vecattention.apply(model, **arguments)
    assert type(caught.value) is error
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("value", [None, "a path", 5, torch.nn.Linear(2, 2), torch.ones(2), hf_tiny.Kind])
def test_what_is_no_model(value: object) -> None:
    with pytest.raises(
        TypeError, match="model_or_pipeline is a .*wanted a model or pipeline of transformers or diffusers"
    ):
        vecattention.apply(value)


def test_a_class_is_no_model() -> None:
    from transformers import LlamaForCausalLM

    with pytest.raises(TypeError, match="model_or_pipeline is a type, wanted a model or pipeline"):
        vecattention.apply(LlamaForCausalLM)


def test_a_config_or_tokenizer_is_no_model(model: Any) -> None:
    with pytest.raises(TypeError, match="model_or_pipeline is a LlamaConfig, wanted a transformers model"):
        vecattention.apply(model.config)


def test_a_model_with_attention_of_its_own() -> None:
    from transformers import PreTrainedConfig, PreTrainedModel

    class Config(PreTrainedConfig):
        model_type = "own"
        num_hidden_layers = num_attention_heads = 1

    class Own(PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.layer = torch.nn.Linear(2, 2)

    own = Own(Config())
    before = own.config._attn_implementation
    with pytest.raises(TypeError, match="holds a Own, wanted a model whose attention goes through transformers.Att"):
        with vecattention.apply(own):
            pass
    assert own.config._attn_implementation == before


def test_integers_and_numbers_of_other_kinds_are_numbers(model: Any) -> None:
    import numpy as np

    for threshold in (1, np.float32(0.5), torch.tensor(0.5), torch.tensor([[0.5, 0.5, 0.5, 0.5]])):
        with torch.no_grad(), vecattention.apply(model, threshold=threshold, min_length=np.int64(200)) as run:
            model(hf_tiny.text(300)["input_ids"])
        assert run.stats.sparse_calls == 2


def test_the_width_of_the_model_decides_from_which_length_on_it_pays(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vecattention.integrations import settings

    monkeypatch.setattr(settings, "pays_from", lambda device, causal, block, width: 1000 + width)
    width = model.config.num_attention_heads * model.config.head_dim
    with torch.no_grad(), vecattention.apply(model) as run:
        model(hf_tiny.text(300)["input_ids"])
    assert f"the sequence has fewer than min_length={1000 + width} keys" in str(run)


def test_what_a_run_prints(model: Any) -> None:
    with torch.no_grad(), vecattention.apply(model) as run:
        assert "dense in" not in str(run)
        assert run.stats.mean_density != run.stats.mean_density and run.stats.density.shape == (0, 0)
        model.generate(hf_tiny.text(300)["input_ids"], max_new_tokens=2)
        model(hf_tiny.text(100)["input_ids"])
    lines = str(run).splitlines()
    assert lines[0] == "layer  density  (least .. most head)  sparse rows  calls: sparse  dense  decode"
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "all"]
    assert [line.split()[-3:] for line in lines[1:3]] == [["1", "1", "1"]] * 2
    assert lines[4].startswith("dense in 2 calls: one-token decoding stays dense")
    assert lines[5].startswith("dense in 2 calls: the sequence has fewer than min_length=129 keys")
