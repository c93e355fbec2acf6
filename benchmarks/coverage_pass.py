"""How long the pass that looks for a coverage or a density takes on Wan 2.1's shape: python benchmarks/coverage_pass.py

Over all lists of 128 rows, and over 16 of them, as pipelines do. Random tensors; the pass alone, without the selection.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path

from vecattention import targets
from vecattention.bench import record, timer
from vecattention.bench.cases import Source, case_of
from vecattention.ops import rule_of

RULES = {"P=64, window": {"q_pooling_size": 64}, "P=32, row": {"q_pooling_size": 32, "max_scope": "row"}}
SAMPLE = 16


def measure(source: Source, rule_name: str, kind: str, lists: int) -> record.Record:
    """One record; lists 0: all."""
    query, key, _ = source.tensors()
    rule = rule_of(source.case.head_dim, causal=source.case.causal, q_block_size=128, **RULES[rule_name])
    rows = query[:, :, : lists * 128].contiguous() if lists else query
    time = timer.measure(lambda: targets.histogram(rows, key, kind, rule), device=source.device)
    return {"study": "coverage pass", "case": source.case.name, "rule": rule_name, "kind": kind, "lists": lists,
            **time.record()}  # fmt: skip


def main() -> None:
    """Measure what the record does not hold yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/coverage-pass.jsonl"), help="records (%(default)s)")
    parser.add_argument("--case", default="wan2.1-14b-720p", help="(%(default)s)")
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    args = parser.parse_args()
    source = Source(case_of(args.case), args.device)
    steps: list[record.Step] = [
        ({"study": "coverage pass", **source.key, "rule": rule, "kind": kind, "lists": lists},
         partial(measure, source, rule, kind, lists))
        for rule, kind, lists in itertools.product(RULES, targets.KINDS, (0, SAMPLE))
    ]  # fmt: skip
    for row in record.run(args.out, steps):
        sys.stdout.write(f"{row['rule']:<14} {row['kind']:<9} {row['lists'] or 'all':>4} lists {row['ms']:9.2f} ms\n")


if __name__ == "__main__":
    main()
