"""Measure how faithful sparse attention is to dense attention, for every method on the same maps.

fidelity: the best any selection could do (an oracle for each granularity), each method's recall and output error over
its range of densities, the rules for the maximum and the pooling, and all methods at matched densities.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vecattention import methods
from vecattention.evals.fidelity.study import STUDIES

if TYPE_CHECKING:
    from vecattention.evals.fidelity.samples import Sample

EXAMPLE = "vecattention eval fidelity --synthetic --frames 4 --out out/fidelity"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vecattention eval`."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, title="kinds")
    _fidelity(kinds.add_parser("fidelity", help="recall and output error of every method against dense attention"))


def run(args: argparse.Namespace) -> int:
    """Measure, and print what was written; or print what an earlier run wrote."""
    from vecattention.evals.fidelity import show
    from vecattention.evals.fidelity.records import Records

    unknown = sorted(set(args.tables or ()) - set(show.TABLES))
    if unknown:
        raise ValueError(f"--tables has {unknown[0]!r}, wanted some of {', '.join(show.TABLES)}; correct it")
    if args.show is not None:
        if not Path(args.show).is_file():
            raise FileNotFoundError(f"--show is {args.show}, wanted a file that this command wrote; none is there")
        rows = list(Records(args.show))
        _print(rows, args)
        _draw(rows, args.png)
        return 0
    from vecattention.evals.fidelity.samples import fingerprint
    from vecattention.evals.fidelity.study import Plan, study

    samples, data = _samples(args)
    folder = Path(args.out)
    records = Records(folder / "fidelity.jsonl")
    chosen = None if args.methods is None else tuple(args.methods)
    plan = Plan(data, tuple(args.studies), chosen, tuple(args.targets), args.repeats)
    with _Progress() as progress:
        written = study(samples, records, plan, progress.step)
    mark = fingerprint(samples)
    rows = [row for row in records if row["key"]["fingerprint"] == mark and row["key"]["data"] == data]
    _print(rows, args)
    _draw(rows, args.png or folder / "pareto.png")
    sys.stdout.write(f"wrote {written} rows to {records.path} ({len(records)} in all)\n")
    return 0


def _print(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The tables that were asked for."""
    from rich.console import Console

    from vecattention.evals.fidelity import show

    names = tuple(show.TABLES) if args.tables is None else tuple(args.tables)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in show.tables(rows, names, args.at):
        if args.markdown:
            sys.stdout.write(f"{table.title}\n\n{table.markdown()}\n")
        else:
            console.print(table.rich())


def _draw(rows: list[dict[str, Any]], path: Path | None) -> None:
    """The Pareto picture, where one is wanted and there is a sweep."""
    from vecattention.evals.fidelity import show

    if path is not None and any(row["key"]["study"] == "sweep" for row in rows):
        show.pareto(rows, path)
        sys.stdout.write(f"wrote {path}\n")


def _fidelity(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data (one of them)").add_mutually_exclusive_group(required=True)
    data.add_argument("--testbed", action="store_true", help="the trained testbed model on procedural movies")
    data.add_argument("--model", metavar="PATH", help="a Qwen2.5-VL checkpoint directory on the same movies")
    data.add_argument("--qk", metavar="FILE", help="a safetensors file of <name>.query, <name>.key and <name>.value")
    data.add_argument("--synthetic", action="store_true", help="seeded maps with sink, verticals, bands and noise")
    data.add_argument("--show", metavar="FILE", help="measure nothing: the tables of a file that an earlier run wrote")
    parser.add_argument("--tokens", type=int, default=8192, help="vision tokens of a movie (%(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to capture (all)")
    parser.add_argument("--frames", type=int, default=32, help="frames of 256 tokens of synthetic maps (%(default)s)")
    parser.add_argument("--full", action="store_true", help="synthetic maps of video generation, not causal")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of movies or synthetic maps (0)")
    parser.add_argument("--save", metavar="FILE", help="also keep the queries, keys and values, for --qk")
    parser.add_argument("--studies", nargs="+", default=STUDIES, choices=STUDIES, help="(all)")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD",
        help=f"name or name:parameter=value,... with names among {', '.join(methods.names())}",
    )  # fmt: skip
    parser.add_argument(
        "--matched", "--targets", dest="targets", type=float, nargs="+", default=[0.1, 0.2, 0.4], metavar="DENSITY",
        help="densities at which all methods are compared and timed (0.1 0.2 0.4)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="runs of each call of the times study (%(default)s)")
    parser.add_argument("--device", default="cpu", help="where selections and attention run (%(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16: round the maps to it (as they are)")
    parser.add_argument("--tables", nargs="+", metavar="TABLE", help="which to print (all)")
    parser.add_argument("--at", type=float, default=0.1, help="density of the tables by head (%(default)s)")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--png", type=Path, help="the Pareto picture (pareto.png in --out; with --show none)")
    parser.add_argument("--out", default="out/fidelity", help="folder of fidelity.jsonl and pareto.png (%(default)s)")


def _samples(args: argparse.Namespace) -> tuple[list[Sample], str]:
    """The samples that were asked for, and their name."""
    from vecattention.evals.fidelity import samples as files

    if args.qk is not None:
        found, name = files.load(args.qk), Path(args.qk).stem
    elif args.synthetic:
        from vecattention.evals.fidelity.synthetic import synthetic

        found = [synthetic(seed, args.frames, causal=not args.full) for seed in args.seeds]
        name = f"synthetic-{'full' if args.full else 'causal'}-{args.frames * 256}"
    else:
        from vecattention.evals.fidelity.captured import capture_movies

        found = capture_movies(args.model, args.tokens, args.seeds, args.layers)
        name = f"{'testbed' if args.model is None else Path(args.model).name}-{args.tokens}"
    if args.save is not None:
        files.save(found, args.save)
        sys.stdout.write(f"wrote {args.save}\n")
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if args.dtype is not None and args.dtype not in dtypes:
        raise ValueError(f"--dtype is {args.dtype!r}, wanted one of {', '.join(dtypes)}; correct it")
    dtype = None if args.dtype is None else dtypes[args.dtype]
    return [one.to(torch.device(args.device), dtype) for one in found], name


class _Progress:
    """A bar with the time left on a terminal, a line a minute elsewhere; on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, refresh_per_second=1)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, done: int, total: int, what: str) -> None:
        """Show how far it is."""
        self._bar.update(self._task, completed=done, total=total, description=what)
