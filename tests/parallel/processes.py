"""Groups of processes joined by gloo that run functions of a test module and hand back what each rank returned."""

from __future__ import annotations

import importlib
import os
import queue
import socket
import traceback
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 120  # seconds for one function


class Pool:
    """``ranks`` processes that wait for work."""

    def __init__(self, ranks: int) -> None:
        context = mp.get_context("spawn")
        self.results = context.Queue()
        self.work = [context.Queue() for _ in range(ranks)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.children = [
            context.Process(target=_child, args=(rank, ranks, port, work, self.results), daemon=True)
            for rank, work in enumerate(self.work)
        ]
        for child in self.children:
            child.start()

    def run(self, module: str, name: str, *arguments: Any) -> list[Any]:
        """What ``module.name(rank, *arguments)`` returns on each rank.

        Raises:
            RuntimeError: some rank failed; its traceback is in the message.
        """
        for work in self.work:
            work.put((module, name, arguments))
        answers: dict[int, Any] = {}
        for _ in self.work:
            rank, answer, error = self.results.get(timeout=PATIENCE)
            if error:
                raise RuntimeError(f"rank {rank} failed\n{error}")
            answers[rank] = answer
        return [answers[rank] for rank in range(len(self.work))]

    def end(self) -> None:
        """Let the processes end, and end those that hang."""
        for work in self.work:
            work.put(None)
        for child in self.children:
            child.join(timeout=5)
            if child.is_alive():
                child.kill()
                child.join()


class Pools:
    """A pool for each number of ranks, made when needed and made anew after a failure."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def run(self, ranks: int, module: str, name: str, *arguments: Any) -> list[Any]:
        """`Pool.run` with so many ranks."""
        if ranks not in self._pools:
            self._pools[ranks] = Pool(ranks)
        try:
            return self._pools[ranks].run(module, name, *arguments)
        except (RuntimeError, queue.Empty):
            self._pools.pop(ranks).end()
            raise

    def end(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.end()


def _child(rank: int, ranks: int, port: int, work: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    while (task := work.get()) is not None:
        module, name, arguments = task
        answer, error = None, ""
        try:
            answer = getattr(importlib.import_module(module), name)(rank, *arguments)
            dist.barrier()
        except BaseException:
            error = traceback.format_exc()
        results.put((rank, _plain(answer), error))
    dist.destroy_process_group()


def _plain(value: Any) -> Any:
    """Tensors as nested lists: a shared tensor would die with its process."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
