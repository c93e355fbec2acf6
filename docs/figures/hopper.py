"""Draws hopper.png: python docs/figures/hopper.py

What a program of the Hopper attention does, which of it happens at the same time, and which limits it meets: gathered
rows come from the L2 cache at some 5 TB/s, so that the rows that share a fetch decide what is to be reached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from vecattention.atomic import replacing
from vecattention.bench import record

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "h200-2026-11-28-4.jsonl"
INK, QUIET, LOAD, PRODUCT, SOFT = "#1b1f24", "#8a94a0", "#e8590c", "#0b7285", "#5f3dc4"
GATHER = (4.8, 5.3)  # TB/s that public Hopper kernels gather from the L2 cache
FLOP_PER_BYTE = 1.0  # of each row that shares a fetch: 512 operations and 512 bytes a key of head_dim 128
Drawn = Any  # matplotlib's axes


def box(
    axes: Drawn, x: float, y: float, width: float, height: float, text: str, colour: str, filled: bool = False
) -> None:
    """A box with a text in its middle."""
    axes.add_patch(
        Rectangle((x, y), width, height, fc=colour if filled else "white", ec="white" if filled else colour, lw=1.2)
    )
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=7.5, color="white" if filled else INK
    )


def arrow(axes: Drawn, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow with a text at its middle."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(x + 0.1, y, text, fontsize=7, color=INK, va="center")


def program(axes: Drawn) -> None:
    """Where a key comes from and goes to."""
    axes.set(xlim=(0, 11.2), ylim=(-0.4, 10.4), title="one program, one multiprocessor")
    axes.axis("off")
    box(axes, 0.2, 8.9, 3.6, 1.2, "selection: 1 bit a key\nfor 128 query rows", QUIET)
    box(axes, 6.0, 8.9, 3.8, 1.2, "K and V\nas the model has them", QUIET)
    box(axes, 0.2, 6.2, 3.6, 1.7, "loader, 4 warps\nbits to positions,\n4,096 keys at a time", LOAD)
    box(axes, 0.2, 4.2, 3.6, 1.1, "ring in the L2 cache:\nwhich rows to copy", LOAD)
    box(axes, 5.2, 6.2, 2.1, 1.7, "shared\nmemory:\n3 tiles of K", LOAD)
    box(axes, 7.7, 6.2, 2.1, 1.7, "shared\nmemory:\n3 tiles of V", LOAD)
    box(axes, 5.2, 3.4, 4.6, 1.5, "consumer 0, 4 warps\nquery rows 0 to 63", PRODUCT)
    box(axes, 5.2, 1.4, 4.6, 1.5, "consumer 1, 4 warps\nquery rows 64 to 127", PRODUCT)
    box(axes, 5.2, -0.2, 4.6, 0.9, "out, log-sum-exp", QUIET)
    arrow(axes, (2.0, 8.9), (2.0, 7.9))
    arrow(axes, (2.0, 6.2), (2.0, 5.3))
    arrow(axes, (3.8, 4.75), (5.2, 6.4))
    arrow(axes, (6.6, 8.9), (6.25, 7.9))
    arrow(axes, (8.4, 8.9), (8.75, 7.9), "  cp.async: 128 rows\n  of 256 bytes a tile")
    arrow(axes, (6.25, 6.2), (6.25, 4.9))
    arrow(axes, (8.75, 6.2), (8.75, 4.9), "wgmma: every\nrow serves both\nconsumers")
    arrow(axes, (7.5, 1.4), (7.5, 0.7))


def steps(axes: Drawn) -> None:
    """What happens at the same time; not to scale."""
    lanes = (
        "loader",
        "tensor cores,\nconsumer 0",
        "arithmetic,\nconsumer 0",
        "tensor cores,\nconsumer 1",
        "arithmetic,\nconsumer 1",
    )
    axes.set(xlim=(0, 9.2), ylim=(-0.6, 5.1), title="one step a tile of 128 keys (not to scale)", xticks=[])
    axes.set_yticks([4.4 - 1.0 * i for i in range(5)], lanes, fontsize=7.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for number in range(3):
        t, x = f"t+{number}" if number else "t", 3.0 * number
        ahead = f"t+{number + 2}"
        box(axes, x, 4.1, 1.4, 0.6, f"K of t+{number + 3}", LOAD, True)
        box(axes, x + 1.4, 4.1, 1.4, 0.6, f"V of {ahead}", LOAD, True)
        for lane, shift in ((3.1, 0.0), (1.1, 0.7)):
            box(axes, x + shift, lane, 0.8, 0.6, f"q K\n{'t+' + str(number + 1)}", PRODUCT, True)
            box(axes, x + shift + 0.8, lane, 0.9, 0.6, f"p V\n{t}", PRODUCT, True)
            box(axes, x + shift + 0.85, lane - 1.0, 1.5, 0.6, f"softmax of t+{number + 1}", SOFT, True)
    axes.text(
        4.6, -0.45, "the softmax of a tile runs beside the product of the weights before with their values,\n"
        "and beside the other consumer's products; the loader is up to three tiles ahead",
        ha="center", va="center", fontsize=7, color=INK,
    )  # fmt: skip


def bound(axes: Drawn) -> None:
    """Useful TFLOP/s against the query rows that share a fetch, and what is measured."""
    rows = (16, 512)
    records = record.read(RECORDS)
    dense = next(
        r["tflops"]
        for r in records
        if r["study"] == "dense" and (r["case"], r["kernel"]) == ("square-32k", "flash-attn-4")
    )
    axes.fill_between(
        rows, *([FLOP_PER_BYTE * speed * x for x in rows] for speed in GATHER), color=LOAD, alpha=0.3, lw=0,
        label=f"gathered at {GATHER[0]} to {GATHER[1]} TB/s",
    )  # fmt: skip
    axes.axhline(dense, color=PRODUCT, lw=1.4, label=f"FlashAttention-4, dense: {dense:.0f}")
    for block, how, marker in ((64, "in pairs, ", "s"), (128, "", "o")):
        for kind, colour in (("random", INK), ("clustered", SOFT)):
            found = [
                r["tflops"] for r in records
                if r["study"] == "attention" and r["key"]["backend"] == "auto" and r["case"] == "square-32k"
                and (r["block"], r["lists"]) == (block, kind) and r["density"] >= 0.1
            ]  # fmt: skip
            shown = [block * (1.06 if kind == "clustered" else 0.94)] * len(found)
            axes.plot(
                shown, found, marker, color=colour, ms=5, ls="", label=f"lists of {block}, {how}{kind}, 10 to 50 %"
            )
    axes.set(
        xscale="log", yscale="log", xlim=rows, ylim=(80, 1000), title="what is to be reached, H200, 32K tokens",
        xlabel="query rows that share a fetch", ylabel="useful TFLOP/s",
    )  # fmt: skip
    axes.set_xticks([16, 32, 64, 128, 256, 512], ["16", "32", "64", "128", "256", "512"], minor=False)
    axes.set_yticks([100, 200, 300, 400, 600, 1000], ["100", "200", "300", "400", "600", "1000"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="lower right")


def main(path: Path) -> None:
    """Draw the figure."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.8), layout="constrained", gridspec_kw={"width_ratios": (1.0, 1.35, 1.1)}
    )
    program(left)
    steps(middle)
    bound(right)
    for axes in (left, middle, right):
        axes.title.set_size(10)
    with replacing(path) as name:
        figure.savefig(name, dpi=130)


if __name__ == "__main__":
    main(Path(__file__).with_suffix(".png"))
