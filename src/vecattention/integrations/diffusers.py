"""Sparse attention in video generators of diffusers: Wan (text and image to video) and HunyuanVideo.

`vecattention.apply` gives the self-attention layers processors of ours by `set_attn_processor`, and hears from
`cache_context` which step and guidance branch a forward belongs to. No class or method of diffusers is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor

from vecattention.integrations.dit.announce import Clock
from vecattention.integrations.dit.attachment import attached
from vecattention.integrations.dit.families import family_of, transformers_of
from vecattention.integrations.dit.run import Run
from vecattention.integrations.dit.settings import DitSettings, dit_settings_of
from vecattention.thresholds import ThresholdTable

__all__ = ["apply"]


@contextmanager
def apply(
    model: object,
    *,
    threshold: float | Tensor | None = None,
    coverage: float | Tensor | None = None,
    density: float | Tensor | None = None,
    table: ThresholdTable | None = None,
    dense_steps: int | float = 0.06,
    dense_layers: int | float = 0,
    q_pooling_size: int | None = None,
    q_block_size: int | None = None,
    k_local_size: int | None = None,
    group_k_block: int | None = None,
    max_scope: str | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    min_length: int | None = None,
    balance_heads: bool = True,
) -> Iterator[Run]:
    """`vecattention.apply` for pipelines and transformers of diffusers: see there."""
    if not isinstance(balance_heads, bool):
        raise TypeError(f"balance_heads is {balance_heads!r}, wanted True or False; pass a bool")
    found = transformers_of(model)
    settings: dict[str, DitSettings] = {}
    for name, (_, transformer) in found.items():
        family = family_of(transformer)
        settings[name] = dit_settings_of(
            layers=len(family.names(transformer.config)) if family else 0,
            heads=transformer.config.num_attention_heads, threshold=threshold, coverage=coverage, density=density,
            table=table, dense_steps=dense_steps, dense_layers=dense_layers, q_pooling_size=q_pooling_size,
            q_block_size=q_block_size, k_local_size=k_local_size, group_k_block=group_k_block, max_scope=max_scope,
            chunk_size=chunk_size, backend=backend, min_length=min_length,
            device=next(transformer.parameters()).device,
            head_dim=int(getattr(transformer.config, "attention_head_dim", None) or 0),
        )  # fmt: skip
    whole = model if isinstance(getattr(model, "components", None), dict) else None
    run = Run(settings, Clock(whole), balance_heads)
    with ExitStack() as stack:
        for name, (called, transformer) in found.items():
            stack.enter_context(attached(called, transformer, name, run))
        yield run
