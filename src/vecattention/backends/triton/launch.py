"""From tensors to launches: strides, grids and launch shapes. What a launch shape changes is speed, never a result."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from vecattention import bits, profile, spec
from vecattention.backends.triton.attend import attend_kernel
from vecattention.backends.triton.select import pool_kernel, select_kernel

RINGS = 32 * 2**20  # bytes of the rings of a launch of the attention, at most: each of its programs has one


@dataclass(frozen=True)
class SelectShape:
    """Pooled rows, keys per step and keys per program of the selection, with its warps and pipeline stages."""

    rows: int = 64
    step: int = 64
    segment: int = 2048
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        _powers(self, {"rows": (16, 256), "step": (32, 256), "segment": (64, 2**16), "warps": (1, 16)})


@dataclass(frozen=True)
class AttendShape:
    """Keys per step, words per decoded segment, warps and pipeline stages of the attention."""

    step: int = 64
    words: int = 64
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        _powers(self, {"step": (16, 256), "words": (1, 256), "warps": (1, 16)})


def _powers(shape: SelectShape | AttendShape, limits: dict[str, tuple[int, int]]) -> None:
    """Raise ValueError where a field is no power of 2 within its limits, or the stages are none.

    What shared memory a shape takes is Triton's to decide: it refuses to launch one for which there is too little.
    """
    for name, (low, high) in limits.items():
        value = getattr(shape, name)
        if not low <= value <= high or value & (value - 1):
            raise ValueError(f"{name} is {value}, wanted a power of 2 from {low} to {high}; correct the launch shape")
    if not 1 <= shape.stages <= 8:
        raise ValueError(f"stages is {shape.stages}, wanted 1 to 8; correct the launch shape")


def select_shape(head_dim: int, dtype: torch.dtype) -> SelectShape:
    """The launch shape of the selection, for rules that it holds: R rows a block and B keys a tile."""
    return SelectShape(warps=8, stages=1) if dtype == torch.float32 or head_dim > 128 else SelectShape()


def attend_shape(block: int, head_dim: int, dtype: torch.dtype) -> AttendShape:
    """The launch shape of the attention over gathered keys: in half precision up to head_dim 128 none that spills."""
    if dtype == torch.float32:
        return AttendShape(step=32 if head_dim > 64 else 64, warps=8 if block > 32 else 4, stages=1)
    if head_dim > 128:
        return AttendShape(step=32, warps=8, stages=2)
    narrow = block > 64 or (head_dim > 64 and block > 16)
    return AttendShape(step=32 if narrow else 64, warps=8 if block > 64 else 4)


def select(query: Tensor, key: Tensor, alpha: Tensor, rule: spec.Rule, shape: SelectShape | None = None) -> Tensor:
    """Words of the kept keys of each block of R rows; see `vecattention.backends`."""
    batch, heads, q_len, dim = query.shape
    k_len, pool = key.shape[2], rule.q_pooling_size
    query, key = _unit_stride(query), _unit_stride(key)
    shape = shape or _select_shape(rule, query)
    plan = _Segments.of(rule, k_len, shape)
    rows, blocks, width = -(-q_len // pool), -(-q_len // rule.q_block_size), bits.words_for(k_len)
    pooled = torch.empty((batch, heads, rows, dim), dtype=torch.float32, device=query.device)
    words = torch.zeros((batch, heads, blocks, width), dtype=torch.int32, device=query.device)
    segments = plan.segments if plan.carry else 0
    tops = torch.empty((batch, heads, rows, segments), dtype=torch.float32, device=query.device)
    limits = alpha.contiguous()
    block_d = triton.next_power_of_2(dim)
    share = rule.rows_per_block
    slots = triton.next_power_of_2(share)  # of a block's pooled rows in a program; 1, 2, 4 or 8
    row_tiles = -(-(rows if share == slots else blocks * slots) // shape.rows)

    def run(maxima: bool, carry: bool, tops: Tensor) -> None:
        select_kernel[(row_tiles * plan.segments * batch * heads,)](
            pooled, key, limits, words, tops, *key.stride()[:3], heads, heads // key.shape[1], rows, k_len,
            k_len - q_len, width, blocks, row_tiles, plan.segments, plan.per_unit, plan.unit, plan.group,
            D=dim, BLOCK_D=block_d, P=pool, SHARE=share, SLOTS=slots, B=rule.k_local_size, T=shape.rows, KB=shape.step,
            SEG=plan.segment, ROW_SCOPE=rule.max_scope == "row", CAUSAL=rule.causal, MAXIMA=maxima,
            CARRY=carry, SPLIT=query.dtype != torch.float32, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip

    with _device(query):
        pool_kernel[(rows * batch * heads,)](
            query, pooled, *query.stride()[:3], heads, q_len, rows, rule.scale, D=dim, BLOCK_D=block_d, P=pool
        )
        if plan.carry:
            tops.fill_(-torch.inf)
            run(True, False, tops)
            if rule.max_scope == "row":
                tops = tops.amax(dim=-1)
        run(False, plan.carry, tops)
    return words


def attend(query: Tensor, key: Tensor, value: Tensor, selection: spec.Selection, scale: float,
           out: Tensor, lse: Tensor, shape: AttendShape | None = None) -> None:  # fmt: skip
    """Exact softmax attention over the selected keys; a row without keys gives 0 and -inf."""
    batch, heads, q_len, dim = query.shape
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    words = selection.words.contiguous()
    if shape is None:
        default = attend_shape(selection.block, dim, query.dtype)
        shape = profile.of(query.device).shape(f"triton.{attend_kind(selection.block, dim, query.dtype)}", default)
    ring = triton.next_power_of_2(shape.words * bits.WORD + shape.step)
    items = batch * heads * selection.blocks
    programs = min(items, max(1, RINGS // (4 * ring)))
    rings = torch.empty((programs, ring), dtype=torch.int32, device=query.device)
    with _device(query):
        for done in range(0, items, programs):
            attend_kernel[(min(programs, items - done),)](
                query, key, value, words, rings, out, lse, *query.stride()[:3], *key.stride()[:3],
                *value.stride()[:3], *out.stride()[:3], *lse.stride()[:2], heads, heads // key.shape[1], q_len,
                selection.k_len, words.shape[3], selection.blocks, done, scale,
                D=dim, BLOCK_D=triton.next_power_of_2(dim), R=selection.block,
                BM=triton.next_power_of_2(max(16, selection.block)), BN=shape.step, SEGMENT=shape.words, RING=ring,
                CAUSAL=selection.causal, STAGES=shape.stages,
                PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=shape.warps,
            )  # fmt: skip


def attend_kind(block: int, head_dim: int, dtype: torch.dtype) -> str:
    """The name of a profile's launch shape for this kind of attention."""
    return f"attend_r{block}_d{head_dim}_{_precision(dtype)}"


def select_kind(head_dim: int, dtype: torch.dtype) -> str:
    """The name of a profile's launch shape for this kind of selection."""
    return f"select_d{head_dim}_{_precision(dtype)}"


def _select_shape(rule: spec.Rule, query: Tensor) -> SelectShape:
    """The profile's launch shape of the selection, or the default; where it does not hold a rule, a wider default."""
    default = select_shape(query.shape[3], query.dtype)
    kind = select_kind(query.shape[3], query.dtype)
    found = profile.of(query.device).shape(f"triton.{kind}", default)
    if rule.rows_per_block <= found.rows and rule.k_local_size <= found.step:
        return found
    rows, step = max(default.rows, rule.rows_per_block), max(default.step, rule.k_local_size)
    stages = default.stages if step == default.step else min(default.stages, 2)
    return replace(default, rows=rows, step=step, stages=stages)  # Ada has 99 KiB of shared memory for a program


def _precision(dtype: torch.dtype) -> str:
    return "single" if dtype == torch.float32 else "half"


@dataclass(frozen=True)
class _Segments:
    """How the keys are cut: units of whole windows (whole words), each of per_unit segments."""

    segment: int
    unit: int
    per_unit: int
    segments: int
    group: int
    carry: bool

    @classmethod
    def of(cls, rule: spec.Rule, k_len: int, shape: SelectShape) -> _Segments:
        tile = rule.k_local_size
        group = min(rule.group_k_block, -(-k_len // tile))
        unit = window = tile * group
        if window % bits.WORD:
            unit = 2 * window  # windows that end inside a word share their unit with the next
        if rule.max_scope == "row":
            unit = -(-k_len // shape.segment) * shape.segment
        elif unit <= shape.segment:
            unit = shape.segment // unit * unit  # several whole windows fit into one segment
            return cls(unit, unit, 1, -(-k_len // unit), group, False)
        per_unit = -(-unit // shape.segment)
        carry = rule.max_scope == "row" or per_unit > 1
        return cls(shape.segment, unit, per_unit, -(-k_len // unit) * per_unit, group, carry)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
