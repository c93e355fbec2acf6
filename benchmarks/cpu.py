"""vec_attention against PyTorch's dense attention on this machine's CPU: python benchmarks/cpu.py

Seeded normal query, key and value, 4 heads, causal; the threshold is found by bisection so that the measured density is
the one asked for. Both are timed in turns in one process, selection included, and reported as median and quartiles.
Peak memory is measured in a process of its own for each: the kernel's high-water mark of resident memory (VmHWM of
/proc/self/status) is reset once the inputs are there and a small call has loaded everything, then one call is made; the
figure is what the call adds, its output included, and 1 + that over the size of query, key and value is "memory".
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import vecattention
from vecattention import machine
from vecattention.bench import record

HEADS = 4
RESULTS = Path(__file__).parent / "results" / "cpu.jsonl"
DTYPES = ("float32", "bfloat16", "float16")
WITHIN = 2e-4  # of the density asked for


def inputs(length: int, head_dim: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded normal query, key and value [1, 4, length, head_dim]."""
    numbers = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, HEADS, length, head_dim, generator=numbers).to(getattr(torch, dtype)) for _ in range(3)
    )
    return query, key, value


def threshold_for(density: float, query: Tensor, key: Tensor) -> tuple[float, float]:
    """The threshold that gives this mean density, and the density it gives."""
    low, high = 1e-3, 1.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        got = float(vecattention.select(query, key, threshold=middle).density().mean())
        if abs(got - density) < WITHIN:
            break
        low, high = (middle, high) if got > density else (low, middle)
    return middle, got


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's attention; on the CPU its own fused kernel."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each call, measured one after the other in rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: _summary(values) for name, values in times.items()}


def errors(query: Tensor, key: Tensor, value: Tensor, selection: vecattention.Selection, outs: dict[str, Tensor],
           rows: int = 32) -> dict[str, float]:  # fmt: skip
    """Largest error against float64 on sampled rows: of each over its own keys, all of the past or the selected."""
    found = dict.fromkeys(outs, 0.0)
    length = query.shape[2]
    for h in range(HEADS):
        for i in torch.linspace(0, length - 1, rows).long().tolist():
            columns = selection.columns(0, h, i // selection.block)
            keys = {"dense": torch.arange(i + 1), "sparse": columns[columns <= i]}
            for name, out in outs.items():
                index = keys[name]
                logits = key[0, h, index].double() @ query[0, h, i].double() * query.shape[3] ** -0.5
                wanted = logits.softmax(0) @ value[0, h, index].double()
                found[name] = max(found[name], float((out[0, h, i].double() - wanted).abs().max()))
    return found


def peak(name: str, length: int, head_dim: int, dtype: str, threshold: float) -> int:
    """Bytes of resident memory that one call adds at most; measured in a fresh process."""
    command = [sys.executable, __file__, "--measure-peak", name, str(length), str(head_dim), dtype, repr(threshold)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def print_peak(name: str, length: str, head_dim: str, dtype: str, threshold: str) -> None:
    """The fresh process of `peak`."""
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        "dense": dense,
        "sparse": partial(vecattention.vec_attention, threshold=float(threshold)),
    }
    calls[name](*inputs(256, int(head_dim), dtype))
    tensors = inputs(int(length), int(head_dim), dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before = _status("VmHWM")
    calls[name](*tensors)
    print(_status("VmHWM") - before)


def measure(length: int, head_dim: int, dtype: str, density: float, repeats: int) -> record.Record:
    """One case: times, density, errors and memory of both."""
    query, key, value = inputs(length, head_dim, dtype)
    threshold, got = threshold_for(density, query, key)
    selection = vecattention.select(query, key, threshold=threshold)
    sparse = partial(vecattention.vec_attention, query, key, value, threshold=threshold)
    times = in_turns(
        {
            "dense": partial(dense, query, key, value),
            "sparse": sparse,
            "select": partial(vecattention.select, query, key, threshold=threshold),
            "attend": partial(vecattention.attend, query, key, value, selection),
        },
        repeats,
    )
    given = 3 * query.nbytes
    return {
        "threshold": threshold,
        "density": round(got, 5),
        "times": times,
        "ratio": round(times["dense"]["ms"] / times["sparse"]["ms"], 3),
        "error": errors(query, key, value, selection, {"dense": dense(query, key, value), "sparse": sparse()}),
        "memory": {
            name: round(1 + peak(name, length, head_dim, dtype, threshold) / given, 3) for name in ("dense", "sparse")
        },
        "processor": machine.processor(),
        "load_before": _load(),
    }


def steps(options: argparse.Namespace) -> Iterator[record.Step]:
    """The cases of a run."""
    for dtype in options.dtypes:
        for length in options.lengths:
            case = {
                "study": "cpu", "length": length, "head_dim": options.head_dim, "heads": HEADS, "dtype": dtype,
                "density": options.density, "threads": torch.get_num_threads(),
            }  # fmt: skip
            yield case, partial(measure, length, options.head_dim, dtype, options.density, options.repeats)


def table(records: Iterator[record.Record]) -> None:
    """Print the records as they come."""
    print(f"{'dtype':9} {'tokens':>6} {'density':>8} {'dense ms':>20} {'sparse ms':>20} {'select':>8} {'ratio':>6} "
          f"{'memory, x (q, k, v)':>22} {'error':>18}")  # fmt: skip
    for found in records:
        key, times = found["key"], found["times"]
        spans = [f"{times[n]['ms']:.0f} ({times[n]['ms_q1']:.0f}-{times[n]['ms_q3']:.0f})" for n in ("dense", "sparse")]
        both = [f"{name} {found['memory'][name]:.2f}" for name in ("dense", "sparse")]
        error = f"{found['error']['dense']:.1e} {found['error']['sparse']:.1e}"
        print(f"{key['dtype']:9} {key['length']:6} {found['density']:8.2%} {spans[0]:>20} {spans[1]:>20} "
              f"{times['select']['ms']:8.0f} {found['ratio']:6.2f} {' '.join(both):>22} {error:>18}",
              flush=True)  # fmt: skip


def main() -> None:
    """Parse the command line, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.22, help="kept pairs over causal pairs")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines, appended; what it holds is not repeated")
    parser.add_argument("--again", action="store_true", help="measure what the file holds already, too")
    parser.add_argument("--measure-peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_peak:
        print_peak(*options.measure_peak)
        return
    torch.set_num_threads(options.threads)
    print(json.dumps({"processor": machine.processor(), "torch": torch.__version__}))
    table(record.run(options.out, steps(options), options.again))
    print(f"records in {options.out}")


def _summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return {"ms": round(middle, 2), "ms_q1": round(low, 2), "ms_q3": round(high, 2), "calls": len(values)}


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _load() -> float:
    return round(float(Path("/proc/loadavg").read_text().split()[0]), 2)


if __name__ == "__main__":
    main()
