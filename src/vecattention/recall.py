"""How much of dense attention a selection keeps: the softmax mass that lies on the selected keys."""

from __future__ import annotations

import torch
from torch import Tensor

from vecattention import bits, checks
from vecattention.spec import Selection

SCORES = 2**23  # scores held at once when the caller leaves it to the library: 32 MiB in float32


def recall(
    query: Tensor,
    key: Tensor,
    selection: Selection,
    *,
    scale: float | None = None,
    rows_per_step: int | None = None,
) -> Tensor:
    """Mean over query rows of the dense softmax mass on the selected keys; dense is over all keys a row may see.

    Args:
        query: [B, H, Sq, D].
        key: [B, Hkv, Sk, D].
        selection: the keys of these queries, causal or not.
        scale: factor of the dot products; None means D ** -0.5.
        rows_per_step: query rows handled at once; None bounds the scores held to 32 MiB. Does not change the result
            beyond rounding.

    Returns:
        float32 [B, H], in [0, 1].

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was wanted and what to do.

    Example:
        >>> import torch, vecattention
        >>> from vecattention.recall import recall
        >>> query, key = torch.randn(1, 2, 300, 16), torch.randn(1, 1, 300, 16)
        >>> recall(query, key, vecattention.select(query, key, threshold=1e-9)).round(decimals=4)
        tensor([[1., 1.]])
    """
    checks.tensors(False, query=query, key=key)
    checks.selection(selection, query, key)
    factor = checks.scale_of(scale, query.shape[3])
    batch, heads, rows, _ = query.shape
    step = max(1, SCORES // (batch * heads * key.shape[2])) if rows_per_step is None else rows_per_step
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(f"rows_per_step is {rows_per_step!r}, wanted an integer of at least 1; pass None to leave it")
    query = selection.arrange(query)
    keys = key.float()[:, :, None].transpose(-1, -2)
    total = torch.zeros(batch, heads, dtype=torch.float64, device=query.device)
    for first in range(0, rows, step):
        index = torch.arange(first, min(first + step, rows), device=query.device)
        part = torch.unflatten(query[:, :, first : first + step].float(), 1, (key.shape[1], -1))
        total += _mass((part @ keys).flatten(1, 2) * factor, selection, index)
    return (total / rows).float()


def _mass(scores: Tensor, selection: Selection, index: Tensor) -> Tensor:
    """float64 [B, H]: the selected mass of the given rows, summed; scores [B, H, rows, Sk] are overwritten."""
    if selection.causal:
        position = index + (selection.k_len - selection.q_len)
        future = torch.arange(selection.k_len, device=index.device) > position[:, None]
        scores.masked_fill_(future, -torch.inf)
    probability = torch.softmax(scores, -1)
    kept = bits.unpack(selection.words[:, :, index // selection.block], selection.k_len)
    return probability.mul_(kept).sum((-1, -2), dtype=torch.float64)
