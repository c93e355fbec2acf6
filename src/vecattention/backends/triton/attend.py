"""Exact softmax attention over the keys whose bits are set: one program per block of R rows.

The bits of a segment of keys become positions in a small ring of global memory (it stays in L2); whole tiles of
positions are gathered and folded into an online softmax; what is left over waits in the ring for the next segment, so
only a block's last tile is partly empty. The keys of a causal block's own span are contiguous: they are loaded as one
dense tile and masked by their bits and by position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vecattention.backends.triton.tiles import NO_KEY, append_keys, load_rows, read_words, softmax_step


@triton.jit
def _gathered(acc, top, total, query, scale, k_base, v_base, k_stride, v_stride, ring, first, filled,
              D: tl.constexpr, BLOCK_D: tl.constexpr, BN: tl.constexpr, RING: tl.constexpr, FULL: tl.constexpr,
              STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Fold the ring's entries [first, filled) into the softmax, BN keys a step; FULL: all steps are whole."""
    dims = tl.arange(0, BLOCK_D)
    for done in tl.range(first, filled, BN, num_stages=STAGES):
        slot = done + tl.arange(0, BN)
        if FULL:
            index = tl.load(ring + (slot & (RING - 1)))
            key = load_rows(k_base, index, dims, k_stride, 0x7FFFFFFF, D, BLOCK_D)
            value = load_rows(v_base, index, dims, v_stride, 0x7FFFFFFF, D, BLOCK_D)
            logits = tl.dot(query, key.T, input_precision=PRECISION)
        else:
            index = tl.load(ring + (slot & (RING - 1)), mask=slot < filled, other=0x7FFFFFFF)
            key = load_rows(k_base, index, dims, k_stride, 0x7FFFFFFF, D, BLOCK_D)
            value = load_rows(v_base, index, dims, v_stride, 0x7FFFFFFF, D, BLOCK_D)
            logits = tl.dot(query, key.T, input_precision=PRECISION)
            logits = tl.where((slot < filled)[None, :], logits, float("-inf"))
        acc, top, total = softmax_step(acc, top, total, logits, scale, value, PRECISION)
    return acc, top, total


@triton.jit
def _own_span(acc, top, total, query, scale, words, k_base, v_base, k_stride, v_stride, position, start, k_len,
              D: tl.constexpr, BLOCK_D: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Fold the block's own span [start, start + R) of keys, each seen by the rows at or after it."""
    dims = tl.arange(0, BLOCK_D)
    for offset in range(0, R, BN):
        column = offset + tl.arange(0, BN)
        index = start + column
        inside = (column < R) & (index >= 0) & (index < k_len)
        word = tl.load(words + index // 32, mask=inside, other=0)
        seen = inside & (((word >> (index % 32)) & 1) != 0)
        key = load_rows(k_base, tl.where(inside, index, k_len), dims, k_stride, k_len, D, BLOCK_D)
        value = load_rows(v_base, tl.where(inside, index, k_len), dims, v_stride, k_len, D, BLOCK_D)
        logits = tl.dot(query, key.T, input_precision=PRECISION)
        logits = tl.where(seen[None, :] & (index[None, :] <= position[:, None]), logits, float("-inf"))
        acc, top, total = softmax_step(acc, top, total, logits, scale, value, PRECISION)
    return acc, top, total


@triton.jit(do_not_specialize=["done"])
def attend_kernel(Q, K, V, WORDS, RINGS, OUT, LSE,
                  sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, slb, slh,
                  heads, group, q_len, k_len, width, blocks, done, scale,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  SEGMENT: tl.constexpr, RING: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """out[b, h, rows of block g], lse = softmax attention over the kept keys; a program each, of a head the last first.

    The grid is that of the B * H * blocks items from the ``done``-th on; each program has a ring of its own.
    """
    item = tl.program_id(0) + done
    g, bh = blocks - 1 - item % blocks, (item // blocks).to(tl.int64)
    h, b = bh % heads, bh // heads
    words, ring = WORDS + (bh * blocks + g) * width, RINGS + tl.program_id(0).to(tl.int64) * RING
    rows, dims = g * R + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    row_limit = tl.minimum(q_len, g * R + R)
    query = load_rows(Q + b * sqb + h * sqh, rows, dims, sqn, row_limit, D, BLOCK_D)
    scale = scale * 1.4426950408889634
    k_base, v_base = K + b * skb + (h // group) * skh, V + b * svb + (h // group) * svh
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    top = tl.full([BM], NO_KEY, tl.float32)
    total = tl.zeros([BM], tl.float32)

    start = g * R + k_len - q_len
    past = tl.minimum(start, k_len) if CAUSAL else k_len
    first, filled = 0, 0
    for word in range(0, tl.cdiv(past, 32), SEGMENT):
        filled = append_keys(ring, filled, read_words(words, word, past, SEGMENT), word, SEGMENT, RING)
        tl.debug_barrier()
        whole = filled - (filled - first) % BN
        acc, top, total = _gathered(acc, top, total, query, scale, k_base, v_base, skn, svn, ring, first, whole,
                                    D, BLOCK_D, BN, RING, True, STAGES, PRECISION)  # fmt: skip
        tl.debug_barrier()
        first = whole
    acc, top, total = _gathered(acc, top, total, query, scale, k_base, v_base, skn, svn, ring, first, filled,
                                D, BLOCK_D, BN, RING, False, 1, PRECISION)  # fmt: skip
    if CAUSAL:
        acc, top, total = _own_span(acc, top, total, query, scale, words, k_base, v_base, skn, svn,
                                    rows + k_len - q_len, start, k_len, D, BLOCK_D, BN, R, PRECISION)  # fmt: skip

    empty = top <= NO_KEY
    total = tl.where(empty, 1.0, total)
    acc = tl.where(empty[:, None], 0.0, acc / total[:, None])
    inside = rows < row_limit
    out = OUT + b * sob + h * soh + rows.to(tl.int64)[:, None] * son + dims[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=inside[:, None] & (dims[None, :] < D))
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(LSE + b * slb + h * slh + rows, lse, mask=inside)
