r"""Sparse attention of one sequence over many GPUs, with the keys that one process would choose.

Ulysses: each rank trades its part of the sequence for the whole sequence of some heads, so that the selection is that
of one process, bit for bit; thresholds, counts and the load follow the heads. Ring: each rank keeps its queries, sees
all keys for the selection, and meets the values rank by rank; the partial results merge exactly by their log-sum-exp,

    out = e^{lse_a - lse} out_a + e^{lse_b - lse} out_b,    lse = ln(e^{lse_a} + e^{lse_b}).

Sources: DeepSpeed-Ulysses (arXiv 2309.14509), Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vecattention import ops
from vecattention.integrations import exchange, shares
from vecattention.integrations.balance import divides, head_order, imbalance
from vecattention.integrations.exchange import Group
from vecattention.integrations.ring import counted_ring

__all__ = ["Groups", "head_order", "imbalance", "parallel_attention", "ring_attention", "ulysses_attention"]

TARGETS = ("threshold", "coverage", "density")


@dataclass(frozen=True)
class Groups:
    """The process groups that a sequence is split over: ring-major, as in diffusers' mesh ("ring", "ulysses").

    Attributes:
        ulysses: ranks that trade sequence for heads, or None.
        ring: ranks that pass values around, or None.
    """

    ulysses: Group = None
    ring: Group = None

    @property
    def shards(self) -> int:
        """Parts that the sequence is split into."""
        sizes = [exchange.size_of(group) for group in (self.ulysses, self.ring) if group is not None]
        return sizes[0] * sizes[1] if len(sizes) == 2 else sizes[0] if sizes else 1


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group = None,
    lengths: Sequence[int] | None = None,
    order: Tensor | None = None,
    return_lse: bool = False,
    **arguments: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vecattention.vec_attention` of a sequence that is split over ranks; every rank calls it.

    Args:
        query: [B, H, own S, D], this rank's part of the sequence, in rank order; H a multiple of the ranks.
        key, value: [B, Hkv, own S, D]; Hkv a multiple of the ranks.
        group: the process group; None means all ranks.
        lengths: tokens of each rank; None means that all hold as many.
        order: int64 [Hkv] from `head_order`, the same on every rank: how the key heads, with their query heads, are
            dealt out. None keeps their order.
        return_lse: also return the log-sum-exp, float32 [B, H, own S].
        arguments: those of `vecattention.vec_attention`; thresholds are given for all H heads.

    Returns:
        [B, H, own S, D], bitwise that part of what one process would return, where the backend treats heads alike.

    Raises:
        ValueError: ranks that do not divide the heads, or lengths that do not fit.
    """
    out, lse, _ = _ulysses(query, key, value, group, None, lengths, order, {**arguments, "count": False})
    return (out, lse) if return_lse else out


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group = None,
    lengths: Sequence[int] | None = None,
    return_lse: bool = False,
    causal: bool = False,
    **arguments: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vecattention.vec_attention`, non-causal, of a sequence that is split over ranks; every rank calls it.

    Any number of heads. The keys chosen are those of one process (by a coverage or a density up to rounding of the
    cut-off); each rank needs memory for all keys.

    Args:
        query, key, value: [B, H, own S, D] and [B, Hkv, own S, D], this rank's part of the sequence, in rank order.
        group, lengths, return_lse: as in `ulysses_attention`.
        causal: must be False; `ulysses_attention` does both.
        arguments: the others of `vecattention.vec_attention`.

    Returns:
        [B, H, own S, D], up to rounding that part of what one process would return.
    """
    out, lse, _ = counted_ring(query, key, value, group, lengths, {**arguments, "causal": causal, "count": False})
    return (out, lse) if return_lse else out


def parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, *, groups: Groups, order: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, kept pairs int64 [B, H] of the whole sequence) over no, one or both kinds of groups.

    All ranks hold as many tokens. Every rank gets the counts of all heads. ``sample`` among the arguments: about so
    many blocks of queries stand for all where a coverage or a density is looked for.
    """
    if groups.ulysses is not None:
        return _ulysses(query, key, value, groups.ulysses, groups.ring, None, order, arguments)
    if groups.ring is not None:
        return counted_ring(query, key, value, groups.ring, None, arguments)
    sample = arguments.pop("sample", 0)
    return ops.counted(
        query, key, value, **shares.at_cut_off(query, key, arguments, q_len=query.shape[2], sample=sample)
    )


def _ulysses(query: Tensor, key: Tensor, value: Tensor, group: Group, ring: Group, lengths: Sequence[int] | None,
             kv_order: Tensor | None, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ranks = exchange.size_of(group)
    heads, kv_heads = query.shape[1], key.shape[1]
    divides("query", heads, ranks)
    divides("key", kv_heads, ranks)
    rows = exchange.lengths_of(query.shape[2], lengths, group)
    keys = exchange.key_lengths_of(key, rows, group)
    if kv_order is not None and kv_order.shape != (kv_heads,):
        raise ValueError(
            f"order has shape {tuple(kv_order.shape)}, wanted ({kv_heads},), one entry for each key head; pass "
            "head_order(cost, ranks)"
        )
    order = None if kv_order is None else _query_heads(kv_order, heads // kv_heads)
    given: dict[str, Any] = {}
    given |= {name: _own_heads(x, heads, order, group) if name in TARGETS else x for name, x in arguments.items()}
    q = exchange.heads_apart(query, rows, order, group)
    k, v = (exchange.heads_apart(x, keys, kv_order, group) for x in (key, value))
    if ring is None:
        sample = given.pop("sample", 0)
        given = shares.at_cut_off(q, k, given, q_len=q.shape[2], sample=sample, heads=group, split_heads=True)
        out, lse, kept = ops.counted(q, k, v, **given)
    else:
        out, lse, kept = counted_ring(q, k, v, ring, None, given, group, split_heads=True)
    out = exchange.heads_together(out, rows, order, group)
    lse = exchange.heads_together(lse[..., None], rows, order, group).squeeze(-1)
    return out, lse, exchange.counts_together(kept, order, group) if kept.numel() else kept


def _query_heads(order: Tensor, share: int) -> Tensor:
    return (order[:, None] * share + torch.arange(share, device=order.device)).flatten()


def _own_heads(limit: float | Tensor, heads: int, order: Tensor | None, group: Group) -> float | Tensor:
    """The thresholds, coverages or densities of the heads that this rank computes."""
    if not isinstance(limit, Tensor) or limit.ndim == 0 or limit.shape[-1] != heads or heads == 1:
        return limit
    dealt = limit if order is None else limit.to(order.device).index_select(-1, order)
    return dealt.tensor_split(exchange.size_of(group), -1)[dist.get_rank(group)]
