"""Which step of a generation a forward belongs to, which guidance branch, and which steps and layers stay dense.

A pipeline tells where it stands; nothing here is guessed from tensors. The first steps settle what a video shows, so
they are kept dense: with the published share 0.06 the first ``floor(0.06 * 50) = 3`` of 50 steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996 in floating point and means 29


@dataclass(frozen=True)
class Place:
    """Where a forward stands in a generation, as far as it was announced.

    Attributes:
        branch: name of the guidance branch ("cond", "uncond"), None when nobody named one.
        step: index of the step, from 0; None when it is not known.
        steps: number of steps of the generation; None when it is not known.
    """

    branch: str | None = None
    step: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Schedule:
    """What stays dense: the first steps and the first layers.

    Attributes:
        dense_steps: how many of the first steps, as a number (int) or a share of all steps (float).
        dense_layers: how many of the first layers.
    """

    dense_steps: int | float = 0.06
    dense_layers: int = 0

    def warming(self, place: Place) -> bool:
        """Whether the place lies among the first, dense steps.

        Raises:
            ValueError: more dense steps than the generation has, or the place does not tell what is needed.

        Example:
            >>> [Schedule(0.06).warming(Place("cond", step, 50)) for step in (0, 2, 3)]
            [True, True, False]
        """
        if not self.dense_steps:
            return False
        if isinstance(self.dense_steps, float) and self.dense_steps == 1.0:
            return True
        if place.step is None:
            raise ValueError(self._lost("the index of the step", place))
        if isinstance(self.dense_steps, int):
            if place.steps is not None:
                leading("dense_steps", self.dense_steps, place.steps, "steps")
            return place.step < self.dense_steps
        if place.steps is None:
            raise ValueError(self._lost("the number of steps", place))
        return place.step < leading("dense_steps", self.dense_steps, place.steps, "steps")

    def _lost(self, what: str, place: Place) -> str:
        return (
            f"dense_steps is {self.dense_steps}, wanted {what} of the generation, got {place}; pass the pipeline to "
            "apply, or call inside transformer.cache_context(branch, step_index=i, num_inference_steps=n), or pass "
            "dense_steps=0"
        )


def schedule_of(dense_steps: int | float, dense_layers: int | float, layers: int) -> Schedule:
    """The checked `Schedule` for a model of so many layers; ``dense_layers`` may be a share too.

    Raises:
        TypeError, ValueError: not a number, below 0, a share over 1, or more layers than there are.

    Example:
        >>> schedule_of(3, 0.25, 40)
        Schedule(dense_steps=3, dense_layers=10)
    """
    _check("dense_steps", dense_steps, "steps")
    steps = int(dense_steps) if isinstance(dense_steps, Integral) else float(dense_steps)
    return Schedule(steps, leading("dense_layers", dense_layers, layers, "layers"))


def leading(name: str, value: int | float, total: int, things: str) -> int:
    """How many of ``total`` things a number (int) or a share (float, rounded down) means.

    Example:
        >>> leading("dense_steps", 0.06, 50, "steps"), leading("dense_steps", 1, 50, "steps")
        (3, 1)
    """
    _check(name, value, things)
    if not isinstance(value, Integral):
        return math.floor(value * total + ROUNDING)
    if value > total:
        raise ValueError(
            f"{name} is {int(value)}, wanted at most the {total} {things} that there are; pass a share such as 0.06, "
            "or 1.0 for all"
        )
    return int(value)


def _check(name: str, value: int | float, things: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} is {value!r} ({type(value).__name__}), wanted a number of {things} (int) or a share of them "
            "(float); pass 3 or 0.06"
        )
    whole = isinstance(value, Integral)
    if not (value >= 0 if whole else 0.0 <= value <= 1.0):  # false for NaN too
        wanted = f"at least 0 {things}" if whole else f"a share of the {things} from 0.0 to 1.0"
        raise ValueError(f"{name} is {value}, wanted {wanted}; an int counts, a float is a share")
