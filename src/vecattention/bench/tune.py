"""Finds a GPU's profile: the fastest launch shape of each kernel, and from which length on sparse calls are faster.

Every candidate has to be right before it is timed. Candidates that do not compile, or want more shared memory than
there is, are recorded as failed and left out.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import logging
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vecattention.bench import studies
from vecattention.bench.cases import Case, Source, lists
from vecattention.bench.exact import error_of
from vecattention.bench.record import Record, Step
from vecattention.bench.timer import measure
from vecattention.ops import rule_of
from vecattention.profile import Crossover, Profile

logger = logging.getLogger(__name__)

DENSITY = 0.2
"""Of the lists that candidates are timed on."""

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
DENSITIES = (0.1, 0.25, 0.5)
"""Where crossovers are looked for."""

GAIN = 0.99
"""A candidate has to take less than this share of the default's time to be preferred to it."""

HOPPER_ATTEND = tuple(
    {"step": step, "stages": stages, "consumer_registers": consumer, "loader_registers": loader}
    for (step, stages), (consumer, loader) in itertools.product(
        ((128, 2), (128, 3), (64, 4), (64, 5), (64, 6)), ((216, 72), (208, 88), (224, 56))
    )
)
HOPPER_SELECT = tuple(
    {"span": span, "stages": stages, "consumer_registers": 208, "loader_registers": 88}
    for span, stages in itertools.product((2048, 4096, 8192, 16384), (3, 4, 5))
)
TRITON_ATTEND = tuple(
    {"step": step, "warps": warps, "stages": stages}
    for step, warps, stages in itertools.product((32, 64, 128), (4, 8), (2, 3, 4))
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel with a launch shape of its own in the profile.

    Attributes:
        name: in the profile, such as "hopper.attend_causal".
        block: query rows that share a list.
        candidates: fields of launch shapes; the default is always tried, too.
    """

    name: str
    block: int
    candidates: tuple[dict[str, int], ...]

    @property
    def selects(self) -> bool:
        """Whether it is a kernel of `select`, or of `attend`."""
        return self.name.split(".")[1].startswith("select")


def kernels(backend: str, causal: bool, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[Kernel]:
    """The kernels of a backend that a case of this kind runs."""
    launch = _launch(backend)
    if backend == "triton":
        return [
            Kernel(f"triton.{launch.attend_kind(block, head_dim, dtype)}", block, TRITON_ATTEND) for block in (64, 128)
        ]
    found = [Kernel(f"hopper.{launch.attend_kind(block == 64, causal)}", block, HOPPER_ATTEND) for block in (128, 64)]
    return [*found, Kernel(f"hopper.{launch.select_kind(causal)}", 128, HOPPER_SELECT)]


Trial = tuple[dict[str, Any], "partial[Record]"]


def steps(backend: str, sources: Sequence[Source], most: int | None = None) -> list[Trial]:
    """All trials, as steps of a record file: each kernel's default first, then its candidates (``most`` at most)."""
    found: list[Trial] = []
    for source in sources:
        case = source.case
        for kernel in kernels(backend, case.causal, case.head_dim, source.dtype):
            for fields in ({}, *kernel.candidates[:most]):
                key = {"study": "tune", "kernel": kernel.name, "case": case.name, "fields": fields}
                found.append((key, partial(trial, source, kernel, fields)))
    return found


def compile_ahead(steps: Sequence[Trial], processes: int) -> None:
    """Run each trial once in other processes, several at a time: what they compile stays in Triton's cache."""
    if processes < 2 or len(steps) < 2:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(steps)), context) as pool:
        for _ in pool.map(_once, [(step.args[0], step.args[1], step.args[2]) for _, step in steps], chunksize=1):
            pass


def _once(asked: tuple[Source, Kernel, dict[str, int]]) -> None:
    source, kernel, fields = asked
    try:
        _, call = (_select if kernel.selects else _attend)(source, kernel, fields)
        call()
    except Exception as error:  # the trial itself will say so
        logger.info("%s %s: %s", kernel.name, fields, error)
    finally:
        if source.device.startswith("cuda"):
            torch.cuda.empty_cache()


def trial(source: Source, kernel: Kernel, fields: dict[str, int]) -> Record:
    """Time of a kernel in a launch shape, once its result is right; a record with ``failed`` where it is not to be had.

    ``fields`` are those in which the shape differs from the default.
    """
    record: Record = {"study": "tune", "kernel": kernel.name, "case": source.case.name, "fields": fields}
    try:
        right, call = (_select if kernel.selects else _attend)(source, kernel, fields)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler and the driver raise
        return record | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    if not right:
        return record | {"failed": "its result differs"}
    return record | measure(call, device=source.device).record()


def profile_of(gpu: str, records: Iterable[Record], source: str) -> Profile:
    """The profile that trials and whole calls lead to."""
    held = list(records)
    return Profile(gpu, shapes(held), crossovers(held), source)


def shapes(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Fields by kernel of those launch shapes that beat the default; where a kernel ran on several cases, summed up."""
    times: dict[str, dict[tuple[tuple[str, int], ...], list[float]]] = {}
    for r in records:
        if r.get("study") == "tune" and "failed" not in r:
            times.setdefault(r["kernel"], {}).setdefault(tuple(r["fields"].items()), []).append(r["ms"])
    found = {}
    for kernel, by_fields in times.items():
        if () not in by_fields:
            continue
        everywhere = {fields: sum(ms) for fields, ms in by_fields.items() if len(ms) == len(by_fields[()])}
        best = min(everywhere, key=lambda fields: everywhere[fields])
        if everywhere[best] < GAIN * everywhere[()]:
            found[kernel] = dict(best)
    return found


def length_case(k_len: int, causal: bool) -> Case:
    """A call of this length: the heads of Qwen2.5-VL-7B, or of Wan 2.1 14B."""
    heads, kv_heads = (28, 4) if causal else (40, 40)
    return Case(f"{'causal' if causal else 'full'}-{k_len}", heads, kv_heads, k_len, k_len, causal)


def crossover_steps(make: Callable[[Case], Source], lengths: Sequence[int] = LENGTHS,
                    densities: Sequence[float] = DENSITIES) -> list[Step]:  # fmt: skip
    """Dense and whole calls of growing length, as steps of a record file; ``make``: the source of a case."""
    found: list[Step] = []
    for causal, k_len in itertools.product((True, False), lengths):
        source = make(length_case(k_len, causal))
        key = {"case": source.case.name, "use": "crossover"}
        found.append(({"study": "dense", **key}, partial(studies.dense, source)))
        for density in densities:
            found.append((
                {"study": "call", **key, "density": density}, partial(studies.whole, source, density, 64, 128, "window")
            ))  # fmt: skip
    return found


def crossovers(records: Sequence[Record]) -> tuple[Crossover, ...]:
    """For each kind of call and density the least length from which on every measured call was no slower than dense."""
    mine = [r for r in records if r["key"].get("use") == "crossover" and "failed" not in r]
    dense: dict[str, float] = {}
    for r in mine:
        if r["study"] == "dense":
            dense[r["case"]] = min(r["ms"], dense.get(r["case"], r["ms"]))
    found = []
    for causal, density in itertools.product((True, False), sorted({r["asked"] for r in mine if r["study"] == "call"})):
        start = "causal-" if causal else "full-"
        calls = [r for r in mine if r["study"] == "call" and r["asked"] == density and r["case"].startswith(start)]
        by_length = sorted((int(r["case"].removeprefix(start)), r["ms"] <= dense[r["case"]]) for r in calls)
        if by_length:
            wins = list(itertools.takewhile(lambda entry: entry[1], reversed(by_length)))
            found.append(Crossover(causal, density, wins[-1][0] if wins else None))
    return tuple(found)


def _attend(source: Source, kernel: Kernel, fields: dict[str, int]) -> tuple[bool, Callable[[], object]]:
    case, (query, key, value) = source.case, source.tensors()
    launch = _launch(kernel.name.partition(".")[0])
    default = launch.AttendShape() if not hasattr(launch, "attend_shape") else launch.attend_shape(
        kernel.block, case.head_dim, source.dtype
    )  # fmt: skip
    shape = dataclasses.replace(default, **fields)
    selection = lists(case, DENSITY, "random", source.seed, kernel.block, source.device)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], device=source.device)

    def call() -> Tensor:
        launch.attend(query, key, value, selection, case.head_dim**-0.5, out, lse, shape)
        return out

    first = call().clone()
    error = error_of(first, query, key, value, selection, case.causal)
    return error.passes and torch.equal(first, call()), call


def _select(source: Source, kernel: Kernel, fields: dict[str, int]) -> tuple[bool, Callable[[], object]]:
    query, key, _ = source.tensors()
    launch = _launch(kernel.name.partition(".")[0])
    rule = rule_of(source.case.head_dim, q_pooling_size=64, q_block_size=kernel.block, causal=source.case.causal)
    alpha = torch.full(query.shape[:2], 0.105, device=source.device)

    def run(shape: Any) -> Tensor:
        words: Tensor = launch.select(query, key, alpha, rule, shape)
        return words

    shape = dataclasses.replace(launch.SelectShape(), **fields)
    return torch.equal(run(shape), run(launch.SelectShape())), lambda: run(shape)


def _launch(backend: str) -> Any:
    return importlib.import_module(f"vecattention.backends.{backend}.launch")
