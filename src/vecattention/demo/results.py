"""What a demonstration found: single answers, and the figures of each method on films of one length."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vecattention.demo.films import Question
from vecattention.testbed.score import DEPTHS

Span = tuple[float, float, float]


@dataclass(frozen=True)
class Result:
    """One answer: to what, by which method, whether right, and what it took.

    Attributes:
        right: the answer is the wanted one; where none is known, the one of full attention.
        tokens: vision tokens of the film.
    """

    film: int
    tokens: int
    question: Question
    method: str
    said: str
    right: bool
    attention_seconds: float
    prefill_seconds: float
    density: float


@dataclass(frozen=True)
class Row:
    """One method on the films of one length. Times are (lower quartile, median, upper quartile), in seconds.

    Those of the attention are 0 where some were not taken.
    """

    tokens: int
    method: str
    asked: int
    right: int
    density: float
    recall: float
    attention_seconds: Span
    prefill_seconds: Span

    @property
    def accuracy(self) -> float:
        """Right answers over questions, 0 to 1."""
        return self.right / self.asked


def row(results: Sequence[Result], recall: float) -> Row:
    """The row of the results of one method on films of one length; at least one result."""
    first, times = results[0], [result.attention_seconds for result in results]
    return Row(
        tokens=first.tokens,
        method=first.method,
        asked=len(results),
        right=sum(result.right for result in results),
        density=statistics.fmean(result.density for result in results),
        recall=recall,
        attention_seconds=quartiles(times) if all(times) else (0.0, 0.0, 0.0),
        prefill_seconds=quartiles([result.prefill_seconds for result in results]),
    )


def quartiles(values: Sequence[float]) -> Span:
    """(lower quartile, median, upper quartile) of at least one value.

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0]), quartiles([2.0])
    ((2.0, 3.0, 4.0), (2.0, 2.0, 2.0))
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def by_depth(results: Sequence[Result], method: str) -> list[tuple[int, int]]:
    """(right, asked) in each fifth of the film where the needle was."""
    parts = [(0, 0)] * DEPTHS
    for result in results:
        if result.method == method and result.question.depth is not None:
            at = min(int(result.question.depth * DEPTHS), DEPTHS - 1)
            parts[at] = parts[at][0] + result.right, parts[at][1] + 1
    return parts
