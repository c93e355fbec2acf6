"""Attention-mass recall of a rule on the inputs of some layers, over evenly spread blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import vecattention
from vecattention.integrations.capture import Captured
from vecattention.recall import recall
from vecattention.spec import Selection

BLOCKS = 32
"""Blocks of rows looked at in each layer."""

LAYERS = 4
"""Layers looked at, evenly spread."""


def layers_of(count: int) -> tuple[int, ...]:
    """At most `LAYERS` layer indices of a model with `count`, evenly spread.

    >>> layers_of(3), layers_of(28)
    ((0, 1, 2), (0, 9, 18, 27))
    """
    return tuple(int(i) for i in torch.linspace(0, count - 1, min(count, LAYERS)).round())


def mean_recall(layers: Iterable[Captured], span: tuple[int, int], rule: Mapping[str, Any]) -> float:
    """Mean over layers, heads and rows of the full attention's mass on the keys that the rule keeps.

    Args:
        layers: what each layer's attention was given, batch 1.
        span: the rows of the film, [start, end): the others stay dense, so that nothing of theirs is lost.
        rule: the arguments of `vecattention.select`.

    Returns:
        0 to 1. All rows count: those outside the span as 1.
    """
    values = [_rows_recall(layer, span, rule) for layer in layers]
    return float(torch.tensor(values, dtype=torch.float64).mean())


def _rows_recall(layer: Captured, span: tuple[int, int], rule: Mapping[str, Any]) -> float:
    block = int(rule.get("q_block_size") or rule["q_pooling_size"])
    rows = layer.query.shape[2]
    first, last = span[0] // block, -(-span[1] // block)
    inside = torch.linspace(first, last - 1, min(BLOCKS, last - first)).round().long().tolist()
    total, count = 0.0, 0
    for g in inside:
        low, high = g * block, min((g + 1) * block, rows)
        query, key = layer.query[:, :, low:high], layer.key[:, :, :high]
        kept = select(query, key, rule, layer.scaling)
        total += float(recall(query, key, kept, scale=layer.scaling).mean()) * (high - low)
        count += high - low
    sparse = span[1] - span[0]
    return (total / count * sparse + rows - sparse) / rows


def select(query: Tensor, key: Tensor, rule: Mapping[str, Any], scale: float | None) -> Selection:
    """The selection of a rule, the arguments of `vecattention.apply` that are not its own left out."""
    own = {name: value for name, value in rule.items() if name not in ("vision_span", "min_length", "chunk_size")}
    return vecattention.select(query, key, scale=scale, **own)
