"""Where the vision tokens of each sequence lie: read from input_ids by a hook that is taken away afterwards."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vecattention.integrations.layout import Span

MARKS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")


def marks_of(config: object) -> tuple[int, ...]:
    """Ids of the tokens that stand for vision, or begin or end it, in a model's config.

    Raises:
        ValueError: the config names none.
    """
    ids = tuple(value for name in MARKS if isinstance(value := getattr(config, name, None), int))
    if not ids:
        raise ValueError(
            f"vision_span is 'auto', wanted a model whose config has one of {MARKS}, got {type(config).__name__}; "
            "pass (start, end), or None to treat text and vision alike"
        )
    return ids


class VisionSpans:
    """The span from the first to the last vision token of each sequence, in positions of the whole sequence.

    A prefill in chunks sees its tokens chunk by chunk: rows after the last vision token of a chunk count as text.
    """

    def __init__(self, marks: tuple[int, ...]) -> None:
        self._marks = marks
        self._running = threading.local()
        self._begun: WeakKeyDictionary[object, list[bool]] = WeakKeyDictionary()

    def spans(self) -> list[Span] | None:
        """Of the forward that this thread runs: one span or None per batch element; None when it saw no input_ids."""
        return getattr(self._running, "spans", None)

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Watch the forwards of a model; remove the handles to stop."""
        return [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
            self._running.spans = None
            return
        first = 0 if cache is None else int(cache.get_seq_length())
        begun = self._begun.get(cache, []) if cache is not None and first else []
        found = self._find(ids)
        spans: list[Span] = []
        for i, span in enumerate(found):
            earlier = i < len(begun) and begun[i]
            spans.append(None if span is None else (0 if earlier else first + span[0], first + span[1]))
        self._running.spans = spans
        self._running.begun = [s is not None or (i < len(begun) and begun[i]) for i, s in enumerate(spans)]

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        cache = getattr(output, "past_key_values", None)
        if self.spans() is not None and cache is not None:
            self._begun[cache] = self._running.begun
        self._running.spans = None

    def _find(self, ids: Tensor) -> list[Span]:
        """First and one past the last mark of each row; one synchronisation."""
        hit = torch.isin(ids, torch.tensor(self._marks, device=ids.device))
        start, end = hit.int().argmax(1), ids.shape[1] - hit.flip(1).int().argmax(1)
        bounds = torch.stack((hit.any(1).to(start.dtype), start, end), 1).tolist()
        return [(a, b) if any_ else None for any_, a, b in bounds]
