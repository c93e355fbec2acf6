"""One call of an attention function of transformers, and the same call answered densely."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vecattention.integrations.masks import CausalSpans

DROPPED = ("softcap", "s_aux")  # what "sdpa" leaves out without a word
Output = tuple[Tensor, Tensor | None]


class Call(NamedTuple):
    """What a model hands to its attention function.

    Attributes:
        module: the attention layer.
        query: [B, H, Sq, D].
        key, value: [B, Hkv, Sk, D], the cache included.
        mask: `CausalSpans`, None, or a mask [B, 1, Sq, Sk] of another kind.
        scaling: factor of the dot products.
        dropout: its probability.
        causal: whether a row sees only the keys up to its own position.
        options: the other arguments.
        stock: the implementation that the model had before it was switched.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | CausalSpans | None
    scaling: float | None
    dropout: float
    causal: bool
    options: Mapping[str, Any]
    stock: str = "sdpa"

    @property
    def layer(self) -> int | None:
        """Index of the layer, None for modules that have none."""
        index = getattr(self.module, "layer_idx", None)
        return index if isinstance(index, int) else None

    @property
    def decoding(self) -> bool:
        """Whether this is one new token against a cache."""
        return self.causal and self.query.shape[2] == 1

    def spans(self) -> CausalSpans | None:
        """The bounds of a causal mask; None when the mask is of another kind or made for other shapes."""
        batch, rows, keys = self.query.shape[0], self.query.shape[2], self.key.shape[2]
        mask = self.mask
        if mask is None and self.causal and rows <= keys:
            return _unpadded(rows)
        if not isinstance(mask, CausalSpans) or mask.rows != rows or mask.last > keys:
            return None
        return mask if mask.spans is None or len(mask.spans) == batch else None

    def dense(self) -> Output:
        """The answer that the model would have had: ([B, Sq, H, D], attention weights or None).

        It is that of "eager" for a model that was loaded so, else that of "sdpa". What "sdpa" would leave out, soft
        caps and sinks, is left out only where the model had "sdpa" before.
        """
        mask = self.mask.dense() if isinstance(self.mask, CausalSpans) else self.mask
        if mask is not None:
            mask = mask.to(self.query.device)
        if self.stock != "sdpa" and (self.stock == "eager" or self._drops()):
            return self._eager(mask)
        out, weights = sdpa_attention_forward(
            self.module, self.query, self.key, self.value, mask, dropout=self.dropout, scaling=self.scaling,
            is_causal=self.causal, **self.options,
        )  # fmt: skip
        return out, weights

    def _drops(self) -> bool:
        return any(self.options.get(name) is not None for name in DROPPED)

    def _eager(self, mask: Tensor | None) -> Output:
        source = sys.modules[type(self.module).__module__]
        eager = getattr(source, "eager_attention_forward", None)
        if eager is None:
            raise TypeError(
                f"{type(self.module).__name__} needs 'eager' attention, wanted an eager_attention_forward in its model "
                f"file, got none in {source.__name__}; load the model with attn_implementation='sdpa'"
            )
        if mask is None and self.causal and self.query.shape[2] > 1:
            shape = self.query.shape[2], self.key.shape[2]
            mask = torch.ones(shape, dtype=torch.bool, device=self.query.device).tril()[None, None]
        if mask is not None and mask.dtype == torch.bool:
            lowest = torch.finfo(self.query.dtype).min
            mask = torch.zeros(mask.shape, dtype=self.query.dtype, device=mask.device).masked_fill(~mask, lowest)
        out, weights = eager(
            self.module, self.query, self.key, self.value, mask, dropout=self.dropout, scaling=self.scaling,
            **self.options,
        )  # fmt: skip
        return out, weights


@functools.lru_cache(maxsize=64)
def _unpadded(rows: int) -> CausalSpans:
    """What no mask means: so many rows from position 0 on, all of them real."""
    return CausalSpans(0, rows, None, lambda: None)
