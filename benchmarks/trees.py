"""Compare versions of the library: python benchmarks/trees.py OUT.jsonl before=../old/src after=src --calls ...

Each version runs in a process of its own, from its own source tree. In each round the measurements come in random
order, and of each the versions do: a clock that sinks as the device gets warm favours none. Printed and recorded are
medians of the rounds; on a GPU calls are CUDA graphs. `equal`: the sum of a version's results is that of the first.

    python benchmarks/trees.py out/trees.jsonl before=../old/src after=src --calls hunyuanvideo-720p:0.38 \\
        --selections qwen2.5-vl-32k --lists square-32k:0.1:random square-32k:0.1:clustered --pool 64 32
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = dict[str, Any]


def works(args: argparse.Namespace) -> list[Work]:
    """What is to be measured, each as the JSON that a process is asked with."""
    found: list[Work] = []
    for name, pool in itertools.product(args.calls, args.pool):
        case, density = name.split(":")
        found.append({"what": "call", "case": case, "density": float(density), "pool": pool})
    for case, pool in itertools.product(args.selections, args.pool):
        found.append({"what": "selection", "case": case, "pool": pool})
    for name in args.lists:
        case, density, kind = name.split(":")
        found.append({"what": "lists", "case": case, "density": float(density), "lists": kind})
    also = {"block": args.block, "scope": args.scope, "device": args.device, "backend": args.backend}
    return [work | also for work in found]


def title(work: Work) -> str:
    """What a record says it is of."""
    shown = f"R={work['block']}" + (f", P={work['pool']}" if "pool" in work else f", {work['lists']}")
    shown += f", {work['scope']}" if work["scope"] != "window" else ""
    shown += f", {work['backend']}" if work["backend"] != "auto" else ""
    return f"{work['what']}, {shown}" + (f", {100 * work['density']:g} %" if "density" in work else "")


class Version:
    """A process that measures with one source tree."""

    def __init__(self, name: str, tree: str) -> None:
        self.name = name
        path = os.pathsep.join([tree, os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip

    def ask(self, work: Work) -> Any:
        """The answer of the process."""
        self.send(work)
        return self.answer()

    def send(self, work: Work) -> None:
        """Ask without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The answer to what was sent; SystemExit where the process ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; its error stands above")
        return json.loads(line)

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def answer() -> None:
    """The loop of a process: a line of JSON in, the answer out; the time of a call if it says "ms", else its sum."""
    from vecattention.bench.timer import measure

    made: dict[str, tuple[Callable[[], object], list[Any], Callable[[], object]]] = {}
    for line in sys.stdin:
        work = json.loads(line)
        budget = work.pop("ms", None)
        name = json.dumps(work)
        if name not in made:
            made[name] = _call_of(work)
        call, kept, _ = made[name]
        if budget is None:
            call()
            print(json.dumps(str(kept[0].double().sum().item())), flush=True)
        else:
            print(json.dumps(measure(call, budget, work["device"]).median), flush=True)


def _call_of(work: Work) -> tuple[Callable[[], object], list[Any], Callable[[], object]]:
    """What is timed, the list in which it leaves its result (of a selection, which goes by chunks, the last), the call.

    The call has to be held: it has the tensors, and older trees' graphs do not hold it.
    """
    import torch

    import vecattention
    from vecattention import dispatch, ops
    from vecattention.bench import studies
    from vecattention.bench.cases import Source, case_of, lists
    from vecattention.bench.timer import graphed
    from vecattention.spec import Problem

    gpu, kept, backend = work["device"] == "cuda", [], work["backend"]
    source = Source(case_of(work["case"]), work["device"], torch.bfloat16 if gpu else torch.float32)
    query, key, value = source.tensors()
    rule = {"q_pooling_size": work.get("pool", 64), "q_block_size": work["block"], "max_scope": work["scope"],
            "causal": source.case.causal}  # fmt: skip
    if work["what"] == "call":
        theta, _ = studies.threshold_for(query, key, work["density"], rule)

        def call() -> None:
            kept[:] = [vecattention.vec_attention(query, key, value, threshold=theta, backend=backend, **rule)]
    elif work["what"] == "selection":
        problem = Problem.of(query, key, ops.rule_of(query.shape[3], **rule))
        chunks = list(dispatch.parts(problem, dispatch.chunk_for(problem, 0)))

        def call() -> None:
            for b, h, g, rows, keys in chunks:
                kept[:] = [vecattention.select(query[b, h, rows], key[b, g, keys], backend=backend, **rule).words]
    else:
        ready = lists(source.case, work["density"], work["lists"], 0, work["block"], work["device"])

        def call() -> None:
            kept[:] = [vecattention.attend(query, key, value, ready, backend=backend)]

    call()
    return graphed(call) if gpu else call, kept, call


def main() -> None:
    """Ask all versions in turn, then record."""
    if sys.argv[1:] == ["--worker"]:
        answer()
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("trees", nargs="+", metavar="NAME=PATH", help="source trees, the first is compared with")
    parser.add_argument("--calls", nargs="*", default=[], metavar="CASE:DENSITY")
    parser.add_argument("--selections", nargs="*", default=[], metavar="CASE")
    parser.add_argument("--lists", nargs="*", default=[], metavar="CASE:DENSITY:KIND")
    parser.add_argument("--pool", nargs="*", type=int, default=[64], help="of calls and selections (64)")
    parser.add_argument("--block", type=int, default=128, help="rows that share a list (128)")
    parser.add_argument("--scope", default="window", choices=("window", "row"))
    parser.add_argument("--backend", default="auto", help="(auto)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ms", type=float, default=200.0, help="that each measurement takes about (200)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    try:
        found = works(args)
    except ValueError as error:
        parser.error(f"a measurement is not of the form that --help shows ({error})")
    if not found:
        parser.error("nothing to measure; pass --calls, --selections or --lists")
    trees = [tree.partition("=")[::2] for tree in args.trees]
    for name, tree in trees:
        if not (Path(tree) / "vecattention" / "__init__.py").is_file():
            parser.error(f"{name} is {tree!r}, wanted a folder that holds vecattention/; pass NAME=PATH/src")
    from vecattention.bench import record

    versions = [Version(name, tree) for name, tree in trees]
    sums = {}
    for i, work in enumerate(found):  # all at once, as each compiles its own kernels
        for v in versions:
            v.send(work)
        sums |= {(i, v.name): v.answer() for v in versions}
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(args.rounds):
        for i in random.sample(range(len(found)), len(found)):
            for v in random.sample(versions, len(versions)):
                times.setdefault((i, v.name), []).append(v.ask(found[i] | {"ms": args.ms}))
    rows = []
    for (i, work), v in itertools.product(enumerate(found), versions):
        key = {"study": "trials", "run": 1, "case": work["case"], "of": title(work), "variant": v.name}
        mine = times[i, v.name]
        row = key | {"ms": round(statistics.median(mine), 4), "ms_min": round(min(mine), 4), "rounds": len(mine),
                     "equal": sums[i, v.name] == sums[i, versions[0].name], "work": work}  # fmt: skip
        rows.append((key, lambda row=row: row))
        print(f"{work['case']:22} {title(work):34} {v.name:12} {row['ms']:10.4f} ms (least {row['ms_min']:.4f})"
              f"{'' if row['equal'] else '  another result'}")  # fmt: skip
    for v in versions:
        v.end()
    list(record.run(args.out, rows, now=True))


if __name__ == "__main__":
    main()
