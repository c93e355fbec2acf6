"""What a run computed: counts per layer and head, gathered on the device and read when asked."""

from __future__ import annotations

import threading
from collections import deque
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
        seconds: time that attention took in prefill, sparse and dense calls together but for ``untimed_calls``, on the
            device's clock.
        untimed_calls: dense calls whose time is not in ``seconds``: on a GPU those of fewer than 1,024 keys.
    """

    kept: Tensor
    sparse_pairs: int = 0
    dense_pairs: int = 0
    sparse_calls: int = 0
    dense_calls: int = 0
    decode_calls: int = 0
    seconds: float = 0.0
    untimed_calls: int = 0

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
        """Time that attention took in prefill, all layers; without that of `untimed_calls`."""
        return sum(layer.seconds for layer in self.layers.values())

    @property
    def untimed_calls(self) -> int:
        """Dense prefill calls that were too short to be timed, all layers."""
        return sum(layer.untimed_calls for layer in self.layers.values())

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
        without = f", {self.untimed_calls} short calls not timed" if self.untimed_calls else ""
        lines.append(
            f"  all  {_percent(torch.tensor(self.mean_density))}  in {self.seconds:.3f} s of prefill attention{without}"
        )
        lines += [f"dense in {count} calls: {reason}" for reason, count in self.reasons.items()]
        return "\n".join(lines)

    @staticmethod
    def _stacked(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows) if rows else torch.empty(0, 0)


class Counts:
    """Gathers what a run computes without waiting for the device; safe to feed from several threads.

    Whoever adds a call names its layer, its query heads, and the interval of its time, which may still be on its way on
    the device.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: dict[int, _Layer] = {}
        self._reasons: dict[str, int] = {}

    def sparse(self, layer: int, kept: Tensor, sparse_pairs: int, dense_pairs: int, interval: Interval) -> None:
        """Add a prefill call with sparse rows.

        Args:
            kept: int64 [H], pairs that its sparse rows attended, on any device.
            sparse_pairs: pairs of one head that the same rows would attend densely.
            dense_pairs: pairs of one head of its dense rows.
        """
        with self._lock:
            held = self._layers.get(layer) or self._layer(layer, len(kept))
            # Not in place: a tensor made under torch.inference_mode may not be changed outside of it.
            held.kept = kept if held.kept is None else held.kept + kept.to(held.kept.device, non_blocking=True)
            held.sparse_pairs += sparse_pairs
            held.dense_pairs += dense_pairs
            held.sparse_calls += 1
            held.time(interval)

    def dense(self, layer: int, heads: int, pairs: int, interval: Interval | None) -> None:
        """Add a prefill call that stayed dense, of ``pairs`` pairs of one head; no interval: its time is not taken."""
        with self._lock:
            held = self._layers.get(layer) or self._layer(layer, heads)
            held.dense_pairs += pairs
            held.dense_calls += 1
            if interval is None:
                held.untimed_calls += 1
            else:
                held.time(interval)

    def decoded(self, layer: int, heads: int) -> None:
        """Add a call of one token."""
        with self._lock:
            held = self._layers.get(layer) or self._layer(layer, heads)
            held.decode_calls += 1

    def note(self, reason: str) -> bool:
        """Count a reason to stay dense; true when it is the first time."""
        with self._lock:
            self._reasons[reason] = count = self._reasons.get(reason, 0) + 1
        return count == 1

    def read(self) -> Stats:
        """The `Stats` until now, on the CPU: waits for the device."""
        with self._lock:
            for held in self._layers.values():
                held.settle(0)
            layers = {index: held.stats() for index, held in sorted(self._layers.items())}
            reasons = dict(self._reasons)
        return Stats({i: replace(layer, kept=layer.kept.cpu()) for i, layer in layers.items()}, reasons)

    def _layer(self, index: int, heads: int) -> _Layer:
        held = self._layers[index] = _Layer(heads)
        return held


class _Layer:
    """What one layer has computed; numbers of the host, and of its sparse calls one tensor on the device."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.kept: Tensor | None = None
        self.sparse_pairs = self.dense_pairs = 0
        self.sparse_calls = self.dense_calls = self.decode_calls = self.untimed_calls = 0
        self.seconds = 0.0
        self.running: deque[Interval] = deque()

    def time(self, interval: Interval) -> None:
        """Add the time of a call."""
        self.running.append(interval)
        if len(self.running) > RUNNING:
            self.settle(RUNNING)

    def settle(self, most: int) -> None:
        """Turn the oldest intervals into seconds until at most so many are left."""
        while len(self.running) > most:
            self.seconds += self.running.popleft().seconds()

    def stats(self) -> LayerStats:
        """Its counts; the kept pairs where they are."""
        kept = torch.zeros(self.heads, dtype=torch.int64, device="cpu") if self.kept is None else self.kept
        return LayerStats(kept, self.sparse_pairs, self.dense_pairs, self.sparse_calls, self.dense_calls,
                          self.decode_calls, self.seconds, self.untimed_calls)  # fmt: skip


def _percent(value: Tensor) -> str:
    return "     -" if bool(torch.isnan(value)) else f"{100 * float(value):5.1f}%"
