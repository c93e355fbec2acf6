"""The GPU backends against the reference on the same device: sets, outputs, log-sum-exp, graphs, strides, memory."""

from __future__ import annotations

from typing import Any

import brute
import pytest
import torch
from torch import Tensor

import vecattention
from vecattention import bits, dispatch, spec

SHAPES = {
    "square": (4, 2, 1000, 1000),
    "prefix": (4, 2, 700, 1300),
    "one row": (2, 1, 1, 300),
    "long": (2, 2, 4096, 4096),
    "many": (12, 4, 4096, 4000 + 96),  # more blocks than a GPU has multiprocessors
}
RULES = [
    {"q_pooling_size": 32, "q_block_size": 128},
    {"q_pooling_size": 64, "q_block_size": 128, "max_scope": "row"},
    {"q_pooling_size": 128, "k_local_size": 64, "group_k_block": 8},
    {"q_pooling_size": 64},
]


def backends() -> list[str]:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return ["triton", "hopper"] if hopper else ["triton"]


@pytest.fixture(params=["triton", "hopper"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in backends():
        pytest.skip("this GPU is not a Hopper one")
    return str(request.param)


def tensors(shape: str, dim: int = 128, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, ...]:
    heads, kv_heads, q_len, k_len = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    return tuple(
        torch.randn(1, h, s, dim, device="cuda", generator=generator).mul(1.5 if i == 1 else 1).to(dtype)
        for i, (h, s) in enumerate(sizes)
    )


def same_sets(a: vecattention.Selection, b: vecattention.Selection) -> None:
    """Equal but for keys whose score meets the cut-off within rounding: fewer than one in 50,000."""
    differ = int(bits.popcount(a.words ^ b.words).sum())
    assert differ <= 2e-5 * int(bits.popcount(b.words).sum()) + 1


def law_of(backend: str, query: Tensor, key: Tensor, **given: Any) -> spec.Selection:
    """The reference's selection; Hopper's rounds the means of queries to their dtype, so that its law starts there."""
    if backend == "hopper":
        query = brute.rounded_means(query, given["q_pooling_size"])
    return vecattention.select(query, key, backend="reference", **given)


def close(out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, selection: spec.Selection) -> None:
    """At most twice the error of torch's own attention in the same dtype, both against float64."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    mask = selection.mask()
    logits = (query.double() @ key.double().mT * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    total = logits.logsumexp(-1)
    exact = (logits - total.masked_fill(total == -torch.inf, 0)[..., None]).exp() @ value.double()
    torch_out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    seen = total > -torch.inf
    allowed = 2 * (torch_out.double() - exact)[seen].norm() + 1e-3 * exact[seen].norm()
    assert (out.double() - exact)[seen].norm() <= allowed
    assert (out[~seen] == 0).all() and (lse[~seen] == -torch.inf).all()
    assert ((lse.double() - total)[seen].abs() < 1e-4).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=["P32 R128", "P64 R128 row", "P128 B64 G8", "published"])
def test_sets_and_outputs(backend: str, rule: dict[str, Any], causal: bool) -> None:
    for shape in SHAPES:
        query, key, value = tensors(shape)
        threshold = torch.tensor([0.9, 0.2, 0.6, 0.01] * 3, device="cuda")[: query.shape[1]]
        given = {"threshold": threshold, "causal": causal, **rule}
        selection = vecattention.select(query, key, backend=backend, **given)
        law = law_of(backend, query, key, **given)
        same_sets(selection, law)
        out, lse = vecattention.attend(query, key, value, law, backend=backend, return_lse=True)
        close(out, lse, query, key, value, law)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", ["prefix", "square"])
def test_scores_that_are_no_numbers_are_never_kept(backend: str, shape: str, causal: bool) -> None:
    query, key, _ = tensors(shape)
    key[0, 0, 70], key[0, 1, 200], query[0, 0, 40] = torch.nan, torch.inf, torch.nan  # an infinite key scores NaN
    if backend != "triton":  # whose means are two numbers, with which an infinite score cancels to NaN
        key[0, 0, 300, 5] = -torch.inf  # scores inf or -inf
    given: dict[str, Any] = {"threshold": 0.5, "q_pooling_size": 32, "q_block_size": 128, "causal": causal}
    for scope in ("window", "row"):
        selection = vecattention.select(query, key, backend=backend, max_scope=scope, **given)
        same_sets(selection, law_of(backend, query, key, max_scope=scope, **given))


@pytest.mark.parametrize("dim, dtype", [(64, torch.bfloat16), (128, torch.float16), (64, torch.float16)])
def test_other_heads_and_dtypes(backend: str, dim: int, dtype: torch.dtype) -> None:
    query, key, value = tensors("prefix", dim, dtype)
    given: dict[str, Any] = {"threshold": 0.5, "q_pooling_size": 32, "q_block_size": 128}
    selection = vecattention.select(query, key, backend=backend, **given)
    same_sets(selection, law_of(backend, query, key, **given))
    out, lse = vecattention.attend(query, key, value, selection, backend=backend, return_lse=True)
    close(out, lse, query, key, value, selection)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(32, 96), (16, 80)], ids=str)
def test_lists_of_any_multiple_of_the_pooling_size(sizes: tuple[int, int], causal: bool) -> None:
    """Triton serves them, whose tiles are powers of 2, also where Hopper's kernels serve others."""
    query, key, value = tensors("prefix")
    rule: dict[str, Any] = {"q_pooling_size": sizes[0], "q_block_size": sizes[1], "causal": causal}
    assert vecattention.explain(query, key, **rule).backend == "triton"
    for scope in ("window", "row"):
        selection = vecattention.select(query, key, threshold=0.5, max_scope=scope, **rule)
        same_sets(selection, law_of("triton", query, key, threshold=0.5, max_scope=scope, **rule))
    out, lse = vecattention.attend(query, key, value, selection, return_lse=True)
    close(out, lse, query, key, value, selection)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.03, 1.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [64, 128])
def test_lists_of_any_density(backend: str, density: float, causal: bool, block: int) -> None:
    query, key, value = tensors("prefix")
    generator = torch.Generator("cuda").manual_seed(1)
    kept = torch.rand(1, 4, -(-700 // block), 1300, device="cuda", generator=generator) < density
    selection = spec.Selection(bits.pack(kept), 700, 1300, block, causal)
    out, lse = vecattention.attend(query, key, value, selection, backend=backend, return_lse=True)
    close(out, lse, query, key, value, selection)


def test_strides_change_nothing(backend: str) -> None:
    query, key, value = tensors("square")
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    odd = [torch.nn.functional.pad(x, (3, 2))[..., 3:-2] for x in (query, key, value)]
    given: dict[str, Any] = {"threshold": 0.5, "q_pooling_size": 32, "q_block_size": 128, "backend": backend}
    want = vecattention.vec_attention(query, key, value, **given)
    assert torch.equal(want, vecattention.vec_attention(*turned, **given))
    assert torch.equal(want, vecattention.vec_attention(*odd, **given))


def test_chunks_and_repeats_are_bitwise_equal(backend: str) -> None:
    query, key, value = tensors("long")
    given: dict[str, Any] = {"threshold": 0.5, "q_pooling_size": 32, "q_block_size": 128, "backend": backend}
    want = vecattention.vec_attention(query, key, value, **given)
    assert torch.equal(want, vecattention.vec_attention(query, key, value, **given))
    assert torch.equal(want, vecattention.vec_attention(query, key, value, chunk_size=1024, **given))


@pytest.mark.parametrize("causal", [True, False])
def test_chunks_of_heads_are_bitwise_equal(backend: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors("many")
    given: dict[str, Any] = {"threshold": 0.5, "q_pooling_size": 32, "q_block_size": 128, "backend": backend}
    given |= {"causal": causal, "return_lse": True}
    want = vecattention.vec_attention(query, key, value, **given)
    for blocks in (10, 32, 70, 200):  # a part of a head, one head, two of the three that share keys, two groups
        monkeypatch.setitem(dispatch.WORKSPACE, "cuda", blocks * 128 * 4)
        assert all(map(torch.equal, want, vecattention.vec_attention(query, key, value, **given)))


def test_a_captured_graph_serves_other_inputs_and_densities(backend: str) -> None:
    static = [x.clone() for x in tensors("long")]
    theta = torch.full((2,), 0.9, device="cuda")
    given: dict[str, Any] = {"q_pooling_size": 32, "q_block_size": 128, "backend": backend}
    vecattention.vec_attention(*static, threshold=theta, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = vecattention.vec_attention(*static, threshold=theta, return_lse=True, **given)
    for seed, value in ((1, 0.9), (2, 0.1), (3, 1e-6)):
        for place, fresh in zip(static, tensors("long", seed=seed), strict=True):
            place.copy_(fresh)
        theta.fill_(value)
        graph.replay()
        eager = vecattention.vec_attention(*static, threshold=theta, return_lse=True, **given)
        assert torch.equal(out, eager[0]) and torch.equal(lse, eager[1])


def test_a_call_takes_little_memory(backend: str) -> None:
    query = torch.randn(1, 8, 16384, 128, device="cuda", dtype=torch.bfloat16)
    given: dict[str, Any] = {"threshold": 0.5, "q_pooling_size": 32, "q_block_size": 128, "backend": backend}
    out = vecattention.vec_attention(query, query, query, **given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = vecattention.vec_attention(query, query, query, **given)
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra <= 64 * 2**20 + 0.01 * 2 * query.numel() * query.element_size()


def test_the_quick_use_of_the_seed_system() -> None:
    query, key, value = (torch.randn(1, 32, 32768, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = vecattention.vec_attention(
        query, key, value, threshold=0.9, q_pooling_size=64, k_local_size=16, group_k_block=16, causal=True,
        chunk_size=64 * 1024,
    )  # fmt: skip
    assert out.shape == query.shape and bool(out.isfinite().all())
