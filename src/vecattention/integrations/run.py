"""A run: one use of `vecattention.apply`, from the moment the model is switched to the moment it is restored."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from vecattention.integrations.call import Call, Output
from vecattention.integrations.clock import Interval
from vecattention.integrations.layout import Part, Span, parts
from vecattention.integrations.serve import dense_pairs, no_backend, serve, too_short, why_dense
from vecattention.integrations.settings import Settings
from vecattention.integrations.stats import Counts, LayerStats, Stats

NO_IDS = "vision_span is 'auto' and this forward had no input_ids; pass them, or (start, end)"
DECODING = "one-token decoding stays dense, by design: there is nothing to gain"

logger = logging.getLogger(__name__)


class Run:
    """One use of `vecattention.apply`; made by it.

    Args:
        settings: what was asked for, checked and completed.
        vision: tells where the vision tokens of the running forward lie, for vision_span="auto".
        count: whether to keep statistics.
    """

    def __init__(
        self, settings: Settings, vision: Callable[[], list[Span] | None] | None = None, count: bool = True
    ) -> None:
        self.settings = settings
        self._vision = vision
        self._count = count
        self._counts = Counts()

    @property
    def stats(self) -> Stats:
        """What was computed until now, per layer and head; reading it waits for the device."""
        return self._counts.read()

    def __str__(self) -> str:
        return str(self.stats)

    def forward(self, call: Call) -> Output:
        """Answer one attention call, sparsely where that is right."""
        if call.decoding:
            return self._decode(call)
        found, reason = self._layout(call)
        interval = Interval(call.query.device)
        if reason or found is None:
            out, counts = call.dense(), self._stays_dense(call, found, str(reason))
        else:
            limit = self.settings.threshold(call.layer or 0)
            answer, counts = serve(call, found, self.settings, limit, self._count)
            out = answer, None
        interval.stop()
        if call.causal:
            self._add(call, counts, interval)
        return out

    def _layout(self, call: Call) -> tuple[list[Part] | None, str | None]:
        """(the parts of the call, the reason to stay dense); at least one of them is there."""
        reason, mask = why_dense(call), call.spans()
        if mask is None or not call.causal:
            return None, reason
        batch = call.query.shape[0]
        vision = self._wanted(batch)
        if isinstance(vision, str):
            vision, reason = None, reason or vision
        found = parts(mask, batch, vision, self.settings.min_length)
        return found, reason or too_short(found, vision, self.settings) or no_backend(call, self.settings)

    def _wanted(self, batch: int) -> list[Span] | str | None:
        """The span of each batch element outside of which rows stay dense (None: all sparse), or why it is unknown."""
        asked = self.settings.vision
        if asked is None:
            return None
        if isinstance(asked, tuple):
            return [asked] * batch
        found = self._vision() if self._vision is not None else None
        return NO_IDS if found is None or len(found) != batch else found

    def _stays_dense(self, call: Call, found: list[Part] | None, reason: str) -> LayerStats:
        if self._counts.note(reason):
            logger.warning("vecattention: attention stays dense in %s: %s", type(call.module).__name__, reason)
        return LayerStats(_nothing(call), dense_pairs=dense_pairs(call, found), dense_calls=1)

    def _decode(self, call: Call) -> Output:
        if self._counts.note(DECODING):
            logger.info("vecattention: %s", DECODING)
        self._add(call, LayerStats(_nothing(call), decode_calls=1))
        return call.dense()

    def _add(self, call: Call, more: LayerStats, interval: Interval | None = None) -> None:
        if call.layer is not None and self._count:
            self._counts.add(call.layer, more, interval)


def _nothing(call: Call) -> torch.Tensor:
    """No kept pairs, on the CPU: that nothing was kept is nothing that the device would have to be told."""
    return torch.zeros(call.query.shape[1], dtype=torch.int64, device="cpu")
