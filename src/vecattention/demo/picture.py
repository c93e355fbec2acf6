"""The picture of a demonstration: frames, where the needles are in time, and one head's attention with what is kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vecattention.atomic import replacing
from vecattention.demo.films import Film
from vecattention.demo.maps import Map
from vecattention.testbed import movies, shapes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, WIDTH, RIGHT = 0.058, 0.927, 0.985
INK, FAINT, GREY, PAPER = "#1b1f2a", "#6b7182", "#c4c9d4", "#ffffff"
LEFT_OUT = ("#ffffff", "#e6ecf7", "#b4c7e7", "#7d9fd3", "#4a74b8", "#2d549b", "#1a3a7c")
KEPT = ("#ffc890", "#ffa255", "#f97a1f", "#e4520c", "#c22d00", "#a81c00")
FRAMES = 11
FLOOR = -4.0
"""Attention below 10 ** FLOOR is drawn white."""


@dataclass(frozen=True)
class Caption:
    """The words on the picture: the question, what each method said, and small lines at the right."""

    question: str
    answers: Sequence[tuple[str, str]]
    figures: Sequence[str]


def save(film: Film, drawn: Map, caption: Caption, path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG; the file appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = compose(film, drawn, caption)
    with replacing(path) as name:
        FigureCanvasAgg(figure).print_png(name)


def compose(film: Film, drawn: Map, caption: Caption) -> Figure:
    """The figure, not yet written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.8), dpi=150, facecolor=PAPER)
    _head(figure, caption)
    scale = Scale(len(film.frames) / film.fps / 60, drawn)
    main = figure.add_axes((LEFT, 0.075, WIDTH, 0.605))
    _strip(figure.add_axes((LEFT, 0.68, WIDTH, 0.215)), film, scale.minutes)
    _map(main, drawn, scale, needles_of(film))
    _legend(figure)
    _part(figure.add_axes((0.64, 0.4, 0.335, 0.235)), main, drawn, scale)
    return figure


@dataclass(frozen=True)
class Scale:
    """From tokens of the film to minutes."""

    minutes: float
    drawn: Map

    def at(self, token: float) -> float:
        """The moment of a token, in minutes."""
        return token / self.drawn.tokens * self.minutes


def needles_of(film: Film) -> tuple[movies.Needle, ...]:
    """The needles of a made film; none of a given one."""
    return film.movie.needles if film.movie is not None else ()


def _head(figure: Figure, caption: Caption) -> None:
    figure.text(LEFT, 0.965, f"“{caption.question}”", fontsize=18, color=INK, weight="bold", va="center")
    said = "      ".join(f"{name}: {words}" for name, words in caption.answers)
    figure.text(LEFT, 0.932, said, fontsize=12.5, color=INK, va="center")
    for line, text in enumerate(caption.figures):
        figure.text(RIGHT, 0.967 - 0.026 * line, text, fontsize=10.5, color=FAINT, va="center", ha="right")


def _strip(axes: Axes, film: Film, minutes: float) -> None:
    """Frames in a row, each tied to its moment on the time axis below; those that show a needle wear its colour."""
    axes.set_axis_off()
    shown = _moments(film)
    slot = minutes / len(shown)
    for place, (frame, needle) in enumerate(shown):
        centre, at = (place + 0.5) * slot, (frame + 0.5) / len(film.frames) * minutes
        left, right = centre - slot * 0.46, centre + slot * 0.46
        colour, line = (GREY, 1.0) if needle is None else (_colour(needle.colour), 3.2)
        axes.imshow(film.frames[frame].numpy(), extent=(left, right, 0.27, 0.87), aspect="auto", zorder=3)
        frame_line = ([left, right, right, left, left], [0.27, 0.27, 0.87, 0.87, 0.27])
        axes.plot(*frame_line, color=colour, lw=line, zorder=4, solid_joinstyle="miter")
        axes.plot([centre, centre, at, at], [0.27, 0.2, 0.07, 0], color=colour, lw=0.3 + line / 2, zorder=2)
        if needle is not None:
            text = ("asked\n" if needle.is_asked else "") + f"{needle.colour} {needle.shape}"
            weight = "bold" if needle.is_asked else "normal"
            axes.text(centre, 0.895, text, ha="center", va="bottom", fontsize=9.5, color=INK, weight=weight)
    axes.set_xlim(0, minutes)
    axes.set_ylim(0, 1)


def _moments(film: Film) -> list[tuple[int, movies.Needle | None]]:
    """Frames to show, in order: the middle of each needle, and others spread evenly between."""
    total = len(film.frames)
    needles = needles_of(film)
    middle = {(n.start_frame + n.end_frame) // 2: n for n in needles}
    plain = [int((i + 0.5) * total / (FRAMES - len(middle))) for i in range(FRAMES - len(middle))]
    free = [t for t in plain if all(not n.start_frame - 8 <= t < n.end_frame + 8 for n in needles)]
    return sorted([(t, n) for t, n in middle.items()] + [(t, None) for t in free], key=lambda pair: pair[0])


def _map(axes: Axes, drawn: Map, scale: Scale, needles: Sequence[movies.Needle]) -> None:
    """The whole map, keys across and queries down, both in minutes; a needle's moment runs down to the diagonal."""
    extent = (0.0, scale.minutes, scale.minutes, 0.0)
    axes.imshow(_blend(drawn.weight, drawn.kept), extent=extent, aspect="auto", interpolation="nearest")
    for needle in needles:
        at = scale.at((needle.start_frame + needle.end_frame) / 2 / movies.FRAMES_PER_TOKEN)
        axes.plot([at, at], [0, at], color=_colour(needle.colour), lw=1.9, solid_capstyle="butt")
    axes.set_xlabel("keys: minutes into the film", fontsize=10.5, color=INK, loc="left")
    axes.set_ylabel("queries: minutes into the film", fontsize=10.5, color=INK)
    axes.tick_params(color=FAINT, labelsize=9.5, labelcolor=INK)
    axes.spines[:].set_visible(False)


def _legend(figure: Figure) -> None:
    """What the colours mean."""
    for left, ramp, text in ((0.66, LEFT_OUT, "attention left out"), (0.875, KEPT, "kept")):
        bar = figure.add_axes((left, 0.022, 0.1, 0.012))
        bar.imshow(_shade(torch.linspace(0, 1, 128)[None], ramp).numpy(), aspect="auto", extent=(FLOOR, 0, 0, 1))
        bar.set_axis_off()
        bar.text(-0.04, 0.5, f"{text}  10$^{{{FLOOR:.0f}}}$", fontsize=9.5, color=INK, ha="right", va="center",
                 transform=bar.transAxes)  # fmt: skip
        bar.text(1.03, 0.5, "1", fontsize=9.5, color=INK, va="center", transform=bar.transAxes)


def _blend(weight: Tensor, kept: Tensor) -> Any:
    """RGB picture [rows, columns, 3]: attention in blue where it is left out, in orange as far as its keys are kept."""
    level = (weight.clamp_min(10**FLOOR).log10() / -FLOOR + 1).clamp(0, 1)
    share = kept.float().sqrt()[..., None]
    return (_shade(level, LEFT_OUT) * (1 - share) + _shade(level, KEPT) * share).numpy()


def _shade(level: Tensor, ramp: Sequence[str]) -> Tensor:
    """Colours [..., 3] of levels 0 to 1 on a ramp."""
    table = torch.tensor([_rgb(code) for code in ramp])
    at = level * (len(table) - 1)
    low = at.floor().long().clamp(max=len(table) - 2)
    part = (at - low)[..., None]
    return table[low] * (1 - part) + table[low + 1] * part


def _rgb(code: str) -> tuple[float, float, float]:
    red, green, blue = (int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _colour(name: str) -> tuple[float, float, float]:
    red, green, blue = shapes.colour_table(torch.device("cpu"))[shapes.COLOURS.index(name)].tolist()
    return red, green, blue


def _part(axes: Axes, main: Axes, drawn: Map, scale: Scale) -> None:
    """The part of the map key by key, where single vectors can be told apart, and where in the map it is."""
    rows, keys = drawn.part_weight.shape
    axes.imshow(_blend(drawn.part_weight, drawn.part_kept), aspect="auto", interpolation="nearest",
                extent=(0, keys, rows, 0))  # fmt: skip
    for row in range(drawn.block, rows, drawn.block):
        axes.axhline(row, color=GREY, lw=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(INK)
    words = f"{keys} keys, {rows} queries: each block of {drawn.block} keeps single keys"
    axes.text(0.5, -0.03, words, fontsize=9, color=INK, ha="center", va="top", transform=axes.transAxes,
              bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 2})  # fmt: skip
    (left, right), (top, bottom) = drawn.keys, drawn.queries
    box = [scale.at(left), scale.at(right)], [scale.at(top), scale.at(bottom)]
    main.plot([box[0][i] for i in (0, 1, 1, 0, 0)], [box[1][i] for i in (0, 0, 1, 1, 0)], color=INK, lw=1.0, zorder=5)
    line = {"arrowstyle": "-", "color": INK, "lw": 0.6}
    for corner, y in ((1, box[1][0]), (0, box[1][1])):
        axes.annotate("", xy=(0, corner), xycoords="axes fraction", xytext=(box[0][1], y), textcoords=main.transData,
                      arrowprops=line)  # fmt: skip
