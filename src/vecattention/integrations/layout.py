"""Which rows of a call are real, which keys they see, and which of them are sparse: plain numbers, no tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vecattention.integrations.masks import CausalSpans
from vecattention.spec import allowed_pairs

Span = tuple[int, int] | None


@dataclass(frozen=True)
class Part:
    """The real rows of some batch elements that are alike: one causal problem, aligned bottom-right.

    Attributes:
        batch: which batch elements.
        rows: which query rows; outside of them is padding.
        keys: which keys, up to the position of the last of the rows.
        low, high: rows low .. high - 1, counted from the first real one, are sparse; the others are dense.
    """

    batch: slice
    rows: slice
    keys: slice
    low: int
    high: int

    @property
    def count(self) -> int:
        """Number of real rows."""
        return int(self.rows.stop - self.rows.start)

    @property
    def before(self) -> int:
        """Keys in front of the first real row: those of the cache."""
        return int(self.keys.stop - self.keys.start) - self.count

    def first_block(self, block: int) -> int:
        """Where the sparse computation begins: the blocks lie as if all rows were sparse, so it starts with a block."""
        return self.low // block * block

    def sparse_pairs(self, block: int) -> int:
        """Pairs of one head that the sparse rows, whole blocks, would attend densely."""
        start = self.first_block(block)
        if self.high == self.low:
            return 0
        return self._elements * allowed_pairs(self.high - start, self.before + self.high, True)

    @functools.cached_property
    def all_pairs(self) -> int:
        """Pairs of one head that all rows would attend densely."""
        return self._elements * allowed_pairs(self.count, self.before + self.count, True) if self.count else 0

    @property
    def _elements(self) -> int:
        return int(self.batch.stop - self.batch.start)


def parts(mask: CausalSpans, batch: int, vision: Sequence[Span] | None, min_length: int) -> tuple[Part, ...]:
    """The `Part`s of a call; neighbouring batch elements that are alike share one.

    Args:
        mask: of the call.
        batch: number of batch elements.
        vision: positions (start, end) of each element's vision tokens, None for an element that has none; rows outside
            stay dense. None: all rows are sparse.
        min_length: rows with fewer keys than this at their end stay dense.

    Example:
        >>> mask = CausalSpans(first=0, rows=300, spans=((100, 300), (0, 300)), dense=lambda: None)
        >>> [(p.rows, p.low, p.high) for p in parts(mask, 2, None, 129)]
        [(slice(100, 300, None), 0, 200), (slice(0, 300, None), 0, 300)]
        >>> [(p.low, p.high) for p in parts(mask, 2, [(150, 290), None], 129)]
        [(50, 190), (0, 0)]
    """
    wanted = None if vision is None else tuple(vision)
    return _parts(mask.first, mask.last, mask.spans, batch, wanted, min_length)


@functools.lru_cache(maxsize=64)  # the layers of a forward ask one after the other
def _parts(
    first: int, last: int, real: tuple[tuple[int, int], ...] | None, batch: int, vision: tuple[Span, ...] | None,
    min_length: int,
) -> tuple[Part, ...]:  # fmt: skip
    """`parts` of a mask whose rows are at the positions first .. last - 1."""
    spans, wanted = real or ((0, last),) * batch, ((0, last),) * batch if vision is None else vision
    bounds = [_bounds(first, last, *both, min_length) for both in zip(spans, wanted, strict=True)]
    found, start = [], 0
    for (rows, keys, sparse), group in itertools.groupby(bounds):
        stop = start + len(list(group))
        found.append(Part(slice(start, stop), slice(*rows), slice(*keys), *sparse))
        start = stop
    return tuple(found)


def _bounds(
    begin: int, end: int, span: tuple[int, int], vision: Span, min_length: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(rows, keys, sparse rows), each (start, end), of a batch element whose rows are at begin .. end - 1."""
    first = min(max(span[0], begin), end)  # positions of the real rows
    last = max(first, min(span[1], end))
    rows, keys = (first - begin, last - begin), (min(span[0], first), last)
    if vision is None:
        return rows, keys, (0, 0)
    low = min(max(vision[0], first), last)
    high = max(low, min(vision[1], last))
    if high - keys[0] < min_length or high == low:
        return rows, keys, (0, 0)
    return rows, keys, (low - first, high - first)
