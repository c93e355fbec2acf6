"""Captioned films of one moving shape: "a red circle moves left over stripes". Drawn from a seed, on any device.

A film is a still ground in two shades of grey and one coloured shape that crosses it at constant speed. All films of a
batch are one formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vecattention.testbed import shapes
from vecattention.testbed.paint import Dice

COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = ("left", "right", "up", "down")
GROUNDS = ("stripes", "dots", "checks", "grey")
WORDS = ("a", *COLOURS, *SHAPES, "moves", *DIRECTIONS, "over", *GROUNDS)
"""Every word of a caption."""

STEPS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))
"""(x, y) of the directions; y points down."""


CYCLES = 3.0
"""Of every ground in a width of the frame; stripes lie level, upright or on either diagonal."""


@dataclass(frozen=True)
class Scene:
    """What a caption says.

    Example:
        >>> Scene.parse("a red circle moves left over stripes")
        Scene(colour='red', shape='circle', direction='left', ground='stripes')
    """

    colour: str
    shape: str
    direction: str
    ground: str

    @property
    def caption(self) -> str:
        """The caption."""
        return f"a {self.colour} {self.shape} moves {self.direction} over {self.ground}"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The scene of a caption.

        Raises:
            ValueError: it does not read like one.
        """
        words = caption.split()
        scene = cls(*(words[i] if len(words) == 7 else "" for i in (1, 2, 4, 6)))
        known = (scene.colour in COLOURS, scene.shape in SHAPES, scene.direction in DIRECTIONS, scene.ground in GROUNDS)
        if not all(known) or scene.caption != caption:
            raise ValueError(
                f"caption is {caption!r}, wanted 'a COLOUR SHAPE moves DIRECTION over GROUND' with "
                f"{', '.join(COLOURS)}; {', '.join(SHAPES)}; {', '.join(DIRECTIONS)}; {', '.join(GROUNDS)}"
            )
        return scene


@dataclass(frozen=True)
class Films:
    """A batch of films, not yet painted: tensors [B] or [B, n] on one device.

    Attributes:
        kinds: int64 [B, 4], indices of colour, shape, direction and ground.
        radius: of the shape, in widths of the frame, like all lengths.
        start, travel: [B, 2], the shape's centre in the first frame, and its way until the last.
        rgb: [B, 3] in 0..1.
        grid: [B, 4]: cycles of the ground in x and y, and their phases.
        tones: [B, 2], the two greys.
    """

    kinds: Tensor
    radius: Tensor
    start: Tensor
    travel: Tensor
    rgb: Tensor
    grid: Tensor
    tones: Tensor

    def scenes(self) -> list[Scene]:
        """What each film shows."""
        names = (COLOURS, SHAPES, DIRECTIONS, GROUNDS)
        return [Scene(*(name[i] for name, i in zip(names, row, strict=True))) for row in self.kinds.tolist()]


def draw(count: int, generator: torch.Generator) -> Films:
    """``count`` films with all they depend on drawn from a generator, on its device."""
    dice = Dice(generator)
    sizes = tuple(len(names) for names in (COLOURS, SHAPES, DIRECTIONS, GROUNDS))
    kinds = torch.stack([dice.integers(0, size - 1, count) for size in sizes], 1)
    step = torch.tensor(STEPS, device=dice.device)[kinds[:, 2]]
    length = dice.uniform(0.28, 0.42, count, 1)
    across = step.flip(1).abs()
    centre = 0.5 + step.abs() * dice.uniform(-0.05, 0.05, count, 1) + across * dice.uniform(-0.18, 0.18, count, 1)
    table = shapes.colour_table(dice.device)[[shapes.COLOURS.index(name) for name in COLOURS]]
    turn = dice.integers(0, 3, count) * (math.pi / 4)
    lines = CYCLES * torch.stack([turn.cos(), turn.sin()], 1)
    grid = torch.where((kinds[:, 3] == 0)[:, None], lines, torch.full_like(lines, CYCLES))
    dark, gap = dice.uniform(0.3, 0.55, count), dice.uniform(0.16, 0.26, count)
    return Films(
        kinds, dice.uniform(0.17, 0.22, count), centre - step * length / 2, step * length, table[kinds[:, 0]],
        torch.cat([grid, dice.uniform(0, 1, count, 2)], 1), torch.stack([dark, dark + gap], 1),
    )  # fmt: skip


def paint(films: Films, frames: int, size: int, first: int = 0, last: int | None = None) -> Tensor:
    """Frames first..last - 1 of films of so many frames, [B, 3, last - first, size, size] float32 in -1..1."""
    axis = (torch.arange(size, device=films.radius.device, dtype=torch.float32) + 0.5) / size
    ground = _ground(films, axis)[:, None, None]
    time = torch.linspace(0, 1, frames, device=axis.device) if frames > 1 else torch.zeros(1, device=axis.device)
    centre = films.start[:, None] + films.travel[:, None] * time[first:last, None]
    cover = _cover(films, centre, axis)[:, None]
    image = ground + (films.rgb[:, :, None, None, None] - ground) * cover
    return image * 2 - 1


def pixels(films: Tensor) -> Tensor:
    """[B, 3, T, H, W] in -1..1 -> uint8 [B, T, H, W, 3]."""
    return ((films + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def _ground(films: Films, axis: Tensor) -> Tensor:
    """Greys [B, H, W] in 0..1."""
    x, y = axis[None, None, :], axis[None, :, None]
    fx, fy, px, py = films.grid[:, :, None, None].unbind(1)
    tau = 2 * math.pi
    lines = torch.cos(tau * (fx * x + fy * y + px))
    columns, rows = torch.cos(tau * (fx * x + px)), torch.cos(tau * (fy * y + py))
    each = torch.stack([lines, columns + rows - 0.9, columns * rows, torch.zeros_like(columns * rows) - 9], 1)
    kind = films.kinds[:, 3, None, None, None].expand(-1, 1, *each.shape[2:])
    value = torch.sigmoid(8 * each.gather(1, kind).squeeze(1))
    dark, light = films.tones[:, :, None, None].unbind(1)
    return dark + (light - dark) * value


def _cover(films: Films, centre: Tensor, axis: Tensor) -> Tensor:
    """How much of each pixel the shape covers, [B, T, H, W] in 0..1; centre [B, T, 2]."""
    dx = axis[None, None, None, :] - centre[:, :, 0, None, None]
    dy = axis[None, None, :, None] - centre[:, :, 1, None, None]
    far = torch.sqrt(dx * dx + dy * dy)
    entry = (torch.atan2(dy, dx) * (shapes.ANGLES / (2 * math.pi))).round().long().remainder(shapes.ANGLES)
    rows = torch.tensor([shapes.SHAPES.index(name) for name in SHAPES], device=axis.device)[films.kinds[:, 1]]
    outline = shapes.outlines(axis.device)[rows]
    edge = outline.gather(1, entry.flatten(1)).view(entry.shape) * films.radius[:, None, None, None]
    return ((edge - far) * (len(axis) / 1.5) + 0.5).clamp(0, 1)
