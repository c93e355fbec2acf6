"""Answers one attention call sparsely where that is right, and says why where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention import bits, ops
from vecattention.integrations.call import Call
from vecattention.integrations.masks import CausalSpans
from vecattention.integrations.settings import Settings
from vecattention.integrations.stats import LayerStats
from vecattention.spec import HEAD_DIMS, Selection, allowed_pairs

SHORT = "the sequence has fewer than min_length={0} keys; lower min_length to make it sparse all the same"
NO_VISION = "vision_span is 'auto' and input_ids hold no vision tokens; pass None to make text sparse too"


@dataclass(frozen=True)
class Part:
    """The answer for some batch elements: out [b, H, rows, D] and its counts."""

    out: Tensor
    kept: Tensor | None
    sparse_pairs: int
    dense_pairs: int


def why_dense(call: Call, settings: Settings) -> str | None:
    """The reason for which a prefill call must stay dense whatever its lengths, or None."""
    options, query, key = call.options, call.query, call.key
    if not call.causal:
        return "the attention is not causal (an encoder, a vision tower or cross-attention)"
    if call.spans() is None:
        return (
            "the mask is not plain causal (packed sequences, sliding windows, padding inside a sequence, "
            "bidirectional blocks or a custom mask)"
        )
    if call.layer is None:
        return "the attention module has no layer_idx"
    if call.module.training or call.dropout > 0:
        return "the model is in training mode; call model.eval()"
    if options.get("output_attentions"):
        return "output_attentions asks for weights; load the model with attn_implementation='eager' to get them"
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            return f"the layer adds {name} to the scores"
    window = options.get("sliding_window")
    if window is not None and key.shape[2] > window:
        return "the layer has a sliding window shorter than the sequence"
    if query.shape[3] not in HEAD_DIMS or call.value.shape != key.shape:
        return f"head_dim is {query.shape[3]} for keys and {call.value.shape[3]} for values, wanted one of {HEAD_DIMS}"
    return _no_backend(call, settings)


def serve(call: Call, settings: Settings, vision: Sequence[tuple[int, int] | None] | None,
          count: bool) -> tuple[Tensor, LayerStats] | str:  # fmt: skip
    """([B, Sq, H, D], counts) of a call for which `why_dense` had no reason, or a reason to stay dense after all.

    Args:
        vision: span of the vision tokens of each batch element; rows outside stay dense. None: all rows sparse.
        count: whether to count the kept pairs.
    """
    mask, layer = call.spans(), call.layer
    if mask is None or layer is None:
        return "the mask is not plain causal"
    batch, heads, rows, dim = call.query.shape
    spans = mask.spans or ((0, mask.last),) * batch
    wanted = list(vision) if vision is not None else [(0, end) for _, end in spans]
    if not any(_sparse(span, want, mask, settings) for span, want in zip(spans, wanted, strict=True)):
        return NO_VISION if all(want is None for want in wanted) else SHORT.format(settings.min_length)
    limit = settings.threshold(layer)
    whole = mask.spans is None and len(set(wanted)) == 1
    groups = [slice(0, batch)] if whole else [slice(b, b + 1) for b in range(batch)]
    parts = [_part(call, mask, g, spans[g.start], wanted[g.start], limit, settings, count) for g in groups]
    out = parts[0].out if whole else call.query.new_zeros(batch, rows, heads, dim).transpose(1, 2)
    for group, part in zip(groups, () if whole else parts, strict=whole is False):
        start, end = _rows(mask, spans[group.start])
        out[group, :, start:end] = part.out
    kept = [part.kept for part in parts if part.kept is not None]
    total = torch.stack(kept).sum(0) if kept else torch.zeros(heads, dtype=torch.int64, device=call.query.device)
    counts = LayerStats(total, sum(p.sparse_pairs for p in parts), sum(p.dense_pairs for p in parts), sparse_calls=1)
    return out.transpose(1, 2).contiguous(), counts


def dense_pairs(call: Call) -> int:
    """Pairs of one head that a dense prefill call attends; a mask of unknown kind counts as a causal one."""
    mask, (batch, _, rows, _), keys = call.spans(), call.query.shape, call.key.shape[2]
    if mask is None:
        return batch * allowed_pairs(rows, max(rows, keys), True)
    total = 0
    for start, end in mask.spans or ((0, mask.last),) * batch:
        real = _rows(mask, (start, end))
        total += allowed_pairs(real[1] - real[0], max(min(end, mask.last) - start, 0), True)
    return total


def _part(call: Call, mask: CausalSpans, group: slice, span: tuple[int, int], vision: tuple[int, int] | None,
          limit: Tensor, settings: Settings, count: bool) -> Part:  # fmt: skip
    """The real rows of some batch elements that share their bounds, padding sliced off."""
    start, end = _rows(mask, span)
    keys = slice(span[0], min(span[1], mask.last))
    query, key, value = call.query[group, :, start:end], call.key[group, :, keys], call.value[group, :, keys]
    if not query.shape[2]:
        return Part(query, None, 0, 0)
    if limit.ndim == 2 and limit.shape[0] > 1:
        limit = limit[group]
    first, last = key.shape[2] - query.shape[2], key.shape[2]
    low, high = _bounds(span, vision, mask)
    if not _sparse(span, vision, mask, settings):
        low = high = last
    # Whole blocks from the first row on, so that the blocks lie where a run over all rows would put them.
    block = int(settings.rule["q_block_size"])
    skip = (low - first) // block * block
    pieces, kept = [], None
    if low > first:
        pieces.append(_dense(query[:, :, : low - first], key[:, :, :low], value[:, :, :low], call.scaling))
    if high > low:
        out, _, pairs = ops.counted(
            query[:, :, skip : high - first], key[:, :, :high], value[:, :, :high], threshold=limit, causal=True,
            chunk_size=settings.chunk_size, backend=settings.backend, count=count, scale=call.scaling, **settings.rule,
        )  # fmt: skip
        pieces.append(out[:, :, low - first - skip :])
        kept = pairs.sum(0) if count else None
    if last > high:
        pieces.append(_dense(query[:, :, high - first :], key, value, call.scaling))
    elements = query.shape[0]
    sparse = elements * allowed_pairs(high - first - skip, high, True) if high > low else 0
    pairs_all = elements * allowed_pairs(query.shape[2], last, True)
    return Part(pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2), kept, sparse, pairs_all - sparse)


def _rows(mask: CausalSpans, span: tuple[int, int]) -> tuple[int, int]:
    """The query rows that hold real tokens."""
    start = min(max(span[0] - mask.first, 0), mask.rows)
    return start, max(start, min(span[1], mask.last) - mask.first)


def _bounds(span: tuple[int, int], vision: tuple[int, int] | None, mask: CausalSpans) -> tuple[int, int]:
    """The sparse rows [low, high) as positions among the real tokens."""
    start, end = _rows(mask, span)
    first, last = start + mask.first - span[0], end + mask.first - span[0]
    if vision is None:
        return last, last
    low = min(max(vision[0] - span[0], first), last)
    return low, max(low, min(vision[1] - span[0], last))


def _sparse(
    span: tuple[int, int], vision: tuple[int, int] | None, mask: CausalSpans, settings: Settings
) -> bool:
    """Whether an element has rows to make sparse, with enough keys before them."""
    low, high = _bounds(span, vision, mask)
    return high > low and high >= settings.min_length


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Dense causal attention, bottom-right aligned, [b, H, rows, D]; keys are not repeated for their groups."""
    if query.shape[2] == key.shape[2]:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    block, keys = 128, key.shape[2]
    blocks = -(-query.shape[2] // block)
    words = bits.below(torch.tensor([keys], device=query.device), keys)
    words = words.expand(query.shape[0], query.shape[1], blocks, -1).contiguous()
    out = ops.attend(query, key, value, Selection(words, query.shape[2], keys, block, True), scale=scale)
    return out if isinstance(out, Tensor) else out[0]


def _no_backend(call: Call, settings: Settings) -> str | None:
    """A reason when only the reference, which builds all Sq x Sk scores, could run the call."""
    if settings.backend != "auto":
        return None
    answer = ops.explain(call.query, call.key, **settings.rule)
    if answer.backend != "reference":
        return None
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in answer.reasons.items() if reasons)
    return f"no fast backend can run it ({why}); pass backend='reference' to run it all the same"
