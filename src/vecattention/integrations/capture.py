"""Queries, keys and values of chosen layers, taken from a dense prefill: for recall figures and pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vecattention.integrations.attach import attached, text_model_of
from vecattention.integrations.call import Call, Output
from vecattention.integrations.transformers import register


@dataclass(frozen=True)
class Captured:
    """What one layer's attention was given.

    Attributes:
        query: [B, H, S, D], after position embedding.
        key, value: [B, Hkv, S, D].
        scaling: factor of the dot products, None for D ** -0.5.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None


class Recorder:
    """Answers densely and keeps what it was given."""

    def __init__(self, layers: Collection[int] | None, max_tokens: int | None) -> None:
        self.maps: dict[int, Captured] = {}
        self._layers = layers
        self._max = max_tokens

    def forward(self, call: Call) -> Output:
        """Answer densely; keep a prefill."""
        wanted = call.layer is not None and (self._layers is None or call.layer in self._layers)
        mask = call.spans()
        if wanted and mask is not None and not call.decoding:
            self._keep(call, mask.first, mask.last)
        return call.dense()

    def _keep(self, call: Call, first: int, last: int) -> None:
        layer, end = int(call.layer or 0), last if self._max is None else min(last, self._max)
        before = self.maps.get(layer)
        query = call.query[:, :, : max(end - first, 0)].detach().clone()
        if first and (before is None or before.query.shape[2] != min(first, end)):
            return
        if first and before is not None:
            query = torch.cat((before.query, query), 2)
        key, value = (x[:, :, :end].detach().clone() for x in (call.key, call.value))
        self.maps[layer] = Captured(query, key, value, call.scaling)


@contextmanager
def capture(
    model: object, layers: Collection[int] | None = None, max_tokens: int | None = None
) -> Iterator[dict[int, Captured]]:
    """Record the attention inputs of a model's text layers while it runs densely.

    Args:
        model: a transformers model, a pipeline of one, or a module that wraps one.
        layers: layer indices to record; None for all.
        max_tokens: keep only the first so many tokens; None for all. A causal prefix is a prefill of its own.

    Returns:
        A context manager that yields a dict from layer index to `Captured`. It is filled while the model runs, on the
        model's device; chunks of one prefill are joined, a new sequence replaces the one before.

    Raises:
        TypeError, ValueError: no transformers model, or a layer that it does not have.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with torch.no_grad(), capture(model, layers=[1]) as maps:
        ...     _ = model(torch.arange(70)[None])
        >>> {layer: tuple(entry.query.shape) for layer, entry in maps.items()}, tuple(maps[1].key.shape)
        ({1: (1, 2, 70, 16)}, (1, 1, 70, 16))
    """
    _, text = text_model_of(model)
    count = text.config.num_hidden_layers
    for layer in layers or ():
        if not 0 <= layer < count:
            raise ValueError(f"layers holds {layer}, wanted 0 to {count - 1} of this model; leave it out")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, wanted at least 1; pass None to keep all")
    register()
    recorder = Recorder(layers, max_tokens)
    with attached(text, recorder):
        yield recorder.maps
