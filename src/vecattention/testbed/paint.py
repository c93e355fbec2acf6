"""The renderer: tables of parameters in, frames out. Vectorised over frames, on any device.

A frame is a background (one of many textures, drifting), a decoy (a grey shape or a coloured bar) and, in a few
frames, a needle (a coloured shape). Every layer is one formula whose parameters differ from frame to frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vecattention.testbed import shapes

SIZE = 56
"""Height and width of a frame, pixels."""


@dataclass(frozen=True)
class Script:
    """What is on screen in B movies of T frames each.

    scenes [*, 24], decoys [*, 12] and needles [*, 12] are float32 tables, one row for each background or sprite;
    scene_at, decoy_at and needle_at [B, T] int64 say which row each frame shows (-1: nothing).
    A sprite's row: shape, red, green, blue (0..1), radius, x, y (frame widths), their change a frame, rotation (rad),
    its change a frame, frame at which it is at x, y.
    """

    scenes: Tensor
    scene_at: Tensor
    decoys: Tensor
    decoy_at: Tensor
    needles: Tensor
    needle_at: Tensor

    @property
    def frames(self) -> int:
        """Frames of each movie."""
        return self.scene_at.shape[1]


@dataclass(frozen=True)
class Slots:
    """Where the needles of B movies are: shape, colour, start and end (exclusive) frame, each [B, K] int64."""

    shape: Tensor
    colour: Tensor
    start: Tensor
    end: Tensor


class Dice:
    """Uniform random numbers from one generator, on its device."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.device = generator.device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """float32 in [low, high)."""
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in low..high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator, device=self.device)


def script(slots: Slots, frames: int, generator: torch.Generator) -> Script:
    """The script of B movies of `frames` frames with the given needles; the rest is drawn from `generator`."""
    dice = Dice(generator)
    batch = slots.shape.shape[0]
    time = torch.arange(frames, device=dice.device)
    length = dice.integers(32, 160, batch, frames // 32 + 1)
    scene = torch.searchsorted(length.cumsum(1), time.expand(batch, -1).contiguous(), right=True)
    rows = length.shape[1]
    base = torch.arange(batch, device=dice.device)[:, None]
    decoys, decoy_at = _decoys(dice, batch, time)
    needles, needle_at = _needles(dice, slots, time)
    return Script(_scenes(dice, batch * rows), base * rows + scene, decoys, decoy_at, needles, needle_at)


def _scenes(dice: Dice, n: int) -> Tensor:
    kinds = torch.tensor(
        # stripes, checks, rings, crossed waves, plain, all together: weights of wave 1, product, rings, wave 2
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.5, 0, 0, 0.5], [0.1, 0, 0, 0], [0.4, 0.3, 0.4, 0.4]],
        device=dice.device,
    )
    weights = kinds[dice.integers(0, len(kinds) - 1, n)]
    sharp = torch.exp(dice.uniform(-1.0, 2.2, n, 1))
    turn, cycles = dice.uniform(0, 2 * math.pi, n, 2), torch.exp(dice.uniform(-1.5, 1.6, n, 2))
    waves = torch.stack([cycles * turn.cos(), cycles * turn.sin()], -1).flatten(1)
    rest = torch.cat([dice.uniform(0.5, 4, n, 1), dice.uniform(0, 1, n, 3), dice.uniform(-0.02, 0.02, n, 3)], 1)
    centre = dice.uniform(0.1, 0.9, n, 2)
    tone = dice.uniform(0.12, 0.88, n, 2, 1) + dice.uniform(-0.07, 0.07, n, 2, 3)
    return torch.cat([weights, sharp, waves, rest, centre, tone.flatten(1)], 1)


def _decoys(dice: Dice, batch: int, time: Tensor) -> tuple[Tensor, Tensor]:
    """Grey shapes that are asked about and coloured bars that are not, one for each 32 frames, half of the time."""
    rows = len(time) // 32 + 2
    n = batch * rows
    bar = dice.uniform(0, 1, n) < 0.4
    shape = torch.where(bar, torch.full_like(bar, shapes.BAR, dtype=torch.int64), dice.integers(0, shapes.BAR - 1, n))
    grey = dice.uniform(0, 1, n, 1).expand(-1, 3)
    colour = shapes.colour_table(dice.device)[dice.integers(0, len(shapes.COLOURS) - 1, n)]
    radius = dice.uniform(0.2, 0.42, n)
    first = (torch.arange(rows, device=dice.device).repeat(batch) * 32).float()
    table = _sprites(dice, shape, torch.where(bar[:, None], colour, grey), radius, first, spread=0.25)
    offset, shown = dice.integers(0, 31, batch, 1), dice.uniform(0, 1, n) < 0.5
    row = torch.arange(batch, device=dice.device)[:, None] * rows + (time + offset) // 32
    return table, torch.where(shown[row], row, torch.full_like(row, -1))


def _needles(dice: Dice, slots: Slots, time: Tensor) -> tuple[Tensor, Tensor]:
    batch, count = slots.shape.shape
    n = batch * count
    colour = shapes.colour_table(dice.device)[slots.colour.flatten()]
    colour = (colour * dice.uniform(0.9, 1.08, n, 1)).clamp(0, 1)
    radius = dice.uniform(0.32, 0.42, n)
    table = _sprites(dice, slots.shape.flatten(), colour, radius, slots.start.flatten().float(), spread=0.1)
    at = torch.full((batch, len(time)), -1, dtype=torch.int64, device=dice.device)
    for k in range(count):
        inside = (time >= slots.start[:, k, None]) & (time < slots.end[:, k, None])
        row = torch.arange(batch, device=dice.device)[:, None] * count + k
        at = torch.where(inside, row, at)
    return table, at


def _sprites(dice: Dice, shape: Tensor, rgb: Tensor, radius: Tensor, first: Tensor, spread: float) -> Tensor:
    n = len(shape)
    place = dice.uniform(0.5 - spread, 0.5 + spread, n, 2)
    speed = dice.uniform(-0.006, 0.006, n, 2)
    turn = torch.cat([dice.uniform(-0.3, 0.3, n, 1), dice.uniform(-0.015, 0.015, n, 1)], 1)
    return torch.cat([shape[:, None].float(), rgb, radius[:, None], place, speed, turn, first[:, None]], 1)


def paint(movie: Script, start: int, stop: int) -> Tensor:
    """Frames start..stop of the B movies laid end to end, [stop - start, 3, 56, 56] float32 in 0..255 (not rounded)."""
    index = torch.arange(start, stop, device=movie.scenes.device)
    time, axis = (index % movie.frames).float(), _axis(movie.scenes.device)
    image = _background(movie.scenes[movie.scene_at.flatten()[index]], time, axis)
    for table, at in ((movie.decoys, movie.decoy_at), (movie.needles, movie.needle_at)):
        row = at.flatten()[index]
        seen = (row >= 0).nonzero().flatten()
        if len(seen):
            sprite = table[row[seen]]
            outline = shapes.outlines(axis.device)
            image[seen] = _draw(image[seen], sprite, outline, _holes(sprite), time[seen], axis)
    return image.mul_(255)


def gather(movie: Script, start: int, stop: int) -> tuple[Tensor, ...]:
    """What `compose` needs to paint frames start..stop, as tensors whose shapes depend on stop - start alone."""
    index = torch.arange(start, stop, device=movie.scenes.device).clamp_(max=movie.scene_at.numel() - 1)
    parts = [(index % movie.frames).float(), _axis(index.device), shapes.outlines(index.device)]
    parts.append(movie.scenes[movie.scene_at.flatten()[index]])
    for table, at in ((movie.decoys, movie.decoy_at), (movie.needles, movie.needle_at)):
        row = at.flatten()[index]
        sprite = table[row.clamp(min=0)]
        sprite[:, 4] = torch.where(row >= 0, sprite[:, 4], torch.full_like(sprite[:, 4], -1.0))
        parts += [sprite, _holes(sprite)]
    return tuple(parts)


def compose(time: Tensor, axis: Tensor, outline: Tensor, scene: Tensor, *sprites: Tensor) -> Tensor:
    """The frames that `gather` describes, as `paint` gives them; one formula, for compilers to fuse."""
    image = _background(scene, time, axis)
    for sprite, hole in zip(sprites[::2], sprites[1::2], strict=True):
        image = _draw(image, sprite, outline, hole, time, axis)
    return image * 255


def _axis(device: torch.device) -> Tensor:
    return (torch.arange(SIZE, device=device, dtype=torch.float32) + 0.5) / SIZE


def _holes(sprite: Tensor) -> Tensor:
    """Radii of the holes of sprites [n, 12], in frame widths (-1: no hole)."""
    hole = shapes.inner_radii(sprite.device)[sprite[:, 0].long()]
    return torch.where(hole > 0, hole * sprite[:, 4], torch.full_like(hole, -1.0))


def _background(p: Tensor, time: Tensor, axis: Tensor) -> Tensor:
    """Backgrounds [n, 3, 56, 56] in 0..1 of n frames: p [n, 24] rows of `Script.scenes`, time [n] frames."""
    x, y = axis[None, None, :], axis[None, :, None]
    f = p[:, :, None, None].unbind(1)
    a, product, rings, b, sharp, fx, fy, gx, gy, fr = f[:10]
    phase = [f[10 + i] + f[13 + i] * time[:, None, None] for i in range(3)]
    tau = 2 * math.pi
    one = ((fx * x + phase[0]) + fy * y).mul_(tau).cos_()
    two = ((gx * x + phase[1]) + gy * y).mul_(tau).cos_()
    far = torch.sqrt((x - f[16]) ** 2 + (y - f[17]) ** 2).mul_(fr).add_(phase[2]).mul_(tau).cos_()
    value = (a * one).add_(b * two).add_(one.mul_(two).mul_(product)).add_(far.mul_(rings))
    value = value.mul_(sharp).tanh_().div_(sharp.tanh()).mul_(0.5).add_(0.5)
    low, high = p[:, 18:21, None, None], p[:, 21:24, None, None]
    return torch.addcmul(low, high - low, value[:, None])


def _draw(image: Tensor, p: Tensor, outline: Tensor, hole: Tensor, time: Tensor, axis: Tensor) -> Tensor:
    """`image` [n, 3, 56, 56] with one sprite on each: p [n, 12] sprite rows, hole [n], time [n] frames.

    A sprite of negative radius is not drawn.
    """
    age = time - p[:, 11]
    x0, y0 = p[:, 5] + p[:, 7] * age, p[:, 6] + p[:, 8] * age
    turn = p[:, 9] + p[:, 10] * age
    dx, dy = axis[None, None, :] - x0[:, None, None], axis[None, :, None] - y0[:, None, None]
    far = torch.sqrt(dx * dx + dy * dy)
    entry = ((torch.atan2(dy, dx) - turn[:, None, None]) * (shapes.ANGLES / (2 * math.pi))).round().long()
    entry = entry.remainder(shapes.ANGLES) + p[:, 0].long()[:, None, None] * shapes.ANGLES
    edge = outline.flatten()[entry] * p[:, 4, None, None]
    soft = SIZE / 1.5
    cover = ((edge - far) * soft + 0.5).clamp(0, 1) * ((far - hole[:, None, None]) * soft + 0.5).clamp(0, 1)
    return image + (p[:, 1:4, None, None] - image) * cover[:, None]
