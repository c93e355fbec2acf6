"""Attention processors for Wan and HunyuanVideo: sparse where they are told to be, else the stock processor itself.

A processor decides nothing. Before each forward it is given `Orders`; all tensors in them may change without a new
compilation, and so may the layer, so that `torch.compile` compiles a block once for all layers and both branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from vecattention.integrations.clock import Interval
from vecattention.integrations.context_parallel import Groups, parallel_attention
from vecattention.integrations.dit.layers import joint_projections, projected, projections, rotated
from vecattention.integrations.dit.parallel import groups_of
from vecattention.integrations.dit.tally import (
    DENSE_PAIRS,
    NOTED_CALLS,
    ORDERED_CALLS,
    SPARSE_CALLS,
    SPARSE_PAIRS,
    Times,
)
from vecattention.integrations.settings import Settings

GRAD = "gradients are being recorded, and sparse attention has none; call under torch.no_grad()"
MASKED = "the call has an attention mask, which this model's self-attention never has"
SAMPLE = {"coverage": 16, "density": 64}
"""Blocks of queries on which a target is looked for: a pass over all would cost as much as attention.

A density needs more of them to be met as nearly (docs/decisions/video-defaults.md has the figures).
"""

SHORT = "the sequence has fewer than min_length={0} keys"


@dataclass
class Orders:
    """What a layer does until further notice.

    Attributes:
        sparse: whether to be sparse; else the stock processor answers.
        limit: thresholds, coverages or densities, [], [H] or [B, H].
        kept: int64 [H], where pairs that sparse rows attend are counted.
        numbers: int64 [5], counts of one head in the order of `tally`.
        order: int64 [H], how heads are dealt to ranks, or None.
        times: where the time of a call is put, outside of compiled graphs.
        lengths: real prompt tokens of each batch element (HunyuanVideo).
        lost: why this forward cannot be served, or "".
    """

    sparse: bool
    limit: Tensor
    kept: Tensor
    numbers: Tensor
    order: Tensor | None = None
    times: Times = field(default_factory=Times)
    lengths: tuple[int, ...] = ()
    lost: str = ""


@dataclass
class Way:
    """How a run attends, the same for all its layers.

    Attributes:
        settings: rule, backend, chunk_size and min_length.
        kind: what the limits in orders are: "threshold", "coverage" or "density".
        note: takes the reason of a call that stays dense against orders.
    """

    settings: Settings
    kind: str = "threshold"
    note: Callable[[str], None] = field(default=lambda reason: None)


class SparseProcessor(nn.Module):
    """Stands in for a stock processor. A module without parameters, so that diffusers' hooks find what sits on it.

    Args:
        stock: the processor that it stands in for, which answers whatever is dense.
        attachment: who installed it.
    """

    def __init__(self, stock: Any, attachment: object) -> None:
        super().__init__()
        # A hook sits on a module of its own in one layer: all layers stay alike, and share their compiled graphs.
        self.ear = nn.Module()
        self.stock = stock
        self.attachment = attachment
        self.orders: Orders | None = None
        self.way: Way | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseProcessor:
        raise TypeError(
            "the model is inside vecattention.apply, wanted it as it was: a copy would not hear of steps; copy it "
            "before or after the block"
        )

    # diffusers sets these on processors: they are meant for the stock one.
    @property
    def _attention_backend(self) -> Any:
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.stock._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.stock._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.stock._parallel_config = value

    def _asked(self) -> tuple[Orders, Way]:
        if self.orders is None or self.way is None:
            raise ValueError("the processor has no orders, wanted those of a run; use vecattention.apply")
        if self.orders.lost:
            raise ValueError(self.orders.lost)
        return self.orders, self.way

    def _begin(self, hidden_states: Tensor) -> Interval | None:
        return None if torch.compiler.is_compiling() else Interval(hidden_states.device)

    def _end(self, begun: Interval | None) -> None:
        if begun is not None:
            begun.stop()
            self._asked()[0].times.add(begun)

    def _sparse(self, hidden_states: Tensor, keys: int, masked: bool) -> bool:
        """Whether this call is to be sparse; notes why not when that is nobody's order."""
        orders, way = self._asked()
        if not orders.sparse:
            return False
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            reason = GRAD
        elif masked:
            reason = MASKED
        elif keys < way.settings.min_length:
            reason = SHORT.format(way.settings.min_length)
        else:
            return True
        if not torch.compiler.is_compiling():
            way.note(reason)
        return False

    def _counted(self, kept: Tensor | None, sparse_pairs: int, dense_pairs: int) -> None:
        """Count a call on the device; nothing waits for it."""
        orders, _ = self._asked()
        if kept is not None:
            orders.kept.add_(kept.to(orders.kept.device))
            orders.numbers[SPARSE_PAIRS].add_(sparse_pairs)
            orders.numbers[SPARSE_CALLS].add_(1)
        else:
            orders.numbers[NOTED_CALLS if orders.sparse else ORDERED_CALLS].add_(1)
        orders.numbers[DENSE_PAIRS].add_(dense_pairs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """Sparse attention of [B, S, H, D] tensors: ([B, Sq, H, D], kept pairs int64 [H] of all ranks)."""
        orders, way = self._asked()
        settings = way.settings
        out, _, kept = parallel_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), groups=groups,
            order=orders.order, causal=False, chunk_size=settings.chunk_size, sample=SAMPLE.get(way.kind, 0),
            backend=settings.backend, **{way.kind: orders.limit.to(query.device)}, **settings.rule,
        )  # fmt: skip
        return out.transpose(1, 2), kept.sum(0)


class WanProcessor(SparseProcessor):
    """Self-attention of Wan: all tokens are video, none is padding."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        begun = self._begin(hidden_states)
        answer = self._answer(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        self._end(begun)
        return answer

    def _answer(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None,
                attention_mask: Tensor | None, rotary_emb: tuple[Tensor, Tensor] | None) -> Tensor:  # fmt: skip
        groups = groups_of(self._parallel_config)
        batch, rows, _ = hidden_states.shape
        tokens = rows * groups.shards
        pairs = batch * tokens * tokens
        if not self._sparse(hidden_states, tokens, attention_mask is not None):
            self._counted(None, 0, pairs)
            answer: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return answer
        query, key, value = projections(attn, hidden_states)
        if rotary_emb is not None:
            query, key = rotated(query, *rotary_emb), rotated(key, *rotary_emb)
        out, kept = self._attend(query, key, value, groups)
        self._counted(kept, pairs, 0)
        return projected(attn.to_out, out.flatten(2).type_as(query))


class HunyuanVideoProcessor(SparseProcessor):
    """Joint attention of HunyuanVideo over video tokens, then prompt tokens, then padding.

    Video rows attend sparsely to video and real prompt keys. The text rows, 256 of 119056, stay dense over the same
    keys, as in the stock processor.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        begun = self._begin(hidden_states)
        answer = self._answer(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        self._end(begun)
        return answer

    def _answer(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None,
                attention_mask: Tensor | None, image_rotary_emb: tuple[Tensor, Tensor] | None,
                ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        orders, _ = self._asked()
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        batch, video, _ = hidden_states.shape
        lengths = orders.lengths if orders.lengths else (text,) * batch
        if not self._sparse(hidden_states, video + max(lengths), len(lengths) != batch or max(lengths) > text):
            self._counted(None, 0, sum((video + n) ** 2 for n in lengths))
            answer: tuple[Tensor, Tensor | None] = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return answer
        query, key, value = joint_projections(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        out = self._joint(query, key, value, video, lengths).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return out, None
        shown, said = out[:, :video], out[:, video:]
        if getattr(attn, "to_out", None) is not None:
            shown = projected(attn.to_out, shown)
        if getattr(attn, "to_add_out", None) is not None:
            said = attn.to_add_out(said)
        return shown, said

    def _joint(self, query: Tensor, key: Tensor, value: Tensor, video: int, lengths: Sequence[int]) -> Tensor:
        """[B, S, H, D]: batch elements with the same prompt length together, in one call where all have it."""
        alike = len(set(lengths)) == 1
        spans = [slice(0, len(lengths))] if alike else [slice(b, b + 1) for b in range(len(lengths))]
        parts, total = [], torch.zeros_like(self._asked()[0].kept)
        sparse = dense = 0
        for span in spans:
            length = lengths[span.start]
            q, k, v = query[span], key[span, : video + length], value[span, : video + length]
            out, kept = self._span(q, k, v, video, span if not alike else slice(None))
            total = total + kept.to(total.device)
            sparse += q.shape[0] * video * k.shape[1]
            dense += q.shape[0] * length * k.shape[1]
            parts.append(out)
        self._counted(total, sparse, dense)
        return parts[0] if alike else torch.cat(parts)

    def _span(self, query: Tensor, key: Tensor, value: Tensor, video: int, span: slice) -> tuple[Tensor, Tensor]:
        orders, way = self._asked()
        limit = orders.limit[span] if orders.limit.ndim == 2 and orders.limit.shape[0] > 1 else orders.limit
        settings = way.settings
        out, _, kept = parallel_attention(
            query[:, :video].transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), groups=Groups(),
            causal=False, chunk_size=settings.chunk_size, backend=settings.backend, sample=SAMPLE.get(way.kind, 0),
            **{way.kind: limit.to(query.device)}, **settings.rule,
        )  # fmt: skip
        shown = out.transpose(1, 2)
        if query.shape[1] == video:
            return shown, kept.sum(0)
        said = dispatch_attention_fn(query[:, video:], key, value, backend=self._attention_backend)
        return torch.cat((shown, said), 1), kept.sum(0)
