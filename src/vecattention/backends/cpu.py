"""Blocked torch on the CPU: never Sq x Sk, no copy of keys or values larger than one head's gathered rows.

`select` scores a slab of pooled rows at a time and packs it to bits; `attend` gathers the keys of one block of queries
and runs two matrix products and an in-place softmax over them. Half precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention import bits, spec

SLAB = 2**21  # scores held at once: 8 MiB in float32
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    kv_heads, k_len = key.shape[1], key.shape[2]
    blocks = -(-q_len // rule.q_block_size)
    words = torch.empty(batch, heads, blocks, bits.words_for(k_len), dtype=torch.int32)
    slab = max(1, SLAB // (k_len * rule.rows_per_block))
    for b in range(batch):
        for kv_head in range(kv_heads):
            keys = _wide(key[b, kv_head])
            for h in range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads):
                pooled = _pooled(query[b, h], rule.q_pooling_size).mul_(rule.scale)
                for first in range(0, blocks, slab):
                    rows = slice(first, min(first + slab, blocks))
                    words[b, h, rows] = _slab(pooled, keys, float(alpha[b, h]), rows, q_len, rule)
    return words


def attend(query: Tensor, key: Tensor, value: Tensor, selection: spec.Selection, scale: float,
           out: Tensor, lse: Tensor) -> None:  # fmt: skip
    """Exact softmax attention over the selected keys; a row without keys gives 0 and -inf."""
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            head = _Head(key[b, h // group], value[b, h // group], selection, scale)
            for g, index in enumerate(_lists(selection.words[b, h], selection.k_len)):
                rows = slice(g * selection.block, min((g + 1) * selection.block, selection.q_len))
                head.attend(query[b, h, rows], index, rows, out[b, h, rows], lse[b, h, rows])


class _Head:
    """One head's keys and values, and what its blocks of queries have in common."""

    def __init__(self, key: Tensor, value: Tensor, selection: spec.Selection, scale: float) -> None:
        self.key, self.value, self.scale = key, value, scale
        self.causal, self.offset = selection.causal, selection.k_len - selection.q_len

    def attend(self, query: Tensor, index: Tensor, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Attention of one block of queries over the keys at ``index`` (ascending), written into out and lse."""
        if not index.numel():
            out.zero_()
            lse.fill_(-torch.inf)
            return
        logits = (_wide(query) * self.scale) @ _wide(self.key.index_select(0, index)).mT
        past = self._hide_future(logits, index, rows) if self.causal else index.numel()
        top = logits.amax(dim=-1)
        weight = logits.softmax(dim=-1)
        out.copy_(weight @ _wide(self.value.index_select(0, index)))
        lse.copy_(top - weight.amax(dim=-1).log())  # the largest weight is exp(top - lse)
        if not past:  # only then can a row see nothing
            empty = top == -torch.inf
            out.masked_fill_(empty[:, None], 0.0)
            lse.masked_fill_(empty, -torch.inf)

    def _hide_future(self, logits: Tensor, index: Tensor, rows: slice) -> int:
        """Set logits of keys after their row's position to -inf; the number of keys that every row sees."""
        first = rows.start + self.offset
        past = int(torch.searchsorted(index, first, right=True))
        if past < index.numel():
            position = torch.arange(first, rows.stop + self.offset)
            logits[:, past:].masked_fill_(index[past:] > position[:, None], -torch.inf)
        return past


def _lists(words: Tensor, k_len: int) -> Iterator[Tensor]:
    """Ascending key positions of each block of one head, int64; words [blocks, W]."""
    slab = max(1, SLAB // k_len)
    for first in range(0, words.shape[0], slab):
        part = words[first : first + slab]
        width = part.shape[1] * bits.WORD
        flat = bits.unpack(part, width).flatten().nonzero().squeeze(-1).remainder_(width)
        yield from flat.split(bits.popcount(part).sum(-1).tolist())


def _slab(pooled: Tensor, keys: Tensor, alpha: float, blocks: slice, q_len: int, rule: spec.Rule) -> Tensor:
    """Words of a range of blocks of one head: scores, cut-off, comparison, union over the pooled rows, bits."""
    k_len, pool, share = keys.shape[0], rule.q_pooling_size, rule.rows_per_block
    pooled = pooled[blocks.start * share : blocks.stop * share]
    start = torch.arange(pooled.shape[0])[:, None] * pool + (blocks.start * rule.q_block_size + k_len - q_len)
    seen = min(k_len, int(start[-1])) if rule.causal else k_len  # no candidate at or past it
    kept = torch.zeros(pooled.shape[0] + -pooled.shape[0] % share, k_len, dtype=torch.bool)
    if seen > 0:
        scores = pooled @ keys[:seen].mT
        if rule.causal:
            first = max(0, int(start[0]))
            scores[:, :pool] = -torch.inf
            scores[:, first:].masked_fill_(torch.arange(first, seen) >= start, -torch.inf)
        kept[: pooled.shape[0], :seen] = _passes(scores, alpha, rule)
    if rule.causal:
        _force(kept[: pooled.shape[0]], start, seen, pool)
    return bits.pack(kept if share == 1 else kept.unflatten(0, (-1, share)).any(dim=1))


def _passes(scores: Tensor, alpha: float, rule: spec.Rule) -> Tensor:
    """bool [rows, keys]: score + alpha >= maximum; scores that are not candidates are -inf and never pass."""
    if rule.max_scope == "row":
        cut = scores.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
        return scores + alpha >= cut
    tile, keys = rule.k_local_size, scores.shape[1]
    tiles = F.pad(scores, (0, -keys % tile), value=-torch.inf) if keys % tile else scores
    tiles = tiles.unflatten(1, (-1, tile))
    tops = tiles.amax(dim=-1)
    group = min(rule.group_k_block, tops.shape[1])
    running = F.pad(tops, (0, -tops.shape[1] % group), value=-torch.inf).unflatten(1, (-1, group))
    running = running.cummax(dim=-1).values.flatten(1)[:, : tops.shape[1], None]
    running.clamp_min_(torch.finfo(scores.dtype).min)
    return (tiles + alpha >= running).flatten(1)[:, :keys]


def _force(kept: Tensor, start: Tensor, seen: int, pool: int) -> None:
    """Keep, in place, the sink {0..P-1} and each pooled row's own positions {start..start+P-1}."""
    kept[:, :pool] = True
    first = max(0, int(start[0]))
    position = torch.arange(first, min(kept.shape[1], max(seen, 0) + pool))
    kept[:, first : first + position.numel()] |= (position >= start) & (position < start + pool)


def _pooled(query: Tensor, pool: int) -> Tensor:
    """[Sq, D] -> [ceil(Sq / P), D]: mean of each block's real rows."""
    q_len = query.shape[0]
    blocks = F.pad(_wide(query), (0, 0, 0, -q_len % pool)).unflatten(0, (-1, pool))
    rows = (q_len - torch.arange(blocks.shape[0]) * pool).clamp(max=pool)
    return blocks.sum(dim=1) / rows[:, None]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
