r"""Attention in a ring: each rank keeps its queries, sees all keys to select, and meets the values rank by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vecattention import bits, ops
from vecattention.integrations import exchange, shares
from vecattention.integrations.exchange import Group
from vecattention.spec import Selection


def counted_ring(query: Tensor, key: Tensor, value: Tensor, group: Group, lengths: Sequence[int] | None,
                 arguments: dict[str, Any], heads: Group = None,
                 split_heads: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, kept pairs int64 [B, H] of all ranks, or [0, 0] without ``count``); see `ring_attention`.

    ``heads``: the group over which heads are split as well, where ``split_heads`` says so.
    """
    given = dict(arguments)
    if given.pop("causal", False):
        raise ValueError("causal is True, wanted False in a ring; use ulysses_attention, which does both")
    count, backend = given.pop("count", True), given.get("backend", "auto")
    sample = given.pop("sample", 0)
    given.pop("chunk_size", None)
    rows = exchange.lengths_of(query.shape[2], lengths, group)
    keys = exchange.key_lengths_of(key, rows, group)
    rule = shares.rule_of(query, {**given, "causal": False})
    block = rule.q_block_size
    whole, before = exchange.whole_blocks(query, rows, block, group)
    all_keys = exchange.gathered(key, keys, group)
    own = whole[:, :, block if before else 0 :]  # a block that begins on the rank before is counted there
    first = -(-sum(rows[: dist.get_rank(group)]) // block)
    found = shares.at_cut_off(
        own, all_keys, {**given, "causal": False}, q_len=sum(rows), sample=sample, first_block=first, heads=heads,
        rows=group, split_heads=split_heads, split_rows=True,
    )  # fmt: skip
    if "alpha" in found:
        words = ops.select_at(whole, all_keys, found["alpha"], rule, backend).words
    else:
        words = ops.select(whole, all_keys, causal=False, **given).words
    mine = whole[:, :, : before + query.shape[2]]
    words = words[:, :, : -(-mine.shape[2] // block)]
    out: Tensor | None = None
    lse: Tensor | None = None
    for rank, values in exchange.around(value, keys, group):
        first = sum(keys[:rank])
        part = Selection(columns(words, first, first + keys[rank]), mine.shape[2], keys[rank], block, False)
        here = all_keys[:, :, first : first + keys[rank]]
        more = ops.attend(mine, here, values, part, scale=given.get("scale"), return_lse=True, backend=backend)
        out, lse = (more[0].float(), more[1]) if out is None or lse is None else merge(out, lse, more[0], more[1])
    kept = _own_pairs(words, mine.shape[2], before, block, group) if count else query.new_zeros(0, 0, dtype=torch.int64)
    if out is None or lse is None:
        raise ValueError("group has no ranks, wanted at least one; pass a group that this process belongs to")
    return out[:, :, before:].to(query.dtype), lse[:, :, before:], kept


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over two disjoint sets of keys, from (out [..., D], lse [...]) over each; float32.

    Example:
        >>> import torch
        >>> out, lse = merge(torch.zeros(1, 2), torch.zeros(1), torch.ones(1, 2), torch.zeros(1))
        >>> out.tolist(), round(float(lse), 4)
        ([[0.5, 0.5]], 0.6931)
    """
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    share_a, share_b = ((part - finite).exp()[..., None] for part in (lse_a, lse_b))
    return out_a.float() * share_a + out_b.float() * share_b, lse


def columns(words: Tensor, start: int, stop: int) -> Tensor:
    """The bits of the keys start..stop-1, from bit 0 on: int32 [..., W] -> int32 [..., ceil((stop - start) / 32)].

    Example:
        >>> import torch
        >>> columns(torch.tensor([6, 1], dtype=torch.int32), 1, 34).tolist()
        [-2147483645, 0]
    """
    first, shift, width = start // bits.WORD, start % bits.WORD, -(-(stop - start) // bits.WORD)
    out = words[..., first : first + width]
    if shift:
        tail = torch.nn.functional.pad(words, (0, 1))[..., first + 1 : first + 1 + width]
        low = (out >> shift) & ((1 << (bits.WORD - shift)) - 1)
        out = low | (tail << (bits.WORD - shift))
    return out & bits.below(torch.tensor([stop - start], device=words.device), stop - start)[0]


def _own_pairs(words: Tensor, rows: int, before: int, block: int, group: Group) -> Tensor:
    """int64 [B, H]: pairs of the rows before..rows-1, summed over the ranks."""
    start = torch.arange(words.shape[2], device=words.device) * block
    own = (start + block).clamp(max=rows) - start.clamp(min=before)
    pairs = (bits.popcount(words).sum(-1) * own.clamp(min=0)).sum(-1)
    dist.all_reduce(pairs, group=group)
    return pairs
