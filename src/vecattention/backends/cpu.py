"""Blocked torch on the CPU: never Sq x Sk, no copy of keys or values larger than one head's gathered rows.

`select` scores a slab of pooled rows at a time and packs it to bits; `attend` gathers the keys of one block of queries
and runs two matrix products and an in-place softmax over them. Half precision is computed in float32.
Slabs are independent and run side by side, see `vecattention.workers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention import bits, spec, workers

SLAB = 2**19  # scores or bits held at once by a thread: 2 MiB in float32, what its cache holds
ROWS, COLUMNS = 16, 48  # a product has whole multiples of them: BLAS rounds otherwise in what is left over
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CPU = torch.device("cpu")


def why_not(problem: spec.Problem) -> tuple[str, ...]:
    """CPU tensors of float16, bfloat16, float32 or float64; any head_dim."""
    reasons = []
    if problem.device.type != "cpu":
        reasons.append(f"it runs on CPU tensors, these are on {problem.device}")
    if problem.dtype not in DTYPES:
        reasons.append(f"it does not take {problem.dtype}")
    return tuple(reasons)


def select(query: Tensor, key: Tensor, alpha: Tensor, rule: spec.Rule) -> Tensor:
    """Words of the kept keys of each block of R rows; see `vecattention.backends`."""
    batch, heads, q_len, _ = query.shape
    k_len, group = key.shape[2], heads // key.shape[1]
    blocks = -(-q_len // rule.q_block_size)
    words = torch.empty(batch, heads, blocks, bits.words_for(k_len), dtype=torch.int32, device=CPU)
    slab = max(1, SLAB // (k_len * rule.rows_per_block))
    for b in range(batch):
        for kv_head in range(key.shape[1]):
            keys = _rows(key[b, kv_head])
            workers.run(
                partial(_select_slab, query[b, h], keys, float(alpha[b, h]), rule, part, words[b, h, part])
                for part in _slabs(blocks, slab)
                for h in range(kv_head * group, (kv_head + 1) * group)
            )
    return words


def attend(query: Tensor, key: Tensor, value: Tensor, selection: spec.Selection, scale: float,
           out: Tensor, lse: Tensor) -> None:  # fmt: skip
    """Exact softmax attention over the selected keys; a row without keys gives 0 and -inf."""
    group = query.shape[1] // key.shape[1]
    slab = max(1, SLAB // selection.k_len)
    workers.run(
        partial(_attend_slab, query[b, h], key[b, h // group], value[b, h // group], selection.words[b, h], selection,
                scale, part, out[b, h], lse[b, h])
        for part in _slabs(selection.blocks, slab)
        for b in range(query.shape[0])
        for h in range(query.shape[1])
    )  # fmt: skip


def _slabs(blocks: int, slab: int) -> Iterator[slice]:
    """Ranges of blocks from the last, which in causal mode has most to do, to the first."""
    for first in reversed(range(0, blocks, slab)):
        yield slice(first, min(first + slab, blocks))


def _attend_slab(query: Tensor, key: Tensor, value: Tensor, words: Tensor, selection: spec.Selection, scale: float,
                 part: slice, out: Tensor, lse: Tensor) -> None:  # fmt: skip
    """Attention of a range of blocks of one head: query and out [Sq, D], key and value [Sk, D], words [blocks, W]."""
    offset = selection.k_len - selection.q_len if selection.causal else 0
    end = min(part.stop * selection.block, selection.q_len) + offset if selection.causal else selection.k_len
    lists = _lists(words[part], end)
    room = torch.empty(max(index.numel() for index in lists), key.shape[1], dtype=_wide(key[:0]).dtype, device=CPU)
    for g, index in enumerate(lists, start=part.start):
        rows = slice(g * selection.block, min((g + 1) * selection.block, selection.q_len))
        first = rows.start + offset if selection.causal else selection.k_len
        _attend_block(query[rows], key, value, index, first, scale, room[: index.numel()], out[rows], lse[rows])


def _attend_block(query: Tensor, key: Tensor, value: Tensor, index: Tensor, first: int, scale: float, room: Tensor,
                  out: Tensor, lse: Tensor) -> None:  # fmt: skip
    """Rows at positions first, first + 1, ... attend the keys at ``index`` (ascending) up to their own position.

    ``room`` [n, D] holds the gathered keys, and then the gathered values.
    """
    if not index.numel():
        out.zero_()
        lse.fill_(-torch.inf)
        return
    logits = (_rows(query) * scale) @ _gather(key, index, room).mT
    past = int(torch.searchsorted(index, first, right=True))
    if past < index.numel():
        position = torch.arange(first, first + query.shape[0], device=CPU)
        logits[:, past:].masked_fill_(index[past:] > position[:, None], -torch.inf)
    top = logits.amax(dim=-1)
    weight = logits.softmax(dim=-1)
    out.copy_(weight @ _gather(value, index, room))
    lse.copy_(top - weight.amax(dim=-1).log())  # the largest weight is exp(top - lse)
    if not past:  # only then can a row see nothing
        empty = top == -torch.inf
        out.masked_fill_(empty[:, None], 0.0)
        lse.masked_fill_(empty, -torch.inf)


def _gather(x: Tensor, index: Tensor, room: Tensor) -> Tensor:
    """The rows of x at ``index``, wide, in ``room``."""
    if x.dtype == room.dtype:
        return torch.index_select(x, 0, index, out=room)
    return room.copy_(x.index_select(0, index))


def _lists(words: Tensor, end: int) -> tuple[Tensor, ...]:
    """Ascending positions below ``end`` of the keys of each block, int64; words [blocks, W]."""
    kept = bits.unpack(words[:, : bits.words_for(end)], end)
    flat = kept.flatten().nonzero().squeeze(-1).remainder_(end)
    return torch.split(flat, kept.sum(dim=-1).tolist())


def _select_slab(query: Tensor, keys: Tensor, alpha: float, rule: spec.Rule, part: slice, words: Tensor) -> None:
    """Words of a range of blocks of one head: scores, cut-off, comparison, union over the pooled rows, bits."""
    k_len, pool, share = keys.shape[0], rule.q_pooling_size, rule.rows_per_block
    pooled = _pooled(query[part.start * rule.q_block_size : part.stop * rule.q_block_size], pool).mul_(rule.scale)
    rows = pooled.shape[0]
    start = torch.arange(rows, device=CPU)[:, None] * pool + (part.start * rule.q_block_size + k_len - query.shape[0])
    seen = min(k_len, int(start[-1])) if rule.causal else k_len  # no candidate at or past it
    kept = torch.zeros(rows + -rows % share, k_len, dtype=torch.bool, device=CPU)
    if seen > 0:
        scores = _product(pooled, keys[:seen])
        if rule.causal:
            first = max(0, int(start[0]))
            scores[:, :pool] = -torch.inf
            scores[:, first:].masked_fill_(torch.arange(first, seen, device=CPU) >= start, -torch.inf)
        kept[:rows, :seen] = _passes(scores, alpha, rule)
    if rule.causal:
        _force(kept[:rows], start, seen, pool)
    words.copy_(bits.pack(kept if share == 1 else kept.unflatten(0, (-1, share)).any(dim=1)))


def _product(pooled: Tensor, keys: Tensor) -> Tensor:
    """[n, D] @ [m, D]^T; the rounding of an entry does not depend on n and m."""
    rows, columns = pooled.shape[0], keys.shape[0]
    whole = columns - columns % COLUMNS
    pooled = _whole(ROWS, pooled)
    scores = pooled.new_empty(pooled.shape[0], columns)
    if whole:
        torch.mm(pooled, keys[:whole].mT, out=scores[:, :whole])
    if whole < columns:
        scores[:, whole:] = torch.mm(pooled, _whole(COLUMNS, keys[whole:]).mT)[:, : columns - whole]
    return scores[:rows]


def _whole(unit: int, x: Tensor) -> Tensor:
    """x [n, D] with rows of zeros up to a multiple of ``unit``."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % unit)) if x.shape[0] % unit else x


def _passes(scores: Tensor, alpha: float, rule: spec.Rule) -> Tensor:
    """bool [rows, keys]: score + alpha >= maximum; -inf (no candidate) and NaN never pass and move no maximum."""
    keys = scores.shape[1]
    tile = keys if rule.max_scope == "row" else rule.k_local_size
    tiles = F.pad(scores, (0, -keys % tile), value=-torch.inf) if keys % tile else scores
    tiles = tiles.unflatten(1, (-1, tile))
    tops = tiles.amax(dim=-1)
    if tops.isnan().any():
        tiles = tiles.masked_fill(tiles.isnan(), -torch.inf)
        tops = tiles.amax(dim=-1)
    group = min(rule.group_k_block, tops.shape[1])
    running = F.pad(tops, (0, -tops.shape[1] % group), value=-torch.inf).unflatten(1, (-1, group))
    running = torch.cummax(running, dim=-1)[0].flatten(1)[:, : tops.shape[1], None]
    running.clamp_min_(torch.finfo(scores.dtype).min)
    return torch.ge(tiles.add_(alpha), running).flatten(1)[:, :keys]


def _force(kept: Tensor, start: Tensor, seen: int, pool: int) -> None:
    """Keep, in place, the sink {0..P-1} and each pooled row's own positions {start..start+P-1}."""
    kept[:, :pool] = True
    first = max(0, int(start[0]))
    position = torch.arange(first, min(kept.shape[1], max(seen, 0) + pool), device=CPU)
    kept[:, first : first + position.numel()] |= (position >= start) & (position < start + pool)


def _pooled(query: Tensor, pool: int) -> Tensor:
    """[Sq, D] -> [ceil(Sq / P), D]: mean of each block's real rows."""
    q_len = query.shape[0]
    blocks = F.pad(_rows(query), (0, 0, 0, -q_len % pool)).unflatten(0, (-1, pool))
    rows = (q_len - torch.arange(blocks.shape[0], device=CPU) * pool).clamp(max=pool)
    return torch.div(blocks.sum(dim=1), rows[:, None])


def _rows(x: Tensor) -> Tensor:
    """[n, D], wide, and copied if its columns lie apart: BLAS rounds otherwise there."""
    x = _wide(x)
    return x if x.stride(1) == 1 else x.contiguous()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
