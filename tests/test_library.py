"""The operators in torch.library: opcheck, fake kernels, torch.compile, the meta device, autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import sample
from torch._subclasses.fake_tensor import FakeTensorMode

import vecattention as va

OPS = torch.ops.vecattention
RULE: tuple[Any, ...] = (64, 64, 16, 16, "window", True, 0.25)
SHAPES = [(1, 2, 1, 130, 130, 32), (2, 4, 2, 70, 200, 16), (1, 1, 1, 1, 1, 64)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes_on_all_three(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key, value = sample(*shape, dtype=dtype)
    limit = torch.tensor(0.9, dtype=torch.float64)
    words = va.select(query, key).words
    torch.library.opcheck(OPS.select.default, (query, key, limit, "threshold", *RULE, "auto"))
    torch.library.opcheck(OPS.attend.default, (query, key, value, words, 64, True, 0.25, "auto"))
    for chunk, count in ((0, False), (64, True)):
        torch.library.opcheck(
            OPS.vec_attention.default, (query, key, value, limit, "threshold", *RULE, chunk, count, "auto")
        )


@each_shape
@pytest.mark.parametrize("threshold", ["number", "tensor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_it_gives_the_same_bits(shape: tuple[int, ...], threshold: str, dynamic: bool) -> None:
    """Backend aot_eager: it traces, fakes and functionalises as inductor does, and needs no compiler."""
    limit: Any = 0.8 if threshold == "number" else torch.full((shape[1],), 0.8)

    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, lse = va.vec_attention(query * 2, key, value, threshold=limit, return_lse=True)
        selection = va.select(query, key, threshold=limit, causal=False)
        return out + 1, lse, va.attend(query, key, value, selection), selection.density()

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    query, key, value = sample(*shape)
    assert all(map(torch.equal, compiled(query, key, value), model(query, key, value)))


@each_shape
def test_fake_tensors_get_the_real_shapes_dtypes_and_strides(shape: tuple[int, ...]) -> None:
    real = sample(*shape, dtype=torch.float16)
    real_selection = va.select(*real[:2], q_pooling_size=16, q_block_size=48)
    real_out = va.vec_attention(*real, return_lse=True)
    with FakeTensorMode() as mode:
        query, key, value = (mode.from_tensor(x) for x in real)
        selection = va.select(query, key, q_pooling_size=16, q_block_size=48)
        out = va.vec_attention(query, key, value, return_lse=True)
    for fake, wanted in zip((selection.words, *out), (real_selection.words, *real_out), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def test_strided_inputs_give_contiguous_outputs_also_when_faked() -> None:
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in sample(heads=4))
    assert va.vec_attention(query, key, value).is_contiguous()
    torch.library.opcheck(
        OPS.vec_attention.default,
        (query, key, value, torch.tensor(0.9), "threshold", *RULE, 0, False, "cpu"),
    )


def test_explain_answers_on_the_meta_device() -> None:
    query = torch.empty(1, 28, 32768, 128, device="meta", dtype=torch.bfloat16)
    key = torch.empty(1, 4, 32768, 128, device="meta", dtype=torch.bfloat16)
    plan = va.explain(query, key, key, threshold=0.8)
    assert plan.reasons["cpu"] == ("it runs on CPU tensors, these are on meta",)
    assert plan.problem.q_len == 32768 and plan.problem.kv_heads == 4
    assert plan.chunk_size % 64 == 0 and plan.chunk_size >= 64 and 1 <= plan.chunk_heads <= 28
    assert plan.workspace == plan.chunk_size // 64 * plan.chunk_heads * 1024 * 4


def test_there_is_no_gradient_and_asking_for_one_says_so() -> None:
    query, key, value = sample()
    out = va.vec_attention(query.requires_grad_(), key, value)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        out.sum().backward()


def test_the_operators_are_named_after_the_verbs() -> None:
    assert {name for name in ("select", "attend", "vec_attention") if hasattr(OPS, name)} == {
        "select", "attend", "vec_attention",
    }  # fmt: skip
