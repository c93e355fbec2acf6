"""What a run computed: counts per layer and head, gathered on the device and read when asked."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vecattention.integrations.clock import Interval

RUNNING = 64  # intervals of a layer that may be open; an older one has long ended, so that reading it does not wait


@dataclass(frozen=True)
class LayerStats:
    """Counts of one layer. Pairs are (query, key) pairs of one head, summed over calls and batch elements.

    Attributes:
        kept: int64 [H], pairs that sparse rows attended.
        sparse_pairs: pairs that the same rows would attend densely.
        dense_pairs: pairs of the rows that stayed dense in prefill.
        sparse_calls, dense_calls, decode_calls: calls with sparse rows, prefill calls without, one-token calls.
        seconds: time that attention took in prefill, sparse and dense calls together, on the device's clock.
    """

    kept: Tensor
    sparse_pairs: int = 0
    dense_pairs: int = 0
    sparse_calls: int = 0
    dense_calls: int = 0
    decode_calls: int = 0
    seconds: float = 0.0

    @property
    def calls(self) -> int:
        """All calls."""
        return self.sparse_calls + self.dense_calls + self.decode_calls

    @property
    def density(self) -> Tensor:
        """float32 [H]: pairs attended in prefill over those of dense attention, dense rows included; NaN if none."""
        return ((self.kept + self.dense_pairs).double() / (self.sparse_pairs + self.dense_pairs)).float()

    @property
    def sparse_density(self) -> Tensor:
        """float32 [H]: the same over the sparse rows alone; NaN without any."""
        return (self.kept.double() / self.sparse_pairs).float()


@dataclass(frozen=True)
class Stats:
    """What a run computed until now; printable.

    Attributes:
        layers: `LayerStats` by layer index, ascending.
        reasons: why calls or rows stayed dense, and how many calls each reason met.
    """

    layers: Mapping[int, LayerStats]
    reasons: Mapping[str, int]

    @property
    def calls(self) -> int:
        """Calls of all layers."""
        return sum(layer.calls for layer in self.layers.values())

    @property
    def sparse_calls(self) -> int:
        """Calls with sparse rows, all layers."""
        return sum(layer.sparse_calls for layer in self.layers.values())

    @property
    def dense_calls(self) -> int:
        """Prefill calls that stayed dense, all layers."""
        return sum(layer.dense_calls for layer in self.layers.values())

    @property
    def decode_calls(self) -> int:
        """One-token calls, all layers."""
        return sum(layer.decode_calls for layer in self.layers.values())

    @property
    def seconds(self) -> float:
        """Time that attention took in prefill, all layers."""
        return sum(layer.seconds for layer in self.layers.values())

    @property
    def density(self) -> Tensor:
        """float32 [layers, H]: pairs attended in prefill over those of dense attention, dense rows included."""
        return self._stacked([layer.density for layer in self.layers.values()])

    @property
    def sparse_density(self) -> Tensor:
        """float32 [layers, H]: the same over the sparse rows alone."""
        return self._stacked([layer.sparse_density for layer in self.layers.values()])

    @property
    def mean_density(self) -> float:
        """Pairs attended in prefill over those of dense attention, all layers and heads; NaN before any prefill."""
        kept = sum(int((layer.kept + layer.dense_pairs).sum()) for layer in self.layers.values())
        pairs = sum((layer.sparse_pairs + layer.dense_pairs) * len(layer.kept) for layer in self.layers.values())
        return kept / pairs if pairs else float("nan")

    def __str__(self) -> str:
        lines = ["layer  density  (least .. most head)  sparse rows  calls: sparse  dense  decode"]
        for index, layer in self.layers.items():
            density, sparse = layer.density, layer.sparse_density.mean()
            lines.append(
                f"{index:5d}  {_percent(density.mean())}  ({_percent(density.min())} .. {_percent(density.max())})"
                f"      {_percent(sparse)}       {layer.sparse_calls:7d} {layer.dense_calls:6d} {layer.decode_calls:7d}"
            )
        lines.append(
            f"  all  {_percent(torch.tensor(self.mean_density))}  in {self.seconds:.3f} s of prefill attention"
        )
        lines += [f"dense in {count} calls: {reason}" for reason, count in self.reasons.items()]
        return "\n".join(lines)

    @staticmethod
    def _stacked(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows) if rows else torch.empty(0, 0)


class Counts:
    """Gathers `LayerStats` without waiting for the device; safe to feed from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: dict[int, LayerStats] = {}
        self._running: dict[int, deque[Interval]] = {}
        self._seconds: defaultdict[int, float] = defaultdict(float)
        self._reasons: Counter[str] = Counter()

    def add(self, layer: int, more: LayerStats, interval: Interval | None = None) -> None:
        """Add the counts of one call and the time it takes; both may still be on their way on the device."""
        with self._lock:
            old = self._layers.get(layer)
            self._layers[layer] = more if old is None else _sum(old, more)
            if interval is not None:
                self._running.setdefault(layer, deque()).append(interval)
                self._settle(layer, RUNNING)

    def note(self, reason: str) -> bool:
        """Count a reason; true when it is the first time."""
        with self._lock:
            self._reasons[reason] += 1
            return self._reasons[reason] == 1

    def read(self) -> Stats:
        """The `Stats` until now, on the CPU: waits for the device."""
        with self._lock:
            for layer in self._running:
                self._settle(layer, 0)
            layers, reasons = dict(sorted(self._layers.items())), dict(self._reasons)
            seconds = {i: layer.seconds + self._seconds[i] for i, layer in layers.items()}
        read = {i: replace(layer, kept=layer.kept.cpu(), seconds=seconds[i]) for i, layer in layers.items()}
        return Stats(read, reasons)

    def _settle(self, layer: int, most: int) -> None:
        """Turn the oldest intervals of a layer into seconds until at most so many are left."""
        running = self._running[layer]
        while len(running) > most:
            self._seconds[layer] += running.popleft().seconds()


def _sum(a: LayerStats, b: LayerStats) -> LayerStats:
    # Not in place: a tensor made under torch.inference_mode may not be changed outside of it. And not at all where
    # there is nothing to add, as in each one-token call: the device would have to be told.
    kept = a.kept if b.sparse_calls == 0 else b.kept
    if a.sparse_calls and b.sparse_calls:
        kept = a.kept + b.kept.to(a.kept.device, non_blocking=True)
    return LayerStats(
        kept, a.sparse_pairs + b.sparse_pairs,
        a.dense_pairs + b.dense_pairs, a.sparse_calls + b.sparse_calls, a.dense_calls + b.dense_calls,
        a.decode_calls + b.decode_calls, a.seconds + b.seconds,
    )  # fmt: skip


def _percent(value: Tensor) -> str:
    return "     -" if bool(torch.isnan(value)) else f"{100 * float(value):5.1f}%"
