"""Which backend runs a problem, and why the others do not: the only place that names them."""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from vecattention import bits, machine, profile, spec

logger = logging.getLogger(__name__)

BACKENDS = ("hopper", "triton", "cpu", "reference")  # the order in which "auto" tries them
POOLED_ROWS = 128
HOPPER_ROWS = 128
HINT = (
    "lists for 128 rows (q_block_size=128) run 1.2 to 2 times as fast for each pair: docs/decisions/pool-and-share.md"
)
WORKSPACE = {"cpu": 8 * 2**20, "cuda": 44 * 2**20}  # bytes of bits that a chunk may hold
SCRATCH = {"cpu": 0, "cuda": 32 * 2**20}  # bytes that a backend's kernels take besides, about: rings and counts


class Backend(Protocol):
    """What a module of `vecattention.backends` offers."""

    def why_not(self, problem: spec.Problem) -> tuple[str, ...]: ...
    def select(self, query: Tensor, key: Tensor, alpha: Tensor, rule: spec.Rule) -> Tensor: ...
    def attend(self, query: Tensor, key: Tensor, value: Tensor, selection: spec.Selection, scale: float,
               out: Tensor, lse: Tensor) -> None: ...  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """What `vec_attention` handles at once: ``rows`` queries (a multiple of R) of ``heads`` query heads.

    ``heads`` counts those of all batch rows.
    """

    heads: int
    rows: int


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would use and why not the others; printable.

    Attributes:
        backend: name of the backend that would run, or None when none can.
        reasons: for each backend, its reasons against this problem (empty: it could run it).
        chunk_size: queries handled at once, of ``chunk_heads`` heads; asked for as ``chunk_size=`` the same number
            means those of all heads, which take more memory.
        chunk_heads: query heads handled at once, those of all batch rows counted.
        workspace: bytes of selection bits that a chunk holds.
        problem: the shapes, dtype and device asked about.
        crossovers: from which lengths on such calls are no slower than dense ones, as far as the GPU's profile knows;
            estimated for this call where those that were measured are wider (`profile.Crossover.keys`).
    """

    backend: str | None
    reasons: dict[str, tuple[str, ...]]
    chunk_size: int
    chunk_heads: int
    workspace: int
    problem: spec.Problem
    crossovers: tuple[profile.Crossover, ...] = ()

    def __str__(self) -> str:
        p, rule = self.problem, self.problem.rule
        lines = [
            f"problem    B={p.batch} H={p.heads} Hkv={p.kv_heads} Sq={p.q_len} Sk={p.k_len} D={p.head_dim} "
            f"{str(p.dtype).removeprefix('torch.')} on {p.device}, {'causal' if rule.causal else 'non-causal'}",
            f"rule       P={rule.q_pooling_size} R={rule.q_block_size} B={rule.k_local_size} "
            f"G={rule.group_k_block} scope={rule.max_scope}",
            f"backend    {self.backend or 'none can run this'}",
            f"chunk      {min(self.chunk_size, p.q_len)} queries of {self.chunk_heads} heads at once, "
            f"{self.workspace / 2**20:.1f} MiB of selection bits",
        ]
        for name, why in self.reasons.items():
            lines.append(f"{name:<10} {'could run it' if not why else 'cannot: ' + '; '.join(why)}")
        if p.device.type == "cuda":
            lines.append(f"dense      {self._dense()}")
        if self.backend == "hopper" and rule.q_block_size < HOPPER_ROWS:
            lines.append(f"hint       {HINT}")
        return "\n".join(lines)

    def _dense(self) -> str:
        """Whether a dense kernel would be faster; `vec_attention` never takes one by itself, `apply` does."""
        if not self.crossovers and not machine.multiprocessors(self.problem.device):
            return "whether it is faster is known only for GPUs of this machine"
        if not self.crossovers:
            return "whether it is faster is not known for this GPU; vecattention bench tune measures it"
        keys, width = self.problem.k_len, self.problem.batch * self.problem.heads * self.problem.head_dim
        said = [
            f"{'slower' if c.k_len is not None and keys >= c.k_len else 'faster'} at {100 * c.density:.3g} % density "
            f"(crossover {'estimated at ' if c.k_len and width < c.width else ''}"
            f"{c.k_len or 'beyond what was measured'})"
            for c in self.crossovers
        ]
        return f"with {keys} keys a dense kernel is " + ", ".join(said)


def load(name: str) -> Backend:
    """The module of a backend, imported on first use."""
    return cast(Backend, importlib.import_module(f"vecattention.backends.{name}"))


def why_not(name: str, problem: spec.Problem) -> tuple[str, ...]:
    """Reasons for which a backend cannot run a problem; empty means that it can."""
    try:
        backend = load(name)
    except ImportError as error:
        return (f"it cannot be imported ({error}); install vecattention[triton]",)
    return backend.why_not(problem)


def choose(name: str, problem: spec.Problem) -> Backend:
    """The backend for a problem. A named backend never falls back.

    Raises:
        ValueError: no such backend, or it cannot run the problem; the message gives its reasons.
    """
    check(name)
    if name != "auto":
        reasons = why_not(name, problem)
        if reasons:
            raise ValueError(
                f"backend is {name!r}, which cannot run this: {'; '.join(reasons)}; pass backend='auto' or another one"
            )
        return load(name)
    refused = {}
    for candidate in BACKENDS:
        refused[candidate] = why_not(candidate, problem)
        if not refused[candidate]:
            if candidate == "reference" and problem.device.type == "cuda":
                _warn_slow(str(problem.device), str(problem.dtype), "; ".join(refused["triton"]))
            return load(candidate)
    listed = "; ".join(f"{candidate}: {', '.join(why)}" for candidate, why in refused.items())
    raise ValueError(f"backend is 'auto', but none can run this ({listed}); move the tensors or change the shapes")


@functools.cache
def _warn_slow(device: str, dtype: str, why: str) -> None:
    logger.warning(
        "vecattention: no kernel runs %s on %s (triton: %s); the reference does, which is right but slow. Pass "
        "backend='reference' to say so yourself, or stay with dense attention there", dtype, device, why,
    )  # fmt: skip


def check(name: str) -> None:
    """Raise ValueError unless ``name`` is "auto" or a backend."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, wanted 'auto' or one of {BACKENDS}; explain(query, key) lists them")


def chunk_for(problem: spec.Problem, asked: int) -> Chunk:
    """What is handled at once: ``asked`` queries of all heads, or (0) as many whole heads as the workspace allows.

    All queries of few heads rather than few queries of all heads, which is faster on a GPU
    (docs/decisions/chunks-of-heads.md). Queries are cut where not even one head fits, and where a GPU would else leave
    many multiprocessors without work at the end of each chunk.
    """
    block, all_heads = problem.rule.q_block_size, problem.batch * problem.heads
    blocks = -(-problem.q_len // block)
    if asked:
        return Chunk(all_heads, max(1, min(asked // block, blocks)) * block)
    fits = WORKSPACE.get(problem.device.type, WORKSPACE["cuda"]) // bytes_per_block(problem)  # blocks of one head
    if fits >= blocks:
        sizes = spec.head_chunks(problem.batch, problem.heads, problem.kv_heads, fits // blocks)
        most = max((b.stop - b.start) * (h.stop - h.start) for b, h, _ in sizes)
        return Chunk(most, _full_rounds(problem, most, machine.multiprocessors(problem.device)) * block)
    # The GPU selection works on whole tiles of pooled rows; a chunk has whole blocks in any case.
    tile = math.lcm(POOLED_ROWS * problem.rule.q_pooling_size, block)
    rows = fits * block
    return Chunk(1, max(block, rows // tile * tile or rows))


@functools.lru_cache(maxsize=256)
def _full_rounds(problem: spec.Problem, heads: int, processors: int) -> int:
    """Blocks of a head that a chunk of ``heads`` heads takes: all, or so many that few multiprocessors go without work.

    Each works on one list of 128 rows at a time, as on Hopper. Not causal, all lists are of much the same length, and
    the last round of every chunk can be nearly empty: then the rows that are left over become chunks of their own, of
    more heads. A chunk more has to save more than two rounds, for its launches and for tiles that few rows fill badly.

    Args:
        processors: multiprocessors; 0: no GPU.
    """
    block = problem.rule.q_block_size
    blocks, items = -(-problem.q_len // block), -(-problem.q_len // HOPPER_ROWS)
    if not processors or problem.rule.causal or block not in (HOPPER_ROWS // 2, HOPPER_ROWS):
        return blocks
    fewer = heads * items // processors * processors // heads
    if not 0 < fewer < items:
        return blocks
    whole, cut = ([_lists(p) for p in parts(problem, Chunk(heads, rows * HOPPER_ROWS))] for rows in (items, fewer))
    saved = sum(-(-n // processors) for n in whole) - sum(-(-n // processors) for n in cut)
    return fewer * HOPPER_ROWS // block if saved > 2 * (len(cut) - len(whole)) else blocks


def _lists(part: Part) -> int:
    """Lists of 128 rows of a chunk."""
    batch, heads, rows = (int(x.stop - x.start) for x in (part.batch, part.heads, part.rows))
    return batch * heads * -(-rows // HOPPER_ROWS)


class Part(NamedTuple):
    """Where a chunk lies in the tensors."""

    batch: slice
    heads: slice
    kv_heads: slice
    rows: slice
    keys: slice


def parts(problem: spec.Problem, chunk: Chunk) -> Iterator[Part]:
    """The chunks of a problem; where the last rows are fewer, of as many more heads as take no more memory."""
    every, block = problem.batch * problem.heads, problem.rule.q_block_size
    for rows, keys in spec.query_chunks(problem.q_len, problem.k_len, chunk.rows, problem.rule.causal):
        most = max(1, chunk.heads * chunk.rows // block // -(-(rows.stop - rows.start) // block))
        for heads in spec.head_chunks(problem.batch, problem.heads, problem.kv_heads, min(every, most)):
            yield Part(*heads, rows, keys)


def bytes_per_block(problem: spec.Problem) -> int:
    """Bytes of selection bits of one block of queries of one head."""
    return bits.words_for(problem.k_len) * 4


def workspace(problem: spec.Problem, chunk: Chunk) -> int:
    """Bytes that a chunk takes beside the tensors and the output: bits and pooled queries, these in float32."""
    pooled = -(-min(chunk.rows, problem.q_len) // problem.rule.q_pooling_size) * (problem.head_dim * 4 + 4)
    return bits_held(problem, chunk) + pooled * chunk.heads


def bits_held(problem: spec.Problem, chunk: Chunk) -> int:
    """Bytes of selection bits of a chunk."""
    blocks = -(-min(chunk.rows, problem.q_len) // problem.rule.q_block_size)
    return chunk.heads * blocks * bytes_per_block(problem)


def _scratch(problem: spec.Problem) -> int:
    return SCRATCH.get(problem.device.type, SCRATCH["cuda"])


def output_size(problem: spec.Problem) -> int:
    """Bytes of the output and its log-sum-exp."""
    return problem.batch * problem.heads * problem.q_len * (problem.head_dim * problem.dtype.itemsize + 4)


def out_of_memory(problem: spec.Problem, chunk: Chunk, free: int, has_output: bool = True) -> str:
    """What to say when a device has no room for a call in such chunks.

    Args:
        free: bytes that are left on the device.
        has_output: whether the output is there already.
    """
    block, heads = problem.rule.q_block_size, problem.batch * problem.heads
    scratch, size = _scratch(problem), 0 if has_output else output_size(problem)
    left, wanted = max(0, free - size), workspace(problem, chunk) + scratch
    per_block = max(workspace(problem, Chunk(heads, block)), 1)
    fits = max(0, int(0.8 * left) - scratch) // per_block * block  # the allocator's rounding has to fit, too
    output = " beside the output" if has_output else f", of which the output takes {size / 2**20:.0f}"
    said = (
        f"{free / 2**20:.0f} MiB are free{output}, {chunk.rows} queries of {chunk.heads} heads at once take about "
        f"{wanted / 2**20:.0f}"
    )
    small = wanted <= 0.8 * left  # then it is not the chunk that did not fit
    remedy = f"chunk_size={fits} would fit" if fits > 0 and not small else "free memory, or pass fewer heads a call"
    return f"{said}; {remedy}"


def no_room_to_select(problem: spec.Problem, free: int) -> str:
    """What to say when a device has no room for all bits of a selection and ``free`` bytes are left on it."""
    every = Chunk(problem.batch * problem.heads, problem.q_len)
    wanted = workspace(problem, every) + _scratch(problem)
    return (
        f"{free / 2**20:.0f} MiB are free, the bits of {every.rows} queries of {every.heads} heads and their pooled "
        f"queries take about {wanted / 2**20:.0f}; pass fewer heads or queries a call, or let vec_attention hold "
        "the bits of a few at a time"
    )


def no_room_to_attend(problem: spec.Problem, free: int) -> str:
    """What to say when a device has no room for the output of a call and ``free`` bytes are left on it."""
    wanted = output_size(problem) + _scratch(problem)
    return (
        f"{free / 2**20:.0f} MiB are free, the output and what the kernels need take about {wanted / 2**20:.0f}; free "
        "memory, or pass fewer heads a call"
    )


def explain(problem: spec.Problem, backend: str, chunk_size: int) -> Explanation:
    """The `Explanation` of a problem: nothing is computed."""
    check(backend)
    names = BACKENDS if backend == "auto" else (backend,)
    reasons = {name: why_not(name, problem) for name in names}
    chosen = next((name for name, why in reasons.items() if not why), None)
    chunk = chunk_for(problem, chunk_size)
    kind = (problem.rule.causal, problem.rule.q_block_size)
    known = [c for c in profile.of(problem.device).crossovers if (c.causal, c.q_block_size) == kind]
    width = problem.batch * problem.heads * problem.head_dim
    crossovers = tuple(replace(c, k_len=c.keys(width)) for c in sorted(known, key=lambda c: c.density))
    return Explanation(chosen, reasons, chunk.rows, chunk.heads, bits_held(problem, chunk), problem, crossovers)
