"""Sparse attention in transformers models. Importing this module makes the name "vecattention" known to transformers:

    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation={"text_config": "vecattention"})

`vecattention.apply` does it by itself, for models that are already loaded. Both go through the public seams of
transformers alone: AttentionInterface, AttentionMaskInterface and set_attn_implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from vecattention.integrations.attach import NAME, Attachment, attached, attachment_of, text_model_of
from vecattention.integrations.call import Call, Output
from vecattention.integrations.masks import CausalSpans, attention_mask
from vecattention.integrations.run import Run
from vecattention.integrations.settings import AUTO, settings_of
from vecattention.integrations.vision import VisionSpans, marks_of
from vecattention.thresholds import ThresholdTable

__all__ = ["apply", "attention_forward", "register"]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | CausalSpans | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> Output:
    """The attention function "vecattention" of transformers, which calls it.

    Under `vecattention.apply` it follows that run. In a model that was loaded with the name and without `apply`, it
    is sparse with the published settings (threshold 0.9), and counts nothing. In a compiled model it is no part of the
    graph, except for one-token decoding, which then is not counted.

    Args:
        query: [B, H, Sq, D].
        key, value: [B, Hkv, Sk, D], cache included, not repeated; query row i is at position i + Sk - Sq.
        attention_mask: what the mask function "vecattention" made.

    Returns:
        ([B, Sq, H, D], attention weights or None).
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    compiling = torch.compiler.is_compiling()
    attachment = None if compiling else attachment_of(module)
    stock = "sdpa" if attachment is None else attachment.stock
    call = Call(module, query, key, value, attention_mask, scaling, dropout, causal, options, stock)
    if not compiling:
        return _answer(call, attachment)
    out: Output = call.dense() if call.decoding else _outside(call)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
def _outside(call: Call) -> Output:
    """The answer, as no part of a graph; where there is none, this decorator would take longer than a short call."""
    attachment = attachment_of(call.module)
    return _answer(call if attachment is None else call._replace(stock=attachment.stock), attachment)


def _answer(call: Call, attachment: Attachment | None) -> Output:
    server = None if attachment is None else attachment.active()
    return (_published() if server is None else server).forward(call)


def register() -> None:
    """Make the name "vecattention" known to transformers; importing this module does it."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def apply(
    model: object,
    *,
    threshold: float | Tensor | None = None,
    table: ThresholdTable | None = None,
    q_pooling_size: int | None = None,
    q_block_size: int | None = None,
    k_local_size: int | None = None,
    group_k_block: int | None = None,
    max_scope: str | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    min_length: int | None = None,
    vision_span: str | tuple[int, int] | None = None,
) -> AbstractContextManager[Run]:
    """`vecattention.apply` for transformers models: see there."""
    whole, text = text_model_of(model)
    settings = settings_of(
        layers=text.config.num_hidden_layers, heads=text.config.num_attention_heads, threshold=threshold, table=table,
        q_pooling_size=q_pooling_size, q_block_size=q_block_size, k_local_size=k_local_size,
        group_k_block=group_k_block, max_scope=max_scope, chunk_size=chunk_size, backend=backend,
        min_length=min_length, vision_span=vision_span, device=text.device, head_dim=_head_dim(text.config),
    )  # fmt: skip
    vision = VisionSpans(marks_of(whole.config)) if settings.vision == AUTO else None
    return _running(whole, text, Run(settings, None if vision is None else vision.spans), vision)


def _head_dim(config: Any) -> int:
    """Size of a head of a text model's attention; 0 where its configuration does not say."""
    return int(getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // config.num_attention_heads)


@contextmanager
def _running(whole: PreTrainedModel, text: PreTrainedModel, run: Run, vision: VisionSpans | None) -> Iterator[Run]:
    with ExitStack() as stack:
        for handle in vision.attach(whole) if vision is not None else ():
            stack.callback(handle.remove)
        stack.enter_context(attached(text, run))
        yield run


@functools.cache
def _published() -> Run:
    """Serves models that were loaded with the name and without `apply`."""
    return Run(settings_of(layers=1, heads=1), count=False)


register()
