"""What a run of sparse attention in a model was asked to do, checked once."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from vecattention import checks, dispatch, ops, profile
from vecattention.thresholds import SETTINGS, ThresholdTable

logger = logging.getLogger(__name__)

PUBLISHED_THRESHOLD = 0.9
AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """The arguments of `vecattention.apply`, checked and completed.

    Attributes:
        limit: the threshold for every layer, [], [H] or [B, H], or None where ``table`` has one per layer.
        table: thresholds by layer and head, or None.
        rule: q_pooling_size, q_block_size, k_local_size, group_k_block and max_scope.
        backend, chunk_size: as in `vecattention.vec_attention`.
        min_length: sequences with fewer keys stay dense.
        vision: None, "auto", or (start, end): the positions outside of which rows stay dense.
    """

    limit: Tensor | None = None
    table: ThresholdTable | None = None
    rule: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    chunk_size: int | None = None
    min_length: int = 0
    vision: str | tuple[int, int] | None = None

    @property
    def block(self) -> int:
        """R, the rows that share one list of keys."""
        return int(self.rule["q_block_size"])

    @functools.cached_property
    def short(self) -> str:
        """Why a short sequence stays dense."""
        least = self.min_length
        return f"the sequence has fewer than min_length={least} keys; lower min_length to make it sparse all the same"

    def threshold(self, layer: int) -> Tensor:
        """The thresholds of a layer: [], [H] or [B, H]."""
        if self.table is not None:
            return self.table.row(layer)
        return torch.tensor(PUBLISHED_THRESHOLD, dtype=torch.float64) if self.limit is None else self.limit


def settings_of(
    *,
    layers: int,
    heads: int,
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
    device: torch.device | None = None,
    head_dim: int = 0,
) -> Settings:
    """The `Settings` of these arguments for a model of so many layers and query heads.

    ``device`` is the model's: min_length None then takes the crossover of its profile, where that is measured, for
    heads of ``head_dim`` (0: like the measured ones).

    Raises:
        TypeError, ValueError: an argument that does not fit, or a table made for something else.
    """
    given: dict[str, Any] = {
        "q_pooling_size": q_pooling_size, "q_block_size": q_block_size, "k_local_size": k_local_size,
        "group_k_block": group_k_block, "max_scope": max_scope,
    }  # fmt: skip
    asked = {name: value for name, value in given.items() if value is not None}
    if table is not None:
        _check_table(table, threshold, layers, heads, asked)
        asked = {name: getattr(table, name) for name in given}
    rule = ops.rule_of(64, **asked)
    dispatch.check(backend)
    checks.chunk_size(chunk_size)
    limit = None if table is not None else _threshold(threshold, heads)
    if min_length is None:
        length = max(2 * rule.q_pooling_size + 1, pays_from(device, True, rule.q_block_size, heads * head_dim))
    else:
        length = _length(min_length)
    kept = {name: getattr(rule, name) for name in given}
    return Settings(limit, table, kept, backend, chunk_size, length, _vision(vision_span))


def pays_from(device: torch.device | None, causal: bool, q_block_size: int, width: int) -> int:
    """Keys from which on sparse calls of this width (H D) are the faster ones on this device; 0 where not known.

    What the profile says that the environment names is only told: it may decide no result.
    """
    if device is None:
        return 0
    known = profile.shipped(device).pays_from(causal, q_block_size, width=width)
    named = 0 if known else profile.of(device).pays_from(causal, q_block_size, width=width)
    if named:
        _tell(named)
    return known


@functools.cache
def _tell(length: int) -> None:
    logger.warning(
        "vecattention: by the profile that %s names such calls are faster than dense ones %s; pass min_length=%d to "
        "leave others dense", profile.VARIABLE,
        "at no length that was measured" if length == profile.NEVER else f"from {length} keys on", length,
    )  # fmt: skip


def _threshold(value: float | Tensor | None, heads: int) -> Tensor:
    value = PUBLISHED_THRESHOLD if value is None else value
    batch = int(value.shape[0]) if isinstance(value, Tensor) and value.ndim == 2 else 1
    limit = checks.threshold(value, batch, heads)
    if limit.device.type == "cpu":
        checks.alpha(limit, batch, heads, limit.device)
    return limit


def _check_table(
    table: ThresholdTable, threshold: float | Tensor | None, layers: int, heads: int, asked: dict[str, Any]
) -> None:
    if not isinstance(table, ThresholdTable):
        raise TypeError(f"table is a {type(table).__name__}, wanted a ThresholdTable; pass ThresholdTable.load(path)")
    if threshold is not None:
        raise ValueError(f"threshold is {threshold!r} beside a table, wanted one of the two; leave threshold out")
    table.check(layers, heads, causal=True, **{name: asked[name] for name in SETTINGS if name in asked})


def _length(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"min_length is {value!r} ({type(value).__name__}), wanted an integer; pass an int or None")
    if value < 0:
        raise ValueError(f"min_length is {value}, wanted at least 0 keys; pass None for the shortest that can gain")
    return int(value)


def _vision(value: str | tuple[int, int] | None) -> str | tuple[int, int] | None:
    if value is None or value == AUTO:
        return value
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or not all(isinstance(x, Integral) and not isinstance(x, bool) for x in value):
        raise TypeError(f"vision_span is {value!r}, wanted 'auto', (start, end) or None; pass two token positions")
    start, end = (int(x) for x in value)
    if not 0 <= start < end:
        raise ValueError(f"vision_span is {(start, end)}, wanted 0 <= start < end; end is the position after the last")
    return start, end
