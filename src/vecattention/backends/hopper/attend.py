"""Exact softmax attention over selected keys on Hopper: one CTA per SM, a team of three roles.

    loader     (4 warps)  bits -> positions in a ring (in L2), rows of K and V -> shared memory (cp.async); the keys
                          a tile ahead of the values, in the order in which they are wanted
    consumer 0 (4 warps)  rows 0..63 of the block:   S = Q K^T, online softmax, O += P V (wgmma)
    consumer 1 (4 warps)  rows 64..127, likewise: both use every row that the loader fetched

Each fetched row of K and V serves 128 query rows, which is what keeps the tensor cores, not the L2 cache, the limit.
Lists of 64 rows go in pairs (PAIR): the keys of both are fetched, and each consumer hides what only the other lists.
The loader runs ahead by STAGES tiles, also into the next block of queries, so that neither decoding nor the first
loads are waited for. It also draws the work items but the first from a counter, since lists differ in length, the
longest list of those that share keys first; which program takes an item changes no result.
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

HALF = gl.constexpr(64)  # rows of a consumer
NO_KEY = gl.constexpr(-1.0e30)


@gluon.jit
def _popcount(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _item(item, blocks, heads):
    """(b, h, bh, g) of a work item: block g of head h of batch row b, bh counts the heads of all batch rows."""
    bh = item // blocks
    return bh // heads, bh % heads, bh, item % blocks


@gluon.jit
def _words(words, first, keys, SEG: gl.constexpr):
    """SEG words from ``first`` on, one a thread; bits of keys at or past ``keys`` are cleared."""
    at = first + gl.arange(0, SEG, gl.BlockedLayout([1], [32], [4], [0]))
    word = gl.load(words + at, mask=at * 32 < keys, other=0)
    room = gl.minimum(gl.maximum(keys - at * 32, 0), 32)
    return gl.where(room < 32, word & ((1 << room) - 1), word)


@gluon.jit
def _sum_and_max(total_a, most_a, total_b, most_b):
    return total_a + total_b, gl.maximum(most_a, most_b)


@gluon.jit
def _decode(ring, filled, mine, other, first, SEG: gl.constexpr, RING: gl.constexpr, PAIR: gl.constexpr):
    """Append the positions of the set bits of SEG words to the ``filled`` ones of the ring, ascending; their number.

    Each thread peels the bits of its word one by one, for as many rounds as the fullest word needs. PAIR: of two lists'
    words; bits 30 and 31 of a position say which of them hold it.
    """
    word = mine | other
    count = _popcount(word)
    after = gl.associative_scan(count, 0, _add)
    total, most = gl.reduce((count, count), 0, _sum_and_max)
    slot = filled + after - count
    key = (first + gl.arange(0, SEG, gl.BlockedLayout([1], [32], [4], [0]))) * 32
    for _ in range(most):
        lowest = word & (0 - word)
        bit = _popcount(lowest - 1)
        entry = key + bit
        if PAIR:
            entry = entry | (((mine >> bit) & 1) << 30) | ((other >> bit) << 31)
        gl.store(ring + (slot & (RING - 1)), entry, mask=word != 0)
        word = word ^ lowest
        slot += 1
    return total


@gluon.jit
def _load(smem, base, index, stride, D: gl.constexpr, N: gl.constexpr):
    """Start copying N rows of D values to shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    dims = gl.arange(0, D, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(smem, base + ((index * stride)[:, None] + dims[None, :]))


@gluon.jit
def _fetch(query, Q, item, items, blocks, heads, sqb, sqh, sqn, q_len, HALF_INDEX: gl.constexpr, D: gl.constexpr,
           R: gl.constexpr):  # fmt: skip
    """Start copying a consumer's half of the queries of a work item (of any other, when there is none left)."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    b, h, bh, g = _item(gl.minimum(item, items - 1), blocks, heads)
    row = g * R + HALF_INDEX * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    _load(query, Q + b.to(gl.int64) * sqb + h.to(gl.int64) * sqh, gl.minimum(row, q_len - 1), sqn, D, HALF)
    async_copy.commit_group()


@gluon.jit
def _values(v_smem, v_full, v_empty, stage, phase, base, index, stride, D: gl.constexpr, N: gl.constexpr,
            STAGES: gl.constexpr, PAIR: gl.constexpr):  # fmt: skip
    """Start copying the values of a tile once their buffer is free; the next buffer and its phase.

    The positions are masked once more: a tensor carried around a loop has lost that its rows are whole vectors.
    """
    mbarrier.wait(v_empty.index(stage), phase)
    _load(v_smem.index(stage), base, index & 0x3FFFFFFF if PAIR else index, stride, D, N)
    async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
    return _next_buffer(stage, phase, STAGES)


@gluon.jit
def _queue(queue, queued, order, item, QUEUE: gl.constexpr):
    """Tell the consumers which item comes ``order``-th; the number of the one after it."""
    queue.index(order % QUEUE).store(gl.full([1], item, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    mbarrier.arrive(queued.index(order % QUEUE))
    return order + 1


@gluon.jit
def _queued(queue, queued, order, QUEUE: gl.constexpr):
    """Which item comes ``order``-th, once the loader says so; the number of the one after it."""
    mbarrier.wait(queued.index(order % QUEUE), order // QUEUE & 1)
    return gl.sum(queue.index(order % QUEUE).load(gl.BlockedLayout([1], [32], [4], [0])), 0), order + 1


@gluon.jit
def _loader(k_smem, v_smem, members, queue, k_full, k_empty, v_full, v_empty, queued, K, V, WORDS, COUNTS, RINGS,
            skb, skh, skn, svb, svh, svn, heads, group, q_len, k_len, width, blocks, lists, items,
            D: gl.constexpr, R: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, SEG: gl.constexpr,
            RING: gl.constexpr, QUEUE: gl.constexpr, CAUSAL: gl.constexpr, PAIR: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ring = RINGS + gl.program_id(0).to(gl.int64) * RING
    stage, phase = 0, 1
    v_stage, v_phase = 0, 1
    item = gl.load(COUNTS + items + 1 + gl.program_id(0))
    # Nobody reads this entry, as consumers load the first item themselves. Without it the assembler of Triton 3.6 keeps
    # the addresses of the copies in half as many registers, and calls take 1 % longer.
    order = _queue(queue, queued, 0, item, QUEUE)
    while item < items:
        drawn = gl.atomic_add(COUNTS + items, 1, sem="relaxed") + gl.num_programs(0)
        following = gl.where(drawn < items, gl.load(COUNTS + items + 1 + gl.minimum(drawn, items - 1)), items)
        b, h, bh, g = _item(item, blocks, heads)
        count = gl.load(COUNTS + item)
        words = WORDS + (bh * lists + (2 * g if PAIR else g)).to(gl.int64) * width
        k_base = K + b.to(gl.int64) * skb + (h // group).to(gl.int64) * skh
        v_base = V + b.to(gl.int64) * svb + (h // group).to(gl.int64) * svh
        keys = gl.minimum(g * R + R + k_len - q_len, k_len) if CAUSAL else k_len
        keys_other = gl.where(2 * g + 1 < lists, keys, 0)
        mine = _words(words, 0, keys, SEG)
        other = _words(words + width, 0, keys_other, SEG) if PAIR else gl.zeros_like(mine)
        order = _queue(queue, queued, order, following, QUEUE)
        filled = 0
        segment = 0
        index = gl.zeros([N], gl.int32, flat)
        gone = gl.zeros([N], gl.int32, rows)
        tiles = gl.maximum((count + N - 1) // N, 1)
        for t in range(-1, tiles):
            need = gl.minimum(t * N + 2 * N, count)
            while filled < need:
                now, now_other = mine, other
                mine = _words(words, segment + SEG, keys, SEG)
                if PAIR:
                    other = _words(words + width, segment + SEG, keys_other, SEG)
                filled += _decode(ring, filled, now, now_other, segment, SEG, RING, PAIR)
                segment += SEG
            entry = index
            here = gl.convert_layout(index & 0x3FFFFFFF if PAIR else index, rows)
            barrier()
            slot = gl.minimum(t * N + N + gl.arange(0, N, flat), count - 1)
            index = gl.load(ring + (slot & (RING - 1)), mask=slot >= 0, other=0)
            if t >= 0:
                mbarrier.wait(k_empty.index(stage), phase)
                if PAIR:
                    members.index(2 * stage).store(_pack_bits(entry >> 30, N))
                    members.index(2 * stage + 1).store(_pack_bits(entry >> 31, N))
                    mbarrier.arrive(k_full.index(stage))
                _load(k_smem.index(stage), k_base, here, skn, D, N)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                stage, phase = _next_buffer(stage, phase, STAGES)
                if t > 0:
                    v_stage, v_phase = _values(v_smem, v_full, v_empty, v_stage, v_phase, v_base, gone, svn, D, N,
                                               STAGES, PAIR)  # fmt: skip
            gone = here
        v_stage, v_phase = _values(v_smem, v_full, v_empty, v_stage, v_phase, v_base, gone, svn, D, N, STAGES, PAIR)
        item = following


@gluon.jit
def _pack_bits(entry, N: gl.constexpr):
    """int32 words [N // 32] of the lowest bits of [N] entries."""
    place = gl.arange(0, N, entry.type.layout) & 31
    return gl.sum(gl.reshape((entry & 1) << place, (N // 32, 32)), 1)


@gluon.jit
def _below(n):
    """int32 with the n lowest bits set, 0 <= n <= 32."""
    return gl.where(n >= 32, -1, (1 << (n & 31)) - 1)


@gluon.jit
def _limits(item, WORDS, COUNTS, blocks, heads, lists, width, q_len, k_len, HALF_INDEX: gl.constexpr, R: gl.constexpr,
            CAUSAL: gl.constexpr, PAIR: gl.constexpr, ROWS: gl.constexpr):  # fmt: skip
    """(entries of a work item's list, how many of them each row sees: all, or those up to itself)."""
    b, h, bh, g = _item(item, blocks, heads)
    count = gl.load(COUNTS + item)
    row = g * R + HALF_INDEX * HALF + gl.arange(0, HALF, ROWS)
    limit = gl.zeros_like(row) + count
    if CAUSAL:
        words = WORDS + (bh * lists + (2 * g if PAIR else g)).to(gl.int64) * width
        start = g * R + k_len - q_len
        limit = _visible_entries(words, width, 2 * g + 1 < lists, count, start, row + (k_len - q_len), k_len, R, PAIR)
    return count, limit


@gluon.jit
def _visible_entries(words, width, pair, count, start, position, k_len, R: gl.constexpr, PAIR: gl.constexpr):
    """How many entries of the ascending list each row sees: all before the block's span, then those up to itself."""
    seen = gl.zeros_like(position)
    own = gl.zeros_like(position)
    last = gl.minimum(start + R, k_len)
    for i in gl.static_range(R // 32 + 1):
        at = start // 32 + i
        place = at + gl.zeros_like(position)
        word = gl.load(words + place, mask=place < width, other=0)
        if PAIR:
            word = word | gl.load(words + width + place, mask=(place < width) & pair, other=0)
        skip = _below(gl.minimum(gl.maximum(start - at * 32, 0), 32))
        seen += _popcount(word & (_below(gl.minimum(gl.maximum(position + 1 - at * 32, 0), 32)) & ~skip))
        own += _popcount(word & (_below(gl.minimum(gl.maximum(last - at * 32, 0), 32)) & ~skip))
    return count - own + seen


@gluon.jit
def _hide(logits, left, N: gl.constexpr, ACC: gl.constexpr):
    """-inf from entry ``left`` of the tile on: there is no key, or one after the row's position."""
    entry = gl.arange(0, N, gl.SliceLayout(0, ACC))
    return gl.where(entry[None, :] < left[:, None], logits, float("-inf"))


@gluon.jit
def _member_words(members, at, none, N: gl.constexpr):
    """Words [N // 32] that say which entries of a tile this consumer's list holds."""
    cells = gl.reshape(none, (HALF, N // 32, 4, 4, 2))
    layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, cells.type.layout)))
    return members.index(at).load(gl.SliceLayout(0, layout))


@gluon.jit
def _mask_unlisted(logits, words, N: gl.constexpr, ACC: gl.constexpr):
    """-inf for entries whose bit is not set; a thread holds all octets o and pairs c of 8 o + 2 q + c for its own q."""
    cells = gl.reshape(logits, (HALF, N // 32, 4, 4, 2))
    L4: gl.constexpr = gl.SliceLayout(4, cells.type.layout)
    L3: gl.constexpr = gl.SliceLayout(3, L4)
    quad = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L4))))
    octet = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L3)))
    P1: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, gl.SliceLayout(1, cells.type.layout)))
    pair = gl.arange(0, 2, gl.SliceLayout(0, P1))[None, :][:, None, :][:, None, :, :][:, None, :, :, :]
    word = words[None, :][:, :, None][:, :, :, None]
    word = (word >> (2 * quad)[None, :][:, None, :][:, :, None, :])[:, :, :, :, None]
    place = 8 * octet[None, :][:, None, :][:, :, :, None][:, :, :, :, None] + pair
    kept = gl.where(((word >> place) & 1) != 0, cells, float("-inf"))
    return gl.convert_layout(gl.reshape(kept, (HALF, N)), ACC, assert_trivial=True)


@gluon.jit
def _thread_sums(weight, N: gl.constexpr):
    """[HALF, N] -> [HALF, 4]: what each of a row's four threads holds of it; they are added once an item is over."""
    return gl.sum(gl.sum(gl.reshape(weight, (HALF, N // 8, 4, 2)), 3), 1)


@gluon.jit
def _next_buffer(stage, phase, STAGES: gl.constexpr):
    """(buffer, phase of its barriers) of the next tile."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _arrived(full, phase, wanted):
    """Wait until a buffer is full, if it is ``wanted`` at all.

    The tensor cores read by another path than copies write: hence the fence. It takes its time; in `_step` a product
    runs meanwhile.
    """
    mbarrier.wait(full, phase, pred=wanted)
    fence_async_shared()


@gluon.jit
def _step(acc, top, total, part, query, k_smem, v_smem, members, k_full, k_empty, v_full, v_empty, last, last_phase,
          stage, phase, scale, left, mask, more, HALF_INDEX: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
          PAIR: gl.constexpr, S_ACC: gl.constexpr, O_ACC: gl.constexpr):  # fmt: skip
    """Scores of the next tile (in ``stage``), and the weights of the last one meet their values; then its softmax.

    The keys have arrived. ``left``: how many entries of the next tile each row sees, if not all (``mask``).
    ``more``: there is one after it.
    """
    none = gl.zeros([HALF, N], gl.float32, S_ACC)
    keys, values = k_smem.index(stage).permute((1, 0)), v_smem.index(last)
    words = _member_words(members, 2 * stage + HALF_INDEX, none, N) if PAIR else left
    ahead = warpgroup_mma(query, keys, none, use_acc=False, is_async=True)
    _arrived(v_full.index(last), last_phase, True)
    mixed = warpgroup_mma(part, values, acc, is_async=True)
    later, later_phase = _next_buffer(stage, phase, STAGES)
    # What hides entries goes through the wait, lest the compiler computes it before, and moves it out of the way.
    logits, left, words = warpgroup_mma_wait(1, deps=(ahead, left, words))
    mbarrier.arrive(k_empty.index(stage))
    if PAIR:
        logits = _mask_unlisted(logits, words, N, S_ACC)
    if mask:
        logits = _hide(logits, left, N, S_ACC)
    higher = gl.maximum(top, gl.max(logits, 1) * scale)
    _arrived(k_full.index(later), later_phase, more)
    weight = gl.exp2(logits * scale - higher[:, None])
    decay = gl.exp2(top - higher)
    faded = gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout), assert_trivial=True)[:, None]
    total = total * faded + _thread_sums(weight, N)
    acc = warpgroup_mma_wait(0, deps=(mixed,))
    mbarrier.arrive(v_empty.index(last))
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O_ACC))[:, None]
    part = gl.convert_layout(weight.to(part.dtype), part.type.layout)
    return acc, higher, total, part, stage, phase, later, later_phase


@gluon.jit
def _write(base, out, first, stride, q_len, D: gl.constexpr):
    """Store rows [HALF, D] of an accumulator from row ``first`` on, in whole vectors.

    The four threads of a row hold two of every eight columns each. In two steps, which are shuffles alone and take no
    shared memory, each gets four neighbours, then eight.
    """
    more: gl.constexpr = [[0, 32], [8, 0]] if D == 64 else [[0, 32], [0, 64], [8, 0]]
    lanes: gl.constexpr = [[1, 0], [2, 0], [4, 0]]
    FOUR: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16]] + more, [[0, 8], [0, 4]] + lanes, [[16, 0], [32, 0]], [], [HALF, D])  # fmt: skip
    EIGHT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4]] + more, [[0, 8], [0, 16]] + lanes, [[16, 0], [32, 0]], [], [HALF, D])  # fmt: skip
    out = gl.convert_layout(gl.convert_layout(out, FOUR), EIGHT)
    row = (first + gl.arange(0, HALF, gl.SliceLayout(1, EIGHT)))[:, None]
    dims = gl.arange(0, D, gl.SliceLayout(0, EIGHT))
    gl.store(base + row.to(gl.int64) * stride + dims[None, :], out, mask=row < q_len)


@gluon.jit
def _consumer(HALF_INDEX: gl.constexpr, q_smem, k_smem, v_smem, members, queue, k_full, k_empty, v_full, v_empty,
              queued, Q, WORDS, COUNTS, OUT, LSE, sqb, sqh, sqn, sob, soh, son, slb, slh, heads, q_len, k_len, width,
              blocks, lists, items, scale, D: gl.constexpr, R: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
              QUEUE: gl.constexpr, CAUSAL: gl.constexpr, PAIR: gl.constexpr):  # fmt: skip
    S_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_OP: gl.constexpr = gl.DotOperandLayout(0, O_ACC, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_ACC)
    MASKED: gl.constexpr = R // N + 1 if CAUSAL else 1
    dtype: gl.constexpr = q_smem.dtype
    query = q_smem.index(HALF_INDEX)
    none = gl.zeros([HALF, N], gl.float32, S_ACC)
    last, last_phase = 0, 0
    item, order = gl.load(COUNTS + items + 1 + gl.program_id(0)), 1
    _fetch(query, Q, item, items, blocks, heads, sqb, sqh, sqn, q_len, HALF_INDEX, D, R)
    count, limit = _limits(item, WORDS, COUNTS, blocks, heads, lists, width, q_len, k_len, HALF_INDEX, R, CAUSAL, PAIR,
                           ROWS)  # fmt: skip
    while item < items:
        tiles = gl.maximum((count + N - 1) // N, 1)
        async_copy.wait_group(0)
        barrier()
        _arrived(k_full.index(last), last_phase, True)
        if PAIR:
            words = _member_words(members, 2 * last + HALF_INDEX, none, N)
        ahead = warpgroup_mma(query, k_smem.index(last).permute((1, 0)), none, use_acc=False, is_async=True)
        # Queued before the first keys were copied; but copies that arrive promise nothing of ordinary stores.
        following, order = _queued(queue, queued, order, QUEUE)
        stage, phase = _next_buffer(last, last_phase, STAGES)
        logits = warpgroup_mma_wait(0, deps=(ahead,))
        mbarrier.arrive(k_empty.index(last))
        if PAIR:
            logits = _mask_unlisted(logits, words, N, S_ACC)
        if tiles <= MASKED:
            logits = _hide(logits, limit, N, S_ACC)
        top = gl.maximum(gl.max(logits, 1) * scale, NO_KEY)
        _arrived(k_full.index(stage), phase, tiles > 1)
        weight = gl.exp2(logits * scale - top[:, None])
        total = _thread_sums(weight, N)
        part = gl.convert_layout(weight.to(dtype), P_OP)
        acc = gl.zeros([HALF, D], gl.float32, O_ACC)
        clear = gl.maximum(tiles - MASKED, 1)
        for t in range(1, tiles):
            acc, top, total, part, last, last_phase, stage, phase = _step(
                acc, top, total, part, query, k_smem, v_smem, members, k_full, k_empty, v_full, v_empty,
                last, last_phase, stage, phase, scale, limit - t * N, t >= clear, t < tiles - 1, HALF_INDEX,
                N, STAGES, PAIR, S_ACC, O_ACC)  # fmt: skip
        _fetch(query, Q, following, items, blocks, heads, sqb, sqh, sqn, q_len, HALF_INDEX, D, R)
        _arrived(v_full.index(last), last_phase, True)
        mixed = warpgroup_mma(part, v_smem.index(last), acc, is_async=True)
        count, limit = _limits(gl.minimum(following, items - 1), WORDS, COUNTS, blocks, heads, lists, width, q_len,
                               k_len, HALF_INDEX, R, CAUSAL, PAIR, ROWS)  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(mixed,))
        mbarrier.arrive(v_empty.index(last))
        last, last_phase = stage, phase

        b, h, bh, g = _item(item, blocks, heads)
        row = g * R + HALF_INDEX * HALF + gl.arange(0, HALF, ROWS)
        total = gl.convert_layout(gl.sum(total, 1), ROWS, assert_trivial=True)
        empty = top <= NO_KEY
        total = gl.where(empty, 1.0, total)
        inverse = gl.where(empty, 0.0, 1.0 / total)
        out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, O_ACC))[:, None]
        inside = row < q_len
        lse = gl.where(empty, float("-inf"), (top + gl.log2(total)) * 0.6931471805599453)
        gl.store(LSE + b.to(gl.int64) * slb + h.to(gl.int64) * slh + row, lse, mask=inside)
        base = OUT + b.to(gl.int64) * sob + h.to(gl.int64) * soh
        _write(base, out.to(dtype), g * R + HALF_INDEX * HALF, son, q_len, D)
        item = following


@gluon.jit
def attend_kernel(Q, K, V, WORDS, COUNTS, RINGS, OUT, LSE,
                  sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, slb, slh,
                  heads, group, q_len, k_len, width, blocks, lists, items, scale,
                  D: gl.constexpr, R: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, SEG: gl.constexpr,
                  RING: gl.constexpr, QUEUE: gl.constexpr, CAUSAL: gl.constexpr, PAIR: gl.constexpr,
                  CONSUMER_REGS: gl.constexpr, LOADER_REGS: gl.constexpr):  # fmt: skip
    """out, lse of every block of R rows; a persistent grid of at most one program per SM, `items` = B * H * blocks."""
    dtype: gl.constexpr = K.dtype.element_ty
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], dtype)
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [2, HALF, D], rows)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, N, D], tile)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, N, D], tile)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    queued = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    members = gl.allocate_shared_memory(gl.int32, [2 * STAGES, N // 32], flat)
    queue = gl.allocate_shared_memory(gl.int32, [QUEUE, 1], flat)
    for i in gl.static_range(QUEUE):
        mbarrier.init(queued.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=129 if PAIR else 128)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=128)
        mbarrier.init(v_empty.index(i), count=2)
    scale = scale * 1.4426950408889634
    gl.warp_specialize(
        [
            (_consumer, (gl.constexpr(0), q_smem, k_smem, v_smem, members, queue, k_full, k_empty, v_full, v_empty,
                         queued, Q, WORDS, COUNTS, OUT, LSE, sqb, sqh, sqn, sob, soh, son, slb, slh, heads, q_len,
                         k_len, width, blocks, lists, items, scale, D, R, N, STAGES, QUEUE, CAUSAL, PAIR)),
            (_consumer, (gl.constexpr(1), q_smem, k_smem, v_smem, members, queue, k_full, k_empty, v_full, v_empty,
                         queued, Q, WORDS, COUNTS, OUT, LSE, sqb, sqh, sqn, sob, soh, son, slb, slh, heads, q_len,
                         k_len, width, blocks, lists, items, scale, D, R, N, STAGES, QUEUE, CAUSAL, PAIR)),
            (_loader, (k_smem, v_smem, members, queue, k_full, k_empty, v_full, v_empty, queued, K, V, WORDS, COUNTS,
                       RINGS, skb, skh, skn, svb, svh, svn, heads, group, q_len, k_len, width, blocks, lists, items,
                       D, R, N, STAGES, SEG, RING, QUEUE, CAUSAL, PAIR)),
        ],
        [4, 4],
        [CONSUMER_REGS, LOADER_REGS],
    )  # fmt: skip
