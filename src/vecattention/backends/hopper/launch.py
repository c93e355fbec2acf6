"""From tensors to launches. What a launch shape changes is speed, never a result."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vecattention import bits, machine, profile, spec
from vecattention.backends.hopper.attend import attend_kernel
from vecattention.backends.hopper.select import select_kernel

BLOCK = 128  # rows that share a list, and with it each fetched row of K and V
TILE = 128  # keys per step of the selection
SPAN = 8192  # keys that a program of the selection owns at most, unless told otherwise
START = 2.5  # tiles that could be done in the time that a program of the selection takes to start (fitted on an H100)
WORDS = 128  # words decoded at a time by the attention, one a thread of its loader
RING = 8192  # positions of the attention's ring: one decoding and the tiles in flight fit
ORDERED = 16  # items whose places a program finds
QUEUE = 16  # slots of the attention's queue of work items: more than its loader is ever ahead
SHARED = 232_448  # bytes of shared memory that a program can have
REGISTERS = 168  # per thread before the roles take their shares: 384 threads fill the register file


@dataclass(frozen=True)
class AttendShape:
    """Keys per tile, tiles in flight, registers of a consumer's and the loader's thread, programs (0: one an SM)."""

    step: int = 128
    stages: int = 3
    consumer_registers: int = 208
    loader_registers: int = 88
    programs: int = 0

    def __post_init__(self) -> None:
        _among("step", self.step, (64, 128))
        _among("stages", self.stages, range(2, 9))
        _shares(self.consumer_registers, self.loader_registers)
        _among("programs", self.programs, range(2**16))

    def shared(self, dim: int) -> int:
        """Bytes of shared memory: both halves of the queries, K and V in flight, barriers, bits and scratch (1 KiB)."""
        return 2 * dim * (BLOCK + 2 * self.stages * self.step) + 64 * self.stages + 12 * QUEUE + 1024


@dataclass(frozen=True)
class SelectShape:
    """Keys per program (about; 0: chosen by `balanced`), tiles in flight, registers of a consumer's and the loader's
    thread.
    """

    span: int = 0
    stages: int = 4
    consumer_registers: int = 224
    loader_registers: int = 56

    def __post_init__(self) -> None:
        _among("span", self.span, range(0, 2**24, TILE))
        _among("stages", self.stages, range(2, 9))
        _shares(self.consumer_registers, self.loader_registers)

    def shared(self, dim: int) -> int:
        """Bytes of shared memory: 128 pooled rows, K in flight, barriers."""
        return 2 * dim * (BLOCK + self.stages * TILE) + 64 * self.stages


def fitting(shape: AttendShape | SelectShape, dim: int) -> None:
    """Raise ValueError where a launch shape wants more shared memory than there is."""
    wanted = shape.shared(dim)
    if wanted > SHARED:
        raise ValueError(
            f"{shape} wants {wanted} bytes of shared memory at head_dim {dim}, a program can have {SHARED}; lower "
            f"stages or step, in the profile if it comes from one ({profile.VARIABLE})"
        )


def _among(name: str, value: int, wanted: Sequence[int]) -> None:
    if value not in wanted:
        shown = " or ".join(map(str, wanted))
        if isinstance(wanted, range):
            shown = f"a multiple of {wanted.step} from " if wanted.step > 1 else ""
            shown += f"{wanted[0]} to {wanted[-1]}"
        raise ValueError(f"{name} is {value}, wanted {shown}; correct the launch shape")


def _shares(consumer: int, loader: int) -> None:
    """Two consumers and a loader of 128 threads each share what 384 threads of `REGISTERS` have."""
    whole = all(x % 8 == 0 and 24 <= x <= 240 for x in (consumer, loader))
    if not whole or 2 * consumer + loader > 3 * REGISTERS:
        raise ValueError(
            f"consumer_registers and loader_registers are {consumer} and {loader}, wanted multiples of 8 from 24 to "
            f"240 with 2 * consumer + loader <= {3 * REGISTERS}; lower one of them"
        )


@triton.jit
def pool_kernel(Q, POOLED, sqb, sqh, sqn, heads, q_len, pooled_rows, D: tl.constexpr, P: tl.constexpr):
    """POOLED = mean of a block's real queries, rounded to Q's type; grid (pooled rows * B * H)."""
    g, bh = tl.program_id(0) % pooled_rows, tl.program_id(0) // pooled_rows
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    row, dims = g * P + tl.arange(0, P), tl.arange(0, D)
    place = Q + b * sqb + h * sqh + row.to(tl.int64)[:, None] * sqn + dims[None, :]
    # Read once: what is kept of it in L2 would push out the keys, which the selection reads next, again and again.
    query = tl.load(place, mask=row[:, None] < q_len, other=0.0, eviction_policy="evict_first")
    mean = tl.sum(query.to(tl.float32), 0) / tl.minimum(P, q_len - g * P)
    tl.store(POOLED + (bh.to(tl.int64) * pooled_rows + g) * D + dims, mean.to(POOLED.dtype.element_ty))


@triton.jit
def count_kernel(WORDS, COUNTS, width, blocks, lists, rows, q_len, k_len, CAUSAL: tl.constexpr, PAIR: tl.constexpr,
                 SIZE: tl.constexpr):  # fmt: skip
    """COUNTS = number of keys that 128 rows may see and their list (PAIR: either list) holds; grid (B * H * blocks).

    Behind them COUNTS holds how many items have been drawn: none.
    """
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    line = bh * lists + (2 * block if PAIR else block)
    keys = tl.minimum((block + 1) * rows + k_len - q_len, k_len) if CAUSAL else k_len
    total = tl.zeros([SIZE], tl.int32)
    for first in range(0, tl.cdiv(keys, 32), SIZE):
        at = first + tl.arange(0, SIZE)
        place = WORDS + line.to(tl.int64) * width + at
        word = tl.load(place, mask=at * 32 < keys, other=0)
        if PAIR:
            word = word | tl.load(place + width, mask=(at * 32 < keys) & (2 * block + 1 < lists), other=0)
        room = tl.minimum(tl.maximum(keys - at * 32, 0), 32)
        x = tl.where(room < 32, word & ((1 << room) - 1), word)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        total += ((x * 0x01010101) >> 24) & 0xFF
    tl.store(COUNTS + tl.program_id(0), tl.sum(total, 0))
    tl.store(COUNTS + tl.num_programs(0), 0, mask=tl.program_id(0) == 0)


@triton.jit
def order_kernel(COUNTS, items, size, SIZE: tl.constexpr, OTHERS: tl.constexpr):
    """COUNTS[items + 1 :] = the items of each stretch of ``size``, by descending count, of equal ones the last first.

    Grid (items / size * ceil(size / SIZE)): a program finds the places of SIZE items, which it compares with OTHERS at
    a time.
    """
    tiles = tl.cdiv(size, SIZE)
    start = tl.program_id(0) // tiles * size
    here = tl.program_id(0) % tiles * SIZE + tl.arange(0, SIZE)
    mine = tl.load(COUNTS + start + here, mask=here < size, other=-1)
    before = tl.zeros([SIZE, OTHERS], tl.int32)
    for first in range(0, size, OTHERS):
        there = first + tl.arange(0, OTHERS)
        theirs = tl.load(COUNTS + start + there, mask=there < size, other=-1)
        longer = theirs[None, :] > mine[:, None]
        later = (theirs[None, :] == mine[:, None]) & (there[None, :] > here[:, None])
        before += (longer | later).to(tl.int32)
    tl.store(COUNTS + items + 1 + start + tl.sum(before, 1), start + here, mask=here < size)


def select(query: Tensor, key: Tensor, alpha: Tensor, rule: spec.Rule, shape: SelectShape | None = None) -> Tensor:
    """Words of the kept keys of each block of R rows; see `vecattention.backends`."""
    batch, heads, q_len, dim = query.shape
    shape = shape or profile.of(query.device).shape(f"hopper.{select_kind(rule.causal)}", SelectShape())
    fitting(shape, dim)
    query, key = _aligned(query), _aligned(key)
    k_len, pool, row_scope = key.shape[2], rule.q_pooling_size, rule.max_scope == "row"
    rows, blocks, width = -(-q_len // pool), -(-q_len // rule.q_block_size), bits.words_for(k_len)
    row_tiles = -(-rows // BLOCK)
    window, unit = _windows(rule, k_len)
    if shape.span:
        span = max(1, shape.span // unit) * unit
    else:
        ends = [(tile + 1) * BLOCK * pool + k_len - q_len if rule.causal else k_len for tile in range(row_tiles)]
        span = balanced(
            tuple(min(end, k_len) for end in ends), batch * heads, unit, machine.multiprocessors(query.device)
        )
    span = min(span, -(-k_len // TILE) * TILE)
    segments = -(-k_len // span)
    pooled = query.new_empty(batch * heads, rows, dim)
    words = torch.empty((batch, heads, blocks, width), dtype=torch.int32, device=query.device)
    tops = torch.empty((batch, heads, rows, segments if row_scope else 0), device=query.device)
    limits = alpha.contiguous()

    def run(maxima: bool, tops: Tensor) -> None:
        select_kernel[(row_tiles * batch * heads, segments)](
            pooled, key, limits, words, tops, *_strides(key), heads, heads // key.shape[1], rows, k_len,
            k_len - q_len, width, blocks, row_tiles, segments, span, window, rule.scale,
            D=dim, P=pool, SHARE=rule.rows_per_block, B=rule.k_local_size, N=TILE, STAGES=shape.stages,
            ROW_SCOPE=row_scope, CAUSAL=rule.causal, MAXIMA=maxima, WHOLE=_whole(rule, k_len - q_len),
            CONSUMER_REGS=shape.consumer_registers, LOADER_REGS=shape.loader_registers, num_warps=4,
            maxnreg=REGISTERS,
        )  # fmt: skip

    with torch.cuda.device(query.device):
        pool_kernel[(rows * batch * heads,)](
            query, pooled, *_strides(query), heads, q_len, rows, D=dim, P=pool, num_warps=1
        )
        if row_scope:
            tops.fill_(-torch.inf)
            run(True, tops)
            tops = tops.amax(dim=-1)
        run(False, tops)
    return words


def attend(query: Tensor, key: Tensor, value: Tensor, selection: spec.Selection, scale: float,
           out: Tensor, lse: Tensor, shape: AttendShape | None = None) -> None:  # fmt: skip
    """Exact softmax attention over the selected keys; a row without keys gives 0 and -inf."""
    batch, heads, q_len, dim = query.shape
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    words, lists, pair = selection.words.contiguous(), selection.blocks, selection.block != BLOCK
    kind = attend_kind(pair, selection.causal)
    shape = shape or profile.of(query.device).shape(f"hopper.{kind}", AttendShape())
    fitting(shape, dim)
    blocks = -(-lists // 2) if pair else lists
    items = batch * heads * blocks
    group = heads // key.shape[1]
    programs = min(items, shape.programs or machine.multiprocessors(query.device))
    # Of each item how many keys it has; how many items are drawn; the order in which they are.
    counts = torch.empty(2 * items + 1, dtype=torch.int32, device=query.device)
    rings = torch.empty(programs * RING, dtype=torch.int32, device=query.device)
    with torch.cuda.device(query.device):
        count_kernel[(items,)](
            words, counts, words.shape[3], blocks, lists, BLOCK, q_len, selection.k_len, CAUSAL=selection.causal,
            PAIR=pair, SIZE=1024,
        )  # fmt: skip
        stretch = group * blocks  # the items that read the same keys and values
        order_kernel[(items // stretch * -(-stretch // ORDERED),)](counts, items, stretch, SIZE=ORDERED, OTHERS=256)
        attend_kernel[(programs,)](
            query, key, value, words, counts, rings, out, lse, *_strides(query), *_strides(key), *_strides(value),
            *_strides(out), *lse.stride()[:2], heads, group, q_len, selection.k_len, words.shape[3],
            blocks, lists, items, scale,
            D=dim, R=BLOCK, N=shape.step, STAGES=shape.stages, SEG=WORDS, RING=RING, QUEUE=QUEUE,
            CAUSAL=selection.causal, PAIR=pair, CONSUMER_REGS=shape.consumer_registers,
            LOADER_REGS=shape.loader_registers, num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip


def select_kind(causal: bool) -> str:
    """The name of a profile's launch shape for this kind of selection."""
    return "select_causal" if causal else "select"


def attend_kind(pair: bool, causal: bool) -> str:
    """The name of a profile's launch shape for this kind of attention; ``pair``: over lists of 64 rows."""
    return "attend" + ("_pairs" if pair else "") + ("_causal" if causal else "")


@functools.lru_cache(maxsize=1024)
def balanced(seen: tuple[int, ...], heads: int, unit: int, processors: int) -> int:
    """Keys per program of the selection, a multiple of ``unit``: so many that the busiest multiprocessor does least.

    A multiprocessor runs one program at a time, and each costs its tiles and what its start takes. On an H100 the times
    of 32K tokens, less what pooling takes, followed this within 6 percent
    (benchmarks/results/h100-spans-2026-11-24.jsonl).

    Args:
        seen: keys that each tile of pooled rows sees.
        heads: B * H.
    """

    def longest(span: int) -> float:
        programs = heads * sum(-(-keys // span) for keys in seen)
        return -(-programs // processors) * (span / TILE + START)

    return min(range(unit, max(unit, SPAN) + 1, unit), key=longest)


def _whole(rule: spec.Rule, offset: int) -> bool:
    """Whether a stretch of k_local_size keys holds candidates of a row only or none, and a word a block's own or none.

    So it is where rows see all keys, and where pooled rows begin with a stretch, blocks with a word, as in a prefill.
    """
    return not rule.causal or (offset % 32 == 0 and offset % rule.k_local_size == 0)


def _windows(rule: spec.Rule, k_len: int) -> tuple[int, int]:
    """(keys per window, keys of which a program owns a multiple): whole windows and whole tiles."""
    window = min(rule.k_local_size * rule.group_k_block, -(-k_len // TILE) * TILE)
    return window, TILE if rule.max_scope == "row" else window


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and row; 0 where there is only one, so that they divide by whatever the copies want."""
    (batch, heads, rows, _), (b, h, n, _) = x.shape, x.stride()
    return (b if batch > 1 else 0, h if heads > 1 else 0, n if rows > 1 else 0)


def _aligned(x: Tensor) -> Tensor:
    """The tensor itself where 16-byte copies and 32-bit row offsets can read it, as they can the usual layouts; else a
    copy: of a part of a fused projection of 15,360 numbers, for instance, from 139,811 rows on.
    """
    (_, _, rows, dim), (_, _, row, one), (b, h, n) = x.shape, x.stride(), _strides(x)
    whole = one == 1 and not (b % 16 or h % 16 or n % 16 or x.data_ptr() % 16)
    return x if whole and (rows - 1) * row + dim < 2**31 else x.contiguous()
