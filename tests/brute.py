"""Selection and attention one row and one tile at a time, in float64: an independent second opinion.

Written from the published rule and the public contract alone; nothing of the library is imported. Slow on purpose:
loops over batch, heads, blocks and tiles, no masks over whole problems, no packing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPS32 = 2.0**-24  # largest relative error of one float32 rounding


@dataclass(frozen=True)
class Kept:
    """bool [B, H, blocks, Sk]: the keys of each block of R rows, before causality, and those too close to call.

    ``unsure`` marks keys whose comparison a float32 computation may decide either way; empty for exact problems.
    """

    kept: Tensor
    unsure: Tensor


def select(query: Tensor, key: Tensor, theta: Tensor, *, pool: int, block: int, tile: int, group: int, scope: str,
           causal: bool, scale: float, exact: bool) -> Kept:  # fmt: skip
    """The kept keys of every block. theta [B, H]; exact: all scores are float32 numbers, so nothing is unsure."""
    batch, heads, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1], key.shape[2]
    blocks = math.ceil(q_len / block)
    kept = torch.zeros(batch, heads, blocks, k_len, dtype=torch.bool)
    unsure = torch.zeros_like(kept)
    for b in range(batch):
        for h in range(heads):
            keys = key[b, h // (heads // kv_heads)].double()
            alpha = float(torch.tensor(-math.log(float(theta[b, h])), dtype=torch.float32))
            for g in range(math.ceil(q_len / pool)):
                rows = query[b, h, g * pool : min((g + 1) * pool, q_len)].double()
                start = g * pool + (k_len - q_len)
                score, error = _scores(rows, keys, scale, exact)
                low, high = (pool, start) if causal else (0, k_len)
                line, doubt = _passing(score, error, low, high, alpha, tile, group, scope)
                if causal:
                    for j in [*range(pool), *range(start, start + pool)]:
                        if j < k_len:
                            line[j], doubt[j] = True, False
                at = g * pool // block
                unsure[b, h, at] |= doubt
                kept[b, h, at] |= line
    return Kept(kept, unsure)


def mask(kept: Tensor, q_len: int, k_len: int, block: int, causal: bool) -> Tensor:
    """bool [B, H, Sq, Sk]: the keys of every row, j <= i + Sk - Sq in causal mode. kept [B, H, blocks, Sk]."""
    rows = torch.zeros(*kept.shape[:2], q_len, k_len, dtype=torch.bool)
    for i in range(q_len):
        last = i + k_len - q_len if causal else k_len - 1
        rows[:, :, i, : last + 1] = kept[:, :, i // block, : last + 1]
    return rows


def attend(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """float64 (out [B, H, Sq, D], lse [B, H, Sq]) over the keys of each row, ``rows`` bool [B, H, Sq, Sk]."""
    batch, heads, q_len, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values = key[b, h // group].double(), value[b, h // group].double()
            for i in range(q_len):
                index = rows[b, h, i].nonzero().squeeze(-1)
                if index.numel() == 0:
                    continue
                logits = scale * (keys[index] @ query[b, h, i].double())
                top = logits.max()
                weight = torch.exp(logits - top)
                out[b, h, i] = weight @ values[index] / weight.sum()
                lse[b, h, i] = top + torch.log(weight.sum())
    return out, lse


def _scores(rows: Tensor, keys: Tensor, scale: float, exact: bool) -> tuple[Tensor, Tensor]:
    """float64 [Sk]: scale * <mean of the rows, key>, and a bound on what float32 accumulation may add to each.

    The bound adds the worst cases of a sum over the rows, one division, one scaling and a sum over the dimensions.
    """
    mean = rows.sum(0) / rows.shape[0]
    score = scale * (keys @ mean)
    if exact:
        if not (torch.equal(mean.float().double(), mean) and torch.equal(score.float().double(), score)):
            raise ValueError("the problem was announced as exact in float32, and is not")
        return score, torch.zeros_like(score)
    steps = rows.shape[0] + rows.shape[1] + 4
    return score, steps * EPS32 * scale * (keys.abs() @ (rows.abs().sum(0) / rows.shape[0]))


def _passing(score: Tensor, error: Tensor, low: int, high: int, alpha: float, tile: int, group: int,
             scope: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which candidates low <= j < high pass, and which are too close to call: two bool [Sk]."""
    kept = torch.zeros(score.shape[0], dtype=torch.bool)
    unsure = torch.zeros_like(kept)
    if low >= high:
        return kept, unsure
    exact = not bool(error.any())
    worst = float(error[low:high].max())
    running = float(score[low:high].max()) if scope == "row" else -math.inf
    window = -1
    for first in range(low // tile * tile, high, tile):
        part = slice(max(first, low), min(first + tile, high))
        if scope == "window":
            if first // (tile * group) != window:
                window, running = first // (tile * group), -math.inf
            running = max(running, float(score[part].max()))
        if exact:  # the comparison as float32 makes it, left side first
            kept[part] = score[part].float() + torch.tensor(alpha).float() >= torch.tensor(running).float()
            continue
        gap = score[part] + alpha - running
        bound = error[part] + worst + EPS32 * (2 * score[part].abs() + 2 * alpha + abs(running))
        kept[part] = gap >= 0
        unsure[part] = gap.abs() <= bound
    return kept, unsure


def rounded_means(query: Tensor, pool: int) -> Tensor:
    """The queries [B, H, Sq, D], each replaced by its block's mean as Hopper's selection rounds it: to their dtype."""
    blocks = [part.double().mean(2, keepdim=True).float().expand_as(part) for part in query.split(pool, dim=2)]
    return torch.cat(blocks, dim=2).to(query.dtype)
