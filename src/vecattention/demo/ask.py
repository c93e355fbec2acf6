"""One question to a model by one method, with the time of its attention and of its whole prefill."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vecattention
from vecattention.integrations.clock import Interval
from vecattention.integrations.run import DECODING
from vecattention.testbed import answer

FULL, SPARSE = "full attention", "VecAttention"
NEVER = 2**62


@dataclass(frozen=True)
class Method:
    """A name and the arguments of `vecattention.apply`."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def methods(rule: Mapping[str, Any]) -> tuple[Method, Method]:
    """Full attention and VecAttention, both through the same hook, so that their times mean the same.

    Below `min_length` the hook answers with what the model had before, "sdpa", bit for bit.
    """
    return Method(FULL, {"min_length": NEVER}), Method(SPARSE, rule)


@dataclass(frozen=True)
class Heard:
    """An answer and what it took.

    Attributes:
        said: the words.
        attention_seconds: in the attention function of all layers during prefill, selection included; 0 where some
            calls were too short to be timed (`LayerStats.untimed_calls`).
        prefill_seconds: from the inputs to the first token, vision tower included.
        density: pairs attended over those of full attention.
        why_dense: reasons for which calls stayed dense though they were to be sparse.
    """

    said: str
    attention_seconds: float
    prefill_seconds: float
    density: float
    why_dense: tuple[str, ...]


def ask(model: nn.Module, processor: Any, inputs: dict[str, Tensor], method: Method, max_new_tokens: int) -> Heard:
    """What the model says to the inputs of `testbed.prepare`, attending by this method."""
    with _quiet(method), vecattention.apply(model, **method.arguments) as run, _first_forward(model) as prefill:
        said = answer(model, processor, inputs, max_new_tokens)
    stats = run.stats
    reasons = () if method.name == FULL else tuple(why for why in stats.reasons if why != DECODING)
    return Heard(said, 0.0 if stats.untimed_calls else stats.seconds, prefill.seconds(), stats.mean_density, reasons)


class _Prefill:
    """The time of a model's first forward."""

    def __init__(self, model: nn.Module) -> None:
        self._device = next(model.parameters()).device
        self._interval: Interval | None = None
        self._ended = False

    def seconds(self) -> float:
        return self._interval.seconds() if self._interval is not None else float("nan")

    def before(self, *_: object) -> None:
        if self._interval is None:
            self._interval = Interval(self._device)

    def after(self, *_: object) -> None:
        if self._interval is not None and not self._ended:
            self._interval.stop()
            self._ended = True


@contextmanager
def _first_forward(model: nn.Module) -> Iterator[_Prefill]:
    prefill = _Prefill(model)
    handles = [model.register_forward_pre_hook(prefill.before), model.register_forward_hook(prefill.after)]
    try:
        yield prefill
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet(method: Method) -> Iterator[None]:
    """Without the warning that attention stays dense, where that is what was asked for."""
    logger = logging.getLogger("vecattention")
    level = logger.level
    logger.setLevel(logging.ERROR if method.name == FULL else level)
    try:
        yield
    finally:
        logger.setLevel(level)


def to_device(inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """The inputs on a device."""
    return {name: value.to(torch.device(device)) for name, value in inputs.items()}
