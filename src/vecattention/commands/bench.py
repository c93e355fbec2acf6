"""Time attention over ready lists, selection, and the whole call on a GPU, beside torch's dense kernels.

Errors against float64 are measured on sampled rows before anything is timed. Records are appended as JSON lines; what a
file already holds is not measured again, so that a run which was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vecattention.bench.record import Step

EXAMPLE = "vecattention bench call --case qwen2.5-vl-8k --density 0.2 --out out/bench.jsonl"
STUDIES = ("attention", "selection", "call", "dense", "all")
RULES = ((32, 128, "window"), (64, 128, "window"), (64, 64, "window"), (64, 128, "row"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vecattention bench`."""
    parser.add_argument("study", choices=STUDIES, help="what to time; all: everything")
    parser.add_argument("--case", action="append", help="a shape, may be repeated (qwen2.5-vl-32k)")
    parser.add_argument(
        "--density", action="append", type=float, help="kept pairs over all, may be repeated (0.1, 0.5)"
    )
    parser.add_argument("--lists", action="append", choices=("random", "clustered"), help="kind of ready lists (both)")
    parser.add_argument("--backend", action="append", help="of ready lists and selection, may be repeated (auto)")
    parser.add_argument("--out", type=Path, default=Path("out/bench.jsonl"), help="records (%(default)s)")
    parser.add_argument("--again", action="store_true", help="measure again what the file already holds")


def run(args: argparse.Namespace) -> int:
    """Measure, print a line for each record, and say where they are; 1 when a result was wrong."""
    from vecattention.bench import record, report

    if not torch.cuda.is_available():
        raise ValueError("this machine has no GPU that torch sees, wanted one to time; benchmarks/cpu.py times the CPU")
    wrong = 0
    for row in record.run(args.out, list(_steps(args)), args.again):
        sys.stdout.write(report.line(row) + "\n")
        sys.stdout.flush()
        wrong += row.get("error_ok") is False or row.get("repeats_equal") is False
    sys.stdout.write(f"records in {args.out}\n")
    return 1 if wrong else 0


def _steps(args: argparse.Namespace) -> Iterator[Step]:
    from vecattention.bench import studies
    from vecattention.bench.cases import case_of

    cases = [case_of(name) for name in args.case or ["qwen2.5-vl-32k"]]
    densities = args.density or [0.1, 0.5]
    backends = args.backend or ["auto"]
    every = args.study == "all"
    for case in cases:
        if every or args.study == "dense":
            yield {"study": "dense", "case": case.name}, functools.partial(studies.dense, case)
        if every or args.study == "attention":
            for density in densities:
                for kind in args.lists or ["random", "clustered"]:
                    for backend in backends:
                        key = {"study": "attention", "case": case.name, "density": density, "lists": kind,
                               "backend": backend}  # fmt: skip
                        yield key, functools.partial(studies.attention, case, density, kind, backend)
        for pool, block, scope in RULES:
            rule = {"case": case.name, "pool": pool, "block": block, "scope": scope}
            if every or args.study == "selection":
                for backend in backends:
                    yield (
                        {"study": "selection", **rule, "backend": backend},
                        functools.partial(studies.selection, case, pool, block, scope, backend),
                    )
            if every or args.study == "call":
                for density in densities:
                    yield (
                        {"study": "call", **rule, "density": density},
                        functools.partial(studies.whole, case, density, pool, block, scope),
                    )
