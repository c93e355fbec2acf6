"""What a program around the call may have switched on: none of it changes a bit of the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from strategies import sample

import vecattention as va

BACKENDS = ("reference", "cpu")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SURROUNDINGS = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


@each_backend
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("count", [1, 2], ids=["1 thread", "2 threads"])
def test_surroundings_change_no_bit(backend: str, surroundings: str, count: int) -> None:
    query, key, value = sample(q_len=1000)  # so many keys that a cut-off with 8 bits would choose others
    table = torch.tensor([0.85, 0.7])
    with threads(count):
        plain = [_run(query, key, value, limit, backend) for limit in (0.85, table)]
        with SURROUNDINGS[surroundings]():
            inside = [_run(query, key, value, limit, backend) for limit in (0.85, table)]
    for got, wanted in zip(inside, plain, strict=True):
        assert all(map(torch.equal, got, wanted))


@each_backend
def test_a_query_that_wants_gradients_gives_the_same_bits(backend: str) -> None:
    query, key, value = sample(q_len=300)
    plain = _run(query, key, value, 0.9, backend)
    inside = _run(query.clone().requires_grad_(), key, value, 0.9, backend)
    assert all(map(torch.equal, inside, plain))


def test_inference_tensors_are_served_outside_of_inference_mode_too() -> None:
    plain = _run(*sample(q_len=300), 0.9, "cpu")
    with torch.inference_mode():
        inputs = sample(q_len=300)
        inside = _run(*inputs, 0.9, "cpu")
    outside = _run(*inputs, 0.9, "cpu")
    assert all(map(torch.equal, inside, plain)) and all(map(torch.equal, outside, plain))


def test_two_runs_give_the_same_bits() -> None:
    inputs = sample(2, 4, 2, 700, 900, 64)
    for backend in BACKENDS:
        assert all(map(torch.equal, _run(*inputs, 0.9, backend), _run(*inputs, 0.9, backend)))


def _run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, limit: float | torch.Tensor,
         backend: str) -> tuple[torch.Tensor, ...]:  # fmt: skip
    words = va.select(query, key, threshold=limit, backend=backend).words
    out, lse = va.vec_attention(query, key, value, threshold=limit, return_lse=True, backend=backend)
    return words, out, lse
