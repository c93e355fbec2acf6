"""Which keys each block keeps: pool the queries, score every key, compare with the maximum, pack to bits.

A program owns T pooled rows and a segment of keys. A window that fits into a segment needs one pass; a row's maximum or
a longer window needs a first pass that leaves each segment's maximum. Bits are written by exactly one program: no
atomics, no sort, no order that could change.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vecattention.backends.triton.tiles import load_rows, pack_words, running_cut


@triton.jit
def pool_kernel(Q, POOLED, sqb, sqh, sqn, heads, q_len, pooled_rows, scale,
                D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """POOLED[b, h, g] = scale * mean of the real queries of block g, float32; grid (ceil(Sq / P) * B * H)."""
    g, bh = tl.program_id(0) % pooled_rows, tl.program_id(0) // pooled_rows
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    rows = load_rows(Q + b * sqb + h * sqh, g * P + tl.arange(0, P), dims, sqn, q_len, D, BLOCK_D)
    mean = tl.sum(rows.to(tl.float32), 0) / tl.minimum(P, q_len - g * P)
    line = (bh.to(tl.int64) * pooled_rows + g) * D
    tl.store(POOLED + line + dims, mean * scale, mask=dims < D)


@triton.jit
def _scores(high, low, keys, SPLIT: tl.constexpr):
    """float32 [T, KB]; a half-precision key meets the pooled row as a sum of two halves, so the mean keeps 16 bits.

    An infinite score cancels to NaN where the halves have different signs, and is then never kept.
    """
    if SPLIT:
        return tl.dot(low, keys.T, tl.dot(high, keys.T))
    return tl.dot(high, keys.T, input_precision="ieee")


@triton.jit
def _carried(tops, row, rows_ok, seg, segments, per_unit, lo, W, unit, SEG: tl.constexpr, T: tl.constexpr):
    """Maximum [T] of the earlier segments whose last window is the one that this segment starts in."""
    carry = tl.full([T], float("-inf"), tl.float32)
    first = seg // per_unit * per_unit
    for other in range(first, seg):
        end = tl.minimum(other % per_unit * SEG + SEG, unit) + other // per_unit * unit
        same = (end - 1) // W == lo // W
        top = tl.load(tops + row * segments + other, mask=rows_ok & same, other=float("-inf"))
        carry = tl.maximum(carry, top)
    return carry


@triton.jit
def select_kernel(POOLED, K, ALPHA, WORDS, TOPS, skb, skh, skn, heads, group, pooled_rows, k_len, offset, width, blocks,
                  row_tiles, segments, per_unit, unit, G,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr, SHARE: tl.constexpr, SLOTS: tl.constexpr,
                  B: tl.constexpr, T: tl.constexpr, KB: tl.constexpr, SEG: tl.constexpr, ROW_SCOPE: tl.constexpr,
                  CAUSAL: tl.constexpr, MAXIMA: tl.constexpr, CARRY: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """One segment of keys for T pooled rows: its maximum per row (MAXIMA), or the words of the kept keys.

    A block's SHARE rows take SLOTS of the T places, the next power of 2. What is left over scores rows of the next
    block, and counts for nothing.
    grid (row_tiles * segments * B * H), row tiles fastest, so that neighbours read the same keys from L2.
    """
    tile, seg = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles % segments
    bh = tl.program_id(0) // row_tiles // segments
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    lo = seg // per_unit * unit + seg % per_unit * SEG
    hi = tl.minimum(tl.minimum(lo + SEG, (seg // per_unit + 1) * unit), k_len)
    row, dims = tile * T + tl.arange(0, T), tl.arange(0, BLOCK_D)
    rows_ok = row < pooled_rows
    after = tile * T + T  # the first row of the next program
    if SHARE != SLOTS:
        slot = row % SLOTS
        row = row // SLOTS * SHARE + slot
        rows_ok = (slot < SHARE) & (row < pooled_rows)
        after = after // SLOTS * SHARE
    start = row * P + offset
    if CAUSAL:
        hi = tl.minimum(hi, after * P + offset)  # nothing at or past the last row's own span
    line = bh.to(tl.int64) * pooled_rows
    pooled = load_rows(POOLED + line * D, row, dims, D, pooled_rows, D, BLOCK_D)
    high = pooled.to(K.dtype.element_ty)
    low = (pooled - high.to(tl.float32)).to(K.dtype.element_ty)
    alpha = tl.load(ALPHA + bh)
    k_base = K + b * skb + (h // group) * skh
    tops = TOPS + line * segments
    W = B * G

    top = tl.full([T], float("-inf"), tl.float32)
    window = lo // W
    if CARRY:
        if ROW_SCOPE:
            top = tl.load(TOPS + line + row, mask=rows_ok, other=float("-inf"))
        else:
            top = _carried(tops, row, rows_ok, seg, segments, per_unit, lo, W, unit, SEG, T)
    for first in range(lo, hi, KB):
        column = first + tl.arange(0, KB)
        keys = load_rows(k_base, column, dims, skn, hi, D, BLOCK_D)
        scores = _scores(high, low, keys, SPLIT)
        candidate = tl.broadcast_to((column < hi)[None, :], (T, KB))
        if CAUSAL:
            candidate = candidate & (column >= P)[None, :] & (column[None, :] < start[:, None])
        scores = tl.where(candidate, scores, float("-inf"))
        last = (tl.minimum(first + KB, hi) - 1) // W
        if MAXIMA:
            if not ROW_SCOPE:
                scores = tl.where((column // W == last)[None, :], scores, float("-inf"))
            here = tl.max(scores, 1)
            top = tl.where((window == last) | ROW_SCOPE, tl.maximum(top, here), here)
        else:
            cube = tl.reshape(scores, (T, KB // B, B))
            if ROW_SCOPE:
                passes = (cube + alpha >= top[:, None, None]) & (cube > float("-inf"))
            else:
                cut, windows = running_cut(cube, top, window, first, G, T, KB, B)
                passes = (cube + alpha >= cut[:, :, None]) & (cube > float("-inf"))
                top = tl.max(tl.where(windows == last, cut, float("-inf")), 1)
            kept = tl.reshape(passes, (T, KB))
            if CAUSAL:
                own = (column[None, :] >= start[:, None]) & (column[None, :] < start[:, None] + P)
                kept = kept | (((column < P)[None, :] | own) & (column < hi)[None, :])
            kept = (kept & rows_ok[:, None]).to(tl.int32)
            words = pack_words(kept, T, KB, SLOTS)
            block = tile * (T // SLOTS) + tl.arange(0, T // SLOTS)
            at = first // 32 + tl.arange(0, KB // 32)
            place = WORDS + (bh.to(tl.int64) * blocks + block.to(tl.int64)[:, None]) * width + at[None, :]
            tl.store(place, words, mask=(block < blocks)[:, None] & (at * 32 < hi)[None, :])
        window = last
    if MAXIMA:
        tl.store(tops + row.to(tl.int64) * segments + seg, top, mask=rows_ok)
