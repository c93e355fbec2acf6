"""How often the model is right on fresh movies, by length and by depth.

`rendered` scores movies that never were files (on a GPU, thousands of questions); `filmed` goes the whole real way:
an H.264 file, the real processor, the real model, one question at a time.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vecattention.testbed import batches, network

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

DEPTHS = 5
"""Depth is reported in this many equal parts of the movie."""


@dataclass(frozen=True)
class Score:
    """Right answers out of `asked`, over all and in each fifth of the movie where the needle was."""

    tokens: int
    asked: int
    right: int
    asked_by_depth: tuple[int, ...]
    right_by_depth: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Right answers over questions, 0 to 1."""
        return self.right / self.asked

    def record(self) -> dict[str, Any]:
        """The score as JSON-ready values."""
        parts = [r / a if a else None for r, a in zip(self.right_by_depth, self.asked_by_depth, strict=True)]
        return {"tokens": self.tokens, "asked": self.asked, "accuracy": self.accuracy, "accuracy_by_depth": parts}


def tally(tokens: int, depths: list[float], right: list[bool]) -> Score:
    """The score of questions about needles at these depths (0 to 1), each right or not."""
    asked, correct = [0] * DEPTHS, [0] * DEPTHS
    for depth, good in zip(depths, right, strict=True):
        part = min(int(depth * DEPTHS), DEPTHS - 1)
        asked[part] += 1
        correct[part] += good
    return Score(tokens, len(right), sum(right), tuple(asked), tuple(correct))


@torch.no_grad()
def rendered(
    model: Qwen2_5_VLForConditionalGeneration,
    tokens: int,
    questions: int,
    seed: int = 0,
    painter: batches.Painter | None = None,
    budget: int = 65536,
) -> Score:
    """Score `questions` fresh movies of `tokens` vision tokens with four needles, one question each.

    Args:
        model: on the device where the movies are to be made; called in its own dtype.
        tokens: vision tokens of each movie.
        questions: how many, at least.
        seed: of the movies.
        painter: as in `batches.draw`.
        budget: vision tokens in one batch.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + 2**40)
    plan = batches.Plan(tokens=tokens, batch=max(1, min(questions, budget // tokens)))
    depths: list[float] = []
    right: list[bool] = []
    while len(right) < questions:
        batch = batches.draw(plan, generator, painter)
        hidden, _ = network.think(model, batch)
        guess = network.answer_logits(model, hidden, batch.answer_at).argmax(-1)
        right += (guess == batch.answers)[:, 0].tolist()
        depths += batch.depth[:, 0].tolist()
    return tally(tokens, depths, right)


@torch.no_grad()
def filmed(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    tokens: int,
    films: int,
    seed: int = 0,
    folder: str | None = None,
) -> Score:
    """Score `films` fresh MP4 files of `tokens` vision tokens, asking for each of their four needles.

    The files are written to `folder` (None: a temporary one) and removed again.
    """
    from vecattention.testbed import movies
    from vecattention.testbed.prepare import prepare
    from vecattention.testbed.questions import answer, question_for

    depths: list[float] = []
    right: list[bool] = []
    with contextlib.ExitStack() as stack:
        home = folder or stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(home) / "film.mp4"
        for film in range(films):
            movie = movies.make(seed=seed + film, tokens=tokens)
            movies.write(movie, path)
            frames, fps = movies.read(path)
            for needle in movie.needles:
                inputs = prepare(processor, frames, fps, question_for(needle.shape))
                right.append(answer(model, processor, inputs) == needle.colour)
                depths.append((needle.start_frame + needle.end_frame) / 2 / movie.frames)
        path.unlink(missing_ok=True)
    return tally(tokens, depths, right)
