"""Independent pieces of CPU work side by side, each of them single-threaded inside.

A thousand small matrix products cost a thousand waits when torch splits every one over its threads, and on a busy
machine a wait takes as long as a time slice of the system: 20 times slower was seen. Here the threads meet once, at the
end. A piece also gives the same bits whatever the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch

Piece = Callable[[], None]


def run(pieces: Iterable[Piece]) -> None:
    """Call every piece, on as many threads as torch uses for one operation in the calling thread.

    The pieces run without autograd, in the inference mode of the caller, and start in the order given. The first
    error stops the others from being started and is raised here.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not _thread_counts_are_per_thread():
        with torch.no_grad():
            for piece in pieces:
                piece()
        return
    queue = list(pieces)
    crew = _Crew(iter(queue), min(threads, len(queue)), torch.is_inference_mode_enabled())
    try:
        crew.start()
    finally:
        torch.set_num_threads(threads)  # what a thread born from now on starts with; the crew keeps its 1
    crew.finish()


class _Crew:
    """Threads that share one queue of pieces."""

    def __init__(self, queue: Iterator[Piece], size: int, inference: bool) -> None:
        self._queue, self._inference = queue, inference
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._ready = threading.Barrier(size + 1)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(size)]

    def start(self) -> None:
        """Start the threads, and wait until each of them is set to one thread inside."""
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no more threads to be had: let go those that wait for the rest
            self._ready.abort()
            raise
        self._ready.wait()

    def finish(self) -> None:
        """Wait for the last piece; raise the first error."""
        try:
            for thread in self._threads:
                thread.join()
        except BaseException:  # an interrupt of the caller: start nothing more, leave when all have stopped
            self._stop()
            for thread in self._threads:
                thread.join()
            raise
        if self._errors:
            raise self._errors[0]

    def _work(self) -> None:
        torch.get_num_threads()  # the first question in a thread sets its count; only then does the next line last
        torch.set_num_threads(1)
        try:
            self._ready.wait()
        except threading.BrokenBarrierError:
            return
        try:
            with torch.inference_mode(self._inference), torch.no_grad():
                while (piece := self._next()) is not None:
                    piece()
        except BaseException as error:
            self._errors.append(error)
            self._stop()

    def _next(self) -> Piece | None:
        with self._lock:
            return next(self._queue, None)

    def _stop(self) -> None:
        with self._lock:
            self._queue = iter(())


@cache
def _thread_counts_are_per_thread() -> bool:
    """Whether `torch.set_num_threads` in one thread leaves the others as they are: so with OpenMP."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()
