"""Answer questions about a film with full attention and with VecAttention, and compare.

Makes films with coloured shapes at chosen depths, writes them as real video files, and asks the small trained
Qwen2.5-VL model that ships with the package about them; or takes a film and a model of yours. Prints right answers,
density, attention-mass recall and times, and writes a picture, the film and a record.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vecattention.commands import generation
from vecattention.commands.rules import add_rule, rule_of, threshold_of
from vecattention.commands.watched import watched

if TYPE_CHECKING:
    from vecattention.demo.run import Outcome
    from vecattention.demo.settings import Settings

EXAMPLE = "vecattention demo --tokens 512 --timing-tokens 0 --depths 0.5 --films 1 --out out/small"
WIDTH = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vecattention demo`."""
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what it writes (%(default)s)")
    made = parser.add_argument_group("the films")
    made.add_argument("--tokens", type=int, default=4096, help="vision tokens of a film (%(default)s)")
    made.add_argument(
        "--timing-tokens", type=int, default=16384, help="of one longer film, 0: none (%(default)s)", metavar="TOKENS"
    )
    made.add_argument(
        "--depths", default="0.05,0.2,0.35,0.5,0.65,0.8,0.95", help="where the needles are, 0 to 1 (%(default)s)"
    )
    made.add_argument("--films", type=int, default=1, help="films for each depth, 4 questions each (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the films (%(default)s)")
    own = parser.add_argument_group("your own")
    own.add_argument("--video", type=Path, metavar="FILE", help="a video file, sampled at 2 frames a second")
    own.add_argument("--question", action="append", default=[], help="about the video; may be repeated")
    own.add_argument("--model", type=Path, metavar="DIR", help="a Qwen2.5-VL checkpoint directory (the small one)")
    own.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    own.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    generation.add_options(parser)
    add_rule(parser, generation.RULE)


def run(args: argparse.Namespace) -> int:
    """Run the demonstration, print its tables and write its files."""
    if args.generate:
        return generation.run(args)
    from vecattention.demo import run as demonstration
    from vecattention.demo.settings import check

    settings = settings_of(args)
    check(settings)
    work = demonstration.work(settings)
    _show(watched(work, "{task.percentage:>3.0f} %", lambda report: demonstration.run(settings, report)))
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the options ask for.

    Raises:
        TypeError, ValueError: an option that does not fit, with what was wanted and what to do.
    """
    from vecattention import checks, ops
    from vecattention.demo.settings import Settings

    rule = {"threshold": threshold_of(args), **rule_of(args)}
    checks.threshold(rule["threshold"], 1, 1)
    ops.rule_of(64, **rule_of(args))
    return Settings(
        out=args.out, rule=rule, tokens=args.tokens, timing_tokens=args.timing_tokens, depths=_depths(args.depths),
        films=args.films, seed=args.seed, model=args.model, device=args.device, dtype=args.dtype, video=args.video,
        questions=tuple(args.question),
    )  # fmt: skip


def _depths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--depths is {text!r}, wanted numbers from 0 to 1; for instance 0.1,0.5,0.9") from None


def _show(outcome: Outcome) -> None:
    from rich.console import Console

    from vecattention.demo import table
    from vecattention.demo.write import write

    written = write(outcome)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(f"\n{table.heading(outcome)}\n", markup=False)
    console.print(table.figures(outcome))
    if outcome.settings.video is None:
        console.print(table.depths(outcome))
    else:
        console.print(table.answers(outcome))
    for remark in outcome.remarks:
        console.print(f"note: {remark}", markup=False)
    for path, what in written:
        console.print(f"wrote {path}: {what}", markup=False, soft_wrap=True)
