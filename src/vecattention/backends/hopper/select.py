"""Which keys each block keeps, on Hopper: the scores are one matrix product, and nothing of them is ever written.

    loader     (4 warps)  tiles of N consecutive keys -> shared memory (cp.async)
    consumer 0 (4 warps)  64 pooled rows: scores (wgmma), maxima, comparison, bits
    consumer 1 (4 warps)  the next 64 pooled rows of the same tiles

A pooled row is rounded once, to the dtype of the tensors (docs/decisions/rounded-means.md). A program owns 128 of them
and a segment of whole windows, and alone writes their words: no atomics, no sort, no order that could change. A row's
maximum needs a first pass that leaves each segment's maximum.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before Triton 3.7

HALF = gl.constexpr(64)  # pooled rows of a consumer
ULP = gl.constexpr(2.0**-23)  # of one
LARGEST = gl.constexpr(3.4028234663852886e38)
TINY = gl.constexpr(1.0e-37)  # nothing beside any other number, but not zero


@gluon.jit
def _copy(smem, base, row, stride, D: gl.constexpr):
    """Start copying rows of D values to shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    dims = gl.arange(0, D, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(smem, base + ((row * stride)[:, None] + dims[None, :]))


@gluon.jit
def _clear(words_base, first_block, blocks, width, first, end, ROWS: gl.constexpr):
    """Write words without a bit for the keys from ``first`` (a multiple of 32) up to ``end``."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    SOME: gl.constexpr = 16 if ROWS > 16 else ROWS  # so that their addresses fit into the registers
    none = gl.zeros([SOME, 32], gl.int32, layout)
    for part in range(ROWS // SOME):
        block = first_block + part * SOME + gl.arange(0, SOME, gl.SliceLayout(1, layout))
        place = words_base + (block.to(gl.int64) * width)[:, None]
        for word in range(first // 32, (end + 31) // 32, 32):
            at = word + gl.arange(0, 32, gl.SliceLayout(0, layout))
            gl.store(place + at[None, :], none, mask=(block < blocks)[:, None] & (at * 32 < end)[None, :])


@gluon.jit
def _seen(lo, hi, first_row, offset, P: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr):
    """Tiles from key ``lo`` up to ``hi`` and, in causal mode, up to the last of the 64 rows' own keys."""
    end = gl.minimum(hi, (first_row + HALF) * P + offset) if CAUSAL else hi
    return end, gl.maximum((end - lo + N - 1) // N, 0)


@gluon.jit
def _loader(k_smem, k_full, k_empty, k_base, skn, WORDS, bh, tile_row, k_len, offset, width, blocks, lo, hi, stop,
            D: gl.constexpr, P: gl.constexpr, SHARE: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
            CLEAR: gl.constexpr):  # fmt: skip
    """CLEAR: also write the words of keys that no consumer looks at."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    tile = 0
    for first in range(lo, hi, N):
        stage = tile % STAGES
        mbarrier.wait(k_empty.index(stage), (tile // STAGES & 1) ^ 1)
        row = gl.minimum(first + gl.arange(0, N, gl.SliceLayout(1, layout)), k_len - 1)
        _copy(k_smem.index(stage), k_base, row, skn, D)
        async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
        tile += 1
    if CLEAR:
        words_base = WORDS + bh.to(gl.int64) * blocks * width
        for half in gl.static_range(2):
            first_row = tile_row * 2 * HALF + half * HALF
            end, tiles = _seen(lo, hi, first_row, offset, P, N, True)
            _clear(words_base, first_row // SHARE, blocks, width, lo + tiles * N, stop, HALF // SHARE)


@gluon.jit
def _running(tops, carry, STEPS: gl.constexpr):
    """Inclusive running maximum, from ``carry`` [64] on, along the last axis of [64, 2 ** STEPS], and its last [64].

    One maximum a window, in registers.
    """
    if STEPS == 0:
        last = gl.maximum(tops, gl.convert_layout(carry, gl.SliceLayout(1, tops.type.layout))[:, None])
        carry = gl.max(last, 1)
    else:
        left, right = _halves(tops, STEPS)
        left, carry = _running(left, carry, STEPS - 1)
        right, carry = _running(right, carry, STEPS - 1)
        last = gl.permute(gl.join(left, right), (0, 2, 1))
        last = gl.convert_layout(gl.reshape(last, (HALF, 1 << STEPS)), tops.type.layout, assert_trivial=True)
    return last, carry


@gluon.jit
def _halves(x, STEPS: gl.constexpr):
    """The first and the second half of the last axis of [64, 2 ** STEPS]."""
    return gl.split(gl.permute(gl.reshape(x, (HALF, 2, 1 << (STEPS - 1))), (0, 2, 1)))


@gluon.jit
def _sign(gap):
    """1 where a float is negative, else 0."""
    return (gap.to(gl.int32, bitcast=True) >> 31) & 1


@gluon.jit
def _limit(top, alpha):
    """A number just below ``top - alpha``, so that it less a kept score is negative, also one that meets the cut-off.

    Finite where the maximum is inf, -inf where there is no candidate. It less a score that is -inf or NaN is inf or
    NaN, which has no sign here; nor has a hidden cut-off, inf, less any score.
    """
    cut = gl.minimum(top - alpha, LARGEST)
    return cut - gl.abs(cut) * ULP


@gluon.jit
def _words(gap, N: gl.constexpr, SHARE: gl.constexpr):
    """float [64, N] -> int32 words [64 // SHARE, N // 32]: which are negative, in any of SHARE neighbouring rows.

    Bit 8 o + 2 q + c of a word. A thread holds all o and c for its own q: it shifts their signs in one after another,
    joins its bytes of up to four words for the union over rows, and then pulls the bits of each apart.
    """
    cells = gl.permute(gl.reshape(gap, (HALF, N // 32, 4, 4, 2)), (0, 1, 3, 2, 4))
    even, odd = gl.split(cells)
    even, odd = gl.reshape(even, (HALF, N // 32, 4, 2, 2)), gl.reshape(odd, (HALF, N // 32, 4, 2, 2))
    even_02, even_13 = gl.split(even)
    odd_02, odd_13 = gl.split(odd)
    even_0, even_2 = gl.split(even_02)
    even_1, even_3 = gl.split(even_13)
    odd_0, odd_2 = gl.split(odd_02)
    odd_1, odd_3 = gl.split(odd_13)
    own = (_sign(odd_3) << 1) | _sign(even_3)
    own = (((own << 1) | _sign(odd_2)) << 1) | _sign(even_2)
    own = (((own << 1) | _sign(odd_1)) << 1) | _sign(even_1)
    own = (((own << 1) | _sign(odd_0)) << 1) | _sign(even_0)
    if SHARE > 1:
        joined = gl.sum(own << 8 * _along(1, N // 32, own), 1)
        joined = gl.reduce_or(gl.reshape(joined, (HALF // SHARE, SHARE, 4)), 1)[:, None, :]
        own = (joined >> 8 * _along(1, N // 32, joined)) & 0xFF
    quad = 1 << 2 * _along(2, 4, own)
    own = (own * 0x1001) & 0xF000F
    own = (own * (0x41 * quad)) & (0x03030303 * quad)
    return gl.sum(own, 2)


@gluon.jit
def _along(axis: gl.constexpr, size: gl.constexpr, like):
    """0, 1, ... along axis 1 or 2 of a tensor laid out like this one of three, whose other axes have length one."""
    layout: gl.constexpr = like.type.layout
    if axis == 1:
        return gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :][:, :, None]
    else:
        return gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, :][:, None, :]


@gluon.jit
def _candidates(row_start, key, k_len, P: gl.constexpr, CAUSAL: gl.constexpr, SINK: gl.constexpr):
    """bool [64, N]: keys that may enter the maximum and be selected; SINK: the first P keys may be among them."""
    if CAUSAL and not SINK:
        return key[None, :] < gl.minimum(row_start, k_len)[:, None]
    seen = (key < k_len)[None, :]
    if CAUSAL:
        seen = seen & (key >= P)[None, :] & (key[None, :] < row_start[:, None])
    return seen


@gluon.jit
def _below(n):
    """int32 with the n lowest bits set; none for n < 0, all for n > 32."""
    return gl.where(n >= 32, -1, (1 << (gl.maximum(n, 0) & 31)) - 1)


@gluon.jit
def _always(block, at, k_len, offset, P: gl.constexpr, SHARE: gl.constexpr, WHOLE: gl.constexpr, SINK: gl.constexpr):
    """Words ``at`` of the keys that blocks keep without a score: their own, and, with SINK, the first P."""
    start = (block * (SHARE * P) + offset)[:, None] - (at * 32)[None, :]
    if WHOLE:
        words = gl.where((start <= 0) & (start > -(SHARE * P)), -1, 0)
    else:
        words = _below(start + SHARE * P) & ~_below(start)
    if SINK:
        words = words | _below(P - at * 32)[None, :]
    return words & _below(k_len - at * 32)[None, :]


@gluon.jit
def _start(pooled, k_smem, k_full, tile, more, N: gl.constexpr, STAGES: gl.constexpr, ACC: gl.constexpr):
    """Start the scores of a tile, once its keys are there (without ``more`` there is none: nothing will be read)."""
    none = gl.zeros([HALF, N], gl.float32, ACC)
    mbarrier.wait(k_full.index(tile % STAGES), tile // STAGES & 1, pred=more)
    fence_async_shared()
    keys = k_smem.index(tile % STAGES).permute((1, 0))
    return warpgroup_mma(pooled, keys, none, use_acc=False, is_async=True)


@gluon.jit
def _holding(tops, first, row_start, k_len, P: gl.constexpr, B: gl.constexpr, N: gl.constexpr, SINK: gl.constexpr):
    """bool [64, N // B]: stretches of B keys, each of candidates only or of none, that hold candidates (if causal)."""
    at = first + B * gl.arange(0, N // B, gl.SliceLayout(0, tops.type.layout))
    row_start = gl.convert_layout(row_start, gl.SliceLayout(1, tops.type.layout), assert_trivial=True)
    return _candidates(row_start, at, k_len, P, True, SINK)


@gluon.jit
def _windows(tops, top, fresh, B: gl.constexpr, N: gl.constexpr):
    """(running maximum [64, N // B] of the windows, what it is after the tile [64]); ``fresh``: a window starts."""
    STEPS: gl.constexpr = 3 if N // B == 8 else (2 if N // B == 4 else (1 if N // B == 2 else 0))
    tops, carry = _running(tops, gl.where(fresh, float("-inf"), top), STEPS)
    return tops, gl.convert_layout(carry, top.type.layout)


@gluon.jit
def _step(scores, top, into, tile, lo, hi, end, pooled, k_smem, k_full, k_empty, words_base, width, blocks,
          first_block, alpha, row_start, k_len, offset, window, P: gl.constexpr, SHARE: gl.constexpr, B: gl.constexpr,
          N: gl.constexpr, STAGES: gl.constexpr, ROW_SCOPE: gl.constexpr, CAUSAL: gl.constexpr, MAXIMA: gl.constexpr,
          WHOLE: gl.constexpr, EDGE: gl.constexpr, SINK: gl.constexpr, ACC: gl.constexpr):  # fmt: skip
    """Decide one tile while the scores of the next are on their way; EDGE: not every key of it is a candidate.

    WHOLE: the keys of a stretch of B are all candidates of a row or none, but for keys past the last one. Those are
    copies of it and change no maximum that a key is compared with; so maxima and cut-offs are hidden instead of scores.
    A word is all of a block's own keys, or none.

    The keys of the tile before ``end``, where the rows' own keys end, are given back; a later one is waited for all the
    same, so that the product that nobody reads does not meet a copy, and given back as it goes by. ``into``: how many
    keys of its window lie before the tile.
    """
    HIDE: gl.constexpr = EDGE and WHOLE and CAUSAL
    first = lo + tile * N
    ahead = _start(pooled, k_smem, k_full, tile + 1, first + N < hi, N, STAGES, ACC)
    # Nothing is waited for: that the scores go through it keeps the compiler from deciding them before the product.
    scores = warpgroup_mma_wait(1, deps=(scores,))
    if EDGE and not WHOLE:
        key = first + gl.arange(0, N, gl.SliceLayout(0, ACC))
        scores = gl.where(_candidates(row_start, key, k_len, P, CAUSAL, SINK), scores, float("-inf"))
    if HIDE or not ROW_SCOPE:
        scores = gl.reshape(scores, (HALF, N // B, B))
        tops = gl.max(scores, 2)
    if HIDE:
        holding = _holding(tops, first, row_start, k_len, P, B, N, SINK)
        tops = gl.where(holding, tops, float("-inf"))
    if MAXIMA:
        top = gl.maximum(top, gl.convert_layout(gl.max(tops if HIDE else scores, 1), top.type.layout))
    else:
        if ROW_SCOPE:
            limit = _limit(top, alpha)
            if HIDE:
                limit = gl.convert_layout(limit, gl.SliceLayout(1, tops.type.layout))[:, None]
        else:
            tops, top = _windows(tops, top, into == 0, B, N)
            limit = _limit(tops, alpha)
        if HIDE:
            limit = gl.where(holding, limit, float("inf"))
        if HIDE or not ROW_SCOPE:
            gap = limit[:, :, None] - scores
            gap = gl.convert_layout(gl.reshape(gap, (HALF, N)), ACC, assert_trivial=True)
        else:
            gap = limit[:, None] - scores
        words = _words(gap, N, SHARE)
        block = first_block + gl.arange(0, HALF // SHARE, gl.SliceLayout(1, words.type.layout))
        at = first // 32 + gl.arange(0, N // 32, gl.SliceLayout(0, words.type.layout))
        if EDGE and WHOLE:
            words = words & _below(k_len - at * 32)[None, :]
        if EDGE and CAUSAL:
            words = words | _always(block, at, k_len, offset, P, SHARE, WHOLE, SINK)
        place = words_base + ((block.to(gl.int64) * width)[:, None] + at[None, :])
        gl.store(place, words, mask=(block < blocks)[:, None] & (at < width)[None, :])
    # Waited for here, not in the next round: scores in flight must not be carried around a loop.
    scores = warpgroup_mma_wait(0, deps=(ahead,))
    mbarrier.arrive(k_empty.index((tile + 1) % STAGES), pred=first + N < end)
    return scores, top, gl.where(into + N == window, 0, into + N)


@gluon.jit
def _consumer(HALF_INDEX: gl.constexpr, q_smem, k_smem, k_full, k_empty, POOLED, ALPHA, WORDS, TOPS, bh, tile_row,
              segment, segments, scale, pooled_rows, k_len, offset, width, blocks, lo, hi, window,
              D: gl.constexpr, P: gl.constexpr, SHARE: gl.constexpr, B: gl.constexpr, N: gl.constexpr,
              STAGES: gl.constexpr, ROW_SCOPE: gl.constexpr, CAUSAL: gl.constexpr, MAXIMA: gl.constexpr,
              WHOLE: gl.constexpr):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    first_row = tile_row * 2 * HALF + HALF_INDEX * HALF
    source = gl.minimum(first_row + gl.arange(0, HALF, gl.SliceLayout(1, wide)), pooled_rows - 1)
    line = bh.to(gl.int64) * pooled_rows
    pooled = q_smem.index(HALF_INDEX)
    _copy(pooled, POOLED + line * D, source, D, D)
    async_copy.commit_group()
    alpha = gl.load(ALPHA + bh) / scale + TINY  # scores are without the scale
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()

    row = first_row + gl.arange(0, HALF, ROWS)
    row_start = row * P + offset
    top = gl.full([HALF], float("-inf"), gl.float32, ROWS)
    if ROW_SCOPE and not MAXIMA:
        top = gl.load(TOPS + line + gl.minimum(row, pooled_rows - 1))
    words_base = WORDS + bh.to(gl.int64) * blocks * width
    first_block = first_row // SHARE

    # The first tile of all and the tiles of the rows' own keys hold keys that are no candidates; between them nothing
    # needs a look, and past its rows' own keys a consumer only lets tiles go by.
    all_tiles = (hi - lo + N - 1) // N
    end, tiles = _seen(lo, hi, first_row, offset, P, N, CAUSAL)
    sink = gl.minimum(1, tiles) if lo < P and CAUSAL else 0
    border = gl.minimum(first_row * P + offset, k_len) if CAUSAL else k_len
    clear = gl.minimum(gl.maximum((border - lo) // N, sink), tiles)
    clear = sink + (clear - sink) // 2 * 2  # two at a time, so that scores stay in the registers where they arrive
    into = 0
    if tiles > 0:
        ahead = _start(pooled, k_smem, k_full, 0, True, N, STAGES, ACC)
        scores = warpgroup_mma_wait(0, deps=(ahead,))
        mbarrier.arrive(k_empty.index(0))
        for t in range(0, sink):
            scores, top, into = _step(
                scores, top, into, t, lo, hi, end, pooled, k_smem, k_full, k_empty, words_base, width, blocks,
                first_block, alpha, row_start, k_len, offset, window, P, SHARE, B, N, STAGES, ROW_SCOPE, CAUSAL,
                MAXIMA, WHOLE, True, True, ACC)  # fmt: skip
        for t in range(sink, clear, 2):
            scores, top, into = _step(
                scores, top, into, t, lo, hi, end, pooled, k_smem, k_full, k_empty, words_base, width, blocks,
                first_block, alpha, row_start, k_len, offset, window, P, SHARE, B, N, STAGES, ROW_SCOPE, CAUSAL,
                MAXIMA, WHOLE, False, False, ACC)  # fmt: skip
            scores, top, into = _step(
                scores, top, into, t + 1, lo, hi, end, pooled, k_smem, k_full, k_empty, words_base, width, blocks,
                first_block, alpha, row_start, k_len, offset, window, P, SHARE, B, N, STAGES, ROW_SCOPE, CAUSAL,
                MAXIMA, WHOLE, False, False, ACC)  # fmt: skip
        for t in range(clear, tiles):
            scores, top, into = _step(
                scores, top, into, t, lo, hi, end, pooled, k_smem, k_full, k_empty, words_base, width, blocks,
                first_block, alpha, row_start, k_len, offset, window, P, SHARE, B, N, STAGES, ROW_SCOPE, CAUSAL,
                MAXIMA, WHOLE, True, False, ACC)  # fmt: skip
    for t in range(tiles, all_tiles):
        mbarrier.wait(k_full.index(t % STAGES), t // STAGES & 1)
        barrier()  # so that no warp of the four is a whole round behind
        mbarrier.arrive(k_empty.index(t % STAGES))
    if MAXIMA:
        gl.store(TOPS + (line + row) * segments + segment, top, mask=row < pooled_rows)


@gluon.jit
def select_kernel(POOLED, K, ALPHA, WORDS, TOPS, skb, skh, skn, heads, group, pooled_rows, k_len, offset, width,
                  blocks, row_tiles, segments, span, window, scale,
                  D: gl.constexpr, P: gl.constexpr, SHARE: gl.constexpr, B: gl.constexpr, N: gl.constexpr,
                  STAGES: gl.constexpr, ROW_SCOPE: gl.constexpr, CAUSAL: gl.constexpr, MAXIMA: gl.constexpr,
                  WHOLE: gl.constexpr, CONSUMER_REGS: gl.constexpr, LOADER_REGS: gl.constexpr):  # fmt: skip
    """One segment of ``span`` keys for 128 pooled rows: its maximum per row (MAXIMA), or the words of the kept keys.

    grid (row_tiles * B * H, segments), the last segment first: neighbours read the same keys from L2, and in causal
    mode the costly tiles of the rows' own keys come before those that fill the gaps.
    """
    tile_row, bh = gl.program_id(0) % row_tiles, gl.program_id(0) // row_tiles
    segment = segments - 1 - gl.program_id(1)
    lo = segment * span
    stop = gl.minimum(lo + span, k_len)
    hi = stop
    if CAUSAL:
        hi = gl.minimum(stop, (tile_row + 1) * 2 * HALF * P + offset)
    if hi > lo:
        dtype: gl.constexpr = K.dtype.element_ty
        q_smem = gl.allocate_shared_memory(dtype, [2, HALF, D], gl.NVMMASharedLayout.get_default_for([HALF, D], dtype))
        k_smem = gl.allocate_shared_memory(dtype, [STAGES, N, D], gl.NVMMASharedLayout.get_default_for([N, D], dtype))
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=128)
            mbarrier.init(k_empty.index(i), count=2)
        k_base = K + (bh // heads).to(gl.int64) * skb + (bh % heads // group).to(gl.int64) * skh
        gl.warp_specialize(
            [
                (_consumer, (gl.constexpr(0), q_smem, k_smem, k_full, k_empty, POOLED, ALPHA, WORDS, TOPS, bh, tile_row,
                             segment, segments, scale, pooled_rows, k_len, offset, width, blocks, lo, hi, window,
                             D, P, SHARE, B, N, STAGES, ROW_SCOPE, CAUSAL, MAXIMA, WHOLE)),
                (_consumer, (gl.constexpr(1), q_smem, k_smem, k_full, k_empty, POOLED, ALPHA, WORDS, TOPS, bh, tile_row,
                             segment, segments, scale, pooled_rows, k_len, offset, width, blocks, lo, hi, window,
                             D, P, SHARE, B, N, STAGES, ROW_SCOPE, CAUSAL, MAXIMA, WHOLE)),
                (_loader, (k_smem, k_full, k_empty, k_base, skn, WORDS, bh, tile_row, k_len, offset, width, blocks, lo,
                           hi, stop, D, P, SHARE, N, STAGES, CAUSAL and not MAXIMA)),
            ],
            [4, 4],
            [CONSUMER_REGS, LOADER_REGS],
        )  # fmt: skip
    elif not MAXIMA:
        rows: gl.constexpr = 2 * HALF // SHARE
        _clear(WORDS + bh.to(gl.int64) * blocks * width, tile_row * rows, blocks, width, lo, stop, rows)
