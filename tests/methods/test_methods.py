"""What all methods share: names, one attention, modes, lengths, errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import vecattention
from vecattention import methods

NAMES = ("full", "vecattention", "flexprefill", "xattention", "anchorattention", "svg")
MODES = [(name, causal) for name in NAMES for causal in methods.get(name).modes]
SPARSE = {"vecattention": {"threshold": 0.6}, "flexprefill": {"gamma": 0.5}, "xattention": {"threshold": 0.5},
          "anchorattention": {"theta": 6.0, "step": 1}, "svg": {"density": 0.1, "frames": 7}}  # fmt: skip


def test_names_and_modes() -> None:
    assert methods.names() == NAMES
    assert {name: methods.get(name).modes for name in NAMES} == {
        "full": (True, False), "vecattention": (True, False), "flexprefill": (True,), "xattention": (True, False),
        "anchorattention": (True,), "svg": (False,),
    }  # fmt: skip


def test_published_defaults() -> None:
    chosen = {name: dict(methods.get(name).parameters) for name in NAMES}
    assert chosen["vecattention"]["threshold"] == 0.9 and chosen["vecattention"]["q_pooling_size"] == 64
    assert chosen["flexprefill"] == {"gamma": 0.9, "tau": 0.1, "min_budget": None, "max_budget": None}
    assert chosen["xattention"] == {"threshold": 0.9, "stride": 16, "norm": 1.0}
    assert chosen["anchorattention"] == {"theta": 12.0, "step": 16}
    assert chosen["svg"]["density"] == 0.25 and chosen["svg"]["num_sampled_rows"] == 64


@pytest.mark.parametrize("name, causal", MODES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_method_runs_on_the_same_attend(case: Any, name: str, causal: bool, backend: str) -> None:
    query, key, value = (x.float() for x in case(2, 4, 2, 469, 469).tensors(seed=1))
    arguments = SPARSE.get(name, {})
    extra = {"value": value} if methods.get(name).takes_value else {}
    selection = methods.get(name).select(query, key, causal=causal, **arguments, **extra)
    density = selection.density()
    assert density.shape == (2, 4) and density.dtype == torch.float32
    assert (density == 1).all() if name == "full" else ((density > 0) & (density < 1)).all()
    mask = selection.mask()
    allowed = 469 * 470 // 2 if causal else 469**2
    torch.testing.assert_close(density, mask.sum((-1, -2)) / allowed)
    wide_k, wide_v = (x.repeat_interleave(2, dim=1) for x in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, wide_k, wide_v, attn_mask=mask)
    got = methods.attention(name, query, key, value, causal=causal, backend=backend, **arguments)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, causal", MODES)
def test_batch_and_heads_are_independent(case: Any, name: str, causal: bool) -> None:
    query, key, value = case(2, 4, 2, 350, 350).tensors(seed=2)
    arguments = SPARSE.get(name, {})
    method = methods.get(name)

    def select(b: int, heads: slice, kv: slice) -> torch.Tensor:
        extra = {"value": value[b : b + 1, kv]} if method.takes_value else {}
        one = method.select(query[b : b + 1, heads], key[b : b + 1, kv], causal=causal, **arguments, **extra)
        return one.mask()[0]

    extra = {"value": value} if method.takes_value else {}
    whole = method.select(query, key, causal=causal, **arguments, **extra).mask()
    for b in range(2):
        for h in range(4):
            assert torch.equal(whole[b, h], select(b, slice(h, h + 1), slice(h // 2, h // 2 + 1))[0])


@pytest.mark.parametrize("name, causal", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(case: Any, name: str, causal: bool, dtype: torch.dtype) -> None:
    tensors = [x.to(dtype) for x in case(1, 2, 1, 301, 301).tensors(seed=3)]
    out = methods.attention(name, *tensors, causal=causal, **({"frames": 7} if name == "svg" else {}))
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("name, causal", MODES)
@pytest.mark.parametrize("q_len, k_len", [(1, 1), (1, 129), (128, 128), (129, 129)])
def test_odd_lengths(case: Any, name: str, causal: bool, q_len: int, k_len: int) -> None:
    query, key, value = case(1, 2, 1, q_len, k_len).tensors(seed=4)
    if name == "svg" and q_len != k_len:
        with pytest.raises(ValueError, match=r"query has Sq=1 rows, wanted 129"):
            methods.attention(name, query, key, value, causal=causal)
        return
    out, lse = methods.attention(name, query, key, value, causal=causal, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("name", ["flexprefill", "xattention", "anchorattention"])
def test_a_prefix_of_whole_blocks_changes_nothing(case: Any, name: str) -> None:
    """The queries after a prefix select what they select in the whole, where the method is local in them."""
    query, key, _ = case(1, 2, 1, 768, 768).tensors(seed=6)
    arguments = SPARSE[name] | ({"tau": 0.0} if name == "flexprefill" else {})
    whole = methods.get(name).select(query, key, causal=True, **arguments).mask()
    part = methods.get(name).select(query[:, :, 256:], key, causal=True, **arguments).mask()
    assert torch.equal(part, whole[:, :, 256:])


def test_vecattention_is_select(case: Any) -> None:
    query, key, _ = case(1, 2, 1, 400, 400).tensors()
    got = methods.get("vecattention").select(query, key, causal=True, threshold=0.5, max_scope="row")
    assert torch.equal(got.words, vecattention.select(query, key, threshold=0.5, max_scope="row").words)


@pytest.mark.parametrize("name, causal", [(n, c) for n in NAMES for c in (True, False) if (n, c) not in MODES])
def test_a_mode_without_meaning_is_refused(case: Any, name: str, causal: bool) -> None:
    query, key, value = case(1, 2, 1, 300, 300).tensors()
    with pytest.raises(ValueError, match=f"causal is {causal}, wanted {not causal}: {name} is not defined otherwise"):
        methods.attention(name, query, key, value, causal=causal)


def test_bad_arguments_say_what_was_wanted(case: Any) -> None:
    query, key, value = case(1, 2, 1, 300, 300).tensors()
    with pytest.raises(ValueError, match=r"name is 'flash', wanted one of \('full', "):
        methods.get("flash")
    with pytest.raises(TypeError, match=r"'gama' is no parameter of flexprefill, wanted one of \('gamma', 'tau'"):
        methods.get("flexprefill").select(query, key, causal=True, gama=0.5)
    with pytest.raises(TypeError, match="'value' is no parameter of full"):
        methods.get("full").select(query, key, causal=True, value=value)
    with pytest.raises(TypeError, match="causal is 1 "):
        methods.get("full").select(query, key, causal=1)  # type: ignore[arg-type]
    for name, arguments, message in [
        ("flexprefill", {"gamma": 1.5}, r"gamma is 1.5, wanted a share of the attention in \[0, 1\]"),
        ("flexprefill", {"min_budget": 0}, "min_budget is 0, wanted keys, at least 1, or None"),
        ("xattention", {"threshold": 0.0}, r"threshold is 0.0, wanted a number in \(0, 1\]"),
        ("anchorattention", {"step": 0}, "step is 0, wanted blocks of 128 rows, at least 1"),
        ("anchorattention", {"theta": float("nan")}, "theta is nan, wanted a number of nats"),
    ]:
        with pytest.raises(ValueError, match=message):
            methods.get(name).select(query, key, causal=True, **arguments)
    for arguments, message in [
        ({"frames": 7}, "frames is 7, wanted a divisor of the 300 video keys"),
        ({"context": 10}, "context is 10, wanted 0 with variant='wan'"),
        ({"variant": "cog"}, "variant is 'cog', wanted one of"),
        (
            {"density": 0.05, "context": 20, "variant": "hunyuan"},
            "density is 0.05, wanted more than 2 context / Sk = 0.13",
        ),
        ({"temporal": torch.ones(3, dtype=torch.bool)}, r"temporal has shape \(3,\), wanted one that broadcasts"),
    ]:
        with pytest.raises(ValueError, match=message):
            methods.get("svg").select(query, key, causal=False, **arguments)


def test_importing_needs_only_torch() -> None:
    code = """
import sys
for name in ("triton", "transformers", "diffusers", "rich", "matplotlib", "safetensors"):
    sys.modules[name] = None
import vecattention
assert "vecattention.methods" not in sys.modules
print(vecattention.methods.names()[1])
try:
    vecattention.nothing
except AttributeError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["vecattention", "module 'vecattention' has no attribute 'nothing'"]
