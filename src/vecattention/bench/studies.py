"""The measurements: each takes the source of its tensors and settings and gives one record, JSON-ready."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import vecattention
from vecattention import dispatch, ops
from vecattention.bench import dense as dense_kernels
from vecattention.bench.cases import Case, Source, lists
from vecattention.bench.exact import Agreement, agreement_of, error_of
from vecattention.bench.timer import graphed, measure, peak_extra
from vecattention.checks import THRESHOLD
from vecattention.spec import Problem, Rule, Selection

Record = dict[str, Any]
COMPARED = 8
"""Blocks at the start, in the middle and at the end of a head whose lists are compared with the reference's."""


def dense(source: Source) -> list[Record]:
    """Time of each dense kernel on a case; ``missing`` says why one was not measured."""
    case, (query, key, value) = source.case, source.tensors()
    found = []
    kernels, missing = dense_kernels.calls(query, key, value, case.causal)
    for name, call in kernels.items():
        error = error_of(call(), query, key, value, None, case.causal)
        time = measure(call, device=source.device)
        found.append({
            "study": "dense", "case": case.name, "kernel": name, **time.record(), **error.record(),
            "tflops": tflops(case.dense_flop, time.median), "missing": missing,
        })  # fmt: skip
    if not found:
        raise RuntimeError(f"no dense kernel runs {case.name}: {missing}; take another device or dtype")
    return found


def attention(source: Source, density: float, kind: str, backend: str, block: int = 128) -> Record:
    """Time of `attend` over ready lists: useful TFLOP/s are those of the kept pairs alone."""
    case, (query, key, value) = source.case, source.tensors()
    selection = lists(case, density, kind, source.seed, block, source.device)

    def call() -> Tensor:
        return vecattention.attend(query, key, value, selection, backend=backend)  # type: ignore[return-value]

    first = call()
    error = error_of(first, query, key, value, selection, case.causal)
    equal = torch.equal(first, call())
    time = measure(call, device=source.device)
    return {
        "study": "attention", "case": case.name, "density": density, "lists": kind, "backend": backend, "block": block,
        **error.record(), "repeats_equal": equal, **time.record(),
        "tflops": tflops(useful_flop(case, selection), time.median), "kept": float(selection.density().mean()),
    }  # fmt: skip


def selection(source: Source, pool: int, block: int, scope: str, backend: str) -> Record:
    """Time of the selection of a whole call, in the chunks in which the call would make it.

    Before, lists of its first and its last chunk are compared with the reference's, and with those of a second run.
    Alone it can be held up by the host, as between kernels of attention it is not: a CUDA graph's time is there, too.
    """
    case, (query, key, _) = source.case, source.tensors()
    rule: dict[str, Any] = {"q_pooling_size": pool, "q_block_size": block, "max_scope": scope}
    problem, size = _chunk(query, key, case.causal, rule)
    parts = list(dispatch.parts(problem, size))

    def chosen(part: dispatch.Part) -> Tensor:
        b, h, g, rows, keys = part
        some, seen = query[b, h, rows], key[b, g, keys]
        return vecattention.select(some, seen, causal=case.causal, backend=backend, threshold=THRESHOLD, **rule).words

    def call() -> None:
        for part in parts:
            chosen(part)

    rounded = (_explained(query, key, case.causal, rule) if backend == "auto" else backend) == "hopper"
    agreement, equal = Agreement(0, 0), True
    for part in (parts[0], *parts[1:][-1:]):
        words = chosen(part)
        agreement += _agreement(words, query, key, part, problem.rule, rounded)
        equal = equal and torch.equal(words, chosen(part))
    time = measure(call, device=source.device)
    replayed = measure(graphed(call)) if source.device.startswith("cuda") else time
    return {
        "study": "selection", "case": case.name, "pool": pool, "block": block, "scope": scope, "backend": backend,
        **agreement.record(), "repeats_equal": equal, "chunk": size.rows, "chunk_heads": size.heads, **time.record(),
        "ms_graph": round(replayed.median, 4),
        "tflops": tflops(case.dense_flop / (2 * pool), replayed.median),
    }  # fmt: skip


def _agreement(words: Tensor, query: Tensor, key: Tensor, part: dispatch.Part, rule: Rule,
               rounded: bool) -> Agreement:  # fmt: skip
    """How the words of a chunk agree with the reference: of its first and its last head, `COMPARED` blocks thrice."""
    b, h, g, rows, keys = part
    some = query[b, h, rows]
    alpha = torch.full(some.shape[:2], -math.log(THRESHOLD), device=query.device)
    heads = sorted({0, some.shape[1] - 1})
    return agreement_of(words, some, key[b, g, keys], alpha, rule, rounded, heads, COMPARED)


def whole(source: Source, density: float, pool: int, block: int, scope: str) -> Record:
    """Time of `vec_attention`, selection included, at the threshold that gives this density; its extra memory too."""
    case, (query, key, value) = source.case, source.tensors()
    rule: dict[str, Any] = {"q_pooling_size": pool, "q_block_size": block, "max_scope": scope, "causal": case.causal}
    theta, reached = threshold_for(query, key, density, rule)

    def call() -> Tensor:
        return vecattention.vec_attention(query, key, value, threshold=theta, **rule)  # type: ignore[return-value]

    first = call()
    # The last blocks of a causal call are a call of their own, if they start where a block does.
    rows = slice(max(0, case.q_len // block - 4) * block if case.causal else 0, None)
    chosen = vecattention.select(query[:, :, rows], key, threshold=theta, **rule)
    error = error_of(first[:, :, rows], query[:, :, rows], key, value, chosen, case.causal)
    del chosen
    gpu = source.device.startswith("cuda")
    extra = peak_extra(call) - first.numel() * first.element_size() if gpu else 0
    equal = torch.equal(first, call())
    time = measure(call, device=source.device)
    replayed = measure(graphed(call)) if gpu else time
    return {
        "study": "call", "case": case.name, "density": reached, "asked": density, "threshold": theta, "pool": pool,
        "block": block, "scope": scope, "structure": source.structure, **error.record(), "repeats_equal": equal,
        **time.record(), "ms_graph": round(replayed.median, 4), "extra_mib": round(extra / 2**20, 2),
        "kv_mib": round(2 * key.numel() * key.element_size() / 2**20, 1),
        "backend": _explained(query, key, case.causal, rule),
        "tflops": tflops(case.dense_flop * reached, replayed.median),
    }  # fmt: skip


def threshold_for(query: Tensor, key: Tensor, density: float, rule: dict[str, Any]) -> tuple[float, float]:
    """(threshold, density it gives): bisection of -ln(threshold), which the density grows with."""
    low, high, best = 0.0, 40.0, (1.0, math.inf)
    for _ in range(16):
        alpha = (low + high) / 2
        theta = math.exp(-alpha)
        reached = _density(query, key, theta, rule)
        if abs(reached - density) < abs(best[1] - density):
            best = (theta, reached)
        if abs(reached - density) < 0.003 * density:
            break
        low, high = (alpha, high) if reached < density else (low, alpha)
    return best


def useful_flop(case: Case, selection: Selection) -> float:
    """Floating-point operations of attention over the kept pairs."""
    return float(selection.kept_pairs().sum()) * 4 * case.head_dim


def tflops(flop: float, ms: float) -> float:
    """TFLOP/s, with one digit after the point; below 0.1 with more."""
    rate = flop / ms / 1e9
    return round(rate, 1) if rate >= 0.1 else round(rate, 5)


def _density(query: Tensor, key: Tensor, theta: float, rule: dict[str, Any]) -> float:
    """Mean density over all rows, chunk by chunk."""
    problem, size = _chunk(query, key, rule["causal"], {k: v for k, v in rule.items() if k != "causal"})
    kept = torch.zeros((), dtype=torch.int64, device=query.device)
    for b, h, g, rows, keys in dispatch.parts(problem, size):
        part: Selection = vecattention.select(query[b, h, rows], key[b, g, keys], threshold=theta, **rule)
        kept += part.kept_pairs().sum()
    pairs = vecattention.spec.allowed_pairs(problem.q_len, problem.k_len, rule["causal"])
    return float(kept) / (pairs * problem.batch * problem.heads)


def _chunk(query: Tensor, key: Tensor, causal: bool, rule: dict[str, Any]) -> tuple[Problem, dispatch.Chunk]:
    """The problem, and what a call would handle of it at once."""
    problem = Problem.of(query, key, ops.rule_of(query.shape[3], causal=causal, **rule))
    return problem, dispatch.chunk_for(problem, 0)


def _explained(query: Tensor, key: Tensor, causal: bool, rule: dict[str, Any]) -> str | None:
    return vecattention.explain(query, key, causal=causal, **{k: v for k, v in rule.items() if k != "causal"}).backend
