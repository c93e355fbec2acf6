"""Compare films made with sparse attention to those made with dense, over many captions:

    python -m vecattention.testbed.generate.compare --films 24 --q-pooling-size 16

prints a Markdown table: of each density the PSNR and SSIM against the dense films from the same noise, and the share of
films in which the judge sees the caption's colour, shape and direction.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vecattention
from vecattention.evals.video import psnr, ssim
from vecattention.testbed.generate import report
from vecattention.testbed.generate.network import Pipeline, Sizes, load


@dataclass(frozen=True)
class Row:
    """Films of one density, means over all of them.

    Attributes:
        density: pairs attended over all pairs, dense steps included.
        psnr, ssim: against the dense films.
        seen: share of films that show the caption's "colour", "shape", "direction", and "all" three.
    """

    density: float
    psnr: float
    ssim: float
    seen: dict[str, float]


def compare(
    pipe: Pipeline, captions: Sequence[str], densities: Iterable[float], sizes: Sizes | None = None, seed: int = 0,
    steps: int = report.STEPS, **rule: Any,
) -> list[Row]:  # fmt: skip
    """The dense films first, then those of each density.

    Args:
        pipe: the generator.
        captions: of the films.
        densities: shares of the pairs, 0 to 1.
        sizes: of the films; None: those of the generator that ships.
        seed, steps: of the generation.
        rule: more arguments of `vecattention.apply`.
    """
    sizes = sizes or Sizes()
    dense, _ = _make(pipe, captions, sizes, seed, steps, {"dense_steps": 1.0})
    rows = [Row(1.0, 100.0, 1.0, report.judged(dense, captions))]
    for density in densities:
        films, found = _make(pipe, captions, sizes, seed, steps, {"density": density, **rule})
        pairs = list(zip(dense, films, strict=True))
        near = [sum(measure(a, b) for a, b in pairs) / len(pairs) for measure in (psnr, ssim)]
        rows.append(Row(found, near[0], near[1], report.judged(films, captions)))
    return rows


def _make(
    pipe: Pipeline, captions: Sequence[str], sizes: Sizes, seed: int, steps: int, arguments: dict[str, Any]
) -> tuple[Tensor, float]:
    """Films, uint8 [B, T, H, W, 3], and the density that was met."""
    made, found = [], []
    for first in range(0, len(captions), report.BATCH):
        some = captions[first : first + report.BATCH]
        with vecattention.apply(pipe, **arguments) as run:
            made.append(report.make(pipe, some, sizes, seed + first, steps))
        found.append(run.stats.mean_density)
    return torch.cat(made), sum(found) / len(found)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table.

    Example:
        >>> print(table([Row(0.5, 30.0, 0.9, {"colour": 1.0, "shape": 0.5, "direction": 1.0, "all": 0.5})]))
        | pairs attended | PSNR dB | SSIM | colour | shape | direction | all three |
        | --: | --: | --: | --: | --: | --: | --: |
        | 50.0 % | 30.00 | 0.900 | 100 % | 50 % | 100 % | 50 % |
    """
    names = ("colour", "shape", "direction", "all")
    lines = ["| pairs attended | PSNR dB | SSIM | colour | shape | direction | all three |", "|" + " --: |" * 7]
    for row in rows:
        near = ("", "") if row.psnr >= 100 else (f"{row.psnr:.2f}", f"{row.ssim:.3f}")
        seen = (f"{100 * row.seen[name]:.0f} %" for name in names)
        lines.append("| " + " | ".join((f"{100 * row.density:.1f} %", *near, *seen)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> str:
    """Run the command; what it prints."""
    parser = argparse.ArgumentParser(prog="python -m vecattention.testbed.generate.compare")
    parser.add_argument("--films", type=int, default=24, help="captions, drawn from the seed (%(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of captions and noise (%(default)s)")
    parser.add_argument("--steps", type=int, default=report.STEPS, help="of the generation (%(default)s)")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.15], help="(%(default)s)")
    parser.add_argument("--q-pooling-size", type=int, default=16, metavar="P", help="queries averaged (%(default)s)")
    parser.add_argument(
        "--q-block-size", type=int, default=16, metavar="R", help="rows that share a list (%(default)s)"
    )
    parser.add_argument("--dense-steps", type=float, default=0.06, help="share of first steps, dense (%(default)s)")
    given = parser.parse_args(arguments)
    captions = report.captions_of(given.films, given.seed)
    rows = compare(
        load(), captions, given.densities, seed=given.seed, steps=given.steps, q_pooling_size=given.q_pooling_size,
        q_block_size=given.q_block_size, dense_steps=given.dense_steps,
    )  # fmt: skip
    return table(rows)


if __name__ == "__main__":
    sys.stdout.write(main() + "\n")
