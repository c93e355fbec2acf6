"""How long a function takes: medians and quartiles of groups of calls, which on a GPU the host does not hold up."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

GROUPS = 7


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and the quartiles over groups of calls, and how many calls were timed."""

    median: float
    low: float
    high: float
    calls: int

    def record(self) -> dict[str, float | int]:
        """JSON-ready values, milliseconds with three digits after the point."""
        return {
            "ms": round(self.median, 4), "ms_q1": round(self.low, 4), "ms_q3": round(self.high, 4), "calls": self.calls,
        }  # fmt: skip


def measure(call: Callable[[], object], budget_ms: float = 150.0, device: str = "cuda") -> Timing:
    """Time a call.

    On a GPU calls are queued in groups between two events, so that the host's part hides behind the device's. Nothing
    empties the L2 cache between calls: from some 8,192 tokens on the inputs are larger than it. A first pass warms up
    and sizes the groups.

    Args:
        call: queues the work and returns, or on a CPU does it.
        budget_ms: about how long all groups take together.
        device: where the work is done.
    """
    group = _queued if device.startswith("cuda") else _clocked
    for _ in range(2):
        call()
    took = group(call, 3)
    each = max(1, int(budget_ms / GROUPS / max(took, 1e-3)))
    times = sorted(group(call, each) for _ in range(GROUPS))
    return Timing(times[GROUPS // 2], times[GROUPS // 4], times[GROUPS - 1 - GROUPS // 4], each * GROUPS)


def compare(call: Callable[[], object], other: Callable[[], object], budget_ms: float = 300.0,
            device: str = "cuda") -> tuple[Timing, float]:  # fmt: skip
    """(time of a call, median of its time over that of another one).

    Groups of the two alternate, either one first in turn, so that a clock that sinks as the device gets warm does not
    favour one.
    """
    group = _queued if device.startswith("cuda") else _clocked
    for made in (call, other, call, other):
        made()
    took = group(call, 3) + group(other, 3)
    each = max(1, int(budget_ms / GROUPS / max(took, 1e-3)))
    pairs = []
    for turn in range(GROUPS):
        first = group(call, each) if turn % 2 else None
        beside = group(other, each)
        pairs.append((first or group(call, each), beside))
    times, ratios = sorted(a for a, _ in pairs), sorted(a / b for a, b in pairs)
    middle = GROUPS // 2
    return Timing(times[middle], times[GROUPS // 4], times[GROUPS - 1 - GROUPS // 4], each * GROUPS), ratios[middle]


def once(call: Callable[[], object], device: str = "cuda") -> float:
    """Milliseconds of one call, with what the host takes to launch it; nothing is warmed up."""
    return (_queued if device.startswith("cuda") else _clocked)(call, 1)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: one launch, whatever the host does in between. It holds the call and its tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return functools.partial(_replay, graph, call)


def peak_extra(call: Callable[[], object]) -> int:
    """Bytes that a call allocates at its peak beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def _replay(graph: torch.cuda.CUDAGraph, _: Callable[[], object]) -> None:
    graph.replay()


def _queued(call: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / calls


def _clocked(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e3 * (time.perf_counter() - start) / calls
