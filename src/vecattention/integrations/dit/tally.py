"""Counts of a video generator's layers, kept on the device and read when asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from vecattention.integrations.clock import Interval
from vecattention.integrations.stats import RUNNING, LayerStats

SPARSE_PAIRS, DENSE_PAIRS, SPARSE_CALLS, ORDERED_CALLS, NOTED_CALLS = range(5)


class Times:
    """Seconds of the calls of one layer; of those on a GPU the latest are read only when asked for."""

    def __init__(self) -> None:
        self._running: deque[Interval] = deque()
        self._ended = 0.0

    def add(self, interval: Interval) -> None:
        """Take an interval that was stopped; one that is long past is read, which does not wait."""
        self._running.append(interval)
        self._settle(RUNNING)

    def seconds(self) -> float:
        """Their sum; waits for the device."""
        self._settle(0)
        return self._ended

    def _settle(self, most: int) -> None:
        while len(self._running) > most:
            self._ended += self._running.popleft().seconds()


class Tally:
    """Counts of the layers of one transformer in one guidance branch.

    Attributes:
        kept: per layer int64 [H], pairs that sparse rows attended.
        numbers: per layer int64 [5]: sparse pairs, dense pairs, sparse calls, calls dense by order and against order.
        times: per layer the time that attention took, outside of compiled graphs.
    """

    def __init__(self, layers: int, heads: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be added to outside of it
            self.kept = [torch.zeros(heads, dtype=torch.int64, device=device) for _ in range(layers)]
            self.numbers = [torch.zeros(5, dtype=torch.int64, device=device) for _ in range(layers)]
        self.times = [Times() for _ in range(layers)]

    def read(self) -> dict[int, LayerStats]:
        """`LayerStats` by layer; waits for the device."""
        kept, numbers = torch.stack(self.kept).cpu(), torch.stack(self.numbers).cpu()
        return {i: _layer(kept[i], numbers[i], self.times[i].seconds()) for i in range(len(kept))}


def ordered(tally: Tally) -> list[int]:
    """Calls of each layer that stayed dense by order; waits for the device."""
    return [int(calls) for calls in torch.stack(tally.numbers)[:, ORDERED_CALLS].tolist()]


def summed(tallies: Iterable[Tally]) -> dict[int, LayerStats]:
    """`LayerStats` by layer, over several tallies; layers without a call are left out."""
    total: dict[int, LayerStats] = {}
    for tally in tallies:
        for index, more in tally.read().items():
            old = total.get(index)
            total[index] = more if old is None else _sum(old, more)
    return {index: layer for index, layer in sorted(total.items()) if layer.calls}


def _layer(kept: Tensor, numbers: Tensor, seconds: float) -> LayerStats:
    values = numbers.tolist()
    return LayerStats(
        kept, values[SPARSE_PAIRS], values[DENSE_PAIRS], sparse_calls=values[SPARSE_CALLS],
        dense_calls=values[ORDERED_CALLS] + values[NOTED_CALLS], seconds=seconds,
    )  # fmt: skip


def _sum(a: LayerStats, b: LayerStats) -> LayerStats:
    return LayerStats(
        a.kept + b.kept, a.sparse_pairs + b.sparse_pairs, a.dense_pairs + b.dense_pairs,
        sparse_calls=a.sparse_calls + b.sparse_calls, dense_calls=a.dense_calls + b.dense_calls,
        seconds=a.seconds + b.seconds,
    )  # fmt: skip
