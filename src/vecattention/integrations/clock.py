"""How long a call takes: wall time on the CPU, events on a GPU that are read when somebody asks."""

from __future__ import annotations

import time

import torch


class Interval:
    """The time from its making to `stop`, on the clock of a device.

    Example:
        >>> interval = Interval(torch.device("cpu"))
        >>> interval.stop()
        >>> 0 <= interval.seconds() < 1
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._end = _now(device)

    def stop(self) -> None:
        """End the interval; does not wait for the device."""
        self._end = _now(self._device)

    def seconds(self) -> float:
        """Its length; waits until the device has reached its end."""
        if isinstance(self._begin, torch.cuda.Event) and isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()
            return float(self._begin.elapsed_time(self._end)) / 1000
        return float(self._end) - float(self._begin)  # type: ignore[arg-type]


def _now(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]
    event.record(torch.cuda.current_stream(device))
    return event
