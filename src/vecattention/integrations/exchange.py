"""What ranks of a group tell each other: heads for sequence (Ulysses), keys, values and edges (ring), counts.

All tensors are [B, H, S, D], the sequence split over the ranks in rank order. ``lengths`` are the tokens of each rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup; None is the group of all ranks


def size_of(group: Group) -> int:
    """Number of ranks.

    Raises:
        ValueError: torch.distributed is not initialized.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"group is {group!r}, wanted an initialized torch.distributed, got none; start with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    return int(dist.get_world_size(group))


def lengths_of(rows: int, lengths: Sequence[int] | None, group: Group) -> tuple[int, ...]:
    """Tokens of each rank, checked against the ``rows`` of this one; None means that all ranks hold as many.

    Raises:
        ValueError: another number of entries than ranks, or another length than this rank holds.
    """
    ranks = size_of(group)
    if lengths is None:
        return (rows,) * ranks
    if len(lengths) != ranks:
        raise ValueError(
            f"lengths has {len(lengths)} entries, wanted {ranks}, one for each rank of group; pass None where all "
            "ranks hold as many tokens"
        )
    rank = dist.get_rank(group)
    if lengths[rank] != rows:
        raise ValueError(
            f"lengths[{rank}] is {lengths[rank]}, wanted the {rows} tokens that this rank holds; pass the same lengths "
            "on every rank, in rank order"
        )
    return tuple(int(length) for length in lengths)


def key_lengths_of(key: Tensor, rows: Sequence[int], group: Group) -> tuple[int, ...]:
    """Keys [B, H, own S, D] of each rank, where the ranks hold so many ``rows``.

    Where all hold as many rows, all hold as many keys, too. Otherwise the ranks tell each other: a rank by itself
    cannot know whether its keys are split like its rows.
    """
    if len(set(rows)) == 1:
        return (key.shape[2],) * len(rows)
    own = torch.tensor([key.shape[2]], device=key.device)
    parts = [torch.empty_like(own) for _ in rows]
    dist.all_gather(parts, own, group=group)
    return tuple(int(part) for part in parts)


def heads_apart(x: Tensor, lengths: Sequence[int], order: Tensor | None, group: Group) -> Tensor:
    """[B, H, own S, D] -> [B, H / ranks, whole S, D]: each rank gets its share of the heads, in ``order`` [H]."""
    ranks, (batch, heads, rows, dim) = len(lengths), x.shape
    if order is not None:
        x = x.index_select(1, order)
    parts = x.unflatten(1, (ranks, heads // ranks)).permute(1, 3, 0, 2, 4).reshape(ranks * rows, -1)
    whole = parts.new_empty(sum(lengths), parts.shape[1])
    dist.all_to_all_single(whole, parts.contiguous(), list(lengths), [rows] * ranks, group=group)
    mine: Tensor = whole.view(-1, batch, heads // ranks, dim).permute(1, 2, 0, 3)
    return mine


def heads_together(x: Tensor, lengths: Sequence[int], order: Tensor | None, group: Group) -> Tensor:
    """[B, H / ranks, whole S, D] -> [B, H, own S, D]: the inverse of `heads_apart`."""
    ranks, (batch, heads, _, dim) = len(lengths), x.shape
    rows = lengths[dist.get_rank(group)]
    parts = x.permute(2, 0, 1, 3).reshape(x.shape[2], -1)
    own = parts.new_empty(ranks * rows, parts.shape[1])
    dist.all_to_all_single(own, parts.contiguous(), [rows] * ranks, list(lengths), group=group)
    out = own.view(ranks, rows, batch, heads, dim).permute(2, 0, 3, 1, 4).reshape(batch, ranks * heads, rows, dim)
    return out if order is None else out.index_select(1, order.argsort())


def counts_together(counts: Tensor, order: Tensor | None, group: Group) -> Tensor:
    """[B, H / ranks] -> [B, H]: counts of all heads, on every rank."""
    parts = [torch.empty_like(counts) for _ in range(size_of(group))]
    dist.all_gather(parts, counts.contiguous(), group=group)
    out = torch.cat(parts, 1)
    return out if order is None else out.index_select(1, order.argsort())


def gathered(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """[B, H, own S, D] -> [B, H, whole S, D], on every rank."""
    most = max(lengths)
    padded = x if x.shape[2] == most else torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[2]))
    parts = [x.new_empty(padded.shape) for _ in lengths]
    dist.all_gather(parts, padded.contiguous(), group=group)
    return torch.cat([part[:, :, :length] for part, length in zip(parts, lengths, strict=True)], 2)


def whole_blocks(query: Tensor, lengths: Sequence[int], block: int, group: Group) -> tuple[Tensor, int]:
    """The rows of this rank made up to whole blocks by rows of its neighbours, and how many come before its own.

    Blocks are counted from the first row of all, so that they lie where one process would put them.

    Raises:
        ValueError: a rank holds fewer rows than a block may lack.
    """
    rank = dist.get_rank(group)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    if all(end % block == 0 for end in ends[:-1]):
        return query, 0
    edge = block - 1
    if min(lengths) < edge:
        raise ValueError(
            f"a rank holds {min(lengths)} tokens, wanted at least q_block_size - 1 = {edge}; use fewer ranks, or "
            f"split the sequence at multiples of {block}"
        )
    edges = torch.stack((query[:, :, :edge], query[:, :, -edge:]))
    parts = [torch.empty_like(edges) for _ in lengths]
    dist.all_gather(parts, edges.contiguous(), group=group)
    before = (ends[rank] - lengths[rank]) % block
    after = 0 if rank == len(lengths) - 1 else min(-ends[rank] % block, ends[-1] - ends[rank])
    pieces = [query]
    if before:
        pieces.insert(0, parts[rank - 1][1][:, :, edge - before :])
    if after:
        pieces.append(parts[rank + 1][0][:, :, :after])
    return torch.cat(pieces, 2), before


def around(x: Tensor, lengths: Sequence[int], group: Group) -> Iterator[tuple[int, Tensor]]:
    """(rank, its [B, H, S, D]) for every rank, own first; the next one travels while the caller computes."""
    ranks, rank = len(lengths), dist.get_rank(group)
    there, here = ((rank + 1) % ranks, (rank - 1) % ranks)
    current = x.contiguous()
    for turn in range(ranks):
        source, waiting, coming = (rank - turn) % ranks, [], current
        if turn + 1 < ranks:
            coming = current.new_empty(*x.shape[:2], lengths[(source - 1) % ranks], x.shape[3])
            waiting = dist.batch_isend_irecv([
                dist.P2POp(dist.isend, current, group=group, group_peer=there),
                dist.P2POp(dist.irecv, coming, group=group, group_peer=here),
            ])  # fmt: skip
        yield source, current
        for work in waiting:
            work.wait()
        current = coming
