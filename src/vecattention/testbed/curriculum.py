"""Which lengths to train on, how fast, and when to go on to longer ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from vecattention.testbed.batches import Plan
from vecattention.testbed.words import QUESTIONS

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Vision tokens of the levels of the curriculum."""

PASS = 0.97
"""Share of right answers at the longest level that opens the next."""

FORCED = 0.5
"""Share of the training time after which the longest level is open in any case, the others before it, evenly."""

FALL = 0.5
"""Share of the training time after which the rate falls."""


@dataclass(frozen=True)
class Standing:
    """Where a training run stands: steps done, seconds spent, the open level, its running accuracy and how many steps
    that has run over."""

    step: int = 0
    seconds: float = 0.0
    level: int = 0
    accuracy: float = 0.0
    count: int = 0


def choose(step: int, seed: int, level: int, budget: int) -> tuple[Plan, int]:
    """The batch of one step, and its level: a function of the step and the seed alone, so that a run can be resumed.

    Longer levels are likelier (each lower one 0.7 times the one above); a movie is 0.6 to 1 times as long as its level;
    `budget` is the number of vision tokens in the batch.
    """
    dice = torch.Generator().manual_seed(seed * 1_000_003 + step)
    weights = torch.tensor([0.7 ** (level - i) for i in range(level + 1)])
    chosen = int(torch.multinomial(weights, 1, generator=dice))
    a, b, c, d, e = torch.rand(5, generator=dice).tolist()
    tokens = max(64, int(LENGTHS[chosen] * (0.6 + 0.4 * a)) // 8 * 8)
    needles = min(4 + int(b * 5), tokens // 16, 8)
    plan = Plan(
        tokens=tokens,
        batch=max(1, budget // tokens),
        needles=needles,
        asked=needles,
        repeat=True,
        wording=int(c * c * len(QUESTIONS)),
        interval=(2, 2, 1, 0, 4)[int(d * 5)],
        late=e < 0.2,
        noise=6.0,
    )
    return plan, chosen


def learn_rate(progress: float, step: int, peak: float, floor: float = 0.02) -> float:
    """The rate at `progress` (0 to 1) of the run: warm-up over 200 steps, constant, then half a cosine to the floor."""
    fall = max(0.0, progress - FALL) / (1 - FALL)
    return peak * min(1.0, (step + 1) / 200) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, fall))))


def advance(standing: Standing, level: int, accuracy: float, progress: float, longest: int) -> Standing:
    """The standing after a step at `level` with this accuracy; opens the next level when the open one is passed."""
    if level == standing.level:
        keep = 0.8 if standing.count else 0.0
        standing = replace(
            standing, accuracy=keep * standing.accuracy + (1 - keep) * accuracy, count=standing.count + 1
        )
    forced = min(longest, int(longest * progress / FORCED))
    passed = standing.count >= 10 and standing.accuracy >= PASS and standing.level < longest
    opened = max(standing.level + passed, forced)
    if opened != standing.level:
        standing = replace(standing, level=opened, accuracy=0.0, count=0)
    return standing
