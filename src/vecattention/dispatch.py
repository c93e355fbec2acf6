"""Which backend runs a problem, and why the others do not: the only place that names them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from vecattention import bits, profile, spec

BACKENDS = ("hopper", "triton", "cpu", "reference")  # the order in which "auto" tries them
POOLED_ROWS = 128
HOPPER_ROWS = 128
HINT = (
    "lists for 128 rows (q_block_size=128) run 1.2 to 2 times as fast for each pair: docs/decisions/pool-and-share.md"
)
WORKSPACE = {"cpu": 8 * 2**20, "cuda": 40 * 2**20}  # bytes of bits that a chunk of queries may hold


class Backend(Protocol):
    """What a module of `vecattention.backends` offers."""

    def why_not(self, problem: spec.Problem) -> tuple[str, ...]: ...
    def select(self, query: Tensor, key: Tensor, alpha: Tensor, rule: spec.Rule) -> Tensor: ...
    def attend(self, query: Tensor, key: Tensor, value: Tensor, selection: spec.Selection, scale: float,
               out: Tensor, lse: Tensor) -> None: ...  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would use and why not the others; printable.

    Attributes:
        backend: name of the backend that would run, or None when none can.
        reasons: for each backend, its reasons against this problem (empty: it could run it).
        chunk_size: queries handled at once.
        workspace: bytes of selection bits that a chunk holds.
        problem: the shapes, dtype and device asked about.
        crossovers: what the GPU's profile knows of the lengths from which on such calls are faster than dense ones.
    """

    backend: str | None
    reasons: dict[str, tuple[str, ...]]
    chunk_size: int
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
            f"chunk      {self.chunk_size} queries at once, {self.workspace / 2**20:.1f} MiB of selection bits",
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
        if not self.crossovers:
            return "whether it is faster is not known for this GPU; vecattention bench tune measures it"
        keys = self.problem.k_len
        said = [
            f"{'slower' if c.k_len is not None and keys >= c.k_len else 'faster'} at {100 * c.density:.3g} % density "
            f"(crossover {c.k_len or 'beyond what was measured'})"
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
            return load(candidate)
    listed = "; ".join(f"{candidate}: {', '.join(why)}" for candidate, why in refused.items())
    raise ValueError(f"backend is 'auto', but none can run this ({listed}); move the tensors or change the shapes")


def check(name: str) -> None:
    """Raise ValueError unless ``name`` is "auto" or a backend."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, wanted 'auto' or one of {BACKENDS}; explain(query, key) lists them")


def chunk_for(problem: spec.Problem, asked: int) -> int:
    """Queries handled at once: what was asked (0: as many as the workspace allows), a multiple of R, at least R."""
    block = problem.rule.q_block_size
    if not asked:
        budget = WORKSPACE.get(problem.device.type, WORKSPACE["cuda"])
        asked = budget // bytes_per_block(problem) * block
        tile = POOLED_ROWS * problem.rule.q_pooling_size  # the GPU selection works on whole tiles of pooled rows
        asked = asked // tile * tile or asked
    return max(block, min(asked, problem.q_len + block - 1) // block * block)


def bytes_per_block(problem: spec.Problem) -> int:
    """Bytes of selection bits of one block of queries, all heads."""
    return problem.batch * problem.heads * bits.words_for(problem.k_len) * 4


def workspace(problem: spec.Problem, chunk: int) -> int:
    """Bytes that a chunk of so many queries takes beside the tensors and the output: bits and pooled queries."""
    rule, rows = problem.rule, min(chunk, problem.q_len)
    pooled = -(-rows // rule.q_pooling_size) * problem.batch * problem.heads * (problem.head_dim * 4 + 4)
    return -(-rows // rule.q_block_size) * bytes_per_block(problem) + pooled


def out_of_memory(problem: spec.Problem, chunk: int, free: int) -> str:
    """What to say when a device has no room for a call in such chunks and ``free`` bytes are left on it."""
    block, out = problem.rule.q_block_size, problem.batch * problem.heads * problem.q_len
    size = out * (problem.head_dim * problem.dtype.itemsize + 4)
    left = max(0, free - size)
    fits = int(0.8 * left) // max(workspace(problem, block), 1) * block  # the allocator's rounding has to fit, too
    said = (
        f"{free / 2**20:.0f} MiB are free, the output takes {size / 2**20:.0f} and chunk_size={chunk} about "
        f"{workspace(problem, chunk) / 2**20:.0f}"
    )
    remedy = f"chunk_size={fits} would fit" if 0 < fits < chunk else "free memory, or handle fewer heads at once"
    return f"{said}; {remedy}"


def explain(problem: spec.Problem, backend: str, chunk_size: int) -> Explanation:
    """The `Explanation` of a problem: nothing is computed."""
    check(backend)
    names = BACKENDS if backend == "auto" else (backend,)
    reasons = {name: why_not(name, problem) for name in names}
    chosen = next((name for name, why in reasons.items() if not why), None)
    chunk = chunk_for(problem, chunk_size)
    blocks = -(-min(chunk, problem.q_len) // problem.rule.q_block_size)
    kind = (problem.rule.causal, problem.rule.q_block_size)
    known = [c for c in profile.of(problem.device).crossovers if (c.causal, c.q_block_size) == kind]
    crossovers = tuple(sorted(known, key=lambda c: c.density))
    return Explanation(chosen, reasons, chunk, blocks * bytes_per_block(problem), problem, crossovers)
