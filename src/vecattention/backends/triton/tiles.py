"""Named parts of the kernels: each is one idea, a few lines long, with its shapes."""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-1.0e30)  # a finite stand-in for -inf in running maxima, so that differences stay finite


@triton.jit
def load_rows(base, index, dims, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``index`` [N] of a matrix with unit column stride -> [N, BLOCK_D]; rows at or past ``limit`` are 0."""
    pointer = base + index.to(tl.int64)[:, None] * stride + dims[None, :]
    inside = index[:, None] < limit
    if BLOCK_D != D:
        inside = inside & (dims[None, :] < D)
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def popcount(x):
    """Set bits of each uint32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def read_words(words, first, keys, SEGMENT: tl.constexpr):
    """uint32 [SEGMENT]: the words from ``first`` on, with the bits of keys at or past ``keys`` cleared."""
    at = first + tl.arange(0, SEGMENT)
    word = tl.load(words + at, mask=at * 32 < keys, other=0).to(tl.uint32, bitcast=True)
    count = tl.minimum(tl.maximum(keys - at * 32, 0), 32)
    kept = ((tl.full([SEGMENT], 1, tl.int64) << count.to(tl.int64)) - 1).to(tl.uint32)
    return word & kept


@triton.jit
def append_keys(ring, filled, word, first, SEGMENT: tl.constexpr, RING: tl.constexpr):
    """Append the positions of the set bits to the ring, ascending; returns the new fill count."""
    count = popcount(word).to(tl.int32)
    before = tl.cumsum(count, 0) - count
    bit = tl.arange(0, 32)
    earlier = (tl.full([32], 1, tl.uint32) << bit.to(tl.uint32)) - 1
    rank = filled + before[:, None] + popcount(word[:, None] & earlier[None, :]).to(tl.int32)
    key = (first + tl.arange(0, SEGMENT))[:, None] * 32 + bit[None, :]
    tl.store(ring + (rank & (RING - 1)), key, mask=((word[:, None] >> bit[None, :].to(tl.uint32)) & 1) != 0)
    return filled + tl.sum(count, 0)


@triton.jit
def softmax_step(acc, top, total, logits, scale, value, PRECISION: tl.constexpr):
    """One step of the online softmax: fold logits [M, N] (-inf: no key) and value [N, D] into (acc, top, total).

    top is in units of scale * logit, where scale holds log2(e); it starts at NO_KEY and never is -inf.
    """
    new_top = tl.maximum(top, tl.max(logits, 1) * scale)
    weight = tl.exp2(logits * scale - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def later_window(top_a, window_a, top_b, window_b):
    """Scan step of a running maximum that restarts with every window."""
    return tl.where(window_a == window_b, tl.maximum(top_a, top_b), top_b), window_b


@triton.jit
def running_cut(scores, carry, carry_window, first, G, T: tl.constexpr, KB: tl.constexpr, B: tl.constexpr):
    """Running maximum per tile [T, KB // B] of scores [T, KB // B, B], restarting with every window of G tiles."""
    tops = tl.max(scores, 2)
    window = (first // B + tl.arange(0, KB // B)) // G
    windows = tl.broadcast_to(window[None, :], (T, KB // B))
    running, _ = tl.associative_scan((tops, windows), 1, later_window)
    return tl.where(windows == carry_window, tl.maximum(running, carry[:, None]), running), windows


@triton.jit
def pack_words(kept, T: tl.constexpr, KB: tl.constexpr, SLOTS: tl.constexpr):
    """int32 0/1 [T, KB] -> int32 words [T // SLOTS, KB // 32] of the union over SLOTS neighbouring rows."""
    union = tl.max(tl.reshape(kept, (T // SLOTS, SLOTS, KB)), 1)
    bit = tl.full([32], 1, tl.int32) << tl.arange(0, 32)
    return tl.sum(tl.reshape(union, (T // SLOTS, KB // 32, 32)) * bit[None, None, :], 2)
