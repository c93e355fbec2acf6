"""`explain`, and the choice of a backend."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
    assert lines[3] == "chunk      256 queries of 8 heads at once, 0.0 MiB of selection bits"
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
    problem = Problem.of(QUERY, KEY, Rule())
    assert dispatch.chunk_for(problem, asked) == dispatch.Chunk(problem.batch * problem.heads, got)


def test_a_long_problem_is_cut_so_that_its_bits_fit() -> None:
    """Whole heads where they fit, as many as do, and else queries of one head."""
    room = dispatch.WORKSPACE["cuda"]
    for rows, heads, kv_heads, block, wanted in (
        (2**17, 28, 4, 128, dispatch.Chunk(2, 2**17)),
        (75_600, 40, 40, 128, dispatch.Chunk(8, 591 * 128)),
        (2**15, 28, 4, 64, dispatch.Chunk(14, 2**15)),
        (2**20, 28, 4, 64, dispatch.Chunk(1, 2**14)),
    ):
        rule = Rule(q_block_size=block)
        problem = Problem(1, heads, kv_heads, rows, rows, 128, torch.bfloat16, torch.device("cuda"), rule)
        chunk = dispatch.chunk_for(problem, 0)
        assert chunk == wanted
        assert dispatch.bits_held(problem, chunk) <= room
        parts = list(dispatch.parts(problem, chunk))
        assert max(h.stop - h.start for _, h, *_ in parts) == chunk.heads
        assert sum((h.stop - h.start) * (q.stop - q.start) for _, h, _, q, _ in parts) == heads * rows


@pytest.mark.parametrize(
    ("rows", "heads", "causal", "wanted", "rounds"),
    [
        (65_536, 20, False, (10, 512), 78),  # 2 chunks of 38.8 rounds
        (118_800, 24, False, (3, 924), 169),  # else 8 chunks of 21 rounds and 15 lists
        (75_600, 40, False, (8, 591), 180),  # 35.8 rounds a chunk: full enough
        (118_800, 24, True, (3, 929), 176),  # causal lists get shorter and fill the last round
        (4096, 8, False, (8, 32), 2),
    ],
)
def test_chunks_end_where_few_multiprocessors_go_without_work(
    rows: int, heads: int, causal: bool, wanted: tuple[int, int], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vecattention.machine.multiprocessors", lambda device: 132)
    rule = Rule(q_block_size=128, causal=causal)
    problem = Problem(1, heads, heads, rows, rows, 128, torch.bfloat16, torch.device("cuda"), rule)
    chunk = dispatch.chunk_for(problem, 0)
    assert (chunk.heads, chunk.rows // 128) == wanted
    parts = list(dispatch.parts(problem, chunk))
    lists = [(p.heads.stop - p.heads.start) * -(-(p.rows.stop - p.rows.start) // 128) for p in parts]
    assert sum(-(-n // 132) for n in lists) == rounds
    assert sum(lists) == heads * -(-rows // 128) and max(lists) <= dispatch.bits_held(problem, chunk) // (
        dispatch.bytes_per_block(problem)
    )
    seen = torch.zeros(heads, rows, dtype=torch.int32)
    for part in parts:
        seen[part.heads, part.rows] += 1
    assert bool((seen == 1).all())


@given(
    pool=st.sampled_from([16, 32, 64, 128]), share=st.integers(1, 8), q_len=st.integers(1, 2**22),
    k_len=st.integers(1, 2**22), batch=st.integers(1, 3), kv_heads=st.integers(1, 4), group=st.integers(1, 7),
    asked=st.one_of(st.just(0), st.integers(1, 2**23)), where=st.sampled_from(["cpu", "cuda"]),
    processors=st.sampled_from([0, 108, 132]), causal=st.booleans(),
)  # fmt: skip
def test_a_chunk_is_whole_blocks_of_some_heads(
    pool: int, share: int, q_len: int, k_len: int, batch: int, kv_heads: int, group: int, asked: int, where: str,
    processors: int, causal: bool,
) -> None:  # fmt: skip
    heads, block, rule = kv_heads * group, pool * share, Rule(pool, pool * share, causal=causal)
    k_len = max(q_len, k_len) if causal else k_len
    problem = Problem(batch, heads, kv_heads, q_len, k_len, 64, torch.float16, torch.device(where), rule)
    with mock.patch("vecattention.machine.multiprocessors", lambda device: processors):
        chunk = dispatch.chunk_for(problem, asked)
    assert chunk.rows % block == 0 and chunk.rows >= block and 1 <= chunk.heads <= batch * heads
    if asked:
        assert chunk.heads == batch * heads and (chunk.rows <= max(asked, block))
    else:
        one = dispatch.bytes_per_block(problem)
        assert dispatch.bits_held(problem, chunk) <= max(dispatch.WORKSPACE[where], one)
    parts = [part for part in itertools.islice(dispatch.parts(problem, chunk), 50)]
    assert all(part.rows.start % block == 0 for part in parts)
    held = [
        (p.batch.stop - p.batch.start) * (p.heads.stop - p.heads.start) * -(-(p.rows.stop - p.rows.start) // block)
        for p in parts
    ]
    assert max(held) <= chunk.heads * chunk.rows // block


def test_auto_prefers_the_fastest_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose("auto", Problem.of(QUERY, KEY, Rule())) is dispatch.load("cpu")
    monkeypatch.setattr(dispatch, "why_not", lambda name, problem: () if name == "reference" else ("no",))
    assert dispatch.choose("auto", Problem.of(QUERY, KEY, Rule())) is dispatch.load("reference")


def test_a_gpu_without_a_kernel_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    problem = Problem(1, 2, 2, 64, 64, 64, torch.float16, torch.device("cuda", 3), Rule())
    dispatch._warn_slow.cache_clear()
    for _ in range(2):
        assert dispatch.choose("auto", problem) is dispatch.load("reference")
    (said,) = caplog.messages
    assert "no kernel runs torch.float16 on cuda:3 (triton: it needs compute capability 8.0 or newer" in said
    dispatch.choose("reference", problem)
    assert len(caplog.messages) == 1


def test_heads_that_32_bits_cannot_address_go_to_triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    for rows, name in ((2**24 - 128, "hopper"), (2**24, "triton")):
        problem = Problem(1, 1, 1, rows, rows, 128, torch.float16, torch.device("cuda"), Rule(q_block_size=128))
        with mock.patch("torch.cuda.is_available", lambda: False):
            told = dispatch.explain(problem, "auto", 0)
        assert told.backend == name, told.reasons
