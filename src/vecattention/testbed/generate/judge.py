"""Reads from the pixels of a film which colour and shape moves in which direction: no network, three rules.

The shape is what has colour: grounds are grey. Colour is the nearest of the palette by its direction from grey;
direction is the way of the coloured pixels' centre; shape is the outline that fits them best.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vecattention.testbed import shapes
from vecattention.testbed.generate.scenes import COLOURS, DIRECTIONS, SHAPES, STEPS, Scene

CHROMA = 0.3
"""Least difference of a pixel's largest and smallest channel (0..1) to count as coloured."""

AREA = 0.01
"""Least share of coloured pixels in a frame to show something."""

WAY = 0.08
"""Least way of the centre, in widths of the frame, to count as a movement."""


@dataclass(frozen=True)
class Seen:
    """What a film shows; None where there is nothing to tell."""

    colour: str | None
    shape: str | None
    direction: str | None


def look(film: Tensor) -> Seen:
    """What a film, uint8 [T, H, W, 3], shows."""
    image = film.float() / 255
    coloured = (image.amax(-1) - image.amin(-1)) > CHROMA
    shown = coloured.float().mean((1, 2)) > AREA
    if shown.sum() < 2:
        return Seen(None, None, None)
    return Seen(_colour(image[coloured]), _shape(coloured[shown]), _direction(coloured, shown))


def score(films: Iterable[Tensor], scenes: Iterable[Scene]) -> dict[str, float]:
    """Share of films, uint8 [T, H, W, 3], that show the colour, shape and direction of their scene, and all three."""
    right: list[tuple[bool, bool, bool]] = []
    for film, scene in zip(films, scenes, strict=True):
        seen = look(film)
        right.append((seen.colour == scene.colour, seen.shape == scene.shape, seen.direction == scene.direction))
    if not right:
        raise ValueError("films has none, wanted at least one; pass uint8 [T, H, W, 3] films with their scenes")
    count = len(right)
    named = dict(zip(("colour", "shape", "direction"), (sum(x) / count for x in zip(*right, strict=True)), strict=True))
    return named | {"all": sum(all(entry) for entry in right) / count}


def _colour(rgb: Tensor) -> str:
    """The palette's colour with the direction from grey nearest to that of the mean of [n, 3] pixels."""
    table = shapes.colour_table(rgb.device)[[shapes.COLOURS.index(name) for name in COLOURS]]
    away = torch.nn.functional.normalize(table - table.mean(1, keepdim=True), dim=1)
    mean = rgb.mean(0)
    return COLOURS[int((away @ (mean - mean.mean())).argmax())]


def _direction(coloured: Tensor, shown: Tensor) -> str | None:
    """The way of the centre of the coloured pixels [T, H, W], by a straight line through the frames that show any."""
    frames, height, width = coloured.shape
    weight = coloured.double()
    mass = weight.sum((1, 2)).clamp(min=1)
    axis_x, axis_y = (torch.arange(n, dtype=torch.float64, device=coloured.device) / n for n in (width, height))
    centre = torch.stack([(weight.sum(1) @ axis_x) / mass, (weight.sum(2) @ axis_y) / mass], 1)[shown]
    time = torch.arange(frames, dtype=torch.float64, device=coloured.device)[shown]
    time = time - time.mean()
    way = (time @ (centre - centre.mean(0))) / (time @ time) * (frames - 1)
    steps = torch.tensor(STEPS, dtype=torch.float64, device=way.device)
    along = steps @ way
    return DIRECTIONS[int(along.argmax())] if float(along.max()) > WAY else None


def _shape(coloured: Tensor) -> str:
    """The outline that fits the coloured pixels [n, H, W] best: most overlap, centred and of their area."""
    side = 48
    total = torch.zeros(len(SHAPES), dtype=torch.float64)
    stencils = _stencils(side)
    for mask in coloured[:: max(len(coloured) // 5, 1)]:
        y, x = mask.nonzero().double().unbind(1)
        half = math.sqrt(len(x)) * 1.1
        place = torch.linspace(-half, half, side, dtype=torch.float64)
        rows = (y.mean() + place).round().long().clamp(0, mask.shape[0] - 1)
        columns = (x.mean() + place).round().long().clamp(0, mask.shape[1] - 1)
        seen = mask[rows.to(mask.device)][:, columns.to(mask.device)].cpu()
        total += ((stencils & seen).sum((1, 2)) / (stencils | seen).sum((1, 2)).clamp(min=1)).double()
    return SHAPES[int(total.argmax())]


@functools.cache
def _stencils(side: int) -> Tensor:
    """Each shape around its centre of mass, its area that of a square of side / 2.2: bool [n, side, side]."""
    outlines = shapes.outlines(torch.device("cpu"))
    grid = torch.linspace(-1.6, 1.6, 256)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    entry = (torch.atan2(y, x) * (shapes.ANGLES / (2 * math.pi))).round().long().remainder(shapes.ANGLES)
    out = []
    for name in SHAPES:
        inside = torch.hypot(x, y) < outlines[shapes.SHAPES.index(name)][entry]
        step = float(grid[1] - grid[0])
        half = math.sqrt(float(inside.sum())) * step * 1.1
        centre_y, centre_x = float(y[inside].mean()), float(x[inside].mean())
        place = torch.linspace(-half, half, side)
        rows = ((centre_y + place + 1.6) / step).round().long().clamp(0, 255)
        columns = ((centre_x + place + 1.6) / step).round().long().clamp(0, 255)
        out.append(inside[rows][:, columns])
    return torch.stack(out)
