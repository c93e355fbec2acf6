"""The reference and the CPU backend against the brute force, over random problems."""

from __future__ import annotations

import brute
import pytest
import torch
from hypothesis import given, note, settings
from strategies import Problem, problems
from tolerance import Exact

import vecattention as va
from vecattention import bits

BACKENDS = ("reference", "cpu")
ALL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@given(problem=problems(exact=True, dtypes=ALL))
@settings(max_examples=120)
def test_sets_are_equal_where_scores_are_exact_ties_included(problem: Problem) -> None:
    wanted = brute.select(problem.query, problem.key, problem.theta, **problem.brute())
    assert not wanted.unsure.any()
    for backend in BACKENDS:
        assert torch.equal(_kept(problem, backend), wanted.kept), backend


@given(problem=problems(dtypes=ALL))
@settings(max_examples=120)
def test_sets_are_equal_but_for_keys_within_rounding_of_the_cut(problem: Problem) -> None:
    wanted = brute.select(problem.query, problem.key, problem.theta, **problem.brute())
    note(f"unsure: {wanted.unsure.float().mean():.2e}")
    for backend in BACKENDS:
        wrong = (_kept(problem, backend) != wanted.kept) & ~wanted.unsure
        assert not wrong.any(), (backend, wrong.nonzero()[:5].tolist())


@given(problem=problems(dtypes=ALL, most=150))
@settings(max_examples=120)
def test_outputs_are_as_close_to_float64_as_pytorch_is(problem: Problem) -> None:
    selection = va.select(problem.query, problem.key, **problem.arguments, backend="reference")
    kept = bits.unpack(selection.words, selection.k_len)
    rows = brute.mask(kept, selection.q_len, selection.k_len, problem.block, problem.causal)
    exact = Exact.of(problem.query, problem.key, problem.value, rows, problem.scale)
    for backend in BACKENDS:
        out, lse = va.attend(
            problem.query, problem.key, problem.value, selection,
            scale=problem.arguments["scale"], return_lse=True, backend=backend,
        )  # fmt: skip
        assert out.dtype == problem.query.dtype and lse.dtype == torch.float32
        exact.check(out, lse, backend)


def test_keys_too_close_to_call_are_rare() -> None:
    unsure = total = 0
    for seed in range(20):
        numbers = torch.Generator().manual_seed(seed)
        query, key = (torch.randn(1, 2, 512, 64, generator=numbers) for _ in range(2))
        for scope in ("window", "row"):
            kept = brute.select(query, key, torch.full((1, 2), 0.9), pool=64, block=64, tile=16, group=16, scope=scope,
                                causal=True, scale=0.125, exact=False)  # fmt: skip
            unsure, total = unsure + int(kept.unsure.sum()), total + kept.unsure.numel()
    assert 0 < unsure < 1e-3 * total


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_comparison_can_fail(backend: str) -> None:
    query, key = (torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    wanted = brute.select(query, key, torch.full((1, 2), 0.9), pool=64, block=64, tile=16, group=4, scope="row",
                          causal=True, scale=0.125, exact=False)  # fmt: skip
    words = va.select(query, key, threshold=0.9, group_k_block=4, max_scope="window", backend=backend).words
    assert ((bits.unpack(words, 256) != wanted.kept) & ~wanted.unsure).any()


def _kept(problem: Problem, backend: str) -> torch.Tensor:
    words = va.select(problem.query, problem.key, **problem.arguments, backend=backend).words
    return bits.unpack(words, problem.key.shape[2])
