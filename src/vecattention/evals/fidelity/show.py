"""Tables and the Pareto picture, from the rows of a study alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from vecattention.evals.fidelity.curves import together

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
SHORT = {
    "vecattention": "vecattention (published)",
    "vecattention:max_scope=row": "vecattention row",
    "vecattention:max_scope=row,q_pooling_size=32,q_block_size=128": "vecattention row P32 R128",
    "vecattention:group_k_block=8192": "vecattention G=8192 (published)",
    "vecattention@coverage:max_scope=row,q_pooling_size=32,q_block_size=128": "vecattention row P32 R128 by coverage",
    "vecattention@density:max_scope=row,q_pooling_size=32,q_block_size=128": "vecattention row P32 R128 by density",
    "vecattention@density": "vecattention (published) by density",
    "vecattention@density:group_k_block=8192": "vecattention G=8192 (published) by density",
}


def name_of(label: str) -> str:
    """A candidate's label as tables show it."""
    return SHORT.get(label, label)


def of(rows: Iterable[Row], study: str) -> list[Row]:
    """The rows of one study."""
    return [row for row in rows if row["key"]["study"] == study]


def matched_table(rows: Iterable[Row]) -> Table:
    """Method, density, recall, output error and times at the matched densities; means over samples and heads."""
    from rich.table import Table

    rows = list(rows)
    table = Table(
        title="At matched density (knob by bisection; means over heads and layers; times: medians, first map)"
    )
    for column in ("target", "method", "knob", "density", "recall", "error L1", "error L2", "select s", "attend s"):
        table.add_column(column, justify="left" if column in ("method", "knob") else "right")
    spent = {(row["key"]["method"], row["key"].get("target")): row["seconds"] for row in of(rows, "times")}
    for row in sorted(of(rows, "matched"), key=lambda row: row["key"]["target"]):
        table.add_row(*matched_cells(row, spent.get((row["key"]["method"], row["key"]["target"]))))
    for (method, target), seconds in spent.items():
        if target is None:
            table.add_row("1", method, *[""] * 6, f"{median(seconds['attend']):.3f}")
    return table


def matched_cells(row: Row, spent: dict[str, list[float]] | None) -> list[str]:
    """One line of the matched table; a density that missed its target by more than 5 % is marked with *."""
    target, samples = row["key"]["target"], row["samples"]
    density = mean(mean(one["density"]) for one in samples)
    figures = [f"{mean(mean(one[name]) for one in samples):.4f}" for name in ("recall", "l1", "l2")]
    seconds = ["", ""] if spent is None else [f"{median(spent[part]):.3f}" for part in ("select", "attend")]
    knob = "" if row["knob"] is None else f"{row['knob']}={row['setting']:.4g}"
    missed = "*" if abs(density - target) > 0.05 * target else ""
    return [f"{target:g}", name_of(row["key"]["method"]), knob, f"{density:.4f}{missed}", *figures, *seconds]


def oracle_table(rows: Iterable[Row]) -> Table:
    """Best recall at each density for each granularity: mean over heads alone, and all heads under one budget."""
    from rich.table import Table

    found = of(rows, "oracle")
    densities = found[0]["densities"]
    table = Table(title="Oracle: best recall at each density (each head alone | one budget for all heads and layers)")
    table.add_column("granularity")
    for density in densities:
        table.add_column(f"{density:g}", justify="right")
    for name in sorted(found[0]["recall"], key=lambda name: -_oracle(found, name)[3]):
        pairs = zip(_oracle(found, name), _together(found, name, densities), strict=True)
        table.add_row(name, *(f"{alone:.3f} | {_text(together)}" for alone, together in pairs))
    return table


def curve_table(rows: Iterable[Row], study: str, name: str) -> Table:
    """Recall at equal density of the rules of a study, each head at its own cut-off and all heads under one."""
    from rich.table import Table

    found = of(rows, study)
    table = Table(title=f"{name}: recall at equal density (each head alone | one cut-off for the heads of a layer)")
    table.add_column("rule")
    densities = found[0]["densities"]
    for density in densities:
        table.add_column(f"{density:g}", justify="right")
    for label, alone, joint in curves(found):
        table.add_row(label, *(f"{_text(a)} | {_text(t)}" for a, t in zip(alone, joint, strict=True)))
    return table


def curves(rows: list[Row]) -> list[tuple[str, list[float | None], list[float | None]]]:
    """(rule, recall of heads alone, under one cut-off) at each density, means over samples, None below a floor."""
    labels = dict.fromkeys(_rule(row) for row in rows)
    found = []
    for label in labels:
        these = [row for row in rows if _rule(row) == label]
        count = len(these[0]["densities"])
        alone = [_mean([head[i] for row in these for head in row["recall"]]) for i in range(count)]
        together = [_mean([row["together"][i] for row in these]) for i in range(count)]
        found.append((label, alone, together))
    return found


def tables(rows: list[Row]) -> list[Table]:
    """Every table that the rows have something for."""
    made = []
    if of(rows, "oracle"):
        made.append(oracle_table(rows))
    for study, name in (("maximum", "The maximum rule"), ("pooling", "Pooled queries P, shared rows R")):
        if of(rows, study):
            made.append(curve_table(rows, study, name))
    if of(rows, "matched"):
        made.append(matched_table(rows))
    return made


def pareto(rows: list[Row], path: str | os.PathLike[str]) -> None:
    """Recall and output error against density: every method's sweep, over the oracles; a PNG, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.2), constrained_layout=True)
    for row_name, shown in (("recall", axes[0]), ("l2", axes[1])):
        for order, (label, points) in enumerate(_points(rows, row_name).items()):
            shown.plot(*zip(*points, strict=True), **_style(order), label=name_of(label))
    oracles = of(rows, "oracle")
    for style, name in zip(("-", "--", ":", "-."), _ORACLES, strict=True):
        if oracles:
            best = _together(oracles, name, _GRID)
            axes[0].plot(_GRID, best, style, color="0.55", lw=1.2, label=f"oracle {name}")
    axes[0].set(
        xscale="log", xlabel="density (kept / allowed pairs)", ylabel="recall (kept softmax mass)", ylim=(0, 1.02)
    )
    axes[1].set(xscale="log", yscale="log", xlabel="density (kept / allowed pairs)", ylabel="output error, relative L2")
    axes[1].set(ylim=(3e-3, 1.3))
    axes[0].legend(fontsize=7, loc="lower right")
    for shown in axes:
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


def _oracle(rows: list[Row], name: str) -> list[float]:
    count = len(rows[0]["densities"])
    return [mean(mean(head[i] for head in row["recall"][name]) for row in rows) for i in range(count)]


def _mean(values: list[float | None]) -> float | None:
    there = [x for x in values if x is not None]
    return mean(there) if len(there) == len(values) else None


def _text(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.3f}"


def _together(rows: list[Row], name: str, densities: Sequence[float]) -> list[float | None]:
    return together([row["bins"][name] for row in rows], densities)


def _rule(row: Row) -> str:
    key = row["key"]
    return str(key["rule"]) if "rule" in key else f"P={key['P']} R={key['R']}"


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".png", dir=path.parent)
    os.close(handle)
    try:
        figure.savefig(partial, dpi=130)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
