"""What is shown of a study, from its rows alone: the tables by name, and the Pareto picture."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from vecattention.evals.fidelity import matches, maximum
from vecattention.evals.fidelity import tables as basic
from vecattention.evals.fidelity.curves import together
from vecattention.evals.fidelity.tables import Table, name_of, of

Row = dict[str, Any]
TABLES: dict[str, tuple[tuple[str, ...], Callable[[list[Row], float], Table]]] = {
    "oracle": (("oracle",), lambda rows, at: basic.oracle(rows)),
    "maximum": (("maximum",), lambda rows, at: basic.curves(rows, "maximum", "The maximum rule")),
    "heads": (("oracle", "maximum"), maximum.heads),
    "waste": (("maximum",), lambda rows, at: maximum.waste(rows)),
    "pooling": (("pooling",), lambda rows, at: basic.curves(rows, "pooling", "P pooled queries, R rows share a list")),
    "price": (("pooling",), lambda rows, at: basic.price(rows)),
    "kinds": (("oracle", "matched"), matches.kinds),
    "matched": (("matched",), lambda rows, at: matches.matched(rows)),
    "lengths": ((), lambda rows, at: matches.lengths(rows)),
}
"""Tables: the studies that each needs (none: it is over all data sets), and what makes it of rows and a density."""


def tables(rows: list[Row], names: tuple[str, ...] = tuple(TABLES), at: float = 0.1) -> list[Table]:
    """Those of the named tables that the rows have something for, for each data set, and the one over all of them.

    ``at`` is the density of tables by head.
    """
    found = []
    for data, mark in dict.fromkeys((row["key"]["data"], row["key"]["fingerprint"]) for row in rows):
        these = [row for row in rows if (row["key"]["data"], row["key"]["fingerprint"]) == (data, mark)]
        there = {row["key"]["study"] for row in these}
        for name in names:
            studies, make = TABLES[name]
            if studies and there >= set(studies):
                table = make(these, at)
                found.append(replace(table, title=f"{data}. {table.title}"))
    if "lengths" in names and len({row["key"]["data"] for row in of(rows, "times")}) > 1:
        found.append(matches.lengths(rows))
    return found


def pareto(rows: list[Row], path: str | os.PathLike[str]) -> None:
    """Recall and output error against density: every method's sweep, over the oracles; a PNG, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), constrained_layout=True)
    for row_name, shown in (("recall", axes[0]), ("l2", axes[1])):
        for order, (label, points) in enumerate(_points(rows, row_name).items()):
            shown.plot(*zip(*points, strict=True), **_style(order), label=name_of(label))
    oracles = of(rows, "oracle")
    for style, name in zip(("-", "--", ":", "-."), _ORACLES, strict=True):
        if oracles:
            best = together([row["bins"][name] for row in oracles], _GRID)
            axes[0].plot(_GRID, best, style, color="0.55", lw=1.2, label=f"oracle {name}")
    axes[0].set(
        xscale="log", xlabel="density (kept / allowed pairs)", ylabel="recall (kept softmax mass)", ylim=(0, 1.02)
    )
    axes[1].set(xscale="log", yscale="log", xlabel="density (kept / allowed pairs)", ylabel="output error, relative L2")
    axes[1].set(ylim=(3e-3, 1.3))
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=8, loc="outside lower center", ncols=4)
    for shown in axes:
        shown.set(xlim=(0.01, 1))
        shown.grid(alpha=0.25, which="both")
    figure.suptitle(f"{rows[0]['key']['data']}: means over heads and layers", fontsize=10)
    _save(figure, Path(path))
    pyplot.close(figure)


_ORACLES = ("1 key x 64 queries", "64 keys x 64 queries", "128 keys x 128 queries", "64 keys x 1 query")
_GRID = tuple(10 ** (step / 20 - 2) for step in range(41))
_MARKS = "osD^vP*X<>"


def _style(order: int) -> dict[str, Any]:
    return {"marker": _MARKS[order % len(_MARKS)], "ms": 4.5, "lw": 1.4, "color": f"C{order % 10}"}


def _points(rows: list[Row], name: str) -> dict[str, list[tuple[float, float]]]:
    """For each method with a knob, (density, figure) over its sweep by density, means over samples and heads."""
    found: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for row in of(rows, "sweep"):
        if row["key"]["setting"] is not None:
            of_method = found.setdefault(row["key"]["method"], {})
            of_method.setdefault(row["key"]["setting"], []).append((mean(row["density"]), mean(row[name])))
    return {
        method: sorted((mean(x for x, _ in points), mean(y for _, y in points)) for points in settings.values())
        for method, settings in found.items()
    }


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".png", dir=path.parent)
    os.close(handle)
    try:
        figure.savefig(partial, dpi=130)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
