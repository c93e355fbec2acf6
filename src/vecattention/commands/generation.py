"""`vecattention demo --generate`: the same prompt and seed with dense and with sparse attention."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vecattention.commands.rules import given_rule
from vecattention.commands.watched import watched

if TYPE_CHECKING:
    from vecattention.demo.generation import Made, Settings


RULE = "with --generate P is 16 and R is P; with --model too 32 and 128; the scope is row unless G is given"
"""What --help says of the rule."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `--generate`."""
    made = parser.add_argument_group("generating a video instead (diffusers)")
    made.add_argument("--generate", action="store_true", help="make a video with Wan, dense and sparse, and compare")
    made.add_argument("--prompt", help="what it shows ('a red circle moves left over stripes')")
    made.add_argument("--densities", help="shares of the pairs to keep (0.9,0.7,0.5; with --model 0.5,0.3,0.15)")
    made.add_argument("--dense-steps", default="0.06", help="first steps that stay dense, 2 or 0.06 (%(default)s)")
    made.add_argument("--steps", type=int, default=20, help="of the generation (%(default)s)")
    made.add_argument("--guidance", type=float, default=3.0, help="guidance scale (%(default)s)")
    made.add_argument("--size", metavar="HxW", help="pixels (those of the model)")
    made.add_argument("--frames", type=int, help="of the video (those of the model)")


def run(args: argparse.Namespace) -> int:
    """Generate, print the table and write the files."""
    from vecattention.demo import generation

    settings = settings_of(args)
    generation.check(settings)
    how_far = "{task.completed:.0f} of {task.total:.0f}"
    made = watched(generation.work(settings), how_far, lambda report: generation.run(settings, report))
    _show(settings, made)
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the options ask for.

    Raises:
        TypeError, ValueError: an option that does not fit, with what was wanted and what to do.
    """
    from vecattention import ops
    from vecattention.demo.generation import CAPTION, Settings

    small = args.model is None  # 448 tokens: lists of 16 rows leave it something to choose, and it can spare little
    if args.threshold is not None:
        raise ValueError(
            f"--threshold is {args.threshold} beside --generate, wanted --densities there; leave the threshold out"
        )
    rule = given_rule(args)
    if small:
        rule = {"q_pooling_size": 16} | rule
        rule = {"q_block_size": rule["q_pooling_size"]} | rule
    ops.rule_of(64, causal=False, **rule)
    densities = args.densities or ("0.9,0.7,0.5" if small else "0.5,0.3,0.15")
    return Settings(
        out=args.out, prompt=CAPTION if args.prompt is None else args.prompt, densities=_densities(densities),
        dense_steps=_steps(args.dense_steps), rule=rule, seed=args.seed, steps=args.steps,
        guidance=args.guidance, size=_size(args.size), frames=args.frames, model=args.model, device=args.device,
        dtype=args.dtype,
    )  # fmt: skip


def _densities(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--densities is {text!r}, wanted shares over 0 up to 1; for instance 0.5,0.3") from None


def _steps(text: str) -> int | float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--dense-steps is {text!r}, wanted a number or a share; 2 or 0.06") from None


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--size is {text!r}, wanted HEIGHTxWIDTH in pixels; for instance 480x832")
    return int(parts[0]), int(parts[1])


def _show(settings: Settings, made: list[Made]) -> None:
    from rich.console import Console
    from rich.table import Table

    from vecattention.demo.sheet import write

    written = write(settings, made)
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    table = Table(title=f"“{settings.prompt}”, seed {settings.seed}, {settings.steps} steps", title_justify="left")
    for name in ("attention", "density", "PSNR dB", "SSIM", "seconds", "in attention", "shows"):
        table.add_column(name, justify="left" if name in ("attention", "shows") else "right")
    for entry in made:
        same = entry.name == "dense"
        table.add_row(
            entry.name, f"{100 * entry.density:.1f} %", "" if same else f"{entry.psnr:.2f}",
            "" if same else f"{entry.ssim:.3f}", f"{entry.seconds:.1f}", f"{entry.attention:.1f}", entry.seen,
        )  # fmt: skip
    console.print(table)
    for path, what in written:
        console.print(f"wrote {path}: {what}", markup=False, soft_wrap=True)
