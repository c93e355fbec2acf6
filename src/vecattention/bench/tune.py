"""Finds a GPU's profile: the fastest launch shape of each kernel, and from which length on sparse calls are faster.

Every candidate has to be right before it is timed. Candidates that do not compile, or want more shared memory than
there is, are recorded as failed and left out. Triton's kernels have a launch shape for each head_dim; those of the
cases are looked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import logging
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vecattention.bench import studies
from vecattention.bench.cases import Case, Source, lists
from vecattention.bench.exact import agreement_of, error_of
from vecattention.bench.record import Record, Step
from vecattention.bench.report import WRONG
from vecattention.bench.timer import compare, graphed
from vecattention.ops import rule_of
from vecattention.profile import Crossover, Profile

logger = logging.getLogger(__name__)

CASES = {
    "hopper": ("qwen2.5-vl-32k", "square-32k"),
    "triton": ("qwen2.5-vl-32k", "square-32k", "internvl3-1b-32k", "cogvideox-5b-480p"),
}
"""Timed where no others are asked for; the names of Triton's launch shapes hold head_dim: cases of 128 and of 64."""

DENSITY = 0.2
"""Of the lists that candidates are timed on."""

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
DENSITIES = (0.1, 0.25, 0.5)
"""Where crossovers are looked for."""

SLOWER = 1.02
"""How much longer than the dense kernel a call may take where it still counts as not slower."""

NEAR = 1.1
"""Within which factor of the density asked for a call has to be, to tell a crossover."""

GAIN = 0.98
"""A candidate has to take less than this share of the default's time to be preferred to it."""

HOPPER_ATTEND = tuple(
    {"step": step, "stages": stages, "consumer_registers": consumer, "loader_registers": loader}
    for (step, stages), (consumer, loader) in itertools.product(
        ((128, 2), (128, 3), (64, 4), (64, 5), (64, 6)), ((224, 56), (216, 72), (208, 88))
    )
)
HOPPER_SELECT = tuple(
    {"span": span, "stages": stages} for span, stages in itertools.product((0, 2048, 4096, 8192, 16384), (3, 4, 5))
)
TRITON_SELECT = tuple(
    {"rows": rows, "step": step, "segment": segment, "warps": warps, "stages": stages}
    for rows, step, segment, warps, stages in itertools.product((64, 128), (64, 128), (2048, 8192), (4, 8), (2, 3))
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
        candidates: fields of launch shapes, each timed beside the default.
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
        found = [
            Kernel(f"triton.{launch.attend_kind(block, head_dim, dtype)}", block,
                   _others(launch.attend_shape(block, head_dim, dtype), TRITON_ATTEND))
            for block in (64, 128)
        ]  # fmt: skip
        select = _others(launch.select_shape(head_dim, dtype), TRITON_SELECT)
        return [*found, Kernel(f"triton.{launch.select_kind(head_dim, dtype)}", 128, select)]
    attend = _others(launch.AttendShape(), HOPPER_ATTEND)
    found = [Kernel(f"hopper.{launch.attend_kind(block == 64, causal)}", block, attend) for block in (128, 64)]
    select = _others(launch.SelectShape(), HOPPER_SELECT)
    return [*found, Kernel(f"hopper.{launch.select_kind(causal)}", 128, select)]


def _others(default: Any, candidates: Sequence[dict[str, int]]) -> tuple[dict[str, int], ...]:
    """The candidates that are not the default itself."""
    return tuple(fields for fields in candidates if dataclasses.replace(default, **fields) != default)


Trial = tuple[dict[str, Any], "partial[Record]"]


def steps(backend: str, sources: Sequence[Source], most: int | None = None) -> list[Trial]:
    """All trials, as steps of a record file: each kernel's default first, then its candidates (``most`` at most)."""
    found: list[Trial] = []
    for source in sources:
        case = source.case
        for kernel in kernels(backend, case.causal, case.head_dim, source.dtype):
            for fields in ({}, *kernel.candidates[:most]):
                key = {"study": "tune", "kernel": kernel.name, **source.key, "fields": fields, "beside": "default"}
                found.append((key, partial(trial, source, kernel, fields)))
    return found


def compile_ahead(steps: Sequence[Trial], processes: int, told: Callable[[int], None] = lambda done: None) -> None:
    """Run each trial once in other processes, several at a time: what they compile stays in Triton's cache.

    Args:
        told: called with the number of trials that are done.
    """
    if processes < 2 or len(steps) < 2:
        return
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(processes, len(steps)), context) as pool:
            asked = [(step.args[0], step.args[1], step.args[2]) for _, step in steps]
            for number, _ in enumerate(pool.map(_once, asked, chunksize=1), 1):
                told(number)
    except BrokenProcessPool:
        logger.warning("a process that compiled ahead was lost; what is missing is compiled when it is measured")


def _once(asked: tuple[Source, Kernel, dict[str, int]]) -> None:
    source, kernel, fields = asked
    try:
        _, call = (_select if kernel.selects else _attend)(source, kernel, fields)
        call()
    except Exception as error:  # the trial itself will say so
        logger.info("%s %s: %s", kernel.name, fields, error)


def trial(source: Source, kernel: Kernel, fields: dict[str, int]) -> Record:
    """Time of a kernel in a launch shape, and its share of the default's, once its result is right.

    A record with ``failed`` where it is not to be had. ``fields``: in what the shape differs from the default.
    """
    record: Record = {"study": "tune", "kernel": kernel.name, "case": source.case.name, "fields": fields}
    make = _select if kernel.selects else _attend
    right, call = make(source, kernel, fields)
    if not right:
        return record | {"failed": WRONG}
    default = make(source, kernel, {})[1]
    if source.device.startswith("cuda"):  # as graphs, lest the host is what is compared
        call, default = graphed(call), graphed(default)
    time, ratio = compare(call, default, device=source.device)
    return record | time.record() | {"ratio": round(ratio, 4)}


def profile_of(gpu: str | None, records: Iterable[Record], source: str) -> Profile:
    """The profile that trials and whole calls on this GPU (None: a CPU) lead to; other records are left out."""
    held = [r for r in records if (r.get("machine") or {}).get("gpu") == gpu]
    return Profile(gpu or "CPU", shapes(held), crossovers(held), source)


def shapes(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Fields by kernel of those launch shapes that beat the default; where it ran on several cases, on average."""
    ratios: dict[str, dict[tuple[tuple[str, int], ...], dict[str, float]]] = {}
    for r in records:
        if r.get("study") == "tune" and "failed" not in r and "ratio" in r:  # the first records had none
            ratios.setdefault(r["kernel"], {}).setdefault(tuple(r["fields"].items()), {})[r["case"]] = r["ratio"]
    found = {}
    for kernel, by_fields in ratios.items():
        cases = {case for by_case in by_fields.values() for case in by_case}
        everywhere = {
            fields: sum(by_case.values()) / len(cases) for fields, by_case in by_fields.items() if set(by_case) == cases
        }
        best = min(everywhere, key=lambda fields: everywhere[fields], default=())
        if best and everywhere[best] < GAIN:
            found[kernel] = dict(best)
    return found


def length_case(k_len: int, causal: bool) -> Case:
    """A call of this length: the heads of Qwen2.5-VL-7B, or of Wan 2.1 14B."""
    heads, kv_heads = (28, 4) if causal else (40, 40)
    return Case(f"{'causal' if causal else 'full'}-{k_len}", heads, kv_heads, k_len, k_len, causal)


def crossover_steps(make: Callable[[Case], Source], with_shapes: Mapping[str, object], lengths: Sequence[int] = LENGTHS,
                    densities: Sequence[float] = DENSITIES) -> list[Step]:  # fmt: skip
    """Dense and whole calls of growing length, as steps of a record file.

    Args:
        make: the source of a case.
        with_shapes: the launch shapes in use: other ones ask for other records.
    """
    found: list[Step] = []
    for causal, k_len in itertools.product((True, False), lengths):
        source = make(length_case(k_len, causal))
        key = {**source.key, "use": "crossover"}
        found.append(({"study": "dense", **key}, partial(studies.dense, source)))
        for block, density in itertools.product(BLOCKS, densities):
            found.append((
                {"study": "call", **key, "density": density, "block": block, "shapes": dict(with_shapes)},
                partial(studies.whole, source, density, 64, block, "window"),
            ))  # fmt: skip
    return found


BLOCKS = (64, 128)
"""Rows that share a list, of the calls whose crossover is looked for; 64 pooled ones."""


def crossovers(records: Sequence[Record]) -> tuple[Crossover, ...]:
    """For each kind of call and density the least length from which on every measured call was no slower than dense.

    No slower: within 2 percent, or a denser call of that length is. Calls that missed their density, because nothing
    sparser was to be had, tell nothing. The last record of a call counts.
    """
    mine = [r for r in records if r.get("key", {}).get("use") == "crossover" and "failed" not in r]
    dense: dict[str, float] = {}
    for r in mine:
        if r["study"] == "dense":
            dense[r["case"]] = min(r["ms"], dense.get(r["case"], r["ms"]))
    calls: dict[tuple[bool, int, float], dict[int, bool]] = {}
    for r in mine:
        if r["study"] != "call" or r["case"] not in dense or not 1 / NEAR < r["density"] / r["asked"] < NEAR:
            continue
        kind, _, length = r["case"].partition("-")
        fast = r["ms"] <= SLOWER * dense[r["case"]]
        calls.setdefault((kind == "causal", r["block"], r["asked"]), {})[int(length)] = fast
    for (causal, block, density), by_length in calls.items():  # a host that is the limit is not always as fast
        for other in calls:
            if other[:2] == (causal, block) and other[2] > density:
                by_length.update((n, True) for n, fast in calls[other].items() if fast and n in by_length)
    found = []
    for (causal, block, density), by_length in sorted(calls.items(), key=lambda entry: (not entry[0][0], entry[0][1:])):
        wins = list(itertools.takewhile(lambda entry: entry[1], sorted(by_length.items(), reverse=True)))
        case = length_case(0, causal)
        width = case.heads * case.head_dim
        found.append(Crossover(causal, block, density, wins[-1][0] if wins else None, width))
    return tuple(found)


def _attend(source: Source, kernel: Kernel, fields: dict[str, int]) -> tuple[bool, Callable[[], object]]:
    case, (query, key, value) = source.case, source.tensors()
    launch = _launch(kernel.name.partition(".")[0])
    shape = dataclasses.replace(_default(kernel, source), **fields)
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
    shape = dataclasses.replace(_default(kernel, source), **fields)

    def call() -> Tensor:
        words: Tensor = launch.select(query, key, alpha, rule, shape)
        return words

    found = call()
    rounded = kernel.name.startswith("hopper.")
    right = agreement_of(found, query, key, alpha, rule, rounded=rounded, heads=(0,)).passes
    return right and torch.equal(found, call()), call


def _default(kernel: Kernel, source: Source) -> Any:
    """The launch shape of a kernel where no profile has another."""
    backend, dim = kernel.name.partition(".")[0], source.case.head_dim
    launch = _launch(backend)
    if backend == "hopper":
        return launch.SelectShape() if kernel.selects else launch.AttendShape()
    if kernel.selects:
        return launch.select_shape(dim, source.dtype)
    return launch.attend_shape(kernel.block, dim, source.dtype)


def _launch(backend: str) -> Any:
    return importlib.import_module(f"vecattention.backends.{backend}.launch")
