"""Everything that a GPU is asked for in one go: python benchmarks/gpu.py OUT.jsonl

First all kernels of the run are compiled, several processes at a time, since that takes longer than the measurements;
then dense kernels, attention over ready lists, selection and whole calls are timed one after the other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

import vecattention
from vecattention.bench import record, report, studies
from vecattention.bench.cases import CASES, inputs, lists

RULES = ((32, 128, "window"), (64, 128, "window"), (64, 64, "window"), (64, 128, "row"))
LISTED = ("square-32k", "qwen2.5-vl-32k")
WHOLE = {
    "qwen2.5-vl-32k": (0.07, 0.215, 0.5), "qwen2.5-vl-128k": (0.07, 0.215), "wan2.1-14b-720p": (0.48,),
    "hunyuanvideo-720p": (0.38,),
}  # fmt: skip


def warm(name: str) -> None:
    """Compile what a case needs, on its own shapes."""
    case = CASES[name]
    query, key, value = inputs(case)
    for pool, block, scope in RULES:
        rule = {"q_pooling_size": pool, "q_block_size": block, "max_scope": scope, "causal": case.causal}
        vecattention.vec_attention(query, key, value, threshold=0.9, **rule)
        if name in LISTED and (pool, block) in ((64, 128), (64, 64)):
            for backend in ("auto", "triton"):
                selection = lists(case, 0.02, block=block)
                vecattention.attend(query, key, value, selection, backend=backend)
    torch.cuda.synchronize()


def steps(which: list[str]) -> list[record.Step]:
    """All measurements of some cases, the most wanted first."""
    found: list[record.Step] = []
    for name in which:
        case = CASES[name]
        found.append(({"study": "dense", "case": name}, partial(studies.dense, case)))
        for pool, block, scope in RULES if "32k" in name else RULES[:3]:
            rule = {"case": name, "pool": pool, "block": block, "scope": scope}
            for density in WHOLE.get(name, ()):
                if (pool, block) != (64, 64) or "32k" in name:
                    found.append(
                        ({"study": "call", **rule, "density": density, "structure": 0.0},
                         partial(studies.whole, case, density, pool, block, scope))
                    )  # fmt: skip
            found.append(
                ({"study": "selection", **rule, "backend": "auto"},
                 partial(studies.selection, case, pool, block, scope, "auto"))
            )  # fmt: skip
    for name in LISTED:
        if name not in which:
            continue
        for block, density, kind, backend in (
            *((128, d, k, "auto") for d in (0.05, 0.1, 0.2, 0.5) for k in ("random", "clustered")),
            *((64, d, k, "auto") for d in (0.1, 0.5) for k in ("random", "clustered")),
            (128, 0.1, "random", "triton"), (64, 0.1, "random", "triton"),
        ):  # fmt: skip
            key = {"study": "attention", "case": name, "density": density, "lists": kind, "backend": backend,
                   "block": block}  # fmt: skip
            found.append((key, partial(studies.attention, CASES[name], density, kind, backend, 0, block)))
    return found


def main() -> None:
    """Compile in parallel, then measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", nargs="*", default=["qwen2.5-vl-32k", "wan2.1-14b-720p", "hunyuanvideo-720p",
                                                       "qwen2.5-vl-128k", "square-32k"])  # fmt: skip
    parser.add_argument("--warm", help="only compile what this case needs")
    args = parser.parse_args()
    if args.warm:
        warm(args.warm)
        return
    others = [subprocess.Popen([sys.executable, __file__, str(args.out), "--warm", name]) for name in args.cases]
    for other in others:
        if other.wait():
            sys.stderr.write("a kernel could not be compiled or run; see above\n")
    wrong = 0
    for row in record.run(args.out, steps(args.cases)):
        sys.stdout.write(report.line(row) + "\n")
        sys.stdout.flush()
        wrong += row.get("error_ok") is False or row.get("repeats_equal") is False
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
