"""Procedural movies: coloured needles among grey and coloured decoys, over textures that change.

    movie = make(seed=0, tokens=4096, needles=4, depth=0.5)     a description: nothing is rendered yet
    frames = render(movie)                                      uint8 [T, 56, 56, 3]
    write(movie, "movie.mp4"); frames, fps = read("movie.mp4")  a real H.264 file

One vision token covers `FRAMES_PER_TOKEN` frames (the temporal patch of Qwen2.5-VL, at 28 x 28 pixels a frame).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vecattention.testbed import paint
from vecattention.testbed.files import read, write_frames
from vecattention.testbed.shapes import COLOURS, SHAPES

__all__ = ["FRAMES_PER_TOKEN", "Movie", "Needle", "chunks", "make", "place", "read", "render", "write"]

FRAMES_PER_TOKEN = 2
LONGEST = 16
"""Most frames that a needle is shown for; the fewest are half of it."""

_CHUNK = 512


@dataclass(frozen=True)
class Needle:
    """One coloured shape, on screen in frames start_frame <= t < end_frame."""

    shape: str
    colour: str
    start_frame: int
    end_frame: int
    is_asked: bool = False


@dataclass(frozen=True)
class Movie:
    """What a movie shows: all that `render` needs. `fps` is in frames a second, `needles` are in order of time."""

    seed: int
    frames: int
    fps: float
    needles: tuple[Needle, ...]

    @property
    def asked(self) -> Needle:
        """The needle whose depth was set."""
        for needle in self.needles:
            if needle.is_asked:
                return needle
        raise ValueError("needles has none with is_asked=True, wanted one; movies.make sets it")

    @property
    def tokens(self) -> int:
        """Vision tokens at one a temporal patch."""
        return self.frames // FRAMES_PER_TOKEN


def make(
    seed: int = 0,
    tokens: int = 4096,
    needles: int = 4,
    depth: float | None = None,
    fps: float = 2.0,
    repeat: bool = False,
) -> Movie:
    """The movie of this seed.

    Args:
        seed: 0 <= seed < 2**31; all else equal, the same seed gives the same movie.
        tokens: vision tokens; the movie has 2 * tokens frames.
        needles: coloured shapes in it, 1 to 8, no two of one shape.
        depth: where the centre of the asked needle is, as a fraction of the movie (moved inwards as far as the needle
            needs to be seen whole). None: anywhere.
        fps: frames a second. The default is the rate at which Qwen2.5-VL samples a video.
        repeat: whether two needles may have the same colour.

    Raises:
        TypeError: seed, tokens or needles is not an int.
        ValueError: an argument outside its values, or a movie too short for its needles.
    """
    _check_make(seed, tokens, needles, depth, fps)
    frames = tokens * FRAMES_PER_TOKEN
    generator = torch.Generator().manual_seed(seed)
    slots = place(1, frames, needles, generator, repeat)
    asked = int(torch.randint(needles, (), generator=generator))
    columns = (column[0].tolist() for column in (slots.shape, slots.colour, slots.start, slots.end))
    rows: list[Row] = list(zip(*columns, strict=True))
    if depth is not None:
        rows = _move(rows, asked, depth, frames, generator)
    found = [Needle(SHAPES[s], COLOURS[c], a, b, i == asked) for i, (s, c, a, b) in enumerate(rows)]
    return Movie(seed, frames, float(fps), tuple(sorted(found, key=lambda needle: needle.start_frame)))


def _check_make(seed: int, tokens: int, needles: int, depth: float | None, fps: float) -> None:
    for name, value in (("seed", seed), ("tokens", tokens), ("needles", needles)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, wanted an int; pass a whole number")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed is {seed}, wanted 0 <= seed < 2**31; pick another seed")
    if not 1 <= needles <= len(SHAPES):
        raise ValueError(f"needles is {needles}, wanted 1 to {len(SHAPES)}: no shape is shown twice; ask for fewer")
    if tokens < 8 * needles:
        raise ValueError(f"tokens is {tokens}, wanted at least 8 a needle ({8 * needles}); make the movie longer")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}, wanted a fraction of the movie, 0 to 1; 0.5 is the middle")
    if not fps > 0:
        raise ValueError(f"fps is {fps}, wanted frames a second, more than 0; 2 is what Qwen2.5-VL samples")


def place(batch: int, frames: int, count: int, generator: torch.Generator, repeat: bool) -> paint.Slots:
    """Random needles for `batch` movies, `count` each: distinct shapes, no two at once, on the generator's device."""
    dice = paint.Dice(generator)
    longest = min(LONGEST, frames // (2 * count))
    shape = dice.uniform(0, 1, batch, len(SHAPES)).argsort(1)[:, :count]
    colour = dice.integers(0, len(COLOURS) - 1, batch, count)
    if not repeat:
        colour = dice.uniform(0, 1, batch, len(COLOURS)).argsort(1)[:, :count]
    span = dice.integers(longest // 2, longest, batch, count)
    free = (frames - span.sum(1, keepdim=True) + 1).float()
    gap = (dice.uniform(0, 1, batch, count) * free).long().sort(1).values
    start = gap + span.cumsum(1) - span
    return paint.Slots(shape, colour, start, start + span)


Row = tuple[int, int, int, int]


def _move(rows: list[Row], asked: int, depth: float, frames: int, generator: torch.Generator) -> list[Row]:
    """`rows` with the asked needle's centre at `depth` and the others moved out of its way, at random."""
    spans = [end - start for _, _, start, end in rows]
    start = min(max(round(depth * frames - spans[asked] / 2), 0), frames - spans[asked])
    taken = {asked: start}
    for i in torch.randperm(len(rows), generator=generator).tolist():
        if i != asked:
            taken[i] = _free_start(spans[i], [(taken[j], taken[j] + spans[j]) for j in taken], frames, generator)
    return [(shape, colour, taken[i], taken[i] + spans[i]) for i, (shape, colour, _, _) in enumerate(rows)]


def _free_start(span: int, taken: list[tuple[int, int]], frames: int, generator: torch.Generator) -> int:
    """A random first frame for `span` frames that touch none of `taken`."""
    free = [t for t in range(frames - span + 1) if all(t + span <= a or t >= b for a, b in taken)]
    if not free:
        raise ValueError(
            f"tokens is {frames // FRAMES_PER_TOKEN}, wanted room for {len(taken) + 1} needles at this depth; "
            "make the movie longer or ask for fewer needles"
        )
    return free[int(torch.randint(len(free), (), generator=generator))]


def chunks(movie: Movie) -> Iterator[Tensor]:
    """The movie's frames in order, as uint8 [n, 56, 56, 3] pieces (RGB)."""
    column = [[SHAPES.index(n.shape) for n in movie.needles], [COLOURS.index(n.colour) for n in movie.needles]]
    column += [[n.start_frame for n in movie.needles], [n.end_frame for n in movie.needles]]
    slots = paint.Slots(*(torch.tensor([values]) for values in column))
    script = paint.script(slots, movie.frames, torch.Generator().manual_seed(movie.seed + 2**31))
    for start in range(0, movie.frames, _CHUNK):
        planes = paint.paint(script, start, min(start + _CHUNK, movie.frames))
        yield planes.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def render(movie: Movie) -> Tensor:
    """All frames of the movie, uint8 [T, 56, 56, 3] (RGB)."""
    return torch.cat(list(chunks(movie)))


def write(movie: Movie | Tensor, path: str | os.PathLike[str], fps: float | None = None) -> None:
    """Write a movie, or frames uint8 [T, H, W, 3] at `fps`, to `path` as H.264 in MP4; whole or not at all."""
    if isinstance(movie, Movie):
        write_frames(chunks(movie), path, movie.fps if fps is None else fps)
    else:
        write_frames(iter([movie]), path, 2.0 if fps is None else fps)
