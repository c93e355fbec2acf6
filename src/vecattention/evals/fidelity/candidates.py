"""The methods of a study: a name with fixed parameters, and the knob that is turned."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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
        knob: the one that is turned; None for a method without.
    """

    method: str
    fixed: dict[str, object] = field(default_factory=dict)

    @property
    def knob(self) -> Knob | None:
        """The method's knob."""
        return methods.get(self.method).knob

    @property
    def label(self) -> str:
        """``name`` or ``name:parameter=value,...``, as `parse` reads it."""
        fixed = ",".join(f"{name}={value}" for name, value in self.fixed.items())
        return f"{self.method}:{fixed}" if fixed else self.method

    def parameters(self, sample: Sample, setting: float | None) -> dict[str, object]:
        """The arguments of ``select`` on this sample at this setting of the knob."""
        method = methods.get(self.method)
        chosen: dict[str, object] = {}
        if method.takes_value and sample.frames is not None:
            chosen = {"frames": sample.frames, "context": sample.context}
            chosen |= {"variant": "hunyuan" if sample.context else "wan"}
        if self.knob is not None and setting is not None:
            chosen[self.knob.name] = setting
        return chosen | self.fixed

    def select(self, sample: Sample, setting: float | None) -> Selection:
        """The selection on this sample."""
        method = methods.get(self.method)
        arguments = self.parameters(sample, setting) | ({"value": sample.value} if method.takes_value else {})
        return method.select(sample.query, sample.key, causal=sample.causal, scale=sample.scale, **arguments)


CAUSAL = (
    "full", "vecattention", "vecattention:max_scope=row",
    "vecattention:max_scope=row,q_pooling_size=32,q_block_size=128",
    "flexprefill", "xattention", "anchorattention", "anchorattention:step=4",
)  # fmt: skip
FREE = (
    "full", "vecattention", "vecattention:group_k_block=8192", "vecattention:max_scope=row",
    "vecattention:max_scope=row,q_pooling_size=32,q_block_size=128", "xattention:stride=8", "svg",
)  # fmt: skip
"""What is compared unless something else is asked for: the published settings, and this library's variants."""


def parse(text: str) -> Candidate:
    """A candidate from ``name`` or ``name:parameter=value,...``; values are Python literals, or words.

    >>> parse("xattention:stride=8").fixed
    {'stride': 8}

    Raises:
        ValueError: no such method or parameter, or not of that form.
    """
    name, _, rest = text.partition(":")
    method = methods.get(name)
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
    return Candidate(name, fixed)


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
