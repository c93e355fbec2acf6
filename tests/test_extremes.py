"""The smallest, the largest and the strangest inputs."""

from __future__ import annotations

import math

import brute
import pytest
import torch
from strategies import sample
from tolerance import Exact

import vecattention as va
from vecattention import bits, dispatch

BACKENDS = ("reference", "cpu")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
either = pytest.mark.parametrize("causal", [True, False], ids=["causal", "non-causal"])
each_scope = pytest.mark.parametrize("scope", ["window", "row"])


@each_backend
@either
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 2), (1, 500), (2, 2), (63, 64), (65, 65), (127, 129)])
@pytest.mark.parametrize(("pool", "tile"), [(16, 16), (128, 128), (128, 16)])
def test_lengths_below_a_block(backend: str, causal: bool, q_len: int, k_len: int, pool: int, tile: int) -> None:
    query, key, value = sample(q_len=q_len, k_len=k_len)
    kept = brute.select(query, key, torch.full((1, 2), 0.9), pool=pool, block=pool, tile=tile, group=16, scope="window",
                        causal=causal, scale=32**-0.5, exact=False)  # fmt: skip
    selection = va.select(query, key, q_pooling_size=pool, k_local_size=tile, causal=causal, backend=backend)
    assert not ((bits.unpack(selection.words, k_len) != kept.kept) & ~kept.unsure).any()
    out, lse = va.attend(query, key, value, selection, return_lse=True, backend=backend)
    Exact.of(query, key, value, selection.mask(), 32**-0.5).check(out, lse)


@each_backend
def test_one_new_token_after_a_long_prefix(backend: str) -> None:
    """Sq = 1: the pooled row is the row itself."""
    query, key, value = sample(q_len=1, k_len=1000)
    selection = va.select(query, key, threshold=0.5, max_scope="row", backend=backend)
    score = (key[0, 0] @ query[0, :, 0].T).T * 32**-0.5
    past = torch.arange(1000)
    wanted = score + math.log(2) >= score[:, 64:999].amax(-1, keepdim=True)
    assert torch.equal(selection.mask()[0, :, 0], wanted | (past < 64) | (past == 999))


@each_backend
@each_scope
@pytest.mark.parametrize("size", [6.0e4, 1.0e-7])
def test_half_precision_at_the_ends_of_its_range(backend: str, scope: str, size: float) -> None:
    query, key, value = (x.sign() * size for x in sample(q_len=150, dtype=torch.float16))
    out, lse = va.vec_attention(query, key, value, max_scope=scope, return_lse=True, backend=backend)
    selection = va.select(query, key, max_scope=scope, backend=backend)
    Exact.of(query, key, value, selection.mask(), 32**-0.5).check(out, lse)


@each_backend
def test_a_huge_window_is_one_window(backend: str) -> None:
    query, key, _ = sample(q_len=500)
    one = va.select(query, key, group_k_block=500 // 16 + 1, backend=backend)
    assert torch.equal(va.select(query, key, group_k_block=2**40, backend=backend).words, one.words)


@each_backend
@each_scope
@either
def test_a_nan_or_infinite_key_is_dropped_from_the_choice_and_moves_no_maximum(
    backend: str, scope: str, causal: bool
) -> None:
    query, key, _ = sample(q_len=300, heads=1)
    query[..., 0] = query[..., 0].abs()  # the sign of an infinite score is known
    clean = va.select(query, key, max_scope=scope, causal=causal, backend=backend).mask()
    for bad, column in ((torch.nan, 3), (-torch.inf, 0)):
        spoiled = key.clone()
        spoiled[:, :, 100, column] = bad
        kept = va.select(query, spoiled, max_scope=scope, causal=causal, backend=backend).mask()
        own = slice(64, 128) if causal else slice(0, 0)  # its own block keeps every position
        assert not kept[:, :, 128 if causal else 0 :, 100].any()
        others = [j for j in range(300) if j != 100]
        if not clean[..., 100].any():
            assert torch.equal(kept[..., others], clean[..., others])
        assert kept[:, :, own, 100].any() == causal


@each_backend
@each_scope
def test_an_infinitely_good_key_is_the_only_choice(backend: str, scope: str) -> None:
    query, key, _ = sample(q_len=300, heads=1)
    query[..., 0] = query[..., 0].abs()
    key[:, :, 100, 0] = torch.inf
    kept = va.select(query, key, max_scope=scope, causal=False, group_k_block=8192, backend=backend).mask()
    assert kept[..., 100].all() and not kept[..., 112:].any()
    assert scope == "window" or kept.sum() == 300


@each_backend
def test_scores_of_minus_0_and_0_tie(backend: str) -> None:
    query, key, _ = sample(q_len=64, k_len=64, heads=1)
    key = key * 0.0  # both signs of zero
    assert (key == 0).all() and key.signbit().any()
    assert va.select(query, key, threshold=1, causal=False, backend=backend).mask().all()


@each_backend
@each_scope
def test_equal_keys_tie_and_are_all_kept(backend: str, scope: str) -> None:
    """Over all the columns of a product, the edges included."""
    query, key, _ = sample(heads=1, q_len=700, head_dim=128)
    key = key[:, :, :1].expand(1, 1, 700, 128)
    for k_len in (700, 699, 690, 65):
        selection = va.select(query, key[:, :, :k_len], threshold=1, causal=False, max_scope=scope, backend=backend)
        assert selection.mask().all()


@pytest.mark.parametrize("scope", ["window", "row"])
def test_the_cpu_backend_never_holds_more_than_a_slab(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 queries and keys: dense scores of one head alone would be 256 MiB."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and func.namespace == "aten":
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    from vecattention import workers
    from vecattention.backends import cpu

    monkeypatch.setattr(workers, "run", lambda pieces: [piece() for piece in pieces])  # modes are seen in one thread
    query, key, value = sample(q_len=8192, k_len=8192, head_dim=32)
    rule = va.ops.rule_of(32, max_scope=scope)
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3])
    with Watch():
        words = cpu.select(query, key, torch.full((1, 2), 1.0), rule)
        cpu.attend(query, key, value, va.Selection(words, 8192, 8192, 64, True), 32**-0.5, out, lse)
    assert 2**20 <= largest <= 4 * cpu.SLAB + query.nbytes


def test_the_workspace_is_bounded_whatever_the_length() -> None:
    for k_len in (2**12, 2**17, 2**22):
        query = torch.empty(1, 28, k_len, 128, device="meta", dtype=torch.bfloat16)
        key = torch.empty(1, 4, k_len, 128, device="meta", dtype=torch.bfloat16)
        plan = va.explain(query, key)
        one_block = dispatch.bytes_per_block(plan.problem)
        assert plan.workspace <= max(dispatch.WORKSPACE["cuda"], one_block)
        assert plan.workspace <= 64 * 2**20 + 0.01 * 2 * key.nbytes
        if k_len == 2**17:  # what an H200 has besides: the log-sum-exp, the rings of positions, pooled queries
            chunk = dispatch.Chunk(plan.chunk_heads, plan.chunk_size)
            besides = 28 * k_len * 4 + 132 * 8192 * 4
            assert dispatch.workspace(plan.problem, chunk) + besides <= 64e6 + 0.01 * 2 * key.nbytes
