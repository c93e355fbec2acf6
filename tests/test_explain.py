"""`explain`, and the choice of a backend."""

from __future__ import annotations

import pytest
import torch
from strategies import sample

import vecattention as va
from vecattention import dispatch
from vecattention.spec import Problem, Rule

QUERY, KEY, VALUE = sample(2, 4, 2, 1000, 1500, 32)


def test_it_prints_the_problem_the_rule_the_choice_and_the_reasons() -> None:
    plan = va.explain(QUERY, KEY, VALUE, q_pooling_size=32, q_block_size=128, group_k_block=5, chunk_size=300)
    lines = str(plan).splitlines()
    assert lines[0] == "problem    B=2 H=4 Hkv=2 Sq=1000 Sk=1500 D=32 float32 on cpu, causal"
    assert lines[1] == "rule       P=32 R=128 B=16 G=5 scope=window"
    assert lines[2] == "backend    cpu"
    assert lines[3] == "chunk      256 queries at once, 0.0 MiB of selection bits"
    assert plan.workspace == 2 * 2 * 4 * 47 * 4
    assert [line.split()[0] for line in lines[4:]] == list(dispatch.BACKENDS)
    assert "cpu        could run it" in lines and "reference  could run it" in lines
    assert next(line for line in lines if line.startswith("triton ")).startswith("triton     cannot: it runs on CUDA")


def test_a_named_backend_is_the_only_one_asked() -> None:
    plan = va.explain(QUERY, KEY, backend="reference", causal=False)
    assert plan.backend == "reference" and plan.reasons == {"reference": ()}
    assert "non-causal" in str(plan)


def test_nothing_that_can_run_is_said_so() -> None:
    plan = va.explain(QUERY.to("meta"), KEY.to("meta"), backend="cpu")
    assert plan.backend is None
    assert "backend    none can run this" in str(plan)
    assert "cpu        cannot: it runs on CPU tensors, these are on meta" in str(plan)


def test_a_backend_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> dispatch.Backend:
        raise ImportError("No module named 'triton'")

    problem = Problem.of(QUERY, KEY, Rule())
    monkeypatch.setattr(dispatch, "load", load)
    for name in ("triton", "hopper"):
        assert dispatch.why_not(name, problem) == (
            "it cannot be imported (No module named 'triton'); install vecattention[triton]",
        )


@pytest.mark.parametrize(
    ("asked", "got"), [(0, 1024), (1, 64), (63, 64), (64, 64), (200, 192), (1000, 960), (1024, 1024), (10**12, 1024)]
)
def test_chunks_are_whole_blocks_and_at_least_one(asked: int, got: int) -> None:
    assert dispatch.chunk_for(Problem.of(QUERY, KEY, Rule()), asked) == got


def test_a_long_problem_is_cut_so_that_its_bits_fit() -> None:
    problem = Problem(1, 28, 4, 2**17, 2**17, 128, torch.bfloat16, torch.device("cuda"), Rule())
    chunk = dispatch.chunk_for(problem, 0)
    blocks = chunk // 64
    assert blocks * dispatch.bytes_per_block(problem) <= dispatch.WORKSPACE["cuda"]
    assert (blocks + 1) * dispatch.bytes_per_block(problem) > dispatch.WORKSPACE["cuda"]


def test_auto_prefers_the_fastest_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose("auto", Problem.of(QUERY, KEY, Rule())) is dispatch.load("cpu")
    monkeypatch.setattr(dispatch, "why_not", lambda name, problem: () if name == "reference" else ("no",))
    assert dispatch.choose("auto", Problem.of(QUERY, KEY, Rule())) is dispatch.load("reference")
