"""The dense kernels of torch that a sparse call must beat."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def calls(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> dict[str, Callable[[], Tensor]]:
    """A call for each dense kernel that takes these tensors, by name."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, kernel in KERNELS.items():
        try:
            _dense(query, key, value, causal, kernel)
        except RuntimeError:
            continue

        def call(kernel: SDPBackend = kernel) -> Tensor:
            return _dense(query, key, value, causal, kernel)

        found[name] = call
    return found


def _dense(query: Tensor, key: Tensor, value: Tensor, causal: bool, kernel: SDPBackend) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
