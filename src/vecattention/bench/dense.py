"""The dense kernels that a sparse call must beat: those of torch, and FlashAttention-4's where it is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def calls(
    query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """A call for each dense kernel that takes these tensors, by name; and why the others do not, by name."""
    found: dict[str, Callable[[], Tensor]] = {}
    missing: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        try:
            _dense(query, key, value, causal, kernel)
        except RuntimeError as error:
            missing[name] = _first_line(error)
            continue

        found[name] = functools.partial(_dense, query, key, value, causal, kernel)
    try:
        call = _flash_attention_4(query, key, value, causal)
        call()
    except Exception as error:  # its compiler raises what it likes; the others are measured all the same
        return found, missing | {"flash-attn-4": _first_line(error)}
    return found | {"flash-attn-4": call}, missing


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _flash_attention_4(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Callable[[], Tensor]:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    turned = [x.transpose(1, 2).contiguous() for x in (query, key, value)]

    def call() -> Tensor:
        given = flash_attn_func(*turned, causal=causal)
        out: Tensor = given[0] if isinstance(given, tuple) else given
        return out.transpose(1, 2)

    return call


def _dense(query: Tensor, key: Tensor, value: Tensor, causal: bool, kernel: SDPBackend) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
