"""The films of a demonstration: made with needles in them, or taken from a file. Always read from a real video file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vecattention.testbed import movies, question_for

SAMPLED = 2.0
"""Frames a second that are taken of a given film: what Qwen2.5-VL samples."""


@dataclass(frozen=True)
class Question:
    """A question, the right answer where it is known, and where in the film (0 to 1) that is shown."""

    text: str
    wanted: str | None = None
    depth: float | None = None


@dataclass(frozen=True)
class Film:
    """Frames uint8 [T, H, W, 3], read from the file `path`; `movie` tells what a made film shows."""

    path: Path
    frames: Tensor
    fps: float
    questions: tuple[Question, ...]
    movie: movies.Movie | None = None


def make(path: Path, seed: int, tokens: int, needles: int, depth: float) -> Film:
    """A fresh film, written to `path` and read back; asked about all its needles, the one at `depth` first."""
    movie = movies.make(seed=seed, tokens=tokens, needles=needles, depth=depth)
    movies.write(movie, path)
    frames, fps = movies.read(path)
    inside = sorted(movie.needles, key=lambda needle: not needle.is_asked)
    asked = [
        Question(question_for(n.shape), n.colour, (n.start_frame + n.end_frame) / 2 / movie.frames) for n in inside
    ]
    return Film(path, frames, fps, tuple(asked), movie)


def take(path: Path, questions: tuple[str, ...]) -> Film:
    """A film from a file.

    Raises:
        FileNotFoundError, VideoError: no such file, or it is not a whole video.
    """
    frames, fps = movies.read(path, sample=SAMPLED)
    return Film(path, frames, fps, tuple(Question(text) for text in questions))


def is_right(said: str, wanted: str, others: tuple[str, ...]) -> bool:
    """Whether the answer names the wanted word and none of the others.

    >>> is_right("The star was red.", "red", ("red", "blue")), is_right("red or blue", "red", ("red", "blue"))
    (True, False)
    """
    words = {word.strip(".,;:!?'\"").lower() for word in said.split()}
    return words & set(others) == {wanted}
