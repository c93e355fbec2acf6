r"""The law: the equation of `vecattention.spec` written densely, for any device, in float32 (float64 for float64).

Scores are computed in float64 where the device has it, and rounded once.

    kept(g) = sink U own U { j candidate : s[g, j] + alpha >= m[g, j] },   out_i = sum_j softmax_j(scale q_i k_j) v_j

It builds every score and every mask, so its memory grows with Sq * Sk. Read it first; test everything against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention import bits, spec

LARGEST = 2**31  # scores of attend: 8 GiB in float32


def why_not(problem: spec.Problem) -> tuple[str, ...]:
    """Any device and dtype, up to 2**31 scores."""
    scores = problem.batch * problem.heads * problem.q_len * problem.k_len
    if scores > LARGEST:
        return (f"it would build {scores} scores, more than {LARGEST}",)
    return ()


def select(query: Tensor, key: Tensor, alpha: Tensor, rule: spec.Rule) -> Tensor:
    """Words of the kept keys of each block of R rows; see `vecattention.backends`."""
    q_len, k_len, pool = query.shape[2], key.shape[2], rule.q_pooling_size
    pooled = pooled_queries(query, pool)
    # In float64 and rounded once: equal keys then tie wherever BLAS computes them, at any number of threads.
    wide = torch.float32 if query.device.type == "mps" else torch.float64
    score = (rule.scale * _grouped(pooled.to(wide), key.to(wide).mT)).to(pooled.dtype)
    position = torch.arange(k_len, device=query.device)
    start = torch.arange(score.shape[2], device=query.device)[:, None] * pool + (k_len - q_len)
    candidate = (position >= pool) & (position < start) if rule.causal else torch.ones_like(position, dtype=torch.bool)
    score = score.masked_fill(~candidate | score.isnan(), -torch.inf)
    kept = (score > -torch.inf) & (score + alpha[:, :, None, None].to(score.dtype) >= cut_off(score, rule))
    if rule.causal:
        kept = kept | (position < pool) | ((position >= start) & (position < start + pool))
    kept = F.pad(kept, (0, 0, 0, -kept.shape[2] % rule.rows_per_block))
    return bits.pack(kept.unflatten(2, (-1, rule.rows_per_block)).any(dim=3))


def attend(query: Tensor, key: Tensor, value: Tensor, selection: spec.Selection, scale: float,
           out: Tensor, lse: Tensor) -> None:  # fmt: skip
    """Exact softmax attention over the selected keys; a row without keys gives 0 and -inf."""
    logits = (scale * _grouped(_wide(query), _wide(key).mT)).masked_fill(~_mask(selection), -torch.inf)
    total = logits.logsumexp(dim=-1)
    probability = logits.softmax(dim=-1).masked_fill((total == -torch.inf)[..., None], 0.0)
    out.copy_(_grouped(probability, _wide(value)))
    lse.copy_(total)


def pooled_queries(query: Tensor, pool: int) -> Tensor:
    """[B, H, Sq, D] -> [B, H, ceil(Sq / P), D]: the mean of each block's real rows, in float32 or wider."""
    q_len = query.shape[2]
    blocks = F.pad(_wide(query), (0, 0, 0, -q_len % pool)).unflatten(2, (-1, pool))
    rows = (q_len - torch.arange(blocks.shape[2], device=query.device) * pool).clamp(max=pool)
    return torch.div(blocks.sum(dim=3), rows[:, None])


def cut_off(score: Tensor, rule: spec.Rule) -> Tensor:
    """m[g, j]: maximum of the row, or of the tiles of j's window up to its own; candidates only (others are -inf)."""
    if rule.max_scope == "row":
        return score.amax(dim=-1, keepdim=True)
    tops = _split(score, rule.k_local_size).amax(dim=-1)
    tiles = tops.shape[-1]
    windows = _split(tops, min(rule.group_k_block, tiles))
    running = running_max(windows).flatten(-2)[..., :tiles]
    return running.repeat_interleave(rule.k_local_size, dim=-1)[..., : score.shape[-1]]


def running_max(x: Tensor) -> Tensor:
    """The values of torch.cummax in the last dimension."""
    return torch.cummax(x, dim=-1)[0] if x.device.type == "cpu" else doubling_max(x)


@torch.no_grad()
def doubling_max(x: Tensor) -> Tensor:
    """The same in log2 many steps: on a GPU several times faster."""
    count = x.shape[-1]
    found = F.pad(x, (0, (1 << (count - 1).bit_length()) - count), value=-torch.inf)
    half = 1
    while half < found.shape[-1]:
        low, high = found.unflatten(-1, (-1, 2, half)).unbind(-2)
        torch.maximum(high, low[..., -1:], out=high)
        half *= 2
    return found[..., :count]


def _split(x: Tensor, size: int) -> Tensor:
    """[..., n] -> [..., ceil(n / size), size], filled with -inf; a view where there is nothing to fill."""
    missing = -x.shape[-1] % size
    return torch.unflatten(F.pad(x, (0, missing), value=-torch.inf) if missing else x, -1, (-1, size))


def _mask(selection: spec.Selection) -> Tensor:
    kept = bits.unpack(selection.words, selection.k_len).repeat_interleave(selection.block, dim=2)
    kept = kept[:, :, : selection.q_len]
    return kept & spec.causal_mask(selection.q_len, selection.k_len, kept.device) if selection.causal else kept


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider, and contiguous, so that strides do not change how BLAS rounds."""
    return (x if x.dtype == torch.float64 else x.float()).contiguous()


def _grouped(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [B, H, n, x] @ matrix [B, Hkv, x, m], query head h with key head h // (H // Hkv)."""
    heads, kv_heads = rows.shape[1], matrix.shape[1]
    return torch.matmul(rows.unflatten(1, (kv_heads, heads // kv_heads)), matrix[:, :, None]).flatten(1, 2)
