"""Every sentence that a bad argument of the operation can produce: name, wanted, got, remedy."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies import sample

import vecattention as va
from vecattention import checks, dispatch
from vecattention.spec import Problem, Rule

QUERY, KEY, VALUE = sample(2, 4, 2, 100, 150, 32)

BAD_TENSORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("not a tensor", {"key": [[1.0]]}, TypeError,
     "key is a list, wanted a torch.Tensor [B, H, S, D]; wrap it in torch.as_tensor"),
    ("dimensions", {"query": QUERY[0]}, ValueError,
     "query has shape (4, 100, 32), wanted 4 dimensions [batch, heads, length, head_dim]; "
     "add the missing ones with x[None], or transpose(1, 2) from [B, S, H, D]"),
    ("integers", {"query": QUERY.int()}, TypeError,
     "query has dtype torch.int32, wanted float16, bfloat16 or float32; convert it with .to(dtype)"),
    ("eight bits", {"value": VALUE.to(torch.float8_e4m3fn)}, TypeError,
     "value has dtype torch.float8_e4m3fn, wanted float16, bfloat16 or float32; convert it with .to(dtype)"),
    ("complex", {"key": KEY.to(torch.complex64)}, TypeError,
     "key has dtype torch.complex64, wanted float16, bfloat16 or float32; convert it with .to(dtype)"),
    ("empty batch", {"query": QUERY[:0], "key": KEY[:0], "value": VALUE[:0]}, ValueError,
     "query has shape (0, 4, 100, 32), wanted at least 1 in batch; skip the call for empty input"),
    ("no heads", {"key": KEY[:, :0], "value": VALUE[:, :0]}, ValueError,
     "key has shape (2, 0, 150, 32), wanted at least 1 in heads; skip the call for empty input"),
    ("no queries", {"query": QUERY[:, :, :0]}, ValueError,
     "query has shape (2, 4, 0, 32), wanted at least 1 in length; skip the call for empty input"),
    ("no keys", {"key": KEY[:, :, :0], "value": VALUE[:, :, :0]}, ValueError,
     "key has shape (2, 2, 0, 32), wanted at least 1 in length; skip the call for empty input"),
    ("no dimensions", {"query": QUERY[..., :0]}, ValueError,
     "query has shape (2, 4, 100, 0), wanted at least 1 in head_dim; skip the call for empty input"),
    ("head_dim", {"query": QUERY[..., :24], "key": KEY[..., :24], "value": VALUE[..., :24]}, ValueError,
     "query has head_dim 24, wanted one of (16, 32, 64, 80, 96, 128, 256); pad the head with zeros and pass scale"),
    ("dtypes differ", {"value": VALUE.half()}, ValueError,
     "value has dtype torch.float16, wanted torch.float32 like query; convert one of them"),
    ("devices differ", {"key": KEY.to("meta")}, ValueError, "key is on meta, wanted cpu like query; move one of them"),
    ("batches differ", {"key": KEY[:1], "value": VALUE[:1]}, ValueError,
     "key has batch 1, wanted 2 like query; expand or slice it"),
    ("head dims differ", {"key": KEY[..., :16]}, ValueError,
     "key has head_dim 16, wanted 32 like query; project them alike"),
    ("value is not like key", {"value": VALUE[:, :, :149]}, ValueError,
     "value has shape (2, 2, 149, 32), wanted (2, 2, 150, 32) like key; "
     "keys and values come in pairs of the same head size"),
    ("heads", {"query": QUERY[:, :3]}, ValueError,
     "query has 3 heads, wanted a multiple of key's 2; query head h reads key head h // (H // Hkv)"),
    ("more queries than keys", {"key": KEY[:, :, :99], "value": VALUE[:, :, :99]}, ValueError,
     "query has Sq=100 rows, wanted at most Sk=99 with causal=True; "
     "pass all keys up to the last query, or causal=False"),
]  # fmt: skip

PROBABILITY = "wanted a number in (0, 1]: a key's probability relative to the largest; 0.9 is sparse, 0.001 dense"
SHAPES = ("wanted () or (4,) or (2, 4) = (batch, heads); "
          "pass threshold[:, None] for one value per batch element, table[layer] for one layer of a table")  # fmt: skip
POOLS = "wanted one of (16, 32, 64, 128); the published values are P=64 and B=16"

BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"threshold": 0}, ValueError, f"threshold is 0.0, {PROBABILITY}"),
    ({"threshold": -0.1}, ValueError, f"threshold is -0.1, {PROBABILITY}"),
    ({"threshold": 2}, ValueError, f"threshold is 2.0, {PROBABILITY}"),
    ({"threshold": 1.0000001}, ValueError, f"threshold is 1.0000001, {PROBABILITY}"),
    ({"threshold": float("nan")}, ValueError, f"threshold is nan, {PROBABILITY}"),
    ({"threshold": float("inf")}, ValueError, f"threshold is inf, {PROBABILITY}"),
    ({"threshold": torch.tensor([0.5, 0.5, torch.nan, 0.5])}, ValueError, f"threshold is nan, {PROBABILITY}"),
    ({"threshold": torch.tensor([[0.5], [0.0]])}, ValueError, f"threshold is 0.0, {PROBABILITY}"),
    ({"threshold": torch.tensor(1.5)}, ValueError, f"threshold is 1.5, {PROBABILITY}"),
    ({"threshold": torch.ones(3)}, ValueError, f"threshold has shape (3,), {SHAPES}"),
    ({"threshold": torch.ones(2)}, ValueError, f"threshold has shape (2,), {SHAPES}"),
    ({"threshold": torch.ones(4, 2)}, ValueError, f"threshold has shape (4, 2), {SHAPES}"),
    ({"threshold": torch.ones(1, 2, 4)}, ValueError, f"threshold has shape (1, 2, 4), {SHAPES}"),
    ({"threshold": torch.ones(4, dtype=torch.bool)}, TypeError,
     "threshold has dtype torch.bool, wanted real numbers in (0, 1]; pass a float tensor"),
    ({"threshold": torch.ones(4, dtype=torch.complex64)}, TypeError,
     "threshold has dtype torch.complex64, wanted real numbers in (0, 1]; pass a float tensor"),
    ({"threshold": "0.9"}, TypeError,
     "threshold is '0.9' (str), wanted a number in (0, 1] or a tensor that broadcasts to (batch, heads); "
     "pass a float, or torch.tensor([...]) with one value per head"),
    ({"threshold": None}, TypeError,
     "threshold is None (NoneType), wanted a number in (0, 1] or a tensor that broadcasts to (batch, heads); "
     "pass a float, or torch.tensor([...]) with one value per head"),
    ({"threshold": True}, TypeError,
     "threshold is True (bool), wanted a number in (0, 1] or a tensor that broadcasts to (batch, heads); "
     "pass a float, or torch.tensor([...]) with one value per head"),
    ({"threshold": [0.9]}, TypeError,
     "threshold is [0.9] (list), wanted a number in (0, 1] or a tensor that broadcasts to (batch, heads); "
     "pass a float, or torch.tensor([...]) with one value per head"),
    ({"q_pooling_size": 48}, ValueError, f"q_pooling_size is 48, {POOLS}"),
    ({"q_pooling_size": 64.0}, TypeError, "q_pooling_size is 64.0 (float), wanted an integer; pass an int"),
    ({"k_local_size": 8}, ValueError, f"k_local_size is 8, {POOLS}"),
    ({"k_local_size": True}, TypeError, "k_local_size is True (bool), wanted an integer; pass an int"),
    ({"k_local_size": 128}, ValueError,
     "k_local_size is 128, wanted at most q_pooling_size=64; lower k_local_size or raise q_pooling_size"),
    ({"q_block_size": 96}, ValueError,
     "q_block_size is 96, wanted a multiple of q_pooling_size=64 up to 128; pass None for q_pooling_size itself"),
    ({"q_block_size": 256}, ValueError,
     "q_block_size is 256, wanted a multiple of q_pooling_size=64 up to 128; pass None for q_pooling_size itself"),
    ({"q_block_size": 0}, ValueError,
     "q_block_size is 0, wanted a multiple of q_pooling_size=64 up to 128; pass None for q_pooling_size itself"),
    ({"q_block_size": 32}, ValueError,
     "q_block_size is 32, wanted a multiple of q_pooling_size=64 up to 128; pass None for q_pooling_size itself"),
    ({"q_block_size": "64"}, TypeError, "q_block_size is '64' (str), wanted an integer; pass an int"),
    ({"group_k_block": 0}, ValueError,
     "group_k_block is 0, wanted at least 1 tile per window; the published value is 16"),
    ({"group_k_block": 1.5}, TypeError, "group_k_block is 1.5 (float), wanted an integer; pass an int"),
    ({"max_scope": "head"}, ValueError,
     "max_scope is 'head', wanted one of ('window', 'row'); 'window' is the published rule, 'row' the formula"),
    ({"causal": 1}, TypeError, "causal is 1 (int), wanted True or False; pass a bool"),
    ({"causal": None}, TypeError, "causal is None (NoneType), wanted True or False; pass a bool"),
    ({"scale": 0.0}, ValueError, "scale is 0.0, wanted a finite number over 0; pass None for D ** -0.5"),
    ({"scale": -1}, ValueError, "scale is -1, wanted a finite number over 0; pass None for D ** -0.5"),
    ({"scale": float("inf")}, ValueError, "scale is inf, wanted a finite number over 0; pass None for D ** -0.5"),
    ({"scale": float("nan")}, ValueError, "scale is nan, wanted a finite number over 0; pass None for D ** -0.5"),
    ({"scale": "auto"}, TypeError, "scale is 'auto' (str), wanted a number; pass None for D ** -0.5"),
    ({"scale": True}, TypeError, "scale is True (bool), wanted a number; pass None for D ** -0.5"),
    ({"backend": "cuda"}, ValueError,
     f"backend is 'cuda', wanted 'auto' or one of {dispatch.BACKENDS}; explain(query, key) lists them"),
    ({"backend": None}, ValueError,
     f"backend is None, wanted 'auto' or one of {dispatch.BACKENDS}; explain(query, key) lists them"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "kind", "message"), [row[1:] for row in BAD_TENSORS], ids=[r[0] for r in BAD_TENSORS]
)
def test_tensors(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    tensors = {"query": QUERY, "key": KEY, "value": VALUE} | given
    with raises(kind, message):
        va.vec_attention(**tensors)
    with raises(kind, message):
        va.explain(**tensors)
    if "value" not in given:
        with raises(kind, message):
            va.select(tensors["query"], tensors["key"])
    if "causal=True" not in message:
        with raises(kind, message):
            va.attend(**tensors, selection=va.select(QUERY, KEY))


@pytest.mark.parametrize(("given", "kind", "message"), BAD_ARGUMENTS, ids=[str(row[0]) for row in BAD_ARGUMENTS])
def test_arguments(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with raises(kind, message):
        va.select(QUERY, KEY, **given)
    with raises(kind, message):
        va.vec_attention(QUERY, KEY, VALUE, **given)
    if not isinstance(given.get("threshold"), torch.Tensor):  # the values of a tensor are read where it is used
        with raises(kind, message):
            va.explain(QUERY, KEY, **given)
    if set(given) <= {"scale", "backend"}:
        with raises(kind, message):
            va.attend(QUERY, KEY, VALUE, va.select(QUERY, KEY), **given)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (0, ValueError, "chunk_size is 0, wanted at least 1 query; pass None to let the library choose"),
        (-64, ValueError, "chunk_size is -64, wanted at least 1 query; pass None to let the library choose"),
        (64.0, TypeError, "chunk_size is 64.0 (float), wanted an integer; pass an int"),
        (True, TypeError, "chunk_size is True (bool), wanted an integer; pass an int"),
    ],
)
def test_chunk_size(given: Any, kind: type[Exception], message: str) -> None:
    with raises(kind, message):
        va.vec_attention(QUERY, KEY, VALUE, chunk_size=given)
    with raises(kind, message):
        va.explain(QUERY, KEY, chunk_size=given)


SELECTION = va.select(QUERY, KEY)
FREE = va.select(QUERY, KEY, causal=False)
ORDER = torch.arange(100).expand(2, 4, 100)
WORDS = "[B, H, ceil(Sq / block), ceil(Sk / 32)]; make a selection with select(query, key)"
BAD_SELECTIONS: list[tuple[Any, type[Exception], str]] = [
    (SELECTION.words, TypeError, "selection is a Tensor, wanted a Selection; make one with select(query, key)"),
    (va.select(QUERY[:, :, 1:], KEY), ValueError,
     "selection is for (B, H, Sq, Sk) = (2, 4, 99, 150), wanted (2, 4, 100, 150) of query and key; "
     "select again for these tensors"),
    (va.select(QUERY[:1, :2], KEY[:1, :, :149]), ValueError,
     "selection is for (B, H, Sq, Sk) = (1, 2, 100, 149), wanted (2, 4, 100, 150) of query and key; "
     "select again for these tensors"),
    (replace(SELECTION, words=SELECTION.words.to("meta")), ValueError,
     "selection is on meta, wanted cpu like query; select on the same device"),
    (replace(SELECTION, words=SELECTION.words[..., :4]), ValueError,
     f"selection.words is torch.int32 (2, 4, 2, 4), wanted torch.int32 (2, 4, 2, 5) = {WORDS}"),
    (replace(SELECTION, words=SELECTION.words.long()), ValueError,
     f"selection.words is torch.int64 (2, 4, 2, 5), wanted torch.int32 (2, 4, 2, 5) = {WORDS}"),
    (replace(SELECTION, block=32), ValueError,
     f"selection.words is torch.int32 (2, 4, 2, 5), wanted torch.int32 (2, 4, 4, 5) = {WORDS}"),
    (replace(SELECTION, block=0), ValueError,
     "selection.block is 0, wanted at least 1 row; make a selection with select(query, key)"),
    (replace(SELECTION, block=64.0), TypeError, "selection.block is 64.0 (float), wanted an integer; pass an int"),
    (replace(FREE, order=ORDER[:, :, :99]), ValueError,
     "selection.order is torch.int64 (2, 4, 99), wanted int64 (2, 4, 100) = [B, H, Sq]; pass order.expand(B, H, -1)"),
    (replace(FREE, order=ORDER.int()), ValueError,
     "selection.order is torch.int32 (2, 4, 100), wanted int64 (2, 4, 100) = [B, H, Sq]; pass order.expand(B, H, -1)"),
    (replace(FREE, order=[0, 1]), ValueError,
     "selection.order is list, wanted int64 (2, 4, 100) = [B, H, Sq]; pass order.expand(B, H, -1)"),
    (replace(FREE, order=ORDER.to("meta")), ValueError,
     "selection.order is on meta, wanted cpu like its words; move it"),
    (replace(SELECTION, order=ORDER), ValueError,
     "selection has an order and causal=True, wanted one of them; a causal block's rows are consecutive"),
]  # fmt: skip


@pytest.mark.parametrize(("selection", "kind", "message"), BAD_SELECTIONS, ids=[row[2][:60] for row in BAD_SELECTIONS])
def test_selections(selection: Any, kind: type[Exception], message: str) -> None:
    with raises(kind, message):
        va.attend(QUERY, KEY, VALUE, selection)


@pytest.mark.parametrize("verb", [va.select, va.vec_attention, va.explain])
def test_an_unknown_keyword_is_an_error(verb: Any) -> None:
    tensors = (QUERY, KEY) if verb is va.select else (QUERY, KEY, VALUE)
    with pytest.raises(TypeError, match="unexpected keyword argument 'treshold'"):
        verb(*tensors, treshold=0.5)


def test_a_named_backend_that_cannot_run_says_why_and_does_not_fall_back() -> None:
    half = Problem(1, 2, 2, 64, 64, 32, torch.int8, torch.device("meta"), Rule())
    with raises(ValueError, "backend is 'cpu', which cannot run this: it runs on CPU tensors, these are on meta; "
                            "it does not take torch.int8; pass backend='auto' or another one"):  # fmt: skip
        dispatch.choose("cpu", half)
    huge = replace(half, q_len=2**20, k_len=2**20, device=torch.device("cpu"), dtype=torch.float32)
    with raises(ValueError, f"backend is 'reference', which cannot run this: it would build {2**41} scores, more than "
                            f"{2**31}; pass backend='auto' or another one"):  # fmt: skip
        dispatch.choose("reference", huge)


def test_when_none_can_run_auto_gives_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda name, problem: (f"{name} is out", "of order"))
    listed = "; ".join(f"{name}: {name} is out, of order" for name in dispatch.BACKENDS)
    with raises(ValueError, f"backend is 'auto', but none can run this ({listed}); "
                            "move the tensors or change the shapes"):  # fmt: skip
        va.select(QUERY, KEY)


def test_nothing_is_written_into_the_inputs() -> None:
    before = [x.clone() for x in (QUERY, KEY, VALUE)]
    va.vec_attention(QUERY, KEY, VALUE)
    assert all(map(torch.equal, (QUERY, KEY, VALUE), before))


def test_the_sentences_of_a_tensor_threshold_are_those_of_a_number() -> None:
    for value in (0.0, 1.5, float("nan")):
        with raises(ValueError, f"threshold is {value}, {PROBABILITY}"):
            checks.alpha(torch.tensor(value, dtype=torch.float64), 2, 4, torch.device("cpu"))


class raises:  # noqa: N801 - it reads like pytest.raises
    """Exactly this type and exactly this sentence."""

    def __init__(self, kind: type[Exception], message: str) -> None:
        self._inner = pytest.raises(kind, match=f"^{re.escape(message)}$")

    def __enter__(self) -> None:
        self._inner.__enter__()

    def __exit__(self, *details: Any) -> bool:
        return bool(self._inner.__exit__(*details))
