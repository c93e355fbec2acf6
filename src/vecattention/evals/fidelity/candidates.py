"""The methods of a study: a name with fixed parameters, and the knob that is turned."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vecattention import methods
from vecattention.evals.fidelity.samples import Sample
from vecattention.methods import Knob
from vecattention.spec import Selection


@dataclass(frozen=True)
class Candidate:
    """A method with some parameters fixed.

    Attributes:
        method: name in `vecattention.methods`.
        fixed: parameters that stay.
        by: name of the knob where it is not the method's own: one of `KNOBS`.
    """

    method: str
    fixed: dict[str, object] = field(default_factory=dict)
    by: str | None = None

    @property
    def knob(self) -> Knob | None:
        """The parameter that is turned; None for a method without."""
        return methods.get(self.method).knob if self.by is None else KNOBS[self.by]

    @property
    def label(self) -> str:
        """``name``, ``name:parameter=value,...`` or ``name@knob:...``, as `parse` reads it."""
        fixed = ",".join(f"{name}={value}" for name, value in self.fixed.items())
        name = self.method if self.by is None else f"{self.method}@{self.by}"
        return f"{name}:{fixed}" if fixed else name

    def parameters(self, sample: Sample, setting: float | None) -> dict[str, object]:
        """The arguments of ``select`` on this sample at this setting of the knob."""
        method = methods.get(self.method)
        chosen: dict[str, object] = {}
        if method.takes_value and sample.frames is not None:
            chosen = {"frames": sample.frames, "context": sample.context}
            chosen |= {"variant": "hunyuan" if sample.context else "wan"}
        if self.knob is not None and setting is not None:
            chosen[self.knob.name] = setting
            if self.by is not None:  # the same target for each head, not for all together
                chosen[self.knob.name] = torch.full((sample.query.shape[1],), setting, dtype=torch.float64)
        return chosen | self.fixed

    def select(self, sample: Sample, setting: float | None) -> Selection:
        """The selection on this sample."""
        method = methods.get(self.method)
        arguments = self.parameters(sample, setting) | ({"value": sample.value} if method.takes_value else {})
        return method.select(sample.query, sample.key, causal=sample.causal, scale=sample.scale, **arguments)


KNOBS = {
    "coverage": Knob("coverage", (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99), 0.01, 1.0),
    "density": Knob("density", (0.03, 0.05, 0.1, 0.2, 0.3, 0.5), 0.001, 1.0),
}
"""Knobs beside the methods' own."""

CAUSAL = (
    "full", "vecattention", "vecattention:max_scope=row",
    "vecattention:max_scope=row,q_pooling_size=32,q_block_size=128",
    "vecattention@coverage:max_scope=row,q_pooling_size=32,q_block_size=128",
    "vecattention@density:max_scope=row,q_pooling_size=32,q_block_size=128", "vecattention@density",
    "flexprefill", "xattention", "anchorattention", "anchorattention:step=4",
)  # fmt: skip
FREE = (
    "full", "vecattention", "vecattention:group_k_block=8192", "vecattention:max_scope=row",
    "vecattention:max_scope=row,q_pooling_size=32,q_block_size=128",
    "vecattention@coverage:max_scope=row,q_pooling_size=32,q_block_size=128",
    "vecattention@density:max_scope=row,q_pooling_size=32,q_block_size=128", "vecattention@density:group_k_block=8192",
    "xattention:stride=8", "svg",
)  # fmt: skip
"""What is compared unless something else is asked for: the published settings, and this library's variants."""


def parse(text: str) -> Candidate:
    """A candidate from ``name``, ``name:parameter=value,...`` or ``name@knob:...``; values are literals, or words.

    >>> parse("xattention:stride=8").fixed
    {'stride': 8}

    Raises:
        ValueError: no such method or parameter, or not of that form.
    """
    name, _, rest = text.partition(":")
    name, _, by = name.partition("@")
    method = methods.get(name)
    if by and (by not in KNOBS or by not in method.parameters):
        raise ValueError(f"method is {text!r}, wanted @ before one of {tuple(KNOBS)} of vecattention; leave it out")
    fixed: dict[str, object] = {}
    for part in filter(None, rest.split(",")):
        parameter, equals, value = part.partition("=")
        if not equals or parameter not in method.parameters:
            raise ValueError(
                f"method is {text!r}, wanted {name}:parameter=value with parameters among {tuple(method.parameters)}; "
                f"correct {part!r}"
            )
        try:
            fixed[parameter] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fixed[parameter] = value
    return Candidate(name, fixed, by or None)


def mean_density(candidate: Candidate, samples: Sequence[Sample], setting: float) -> float:
    """Density over all samples and heads."""
    found = [float(candidate.select(sample, setting).density().mean()) for sample in samples]
    return sum(found) / len(found)


def matched(candidate: Candidate, samples: Sequence[Sample], target: float, near: float = 0.01) -> tuple[float, float]:
    """The knob's setting at which the density over all samples is the target, by bisection, and that density.

    It stops within ``near`` of the target (relative), or after 24 halvings with the nearest setting found: a knob may
    move the density in steps, and a method may have a floor above the target.
    """
    knob = candidate.knob
    if knob is None:
        raise ValueError(f"{candidate.label} has no knob, wanted one to turn; leave it out of the matched study")
    low, high = knob.sparse, knob.dense
    if candidate.method == "svg":
        low += max(2 * sample.context / sample.key.shape[2] for sample in samples)
    tried = {setting: mean_density(candidate, samples, setting) for setting in (low, high)}
    for _ in range(24):
        best = min(tried, key=lambda setting: abs(tried[setting] - target))
        if abs(tried[best] - target) <= near * target or tried[low] >= target or tried[high] <= target:
            break
        middle = math.sqrt(low * high) if knob.log else (low + high) / 2
        tried[middle] = mean_density(candidate, samples, middle)
        low, high = (middle, high) if tried[middle] < target else (low, middle)
    best = min(tried, key=lambda setting: abs(tried[setting] - target))
    return best, tried[best]
