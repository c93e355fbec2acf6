"""Answers an attention call sparsely, and says of which calls it cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention import bits, ops
from vecattention.integrations.call import Call
from vecattention.integrations.layout import Part
from vecattention.integrations.settings import Settings
from vecattention.spec import HEAD_DIMS, Selection, allowed_pairs

NOT_CAUSAL = "the attention is not causal (an encoder, a vision tower or cross-attention)"
OTHER_MASK = (
    "the mask is not plain causal (packed sequences, sliding windows, padding inside a sequence, bidirectional blocks "
    "or a custom mask)"
)
NO_VISION = "vision_span is 'auto' and input_ids hold no vision tokens; pass None to make text sparse too"


def why_dense(call: Call) -> str | None:
    """The reason for which a prefill call must stay dense whatever its lengths, or None; but see `no_backend`."""
    options, query, key = call.options, call.query, call.key
    if not call.causal:
        return NOT_CAUSAL
    if call.spans() is None:
        return OTHER_MASK
    if call.layer is None:
        return "the attention module has no layer_idx"
    if call.module.training or call.dropout > 0:
        return "the model is in training mode; call model.eval()"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, call.value)):
        return "gradients are being recorded, and sparse attention has none; call under torch.no_grad()"
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
    return None


def too_short(parts: Sequence[Part], vision: Sequence[object] | None, settings: Settings) -> str | None:
    """The reason for which no row of a call can be sparse, or None."""
    if any(part.high > part.low for part in parts):
        return None
    if vision is not None and all(span is None for span in vision):
        return NO_VISION
    return settings.short


def serve(call: Call, parts: Sequence[Part], settings: Settings, limit: Tensor, count: bool) -> tuple[Tensor, Tensor]:
    """([B, Sq, H, D], kept pairs [H]) of a call for which nobody had a reason to stay dense; padding gives 0.

    Args:
        limit: thresholds of the layer, [], [H] or [B, H].
        count: whether to count the kept pairs.
    """
    batch, heads, rows, dim = call.query.shape
    out = call.query.new_zeros(batch, rows, heads, dim)
    kept = torch.zeros(heads, dtype=torch.int64, device=call.query.device)
    for part in parts:
        if part.count:
            kept = kept + _fill(out.transpose(1, 2)[part.batch, :, part.rows], call, part, settings, limit, count)
    return out, kept


def all_pairs(call: Call, parts: Sequence[Part] | None) -> int:
    """Pairs of one head that a prefill call attends densely; a mask of unknown kind counts as a causal one."""
    if parts is None:
        batch, _, rows, _ = call.query.shape
        return batch * allowed_pairs(rows, max(rows, call.key.shape[2]), True)
    return sum(part.all_pairs for part in parts)


def _fill(out: Tensor, call: Call, part: Part, settings: Settings, limit: Tensor, count: bool) -> Tensor:
    """Write a part's rows into out [b, H, rows, D]; the kept pairs of its sparse rows, int64 [H] or 0."""
    query = call.query[part.batch, :, part.rows]
    key, value = call.key[part.batch, :, part.keys], call.value[part.batch, :, part.keys]
    low, high, before = part.low, part.high, part.before
    if low:
        end = before + low
        out[:, :, :low] = _dense(query[:, :, :low], key[:, :, :end], value[:, :, :end], call.scaling)
    if high < part.count:
        out[:, :, high:] = _dense(query[:, :, high:], key, value, call.scaling)
    if high == low:
        return query.new_zeros((), dtype=torch.int64)
    start, end = part.first_block(settings.block), before + high
    sparse, _, pairs = ops.counted(
        query[:, :, start:high], key[:, :, :end], value[:, :, :end], count=count, scale=call.scaling, causal=True,
        threshold=limit[part.batch] if limit.ndim == 2 and limit.shape[0] > 1 else limit,
        chunk_size=settings.chunk_size, backend=settings.backend, **settings.rule,
    )  # fmt: skip
    out[:, :, low:high] = sparse[:, :, low - start :]
    return pairs.sum(0) if count else query.new_zeros((), dtype=torch.int64)


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Dense causal attention, bottom-right aligned, [b, H, rows, D]; keys are not repeated for their groups."""
    if query.shape[2] == key.shape[2]:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    block, keys = 128, key.shape[2]
    words = bits.below(torch.tensor([keys], device=query.device), keys)
    words = words.expand(query.shape[0], query.shape[1], -(-query.shape[2] // block), -1).contiguous()
    out = ops.attend(query, key, value, Selection(words, query.shape[2], keys, block, True), scale=scale)
    return out if isinstance(out, Tensor) else out[0]


def no_backend(call: Call, settings: Settings) -> str | None:
    """A reason when only the reference, which builds all Sq x Sk scores, could run the call."""
    if settings.backend != "auto":
        return None
    answer = ops.explain(call.query, call.key, **settings.rule)
    if answer.backend != "reference":
        return None
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in answer.reasons.items() if reasons)
    return f"no fast backend can run it ({why}); pass backend='reference' to run it all the same"
