"""A run: one use of `vecattention.apply`, from the moment the model is switched to the moment it is restored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from vecattention.integrations.call import Call, Output
from vecattention.integrations.clock import Interval
from vecattention.integrations.layout import Part, Span, parts
from vecattention.integrations.serve import all_pairs, no_backend, serve, too_short, why_dense
from vecattention.integrations.settings import Settings
from vecattention.integrations.stats import Counts, Stats
from vecattention.spec import allowed_pairs

NO_IDS = "vision_span is 'auto' and this forward had no input_ids; pass them, or (start, end)"
DECODING = "one-token decoding stays dense, by design: there is nothing to gain"
UNTIMED = 1024
"""Keys below which dense calls on a GPU are not timed: the events would take the host longer than it may."""

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
        self._asked: tuple[object, str | None] = (None, None)

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
        if call.causal and call.key.shape[2] < self.settings.min_length and self.settings.vision is None:
            return self._short(call)
        found, reason = self._layout(call)
        if reason or found is None:
            return self._dense(call, str(reason), all_pairs(call, found))
        interval = Interval(call.query.device) if self._count else None
        answer, kept = serve(call, found, self.settings, self.settings.threshold(call.layer or 0), self._count)
        if interval is not None:
            interval.stop()
        sparse = sum(part.sparse_pairs(self.settings.block) for part in found)
        if call.layer is not None and interval is not None:
            self._counts.sparse(call.layer, kept, sparse, all_pairs(call, found) - sparse, interval)
        return answer, None

    def _decode(self, call: Call) -> Output:
        if self._counts.note(DECODING):
            logger.info("vecattention: %s", DECODING)
        out, layer = call.dense(), call.layer
        if layer is not None and self._count:
            self._counts.decoded(layer, call.query.shape[1])
        return out

    def _short(self, call: Call) -> Output:
        """The answer to a call that has too few keys, of which little is asked: it would be the host's time."""
        batch, _, rows, _ = call.query.shape
        if call.mask is None:
            pairs = batch * allowed_pairs(rows, rows, True)
        else:
            mask = call.spans()
            pairs = all_pairs(call, None if mask is None else parts(mask, batch, None, self.settings.min_length))
        return self._dense(call, why_dense(call) or self.settings.short, pairs)

    def _dense(self, call: Call, reason: str, pairs: int) -> Output:
        if self._counts.note(reason):  # before the answer: it may run out of memory
            logger.warning("vecattention: attention stays dense in %s: %s", type(call.module).__name__, reason)
        layer = call.layer if self._count and call.causal else None
        timed = layer is not None and (call.key.shape[2] >= UNTIMED or call.query.device.type != "cuda")
        interval = Interval(call.query.device) if timed else None
        out = call.dense()
        if interval is not None:
            interval.stop()
        if layer is not None:
            self._counts.dense(layer, call.query.shape[1], pairs, interval)
        return out

    def _layout(self, call: Call) -> tuple[Sequence[Part] | None, str | None]:
        """(the parts of the call, the reason to stay dense); at least one of them is there."""
        reason, mask = why_dense(call), call.spans()
        if mask is None or not call.causal:
            return None, reason
        batch = call.query.shape[0]
        vision = self._wanted(batch)
        if isinstance(vision, str):
            vision, reason = None, reason or vision
        found = parts(mask, batch, vision, self.settings.min_length)
        return found, reason or too_short(found, vision, self.settings) or self._no_backend(call)

    def _no_backend(self, call: Call) -> str | None:
        """`no_backend`, which the layers of a forward would ask alike, one after the other."""
        problem = call.query.shape, call.key.shape, call.query.dtype, call.query.device
        asked, answer = self._asked
        if asked != problem:
            answer = no_backend(call, self.settings)
            self._asked = problem, answer
        return answer

    def _wanted(self, batch: int) -> list[Span] | str | None:
        """The span of each batch element outside of which rows stay dense (None: all sparse), or why it is unknown."""
        asked = self.settings.vision
        if asked is None:
            return None
        if isinstance(asked, tuple):
            return [asked] * batch
        found = self._vision() if self._vision is not None else None
        return NO_IDS if found is None or len(found) != batch else found
