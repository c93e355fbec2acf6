"""Every sentence that a bad argument can produce: the name, what was wanted, what came, what to do."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from vecattention import bits, spec

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POOLING_SIZES = (16, 32, 64, 128)
SCOPES = ("window", "row")
THRESHOLD = 0.9
MEANINGS = {
    "threshold": "a key's probability relative to the largest; 0.9 is sparse, 0.001 dense",
    "coverage": "the share of the pooled softmax that the kept keys hold; pass 0.9 to keep most of it",
    "density": "the share of all allowed pairs that are kept; pass 0.1 to keep a tenth",
}


def tensors(causal: bool, **named: Tensor) -> None:
    """Check query [B, H, Sq, D] and key (and value) [B, Hkv, Sk, D] against each other.

    Raises:
        TypeError: not a tensor, or a dtype that is not served.
        ValueError: shapes, devices, dtypes or head counts that do not fit.
    """
    for name, x in named.items():
        _tensor(name, x)
    query, key = named["query"], named["key"]
    for name, x in named.items():
        _alike(name, x, query)
    if "value" in named and named["value"].shape != key.shape:
        raise ValueError(
            f"value has shape {_shape(named['value'])}, wanted {_shape(key)} like key; "
            "keys and values come in pairs of the same head size"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads, wanted a multiple of key's {key.shape[1]}; "
            "query head h reads key head h // (H // Hkv)"
        )
    if causal and query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query has Sq={query.shape[2]} rows, wanted at most Sk={key.shape[2]} with causal=True; "
            "pass all keys up to the last query, or causal=False"
        )


def rule(*, head_dim: int, q_pooling_size: int, q_block_size: int | None, k_local_size: int, group_k_block: int,
         max_scope: str, causal: bool, scale: float | None) -> spec.Rule:  # fmt: skip
    """The checked `Rule` of these arguments, q_block_size and scale filled in.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument outside its values.
    """
    pool = _one_of("q_pooling_size", q_pooling_size, POOLING_SIZES)
    tile = _one_of("k_local_size", k_local_size, POOLING_SIZES)
    if tile > pool:
        raise ValueError(
            f"k_local_size is {tile}, wanted at most q_pooling_size={pool}; lower k_local_size or raise q_pooling_size"
        )
    block = pool if q_block_size is None else _integer("q_block_size", q_block_size)
    if block % pool or not pool <= block <= 128:
        raise ValueError(
            f"q_block_size is {block}, wanted a multiple of q_pooling_size={pool} up to 128; "
            "pass None for q_pooling_size itself"
        )
    group = _integer("group_k_block", group_k_block)
    if group < 1:
        raise ValueError(f"group_k_block is {group}, wanted at least 1 tile per window; the published value is 16")
    if max_scope not in SCOPES:
        raise ValueError(
            f"max_scope is {max_scope!r}, wanted one of {SCOPES}; 'window' is the published rule, 'row' the formula"
        )
    if not isinstance(causal, bool):
        raise TypeError(f"causal is {causal!r} ({type(causal).__name__}), wanted True or False; pass a bool")
    return spec.Rule(pool, block, tile, group, max_scope, causal, scale_of(scale, head_dim))


def scale_of(scale: float | None, head_dim: int) -> float:
    """The softmax scale as a float, D ** -0.5 for None."""
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale is {scale!r} ({type(scale).__name__}), wanted a number; pass None for D ** -0.5")
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"scale is {scale}, wanted a finite number over 0; pass None for D ** -0.5")
    return float(scale)


def threshold(value: float | Tensor, batch: int, heads: int, name: str = "threshold") -> Tensor:
    """The threshold as a tensor of shape [], [H] or [B, H] on its own device; its values are checked in `values`.

    Raises:
        TypeError: neither a real number nor a tensor of numbers.
        ValueError: a number outside (0, 1], or a shape that does not broadcast to (batch, heads).
    """
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} has dtype {value.dtype}, wanted real numbers in (0, 1]; pass a float tensor")
        if value.ndim > 2 or any(
            n not in (1, full) for n, full in zip(value.shape[::-1], (heads, batch), strict=False)
        ):
            raise ValueError(
                f"{name} has shape {_shape(value)}, wanted () or ({heads},) or ({batch}, {heads}) = (batch, heads); "
                f"pass {name}[:, None] for one value per batch element, table[layer] for one layer of a table"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} is {value!r} ({type(value).__name__}), wanted a number in (0, 1] or a tensor that broadcasts "
            "to (batch, heads); pass a float, or torch.tensor([...]) with one value per head"
        )
    _probability(float(value), name)
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def target(limit: float | Tensor, coverage: float | Tensor | None, density: float | Tensor | None, batch: int,
           heads: int) -> tuple[str, Tensor]:  # fmt: skip
    """What decides how many keys are kept: "threshold" (``limit``), "coverage" or "density", and its checked value.

    Raises:
        TypeError, ValueError: as `threshold`, or more than one of them is given.
    """
    given = {name: x for name, x in (("coverage", coverage), ("density", density)) if x is not None}
    if given and not (isinstance(limit, Real) and limit == THRESHOLD):
        given = {"threshold": limit} | given
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are both given, wanted one of them, as each decides how many keys are kept; "
            "leave one out"
        )
    kind, value = next(iter(given.items()), ("threshold", limit))
    return kind, threshold(value, batch, heads, kind)


def alpha(value: Tensor, batch: int, heads: int, device: torch.device) -> Tensor:
    """-ln(threshold) as float32 [B, H] on ``device``. Values on the CPU are checked here; values on another device by
    an assertion on that device, so that nothing waits for it.

    Raises:
        ValueError: a value on the CPU that is NaN or outside (0, 1].
    """
    if value.device.type == "cpu" and value.ndim == 0:
        number = float(value)
        _probability(number, "threshold")
        return torch.full((batch, heads), -math.log(number), dtype=torch.float32, device=device)
    return (-values(value).log()).float().to(device, non_blocking=True).expand(batch, heads)


def values(value: Tensor, name: str = "threshold") -> Tensor:
    """The checked values as float64, on their own device; see `alpha` for where they are checked.

    Raises:
        ValueError: a value on the CPU that is NaN or outside (0, 1].
    """
    wide = value.double()
    if value.device.type == "cpu":
        for entry in wide.flatten().tolist():
            _probability(entry, name)
    else:
        torch._assert_async(((wide > 0) & (wide <= 1)).all(), f"{name} holds NaN or a value outside (0, 1]")
    return wide


def chunk_size(value: int | None) -> int:
    """chunk_size as an int, 0 for None."""
    if value is None:
        return 0
    size = _integer("chunk_size", value)
    if size < 1:
        raise ValueError(f"chunk_size is {size}, wanted at least 1 query; pass None to let the library choose")
    return size


def selection(value: spec.Selection, query: Tensor, key: Tensor) -> None:
    """Check that a selection was made for these tensors.

    Raises:
        TypeError: not a Selection.
        ValueError: made for other lengths, heads, batch or another device.
    """
    if not isinstance(value, spec.Selection):
        raise TypeError(f"selection is a {type(value).__name__}, wanted a Selection; make one with select(query, key)")
    wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    got = (*value.words.shape[:2], value.q_len, value.k_len)
    if wanted != got:
        raise ValueError(
            f"selection is for (B, H, Sq, Sk) = {got}, wanted {wanted} of query and key; select again for these tensors"
        )
    _words(value)
    if value.words.device != query.device:
        raise ValueError(
            f"selection is on {value.words.device}, wanted {query.device} like query; select on the same device"
        )
    if value.order is not None:
        _order(value.order, value)


def _words(selection: spec.Selection) -> None:
    block = _integer("selection.block", selection.block)
    if block < 1:
        raise ValueError(f"selection.block is {block}, wanted at least 1 row; make a selection with select(query, key)")
    words = selection.words
    wanted = (*words.shape[:2], selection.blocks, bits.words_for(selection.k_len))
    if words.dtype != torch.int32 or tuple(words.shape) != wanted:
        raise ValueError(
            f"selection.words is {words.dtype} {_shape(words)}, wanted torch.int32 {wanted} = [B, H, ceil(Sq / block), "
            "ceil(Sk / 32)]; make a selection with select(query, key)"
        )


def _order(order: Tensor, selection: spec.Selection) -> None:
    wanted = (*selection.words.shape[:2], selection.q_len)
    if not isinstance(order, Tensor) or tuple(order.shape) != wanted or order.dtype != torch.int64:
        got = f"{order.dtype} {_shape(order)}" if isinstance(order, Tensor) else type(order).__name__
        raise ValueError(f"selection.order is {got}, wanted int64 {wanted} = [B, H, Sq]; pass order.expand(B, H, -1)")
    if order.device != selection.words.device:
        raise ValueError(
            f"selection.order is on {order.device}, wanted {selection.words.device} like its words; move it"
        )
    if selection.causal:
        raise ValueError(
            "selection has an order and causal=True, wanted one of them; a causal block's rows are consecutive"
        )


def _tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} is a {type(x).__name__}, wanted a torch.Tensor [B, H, S, D]; wrap it in torch.as_tensor"
        )
    if x.ndim != 4:
        raise ValueError(
            f"{name} has shape {_shape(x)}, wanted 4 dimensions [batch, heads, length, head_dim]; "
            "add the missing ones with x[None], or transpose(1, 2) from [B, S, H, D]"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}, wanted float16, bfloat16 or float32; convert it with .to(dtype)")
    for size, what in zip(x.shape, ("batch", "heads", "length", "head_dim"), strict=True):
        if size < 1:
            raise ValueError(
                f"{name} has shape {_shape(x)}, wanted at least 1 in {what}; skip the call for empty input"
            )
    if x.shape[3] not in spec.HEAD_DIMS:
        raise ValueError(
            f"{name} has head_dim {x.shape[3]}, wanted one of {spec.HEAD_DIMS}; pad the head with zeros and pass scale"
        )


def _alike(name: str, x: Tensor, query: Tensor) -> None:
    if x.dtype != query.dtype:
        raise ValueError(f"{name} has dtype {x.dtype}, wanted {query.dtype} like query; convert one of them")
    if x.device != query.device:
        raise ValueError(f"{name} is on {x.device}, wanted {query.device} like query; move one of them")
    if x.shape[0] != query.shape[0]:
        raise ValueError(f"{name} has batch {x.shape[0]}, wanted {query.shape[0]} like query; expand or slice it")
    if x.shape[3] != query.shape[3]:
        raise ValueError(f"{name} has head_dim {x.shape[3]}, wanted {query.shape[3]} like query; project them alike")


def _one_of(name: str, value: int, values: tuple[int, ...]) -> int:
    number = _integer(name, value)
    if number not in values:
        raise ValueError(f"{name} is {number}, wanted one of {values}; the published values are P=64 and B=16")
    return number


def _integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}), wanted an integer; pass an int")
    return int(value)


def _probability(value: float, name: str) -> None:
    if not 0.0 < value <= 1.0:  # false for NaN too
        raise ValueError(f"{name} is {value}, wanted a number in (0, 1]: {MEANINGS[name]}")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
