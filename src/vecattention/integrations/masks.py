"""The mask function "vecattention" of `transformers.AttentionMaskInterface`: plain causal masks by their bounds only.

A boolean mask [B, 1, Sq, Sk] of a long video takes gigabytes. What sparse attention needs of it is where the real
tokens of each batch element begin and end, read from the padding mask once per forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

if "q_offset" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(f"transformers is {transformers.__version__}, wanted 5.4 or newer; update it")


@dataclass(frozen=True)
class CausalSpans:
    """A causal mask with padding at the ends: query row i, at position ``first + i``, sees the real keys up to it.

    Attributes:
        first: position of the first query row; the keys before it come from the cache.
        rows: Sq.
        spans: (start, end) of the real tokens of each batch element, or None where nothing is padded.
        dense: makes the mask that "sdpa" would have had (None: its own causal flag serves), once per forward.
    """

    first: int
    rows: int
    spans: tuple[tuple[int, int], ...] | None
    dense: Callable[[], Tensor | None]

    @property
    def last(self) -> int:
        """Position after the last query row: keys from here on are not written yet."""
        return self.first + self.rows

    @property
    def ndim(self) -> int:
        """4, so that transformers takes a mask that was made ahead (static caches) for a finished one."""
        return 4


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | CausalSpans | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | CausalSpans | None:
    """The mask of one forward: `CausalSpans` or None for causal masks with padding at the ends, else what "sdpa" has.

    Called by transformers, with its arguments. None means what it means to "sdpa": causal from the first key on.
    """
    if isinstance(attention_mask, CausalSpans):
        return attention_mask
    stock: Callable[[], Tensor | None] = functools.partial(
        sdpa_mask, batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip, **options,
    )  # fmt: skip
    plain = mask_function is causal_mask_function and allow_is_causal_skip and kv_offset == 0
    if q_length == 1 or not plain:
        return stock()
    bound = _outside if torch.compiler.is_compiling() else _bounded
    bounds: Tensor | CausalSpans | None = bound(stock, q_length, kv_length, q_offset, attention_mask)
    return bounds


def _bounded(
    stock: Callable[[], Tensor | None], rows: int, keys: int, offset: int | Tensor, padding: Tensor | None
) -> Tensor | CausalSpans | None:
    """The bounds of a plain causal mask. It looks at values, so compiled models step out of their graph for it."""
    first = int(offset)  # a static cache keeps its length on the device
    if first + rows > keys:
        return stock()
    spans = None if padding is None else _spans(padding[:, : first + rows], first + rows)
    if spans == ():
        return stock()
    if spans is None and first == 0:
        return None
    return CausalSpans(first, rows, spans, functools.cache(stock))


_outside = torch.compiler.disable(_bounded)  # type: ignore[no-untyped-call,unused-ignore]


def _spans(padding: Tensor, keys: int) -> tuple[tuple[int, int], ...] | None:
    """(start, end) of the real tokens of each row of a padding mask; None: all real; (): some row has a hole."""
    real = padding.bool()
    count = real.sum(1)
    start = real.int().argmax(1)
    end = real.shape[1] - real.flip(1).int().argmax(1)
    bounds = torch.stack((start, end, count), 1).tolist()
    if any(0 < n != b - a for a, b, n in bounds):
        return ()
    spans = tuple((a, b) if n else (keys, keys) for a, b, n in bounds)
    return None if all(span == (0, keys) for span in spans) else spans
