"""Time attention over ready lists, selection, and the whole call on a GPU, beside dense kernels and other methods.

Errors against float64 are measured on sampled rows before anything is timed. Records are appended as JSON lines; what a
file already holds is not measured again, so that a run which was cut off goes on where it was. `vecattention report`
makes tables and pictures of them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vecattention import profile

if TYPE_CHECKING:
    from vecattention.bench.cases import Source
    from vecattention.bench.record import Step

EXAMPLE = "vecattention bench call --case qwen2.5-vl-8k --density 0.2 --out out/bench.jsonl"
STUDIES = {
    "attention": "attention over ready lists, and other kernels over lists of the same density",
    "selection": "selection alone",
    "call": "the whole call, with its extra memory",
    "dense": "dense kernels",
    "breakdown": "selection and attention of every method, at equal recall",
    "layer": "dense, selection, call and breakdown on the queries and keys of a model's layers",
    "all": "all of these but layer",
    "tune": "launch shapes and crossovers of this GPU, written as a profile",
}
OPTIONS = {
    "case": ("attention", "selection", "call", "dense", "breakdown", "all", "tune"),
    "density": ("attention", "call", "layer", "all"),
    "lists": ("attention", "all"),
    "backend": ("attention", "selection", "layer", "all"),
    "recall": ("breakdown", "layer", "all"),
    "model": ("layer",), "tokens": ("layer",), "layers": ("layer",),
    "profile": ("tune",), "processes": ("tune",),
}  # fmt: skip
"""The studies that heed an option; --device, --out and --again are for all."""

RECALL, TOKENS = 0.9, 8192
PROCESSES = max(1, min(8, (os.cpu_count() or 2) - 2))
RULES = ((32, 128, "window"), (64, 128, "window"), (64, 64, "window"), (64, 128, "row"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vecattention bench`."""
    told = "; ".join(f"{name}: {what}" for name, what in STUDIES.items())
    parser.add_argument("study", choices=STUDIES, metavar="STUDY", help=told)
    parser.add_argument("--case", action="append", help="a shape, may be repeated (qwen2.5-vl-32k)")
    parser.add_argument(
        "--density", action="append", type=float, help="kept pairs over all, may be repeated (0.1, 0.5)"
    )
    parser.add_argument("--lists", action="append", choices=("random", "clustered"), help="kind of ready lists (both)")
    parser.add_argument("--backend", action="append", help="of ready lists and selection, may be repeated (auto)")
    parser.add_argument("--recall", type=float, help=f"of the methods in breakdown ({RECALL})")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: in float32, for trying this out (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench.jsonl"), help="records (%(default)s)")
    parser.add_argument("--again", action="store_true", help="measure again what the file already holds")
    layer = parser.add_argument_group("layer")
    layer.add_argument("--model", metavar="PATH", help="a Qwen2.5-VL checkpoint directory (the testbed's model)")
    layer.add_argument("--tokens", type=int, help=f"vision tokens of its film ({TOKENS})")
    layer.add_argument("--layers", type=int, nargs="+", help="(all)")
    tune = parser.add_argument_group("tune")
    tune.add_argument("--profile", type=Path, metavar="FILE", help="the profile to write (out/GPU.json)")
    tune.add_argument("--processes", type=int, help=f"that compile beforehand ({PROCESSES})")


def run(args: argparse.Namespace) -> int:
    """Measure, print a line for each record, and say where they are; 1 when a result was wrong."""
    _check(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "this machine has no GPU that torch sees, wanted one to time; benchmarks/cpu.py times the CPU, and "
            "--device cpu tries this command out"
        )
    wrong = _tune(args) if args.study == "tune" else _measure(args, list(_steps(args)))
    sys.stdout.write(f"records in {args.out}\n")
    return 1 if wrong else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that the study does not heed, and shares that are none."""
    for name, studies in OPTIONS.items():
        if (given := getattr(args, name)) is not None and args.study not in studies:
            shown = " ".join(map(str, given)) if isinstance(given, list) else given
            raise ValueError(
                f"--{name} is {shown}, wanted none for {args.study}, which does not heed it; leave it out, it is for "
                f"{', '.join(studies)}"
            )
    if args.recall is not None and not 0 < args.recall <= 1:
        raise ValueError(f"--recall is {args.recall}, wanted a share of the softmax mass in (0, 1]; correct it")
    for density in args.density or []:
        if not 0 < density <= 1:
            raise ValueError(f"--density is {density}, wanted a share of all pairs in (0, 1]; correct it")


def _measure(args: argparse.Namespace, steps: Sequence[Step]) -> int:
    """Number of results that are wrong or missing; peers may be missing."""
    from vecattention.bench import record, report

    wrong, measured, begun = 0, 0, time.monotonic()
    asked = list(steps if args.again else record.remaining(args.out, steps))
    for number, step in enumerate(steps, 1):
        rows = list(record.run(args.out, [step], args.again))
        measured += step in asked
        left = _left(begun, measured, len(asked))
        for row in rows:
            _say(f"[{number}/{len(steps)}{left}] {report.line(row)}")
            wrong += report.wrong(row)
    return wrong


def _left(begun: float, done: int, of: int) -> str:
    """In words, the time left if it goes on as fast as since ``begun``; empty before the first and after the last."""
    if not 0 < done < of:
        return ""
    seconds = (time.monotonic() - begun) / done * (of - done)
    return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"


def _source(args: argparse.Namespace, name: str) -> Source:
    from vecattention.bench.cases import Source, case_of

    return Source(case_of(name), args.device, _dtype(args))


def _dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.float32 if args.device == "cpu" else torch.bfloat16


def _steps(args: argparse.Namespace) -> Iterator[Step]:
    if args.study == "layer":
        for source in _layers(args):
            for study in ("dense", "selection", "call", "breakdown"):
                yield from _of(study, source, args)
        return
    for name in args.case or ["qwen2.5-vl-32k"]:
        source = _source(args, name)
        for study in ("dense", "attention", "selection", "call", "breakdown"):
            if args.study in (study, "all"):
                yield from _of(study, source, args)


def _of(study: str, source: Source, args: argparse.Namespace) -> Iterator[Step]:
    """The steps of one study on one source."""
    from vecattention import methods
    from vecattention.bench import peers, studies

    densities, backends, recall = args.density or [0.1, 0.5], args.backend or ["auto"], args.recall or RECALL
    if study == "dense":
        yield {"study": "dense", **source.key}, functools.partial(studies.dense, source)
    if study == "attention":
        for density in densities:
            for kind, backend in itertools.product(args.lists or ["random", "clustered"], backends):
                key = {"study": study, **source.key, "density": density, "lists": kind, "backend": backend}
                yield key, functools.partial(studies.attention, source, density, kind, backend)
            key = {"study": "peer", "kernel": "flex_attention", **source.key, "density": density}
            yield key, functools.partial(peers.flex, source, density, args.device != "cpu")
    if study in ("selection", "call"):
        for pool, block, scope in RULES:
            rule = {**source.key, "pool": pool, "block": block, "scope": scope}
            for backend in backends if study == "selection" else []:
                key = {"study": study, **rule, "backend": backend}
                yield key, functools.partial(studies.selection, source, pool, block, scope, backend)
            for density in densities if study == "call" else []:
                key = {"study": study, **rule, "density": density}
                yield key, functools.partial(studies.whole, source, density, pool, block, scope)
    if study == "breakdown":
        for method in methods.names():
            if method != "full" and source.case.causal in methods.get(method).modes:
                key = {"study": "method", **source.key, "method": method, "recall": recall}
                yield key, functools.partial(peers.method, source, method, recall)


def _layers(args: argparse.Namespace) -> Iterator[Source]:
    from vecattention.bench.cases import Source
    from vecattention.evals.fidelity.captured import capture_movies

    tokens = TOKENS if args.tokens is None else args.tokens
    found = capture_movies(args.model, tokens, (0,), args.layers, args.device)
    model = "testbed" if args.model is None else Path(args.model).name
    for one in found:
        name = f"{model} {tokens} {one.name}"
        yield Source.captured(name, one.query, one.key, one.value, one.causal, args.device, _dtype(args))


def _tune(args: argparse.Namespace) -> int:
    """Launch shapes first, then crossovers with them; the profile is written after each. Number of wrong results."""
    from vecattention.bench import record, tune
    from vecattention.bench.cases import Source

    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    backends = ("hopper", "triton") if gpu and torch.cuda.get_device_capability() == (9, 0) else ("triton",)
    path = args.profile or args.out.parent / f"{profile.slug(gpu or 'cpu')}.json"
    steps = [
        step
        for backend in backends
        for step in tune.steps(backend, [_source(args, name) for name in args.case or tune.CASES[backend]])
    ]
    asked = record.remaining(args.out, steps)
    ahead = [step for step in steps if args.again or step in asked]
    processes, begun = PROCESSES if args.processes is None else args.processes, time.monotonic()
    tune.compile_ahead(
        ahead, processes, lambda done: _say(f"compiled {done} of {len(ahead)}{_left(begun, done, len(ahead))}")
    )
    wrong = _measure(args, steps)
    told = f"vecattention bench tune, {args.out.name}"
    made = tune.profile_of(gpu, record.made_here(record.read(args.out)), told)
    _write(path, made)
    with _using(path):
        used = {name: fields for name, fields in made.shapes.items() if name.startswith(f"{backends[0]}.")}
        wrong += _measure(args, tune.crossover_steps(lambda case: Source(case, args.device, _dtype(args)), used))
    made = tune.profile_of(gpu, record.made_here(record.read(args.out)), told)
    _write(path, made)
    sys.stdout.write(f"profile in {path}; {profile.VARIABLE}={path} uses its launch shapes\n")
    for causal, block in itertools.product((True, False), tune.BLOCKS):
        length = made.pays_from(causal, block)
        known = {0: "not known", profile.NEVER: "longer than was measured"}.get(length, f"min_length={length}")
        kind = "causal" if causal else "not causal"
        sys.stdout.write(f"faster than dense at half density, {kind}, q_block_size={block}: {known}\n")
    return wrong


@contextlib.contextmanager
def _using(path: Path) -> Iterator[None]:
    """With this file as the profile of this process."""
    before = os.environ.get(profile.VARIABLE)
    os.environ[profile.VARIABLE] = str(path)
    profile.for_gpu.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ[profile.VARIABLE]
        else:
            os.environ[profile.VARIABLE] = before
        profile.for_gpu.cache_clear()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _write(path: Path, made: profile.Profile) -> None:
    from vecattention.atomic import replacing

    held: dict[str, Any] = profile.as_json(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as name:
        Path(name).write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
