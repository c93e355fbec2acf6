"""The vocabulary of the movies: eight shapes, eight colours, and the outline of each shape."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "bowtie")
"""Names of the shapes that can be asked about."""

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
"""Names of the colours that can be the answer."""

BAR = len(SHAPES)
"""Row of `outlines` that holds the bar: a shape nobody asks about, which decoys wear in full colour."""

ANGLES = 512
"""Entries of one outline, over a full turn."""

_RGB = (
    (225, 30, 30),
    (250, 140, 20),
    (245, 230, 40),
    (30, 170, 50),
    (30, 215, 225),
    (40, 60, 225),
    (130, 40, 190),
    (255, 125, 195),
)
_INNER = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0)


@functools.cache
def colour_table(device: torch.device) -> Tensor:
    """Colours of the needles, [8, 3] float32 in 0..1, in the order of `COLOURS`."""
    return torch.tensor(_RGB, dtype=torch.float32, device=device) / 255


@functools.cache
def inner_radii(device: torch.device) -> Tensor:
    """Radius of the hole of each shape, [9] float32, in units of the shape's radius (0: no hole)."""
    return torch.tensor(_INNER, dtype=torch.float32, device=device)


@functools.cache
def outlines(device: torch.device) -> Tensor:
    """Distance from the centre to the edge of each shape, [9, ANGLES] float32, in units of its radius.

    Entry i is for the direction (cos, sin)(2 pi i / ANGLES) in image axes (x right, y down).
    """
    star = [_point(math.pi * i / 5, 1.05 if i % 2 == 0 else 0.42) for i in range(10)]
    a = 0.3
    cross = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    bowtie = [(-0.95, -0.8), (0, -0.15), (0.95, -0.8), (0.95, 0.8), (0, 0.15), (-0.95, 0.8)]
    rows = [
        torch.full((ANGLES,), 0.95),
        _polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
        _polygon([_point(2 * math.pi * i / 3, 1.1) for i in range(3)]),
        _polygon(star),
        _polygon(cross),
        _polygon([_heart(2 * math.pi * i / 96) for i in range(96)]),
        torch.full((ANGLES,), 1.0),
        _polygon(bowtie),
        _polygon([(-1, -0.16), (1, -0.16), (1, 0.16), (-1, 0.16)]),
    ]
    return torch.stack(rows).float().to(device)


def _point(turn: float, radius: float) -> tuple[float, float]:
    """A corner at `turn` radians clockwise from the top."""
    return radius * math.sin(turn), -radius * math.cos(turn)


def _heart(t: float) -> tuple[float, float]:
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -(y + 2.5) / 15


def _polygon(corners: list[tuple[float, float]]) -> Tensor:
    """Where a ray from the origin leaves a polygon around it, [ANGLES] float64: the farthest edge that it crosses."""
    p = torch.tensor(corners, dtype=torch.float64)
    edge = p.roll(-1, 0) - p
    turn = torch.arange(ANGLES, dtype=torch.float64) * (2 * math.pi / ANGLES)
    ray = torch.stack([turn.cos(), turn.sin()], -1)[:, None]
    det = edge[:, 0] * ray[..., 1] - edge[:, 1] * ray[..., 0]
    safe = torch.where(det.abs() < 1e-12, torch.ones_like(det), det)
    along = (edge[:, 0] * p[:, 1] - edge[:, 1] * p[:, 0]) / safe
    where = (p[:, 1] * ray[..., 0] - p[:, 0] * ray[..., 1]) / safe
    hit = (det.abs() >= 1e-12) & (along > 0) & (where >= -1e-9) & (where <= 1 + 1e-9)
    return torch.where(hit, along, torch.zeros_like(along)).amax(-1)
