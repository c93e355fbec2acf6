"""Tables, and a picture, of the records that `vecattention bench` wrote.

Whole calls are set beside the fastest dense kernel of the same file, so that both ran on the same GPU in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

EXAMPLE = "vecattention report out/bench.jsonl --png out/bench.png"
RIGHT = {True: "yes", False: "NO", None: "not compared"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vecattention report`."""
    parser.add_argument("records", type=Path, help="a file of records, JSON lines")
    parser.add_argument("--png", type=Path, help="also draw the figures into this file")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")


def run(args: argparse.Namespace) -> int:
    """Print the tables, draw the picture, and say where it is."""
    from vecattention.bench import figures, record, report

    if not args.records.is_file():
        raise FileNotFoundError(
            f"records is {args.records}, wanted a file that `vecattention bench` wrote; none is there"
        )
    lines = record.numbered(args.records)
    held = {n: row for n, row in lines.items() if "failed" not in row and "study" in row and "key" in row}
    if not held:
        raise ValueError(f"records {args.records} holds no record of bench, wanted some; run vecattention bench all")
    report.check(args.records, held)
    found = list(held.values())
    if len(where := figures.machines(found)) > 1:
        raise ValueError(f"records {args.records} holds those of {', '.join(where)}, wanted one; pass a file for each")
    found = _last_versions(found)
    calls = [
        [r["case"], f"{r['pool']} {r['block']} {r['scope']}", f"{100 * r['density']:.1f} %", r["dense"] or "-",
         _known(r["dense_ms"], "{:.2f}"), f"{r['ms']:.2f}", _known(r["ratio"], "{:.2f}x"), f"{r['extra_mib']:.0f}"]
        for r in figures.speed_ups(found)
    ]  # fmt: skip
    _table(
        "whole calls", ["case", "P R scope", "density", "best dense", "ms", "call ms", "faster", "extra MiB"], calls,
        args.markdown,
    )  # fmt: skip
    missing: dict[tuple[str, str], set[str]] = {}
    for r in (r for r in found if r["study"] == "dense"):
        for pair in (r.get("missing") or {}).items():
            missing.setdefault(pair, set()).add(r["case"])
    for (name, why), cases in sorted(missing.items()):
        sys.stdout.write(f"\nDense kernel not measured: {name} on {', '.join(sorted(cases))} ({why})\n")
    chosen = [
        [r["case"], f"{r['pool']} {r['block']} {r['scope']}", r["backend"], f"{r['ms']:.3f}",
         _known(r["percent"], "{:.1f} %"), RIGHT[r["right"]]]
        for r in figures.shares(found)
    ]  # fmt: skip
    _table("selection", ["case", "P R scope", "backend", "ms", "of dense", "right"], chosen, args.markdown)
    grown = [
        [r["case"], str(r["block"]), f"{100 * r['density']:.0f} %", _known(r["dense_ms"], "{:.3f}"), f"{r['ms']:.3f}",
         _known(r["ratio"], "{:.2f}x"), _known(r["ratio_graph"], "{:.2f}x")]
        for r in figures.lengths(found)
    ]  # fmt: skip
    _table("lengths", ["case", "R", "density", "dense ms", "ms", "faster", "as a graph"], grown, args.markdown)
    ways = [
        [r["case"], r["method"], f"{r['recall']:.3f}", f"{100 * r['density']:.1f} %", f"{r['select_ms']:.3f}",
         f"{r['attend_ms']:.3f}", _known(r["ratio"], "{:.2f}x")]
        for r in figures.methods(found)
    ]  # fmt: skip
    _table(
        "methods at equal recall", ["case", "method", "recall", "density", "select ms", "attend ms", "faster"], ways,
        args.markdown,
    )  # fmt: skip
    others = [
        [r["case"], r["kernel"], str(r.get("block", 128)), r["lists"], f"{100 * r['density']:.0f} %", f"{r['ms']:.3f}",
         f"{r['tflops']:.0f}"]  # the first records name no block, and are of 128 rows
        for r in found if r["study"] == "peer"
    ]  # fmt: skip
    _table("other sparse kernels", ["case", "kernel", "R", "lists", "density", "ms", "TFLOP/s"], others, args.markdown)
    rates = [
        [r["case"], str(r["block"]), r["lists"], f"{100 * r['density']:.0f} %", r["backend"], f"{r['ms']:.3f}",
         f"{r['tflops']:.0f}", f"{r['error']:.1e}"]
        for r in found if r["study"] == "attention"
    ]  # fmt: skip
    _table("attend", ["case", "R", "lists", "density", "backend", "ms", "TFLOP/s", "error"], rates, args.markdown)
    tried = [
        [r["case"], str(r["block"]), r["lists"], f"{100 * r['density']:.0f} %", r["variant"],
         {True: "yes", False: "no"}.get(r["turns"], ""), f"{r['tflops']:.0f}", RIGHT[r.get("right")]]
        for r in found if r["study"] == "variants"
    ]  # fmt: skip
    _table(
        "variants", ["case", "R", "lists", "density", "variant", "in turns", "TFLOP/s", "right"], tried, args.markdown
    )
    trials = [
        [str(r["run"]), r["case"], r["of"], r["variant"], "" if r["ms"] is None else f"{r['ms']:.4g}"]
        for r in found if r["study"] == "trials"
    ]  # fmt: skip
    _table("trials", ["run", "case", "of", "variant", "ms"], trials, args.markdown)
    layers = [
        [r["case"], f"{r['pool']} {r['block']}", f"{r['dense']['ms']:.0f}", f"{100 * r['density']:.1f} %",
         f"{r['sparse']['ms']:.0f}", f"{r['ratio']:.2f}x", f"{100 * r['coverage']['density']:.1f} %",
         f"{r['coverage']['ms']:.0f}", f"{r['dense']['ms'] / r['coverage']['ms']:.2f}x"]
        for r in found if r["study"] == "layer" and "coverage" in r
    ]  # fmt: skip
    _table(
        "layers of video models, the whole forward",
        ["case", "P R", "dense ms", "density", "ms", "faster", "of coverage 0.9", "ms", "faster"], layers,
        args.markdown,
    )  # fmt: skip
    without = Counter(r["study"] for r in found if r["study"] not in report.FIELDS)
    for study, count in sorted(without.items()):
        sys.stdout.write(f"\nNo table for {count} records of {study}: read the file\n")
    if args.png:
        args.png.parent.mkdir(parents=True, exist_ok=True)
        figures.draw(found, args.png)
        sys.stdout.write(f"picture in {args.png}\n")
    return 0


def _last_versions(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the versions that were measured last, so that old and new times are not set side by side; said."""
    versions = [(r.get("machine") or {}).get("versions") for r in records]
    last = next((made for made in reversed(versions) if made), None)
    found = [r for r, made in zip(records, versions, strict=True) if not made or made == last]
    if len(found) < len(records):
        named = ", ".join(f"{name} {version}" for name, version in (last or {}).items())
        sys.stdout.write(f"\nLeft out: {len(records) - len(found)} records of other versions than {named}\n")
    return found


def _known(value: float | None, form: str) -> str:
    """The value in this form; "-" where it is not known, as there is no dense record."""
    return "-" if value is None else form.format(value)


def _table(title: str, names: list[str], rows: list[list[str]], markdown: bool) -> None:
    if not rows:
        return
    if markdown:
        lines = [names, ["---"] * len(names), *rows]
        sys.stdout.write(f"\n{title}\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines))
        return
    from rich.console import Console
    from rich.table import Table

    table: Any = Table(title=title)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
