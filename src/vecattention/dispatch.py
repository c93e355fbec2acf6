"""Which backend runs a problem, and why the others do not: the only place that names them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from vecattention import bits, spec

BACKENDS = ("hopper", "triton", "cpu", "reference")  # the order in which "auto" tries them
POOLED_ROWS = 128
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
    """

    backend: str | None
    reasons: dict[str, tuple[str, ...]]
    chunk_size: int
    workspace: int
    problem: spec.Problem

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
        return "\n".join(lines)


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


def explain(problem: spec.Problem, backend: str, chunk_size: int) -> Explanation:
    """The `Explanation` of a problem: nothing is computed."""
    check(backend)
    names = BACKENDS if backend == "auto" else (backend,)
    reasons = {name: why_not(name, problem) for name in names}
    chosen = next((name for name, why in reasons.items() if not why), None)
    chunk = chunk_for(problem, chunk_size)
    blocks = -(-min(chunk, problem.q_len) // problem.rule.q_block_size)
    return Explanation(chosen, reasons, chunk, blocks * bytes_per_block(problem), problem)
