"""What else could be called instead: other sparse kernels at equal density, other methods at equal recall."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vecattention
from vecattention import bits, methods
from vecattention.bench.cases import Case, Source, lists
from vecattention.bench.exact import blocks_of, error_of
from vecattention.bench.studies import Record, tflops, useful_flop
from vecattention.bench.timer import measure
from vecattention.spec import Selection

BLOCK = 128
ROWS = 64
"""Query rows of each head on which recall is measured, spread evenly."""

HALVINGS = 12


def flex(source: Source, density: float, compiled: bool = True) -> Record:
    """torch's FlexAttention over random blocks of 128 x 128 at this density.

    Args:
        compiled: as it is meant to be used; without, torch computes every score.
    """
    from torch.nn.attention.flex_attention import flex_attention

    case, (query, key, value) = source.case, source.tensors()
    kept = _random_blocks(case, density, source)
    mask, selection = _block_mask(kept, case, compiled), _of_blocks(kept, case)
    run: Any = flex_attention
    if compiled:  # for this shape alone, with the launch shapes that it finds best
        torch._dynamo.reset()
        run = torch.compile(flex_attention, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")

    def call() -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile")
            out: Tensor = run(query, key, value, block_mask=mask, enable_gqa=case.heads != case.kv_heads)
        return out

    error = error_of(call(), query, key, value, selection, case.causal)
    time = measure(call, device=source.device)
    return {
        "study": "peer", "case": case.name, "kernel": "flex_attention", "density": density, "lists": "128-blocks",
        "block": BLOCK, **error.record(), **time.record(), "tflops": tflops(useful_flop(case, selection), time.median),
        "kept": float(selection.density().mean()),
    }  # fmt: skip


def paged(source: Source, density: float, kind: str) -> Record:
    """FlashAttention-4 with pages of one key, each block of queries a sequence of its own; not causal.

    Raises:
        ImportError: flash-attn-4 is not installed.
        ValueError: a causal case, or queries that are not whole blocks of 128.
    """
    from flash_attn.cute import flash_attn_varlen_func  # type: ignore[import-not-found]

    selection = _ready(source, density, kind, BLOCK)
    case, (query, key, value) = source.case, source.tensors()
    table, lengths = pages(selection, case)
    rows = query.reshape(-1, BLOCK, 1, case.head_dim)
    keys, values = (x.reshape(-1, 1, 1, case.head_dim) for x in (key, value))

    def call() -> Tensor:
        found = flash_attn_varlen_func(rows, keys, values, page_table=table, seqused_k=lengths)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.view(query.shape)

    return _over_lists(source, density, kind, selection, "flash-attn-4 pages of 1", call)


def vector_sparse(source: Source, density: float, kind: str, block: int = BLOCK) -> Record:
    """FlashInfer's block-sparse attention, blocks of one key; all heads as one, so that each has its lists; not causal.

    Its plan, made on the host from the lists' lengths, is not timed.

    Raises:
        ImportError: flashinfer-python is not installed.
        ValueError: a causal case, or queries that are not whole blocks.
    """
    from flashinfer import BlockSparseAttentionWrapper  # type: ignore[import-not-found]

    selection = _ready(source, density, kind, block)
    case, (query, key, value) = source.case, source.tensors()
    table, lengths = pages(selection, case)
    places = torch.arange(table.shape[1], device=table.device)
    starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)))
    rows, keys, values = (x.reshape(-1, 1, case.head_dim) for x in (query, key, value))
    wrapper = BlockSparseAttentionWrapper(torch.empty(2**27, dtype=torch.uint8, device=query.device))
    wrapper.plan(
        starts, table[places < lengths[:, None]], len(rows), len(keys), block, 1, 1, 1, case.head_dim,
        q_data_type=query.dtype, o_data_type=query.dtype,
    )  # fmt: skip

    def call() -> Tensor:
        out: Tensor = wrapper.run(rows, keys, values)
        return out.view(query.shape)

    return _over_lists(source, density, kind, selection, "flashinfer", call)


def _ready(source: Source, density: float, kind: str, block: int) -> Selection:
    """Lists for kernels that know neither causal masks nor a last block that is not whole."""
    case = source.case
    if case.causal or case.q_len % block:
        raise ValueError(f"case is {case.name}, wanted one that is not causal, of whole blocks of {block} queries")
    return lists(case, density, kind, source.seed, block, source.device)


def _over_lists(source: Source, density: float, kind: str, selection: Selection, kernel: str,
                call: Callable[[], Tensor]) -> Record:  # fmt: skip
    """The record of a kernel over ready lists, checked first."""
    case, (query, key, value) = source.case, source.tensors()
    error = error_of(call(), query, key, value, selection, False)
    time = measure(call, device=source.device)
    return {
        "study": "peer", "case": case.name, "kernel": kernel, "density": density, "lists": kind,
        "block": selection.block, **error.record(), **time.record(),
        "tflops": tflops(useful_flop(case, selection), time.median), "kept": float(selection.density().mean()),
    }  # fmt: skip


def pages(selection: Selection, case: Case) -> tuple[Tensor, Tensor]:
    """(int32 [H * blocks, longest]: places of the kept keys in [Hkv * Sk], 0 after the last; int32 their numbers)."""
    device, group = selection.words.device, case.heads // case.kv_heads
    counts = bits.popcount(selection.words)[0].sum(-1, dtype=torch.int32)
    table = torch.zeros(case.heads, selection.blocks, int(counts.max()), dtype=torch.int32, device=device)
    for head in range(case.heads):
        for block in range(selection.blocks):
            at = selection.columns(0, head, block)
            table[head, block, : len(at)] = at.to(torch.int32) + head // group * case.k_len
    return table.flatten(0, 1), counts.flatten()


def method(source: Source, name: str, recall: float) -> Record:
    """Selection and attention of a method of `vecattention.methods`, its knob turned to this recall.

    Recall is the dense softmax mass on the selected keys, in [0, 1], over `ROWS` rows of each head.
    """
    case, (query, key, value) = source.case, source.tensors()
    chosen = methods.get(name)
    given: dict[str, Any] = {"value": value} if chosen.takes_value else {}
    given |= _geometry(name)
    truth = _sampled(query, key, case)

    def select(setting: float | None) -> Selection:
        turned: dict[str, Any] = {chosen.knob.name: setting} if chosen.knob and setting is not None else {}
        return chosen.select(query, key, causal=case.causal, **(given | turned))

    setting, reached = _turned(chosen.knob, lambda x: _recall(select(x), *truth), recall)
    selection = select(setting)

    def attend() -> Tensor:
        return vecattention.attend(query, key, value, selection)  # type: ignore[return-value]

    error = error_of(attend(), query, key, value, selection, case.causal)
    chosen_ms = measure(lambda: select(setting), device=source.device)
    attend_ms = measure(attend, device=source.device)
    return {
        "study": "method", "case": case.name, "method": name, "asked": recall, "recall": reached,
        "knob": chosen.knob.name if chosen.knob else None, "setting": setting, "structure": source.structure,
        "density": float(selection.density().mean()), **error.record(), "select_ms": round(chosen_ms.median, 4),
        "attend_ms": round(attend_ms.median, 4), "ms": round(chosen_ms.median + attend_ms.median, 4),
        "ms_q1": round(chosen_ms.low + attend_ms.low, 4), "ms_q3": round(chosen_ms.high + attend_ms.high, 4),
        "tflops": tflops(useful_flop(case, selection), attend_ms.median),
    }  # fmt: skip


def _geometry(name: str) -> dict[str, object]:
    """The geometry that the kernels are built for, where a method has one."""
    return {"q_pooling_size": 64, "q_block_size": 128} if name == "vecattention" else {}


def _turned(knob: methods.Knob | None, recall_at: Callable[[float | None], float],
            wanted: float) -> tuple[float | None, float]:  # fmt: skip
    """(setting, recall it gives) nearest to the wanted recall, by bisection; without a knob what there is."""
    if knob is None:
        return None, recall_at(None)
    low, high, best = knob.sparse, knob.dense, (knob.dense, math.inf)
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high) if knob.log else (low + high) / 2
        reached = recall_at(middle)
        if abs(reached - wanted) < abs(best[1] - wanted):
            best = (middle, reached)
        if abs(reached - wanted) < 0.002:
            break
        low, high = (middle, high) if reached < wanted else (low, middle)
    return best


def _sampled(query: Tensor, key: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """(row numbers [n], their dense probabilities float32 [H, n, Sk])."""
    rows = torch.linspace(0, case.q_len - 1, min(ROWS, case.q_len), device=query.device).long().unique()
    group = case.heads // case.kv_heads
    heads = []
    for head in range(case.heads):
        scores = query[0, head, rows].float() @ key[0, head // group].float().mT * case.head_dim**-0.5
        if case.causal:
            place = torch.arange(case.k_len, device=query.device)
            scores.masked_fill_(place > rows[:, None] + case.k_len - case.q_len, -torch.inf)
        heads.append(scores.softmax(-1))
    return rows, torch.stack(heads)


def _recall(selection: Selection, rows: Tensor, truth: Tensor) -> float:
    total = torch.zeros((), device=rows.device)
    for head in range(truth.shape[0]):
        words = selection.words[0, head, blocks_of(selection, head, rows)]
        total += (truth[head] * bits.unpack(words, selection.k_len)).sum()
    return float(total) / truth[..., 0].numel()


def _random_blocks(case: Case, density: float, source: Source) -> Tensor:
    """bool [H, query blocks, key blocks]; causal: none of the future, always the own one."""
    tall, wide = -(-case.q_len // BLOCK), -(-case.k_len // BLOCK)
    generator = torch.Generator(source.device).manual_seed(source.seed)
    kept = torch.rand(case.heads, tall, wide, device=source.device, generator=generator) < density
    if case.causal:
        own = torch.eye(tall, wide, dtype=torch.bool, device=source.device)
        kept = (kept | own).tril()
    return kept


def _block_mask(kept: Tensor, case: Case, compiled: bool) -> Any:
    """FlexAttention's own form of a map of blocks: whole ones, and in causal mode those on the diagonal apart.

    Uncompiled it asks for every pair instead, whatever the blocks say.
    """
    from torch.nn.attention.flex_attention import BlockMask

    own = torch.eye(*kept.shape[1:], dtype=torch.bool, device=kept.device) & kept
    part = own if case.causal else torch.zeros_like(kept)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
        return blocks.sum(-1, dtype=torch.int32)[None], order[None]

    offset = case.k_len - case.q_len

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q + offset >= k

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = kept[h, q // BLOCK, k // BLOCK]
        return found & seen(b, h, q, k) if case.causal else found

    asked = allowed if not compiled else seen if case.causal else None
    return BlockMask.from_kv_blocks(
        *listed(part), *listed(kept & ~part), BLOCK_SIZE=BLOCK, mask_mod=asked,
        seq_lengths=(case.q_len, case.k_len),
    )  # fmt: skip


def _of_blocks(kept: Tensor, case: Case) -> Selection:
    columns = kept.repeat_interleave(BLOCK, dim=2)[..., : case.k_len]
    return Selection(bits.pack(columns)[None], case.q_len, case.k_len, BLOCK, case.causal)
