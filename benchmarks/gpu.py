"""Everything that a GPU is asked for in one go: python benchmarks/gpu.py OUT.jsonl [--parts ...]

main: dense kernels, whole calls, selection and attention over ready lists, on the shapes of real models.
peers: other sparse kernels at equal density, the methods at equal recall, layers of the testbed's model.
tune: launch shapes, and the lengths from which sparse calls are faster, written as a profile beside OUT.

Kernels are compiled first, several processes at a time, since that takes longer than the measurements. What OUT holds
already is not measured again, so that a run which was cut off goes on.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

import vecattention
from vecattention import cli, methods
from vecattention.bench import peers, record, report, studies
from vecattention.bench.cases import CASES, Source, case_of, lists

RULES = ((32, 128, "window"), (64, 128, "window"), (64, 64, "window"), (64, 128, "row"))
CASES_OF = {
    "main": ("qwen2.5-vl-32k", "wan2.1-14b-720p", "hunyuanvideo-720p", "qwen2.5-vl-128k", "square-32k"),
    "peers": ("square-32k", "qwen2.5-vl-32k"),
}
LISTED = ("square-32k", "qwen2.5-vl-32k")
WHOLE = {
    "qwen2.5-vl-32k": (0.07, 0.215, 0.5), "qwen2.5-vl-128k": (0.07, 0.215), "wan2.1-14b-720p": (0.48,),
    "hunyuanvideo-720p": (0.38,),
}  # fmt: skip
RECALL = 0.9
PARTS = ("main", "peers", "tune")


def warm(name: str) -> None:
    """Compile what a case needs, on its own shapes."""
    source = Source(case_of(name))
    case, (query, key, value) = source.case, source.tensors()
    for pool, block, scope in RULES:
        rule = {"q_pooling_size": pool, "q_block_size": block, "max_scope": scope, "causal": case.causal}
        vecattention.vec_attention(query, key, value, threshold=0.9, **rule)
        if name in LISTED and (pool, block) in ((64, 128), (64, 64)):
            for backend in ("auto", "triton"):
                selection = lists(case, 0.02, block=block)
                vecattention.attend(query, key, value, selection, backend=backend)
    torch.cuda.synchronize()


def main_steps(name: str) -> list[record.Step]:
    """Dense kernels, whole calls, selection and ready lists of a case."""
    found: list[record.Step] = []
    source = Source(case_of(name))
    found.append(({"study": "dense", **source.key}, partial(studies.dense, source)))
    for pool, block, scope in RULES if "32k" in name else RULES[:3]:
        rule = {**source.key, "pool": pool, "block": block, "scope": scope}
        for density in WHOLE.get(name, ()):
            if (pool, block) != (64, 64) or "32k" in name:
                found.append(
                    ({"study": "call", **rule, "density": density},
                     partial(studies.whole, source, density, pool, block, scope))
                )  # fmt: skip
        found.append(
            ({"study": "selection", **rule, "backend": "auto"},
             partial(studies.selection, source, pool, block, scope, "auto"))
        )  # fmt: skip
    return found + (list_steps(source) if name in LISTED else [])


def list_steps(source: Source) -> list[record.Step]:
    """Attention over ready lists."""
    both = ("random", "clustered")
    wanted = (
        *((128, d, k, "auto") for d, k in itertools.product((0.05, 0.1, 0.2, 0.5), both)),
        *((64, d, k, b) for d, k, b in itertools.product((0.1, 0.5), both, ("auto", "triton"))),
        *((128, 0.1, k, "triton") for k in both),
    )
    found: list[record.Step] = []
    for block, density, kind, backend in wanted:
        key = {"study": "attention", **source.key, "density": density, "lists": kind, "backend": backend,
               "block": block}  # fmt: skip
        found.append((key, partial(studies.attention, source, density, kind, backend, block)))
    return found


def peer_steps(name: str) -> list[record.Step]:
    """Other kernels at equal density, and the methods at equal recall on maps with bright stretches."""
    plain, bright = Source(case_of(name)), Source(case_of(name), structure=1.0)
    found: list[record.Step] = []
    for density in (0.1, 0.2, 0.5):
        key = {"study": "peer", **plain.key, "density": density}
        found.append(({**key, "kernel": "flex_attention"}, partial(peers.flex, plain, density)))
        if not plain.case.causal:
            for kind in ("random", "clustered"):
                found.append(({**key, "kernel": "flash-attn-4", "lists": kind},
                              partial(peers.paged, plain, density, kind)))  # fmt: skip
                for block in (128, 64):
                    found.append(({**key, "kernel": "flashinfer", "lists": kind, "block": block},
                                  partial(peers.vector_sparse, plain, density, kind, block)))  # fmt: skip
    found.append(({"study": "dense", **plain.key}, partial(studies.dense, plain)))
    for method in methods.names():
        if method != "full" and plain.case.causal in methods.get(method).modes:
            key = {"study": "method", **bright.key, "method": method, "recall": RECALL}
            found.append((key, partial(peers.method, bright, method, RECALL)))
    return found


def measure(out: Path, steps: list[record.Step]) -> int:
    """Number of wrong results."""
    wrong = 0
    for row in record.run(out, steps):
        sys.stdout.write(report.line(row) + "\n")
        sys.stdout.flush()
        wrong += report.wrong(row)
    return wrong


def main() -> None:
    """Compile in parallel, then measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=["main"], help="(main)")
    parser.add_argument("--cases", nargs="*", choices=CASES, help="of main and peers (all of theirs)")
    parser.add_argument("--warm", help="only compile what this case needs")
    args = parser.parse_args()
    if args.warm:
        warm(args.warm)
        return
    named = {part: args.cases or CASES_OF[part] for part in args.parts if part in CASES_OF}
    others = [
        subprocess.Popen([sys.executable, __file__, str(args.out), "--warm", name])
        for name in dict.fromkeys(itertools.chain(*named.values()))
    ]
    for other in others:
        if other.wait():
            sys.stderr.write("a kernel could not be compiled or run; see above\n")
    steps = [step for name in named.get("main", ()) for step in main_steps(name)]
    steps += [step for name in named.get("peers", ()) for step in peer_steps(name)]
    wrong = measure(args.out, steps)
    if "peers" in args.parts:
        wrong += cli.main(["bench", "layer", "--out", str(args.out), "--recall", str(RECALL)])
    if "tune" in args.parts:
        wrong += cli.main(["bench", "tune", "--out", str(args.out)])
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
