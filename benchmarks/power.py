"""What the power limit of a GPU costs: python benchmarks/power.py OUT.jsonl

Attention over lists, and torch's dense kernel, each four ways: over random values and over zeros, of which the circuits
of a GPU take less power; call after call, and with a rest before each call. Where a kernel is limited by power alone,
rest and zeros make it faster; where its own steps are the limit, they do not. Medians; calls are CUDA graphs.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import vecattention
from vecattention import machine
from vecattention.bench import record, studies, timer
from vecattention.bench.cases import Source, case_of, lists

LISTS = [
    *itertools.product(("square-32k", "qwen2.5-vl-32k"), (0.1, 0.2, 0.5), ("random", "clustered"), (128,)),
    *itertools.product(("square-32k", "qwen2.5-vl-32k"), (0.1, 0.5), ("random", "clustered"), (64,)),
]


def measure(
    source: Source, density: float, kind: str, block: int, rounds: int, ms: float, rest: float
) -> list[record.Record]:
    """A record for each of the four ways; density 1: the dense kernel."""
    tensors = {"random": source.tensors()}
    tensors["zeros"] = tuple(torch.zeros_like(x) for x in tensors["random"])
    if density < 1:
        ready = lists(source.case, density, kind, 0, block, source.device)
        flop, of = studies.useful_flop(source.case, ready), f"lists, R={block}, {kind}, {100 * density:g} %"

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return vecattention.attend(query, key, value, ready)
    else:
        flop, of = source.case.dense_flop, "dense, cuDNN"

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if source.device == "cuda" else SDPBackend.MATH):
                return scaled_dot_product_attention(
                    query, key, value, is_causal=source.case.causal, enable_gqa=query.shape[1] != key.shape[1]
                )

    calls = {}
    for values, (query, key, value) in tensors.items():
        call(query, key, value)
        made = partial(call, query, key, value)
        calls[values] = timer.graphed(made) if source.device == "cuda" else made
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for values in random.sample(list(calls), len(calls)):
            times.setdefault((values, "no rest"), []).append(timer.measure(calls[values], ms, source.device).median)
            rested = [_rested(calls[values], rest, source.device) for _ in range(5)]
            times.setdefault((values, f"{1e3 * rest:g} ms of rest"), []).append(statistics.median(rested))
    busy = {values: _busy(run, statistics.median(times[values, "no rest"]) / 1e3) for values, run in calls.items()}
    return [
        {"study": "trials", "run": 1, "case": source.case.name, "of": of, "variant": f"{values}, {how}",
         "ms": round(statistics.median(found), 4), "ms_min": round(min(found), 4), "rounds": rounds,
         "tflops": studies.tflops(flop, statistics.median(found)),
         **({"while_busy": busy[values]} if how == "no rest" else {})}
        for (values, how), found in sorted(times.items())
    ]  # fmt: skip


def _rested(call: Callable[[], object], seconds: float, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    time.sleep(seconds)
    return timer.once(call, device)


def _busy(call: Callable[[], object], seconds: float) -> dict[str, float | bool] | None:
    """What the GPU says of its clock and power amid half a second of calls."""
    for _ in range(int(0.5 / seconds) + 1):
        call()
    time.sleep(0.2)
    return machine.gpu_state()


def main() -> None:
    """Measure what the record does not hold yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--ms", type=float, default=100.0, help="that calls without rest are timed for (%(default)s)")
    parser.add_argument("--rest", type=float, default=0.05, help="seconds before each of five calls (%(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device, and this measures one; run it where there is one")
    works = [*(("square-32k", 1.0, "", 0), ("qwen2.5-vl-32k", 1.0, "", 0)), *LISTS]
    steps: list[record.Step] = []
    for case, density, kind, block in works:
        source = Source(case_of(case))
        key = {"study": "power", **source.key, "density": density, "lists": kind, "block": block, "rest": args.rest}
        steps.append((key, partial(measure, source, density, kind, block, args.rounds, args.ms, args.rest)))
    for row in record.run(args.out, steps):
        if "failed" in row:
            sys.stdout.write(f"{row['key']}: {row['failed']}\n")
            continue
        busy = row.get("while_busy") or {}  # its watts are an average over what went before, too
        state = f"  {busy['sm_mhz']:.0f} MHz" if "sm_mhz" in busy else ""
        sys.stdout.write(f"{row['case']:<16} {row['of']:<34} {row['variant']:<26} {row['ms']:8.4f} ms "
                         f"{row['tflops']:6.0f} TFLOP/s{state}\n")  # fmt: skip


if __name__ == "__main__":
    main()
