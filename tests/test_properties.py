"""What must hold for any problem on any backend: dense limits, supersets, permutations, merging, chunks, strides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import brute
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAYOUTS, Problem, laid_out, problems, sample
from tolerance import Exact

import vecattention as va
from vecattention import bits, dispatch
from vecattention.ops import counted

BACKENDS = ("reference", "cpu")
HALVES = (torch.float16, torch.bfloat16, torch.float32)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
either = pytest.mark.parametrize("causal", [True, False], ids=["causal", "non-causal"])


@each_backend
@given(problem=problems(dtypes=HALVES, most=70))
@settings(max_examples=30)
def test_a_threshold_near_0_is_dense_attention(backend: str, problem: Problem) -> None:
    q_len, k_len = problem.query.shape[2], problem.key.shape[2]
    everything = torch.ones(*problem.query.shape[:2], q_len, k_len, dtype=torch.bool)
    rows = everything.tril(k_len - q_len) if problem.causal else everything
    exact = Exact.of(problem.query, problem.key, problem.value, rows, problem.scale)
    exact.check(*_run(problem, backend, threshold=1e-300))
    assert va.select(problem.query, problem.key, **problem.arguments | {"threshold": 1e-300}).density().eq(1).all()


@given(problem=problems(dtypes=HALVES))
@settings(max_examples=60)
def test_a_lower_threshold_keeps_a_superset(problem: Problem) -> None:
    thresholds = [1.0, 0.97, 0.9, 0.6, 0.2, 0.01]
    for backend in BACKENDS:
        kept = [_select(problem, backend, threshold=theta).words for theta in thresholds]
        for sparse, dense in zip(kept, kept[1:], strict=False):
            assert not (sparse & ~dense).any(), backend


@given(problem=problems(dtypes=HALVES, exact=True), data=st.data())
@settings(max_examples=40)
def test_heads_and_batch_permute(problem: Problem, data: st.DataObject) -> None:
    batch, heads = problem.query.shape[:2]
    kv_heads = problem.key.shape[1]
    b = torch.tensor(data.draw(st.permutations(range(batch))))
    kv = torch.tensor(data.draw(st.permutations(range(kv_heads))))
    h = (kv[:, None] * (heads // kv_heads) + torch.arange(heads // kv_heads)).flatten()
    theta = problem.theta
    moved = replace(
        problem, query=problem.query[b][:, h], key=problem.key[b][:, kv], value=problem.value[b][:, kv],
        arguments=problem.arguments | {"threshold": theta[b][:, h]},
    )  # fmt: skip
    for backend in BACKENDS:
        assert torch.equal(_select(moved, backend).words, _select(problem, backend).words[b][:, h])
    for got, wanted in zip(_run(moved, "cpu"), _run(problem, "cpu", threshold=theta), strict=True):
        assert torch.equal(got, wanted[b][:, h])


@given(problem=problems(dtypes=HALVES, most=70), cut=st.floats(0, 1))
@settings(max_examples=40)
def test_two_halves_merge_by_lse_into_the_whole(problem: Problem, cut: float) -> None:
    selection = _select(problem, "reference")
    low = bits.below(torch.tensor([int(cut * selection.k_len)]), selection.k_len)
    halves = [replace(selection, words=selection.words & half) for half in (low, ~low)]
    whole, *exact = (
        Exact.of(problem.query, problem.key, problem.value, part.mask(), problem.scale) for part in (selection, *halves)
    )
    largest = float(problem.value.double().abs().max())
    bound = max(half.out_error + 2 * half.lse_error * largest for half in exact)
    for backend in BACKENDS:
        (out_a, lse_a), (out_b, lse_b) = (_attend(problem, half, backend) for half in halves)
        lse = torch.logaddexp(lse_a.double(), lse_b.double())
        a, b = ((part.double() - lse).exp().nan_to_num(0.0)[..., None] for part in (lse_a, lse_b))
        assert (a * out_a.double() + b * out_b.double() - whole.out).abs().max() <= bound
        seen = whole.lse > -torch.inf
        assert ((lse - whole.lse)[seen].abs() <= max(half.lse_error for half in exact)).all()
        assert (lse[~seen] == -torch.inf).all()


@given(problem=problems(dtypes=(*HALVES, torch.float64)), chunk=st.one_of(st.integers(1, 400), st.just(10**9)),
       workspace=st.integers(1, 4000))  # fmt: skip
@settings(max_examples=60)
def test_chunks_change_no_bit(problem: Problem, chunk: int, workspace: int) -> None:
    whole = _run(problem, "cpu", chunk_size=10**9)
    assert all(map(torch.equal, _run(problem, "cpu", chunk_size=chunk), whole))
    with mock.patch.dict(dispatch.WORKSPACE, {"cpu": workspace}):  # whole heads, one head, or a part of its queries
        assert all(map(torch.equal, _run(problem, "cpu"), whole))
    assert all(map(torch.equal, _run(problem, "cpu"), whole))
    assert all(map(torch.equal, _attend(problem, _select(problem, "cpu"), "cpu"), whole))


@pytest.mark.parametrize("scope", ["window", "row"])
def test_chunks_keep_the_same_keys_of_a_long_problem(scope: str) -> None:
    """Millions of comparisons, so that one score with another last bit would show."""
    query, key, value = sample(heads=2, q_len=4000, head_dim=64)
    runs = [
        counted(query, key, value, threshold=0.8, max_scope=scope, q_pooling_size=16, chunk_size=chunk, backend="cpu")
        for chunk in (16, 700, 4000)
    ]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@each_backend
@given(problem=problems(dtypes=HALVES), layouts=st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3))
@settings(max_examples=30)
def test_strides_change_no_bit(backend: str, problem: Problem, layouts: list[str]) -> None:
    given = (problem.query, problem.key, problem.value)
    moved = [laid_out(x, layout) for x, layout in zip(given, layouts, strict=True)]
    strided = replace(problem, query=moved[0], key=moved[1], value=moved[2])
    dense = replace(problem, query=moved[0].clone(memory_format=torch.contiguous_format),
                    key=moved[1].contiguous().clone(), value=moved[2].contiguous().clone())  # fmt: skip
    assert torch.equal(_select(strided, backend).words, _select(dense, backend).words)
    assert all(map(torch.equal, _run(strided, backend), _run(dense, backend)))


@given(problem=problems(dtypes=(*HALVES, torch.float64)))
@settings(max_examples=30)
def test_what_fresh_memory_holds_changes_no_bit(problem: Problem) -> None:
    for backend in BACKENDS:
        clean = _run(problem, backend)
        words = _select(problem, backend).words
        with poisoned():
            assert torch.empty(3).isnan().all() and torch.empty(2, 2, dtype=torch.bool).all()
            assert all(map(torch.equal, _run(problem, backend), clean)), backend
            assert torch.equal(_select(problem, backend).words, words), backend


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is full of NaN or the largest integer, in torch itself."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@each_backend
@either
def test_a_row_without_keys_gives_0_and_minus_infinity(backend: str, causal: bool) -> None:
    query, key, value = sample(q_len=100, k_len=150)
    selection = va.select(query, key, causal=causal)
    words = selection.words.clone()
    words[:, 1] = 0
    words[:, 0, 0] = bits.pack(torch.arange(150) == (70 if causal else 3))  # causal: rows before position 70 see none
    selection = replace(selection, words=words)
    out, lse = va.attend(query, key, value, selection, return_lse=True, backend=backend)
    rows = brute.mask(bits.unpack(words, 150), 100, 150, 64, causal)
    assert rows[0, 0].any(-1).sum() == (100 - 20 if causal else 100) and not rows[0, 1].any()
    Exact.of(query, key, value, rows, 32**-0.5).check(out, lse)


@each_backend
@given(problem=problems(dtypes=HALVES))
@settings(max_examples=30)
def test_a_shared_list_is_the_union_of_its_pooled_rows(backend: str, problem: Problem) -> None:
    pool = problem.arguments["q_pooling_size"]
    own = bits.unpack(_select(problem, backend, q_block_size=pool).words, problem.key.shape[2])
    for block in range(pool, 129, pool):
        shared = bits.unpack(_select(problem, backend, q_block_size=block).words, problem.key.shape[2])
        for g, line in enumerate(shared.unbind(2)):
            assert torch.equal(line, own[:, :, g * block // pool : (g + 1) * block // pool].any(2))


@given(problem=problems(dtypes=HALVES))
@settings(max_examples=30)
def test_sink_and_own_positions_are_always_kept(problem: Problem) -> None:
    causal = replace(problem, arguments=problem.arguments | {"causal": True})
    if problem.query.shape[2] > problem.key.shape[2]:
        causal = replace(causal, query=problem.query[:, :, -problem.key.shape[2] :])
    q_len, k_len = causal.query.shape[2], causal.key.shape[2]
    for backend in BACKENDS:
        mask = _select(causal, backend, threshold=1).mask()
        for i in range(q_len):
            first, last = i // problem.block * problem.block + k_len - q_len, i + k_len - q_len
            assert mask[:, :, i, first : last + 1].all()
            assert mask[:, :, i, : min(problem.arguments["q_pooling_size"], last + 1)].all()
            assert not mask[:, :, i, last + 1 :].any()


@given(problem=problems(dtypes=HALVES))
@settings(max_examples=30)
def test_keys_that_are_not_listed_are_not_read(problem: Problem) -> None:
    selection = _select(problem, "cpu")
    listed = selection.mask().any(2).unflatten(1, (problem.key.shape[1], -1)).any(2)
    ends = bits.unpack(selection.words, selection.k_len).any(2).unflatten(1, (problem.key.shape[1], -1)).any(2)
    spoiled = replace(
        problem,
        key=problem.key.masked_fill(~ends[..., None], torch.nan),
        value=problem.value.masked_fill(~ends[..., None], torch.nan),
    )
    assert not (listed & ~ends).any()
    assert all(map(torch.equal, _attend(spoiled, selection, "cpu"), _attend(problem, selection, "cpu")))


@given(problem=problems(dtypes=HALVES, most=100))
@settings(max_examples=30)
def test_one_threshold_per_head_is_a_call_per_head(problem: Problem) -> None:
    group = problem.query.shape[1] // problem.key.shape[1]
    for backend in BACKENDS:
        together = _select(problem, backend).words
        for b in range(together.shape[0]):
            for h in range(together.shape[1]):
                alone = va.select(
                    problem.query[b : b + 1, h : h + 1], problem.key[b : b + 1, h // group : h // group + 1],
                    **problem.arguments | {"threshold": float(problem.theta[b, h])}, backend=backend,
                )  # fmt: skip
                assert torch.equal(alone.words[0, 0], together[b, h])


@each_backend
def test_an_integer_threshold_is_the_same_number(backend: str) -> None:
    query, key, value = sample()
    whole = va.vec_attention(query, key, value, threshold=1, backend=backend)
    for same in (1.0, torch.tensor(1), torch.tensor([1, 1]), torch.ones(1, 2, dtype=torch.int8)):
        assert torch.equal(va.vec_attention(query, key, value, threshold=same, backend=backend), whole)
    assert va.select(query, key, threshold=1).density().max() < 1


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    query, key, value = sample(batch=2, heads=4, kv_heads=2, q_len=1000, head_dim=64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = va.vec_attention(query, key, value, return_lse=True, backend="cpu")
        torch.set_num_threads(threads)
        assert all(map(torch.equal, va.vec_attention(query, key, value, return_lse=True, backend="cpu"), alone))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@given(problem=problems(dtypes=HALVES, most=150))
@settings(max_examples=30)
def test_counting_counts_the_pairs_of_the_selection(problem: Problem) -> None:
    arguments = problem.arguments | {"chunk_size": 70}
    out, lse, kept = counted(problem.query, problem.key, problem.value, **arguments)
    assert torch.equal(kept, _select(problem, "auto").kept_pairs())
    assert all(map(torch.equal, (out, lse), _run(problem, "auto")))


def _select(problem: Problem, backend: str, **changed: Any) -> va.Selection:
    return va.select(problem.query, problem.key, **problem.arguments | changed, backend=backend)


def _attend(problem: Problem, selection: va.Selection, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = va.attend(
        problem.query, problem.key, problem.value, selection,
        scale=problem.arguments["scale"], return_lse=True, backend=backend,
    )  # fmt: skip
    return out, lse


def _run(problem: Problem, backend: str, **changed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = problem.arguments | changed
    out, lse = va.vec_attention(
        problem.query, problem.key, problem.value, **arguments, return_lse=True, backend=backend
    )
    assert not math.isnan(float(out.double().sum()))
    return out, lse
