"""Tables of the matched study and its times: methods at equal density, head by head, and by length."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

from vecattention.evals.fidelity.candidates import parse
from vecattention.evals.fidelity.tables import Table, head_name, name_of, of, place_of

Row = dict[str, Any]
MISSED = 0.05
"""From this relative distance on, a matched density is said to be missed."""


def matched(rows: list[Row]) -> Table:
    """Method, density, recall, output error and times at the matched densities; means over samples and heads."""
    spent = timed(rows)
    lines = []
    for row in sorted(of(rows, "matched"), key=_place):
        lines.append(matched_cells(row, spent.get((row["key"]["method"], row["key"]["target"]))))
    for (method, target), row in spent.items():
        if target is None:
            lines.append(["100 %", method, *[""] * 6, _seconds(row, "attend")])
    columns = ("target", "method", "knob", "density", "recall", "error L1", "error L2", "select ms", "attend ms")
    title = "At matched density (one setting of the knob for all maps, by bisection; means over heads and maps)"
    return Table(title + where(list(spent.values())), columns, lines, words=3)


def timed(rows: list[Row]) -> dict[tuple[str, float | None], Row]:
    """The times by method and target, of the device that was measured last."""
    found = of(rows, "times")
    last = found[-1]["key"]["device"] if found else None
    return {(row["key"]["method"], row["key"].get("target")): row for row in found if row["key"]["device"] == last}


def where(times: list[Row]) -> str:
    """What the times of a table are of."""
    if not times:
        return ""
    facts = dict.fromkeys((row["key"]["device"], row["dtype"], row["threads"]) for row in times)
    places = " and ".join(f"{device}, {dtype}, {threads} thread(s)" for device, dtype, threads in facts)
    backends = ", ".join(dict.fromkeys(row["backend"] for row in times if row.get("backend")))
    return f"; times: medians on the first map, {places}, attend on backend {backends}"


def lengths(rows: list[Row]) -> Table:
    """Selection, attention and both against torch's dense attention, for each data set with times."""
    lines = []
    for data in dict.fromkeys(row["key"]["data"] for row in rows):
        these = [row for row in rows if row["key"]["data"] == data]
        spent = timed(these)
        dense = next((row for (_, target), row in spent.items() if target is None), None)
        for row in sorted(of(these, "matched"), key=_place):
            time = spent.get((row["key"]["method"], row["key"]["target"]))
            if dense is not None and time is not None and row["knob"] is not None:
                cells = matched_cells(row, time)
                select, attend, whole = (
                    median(x)
                    for x in (time["seconds"]["select"], time["seconds"]["attend"], dense["seconds"]["attend"])
                )
                ratio = f"{whole / (select + attend):.2f}x"
                lines.append([data, *cells[1:2], *cells[3:5], *cells[7:], _seconds(dense, "attend"), ratio])
    columns = ("data", "method", "density", "recall", "select ms", "attend ms", "torch SDPA ms", "faster")
    return Table("Selection and attention against dense attention, by length", columns, lines, words=2)


def matched_cells(row: Row, spent: Row | None) -> list[str]:
    """One line of the matched table; a density that was missed is said to be."""
    target, knob = row["key"]["target"], row["knob"]
    density, *figures = _means(row)
    times = ["", ""] if spent is None else [_seconds(spent, part) for part in ("select", "attend")]
    setting = "" if knob is None else f"{knob}={row['setting']:.4g}"
    shown = f"{100 * density:.1f} %{_missed(row, density)}"
    return [
        f"{100 * target:g} %",
        name_of(row["key"]["method"]),
        setting,
        shown,
        *(f"{x:.3f}" for x in figures),
        *times,
    ]


def kinds(rows: list[Row], density: float) -> Table:
    """Recall (and density) of every head at one target: oracles with a budget for each head, and the methods."""
    best = of(rows, "oracle")
    place = place_of(best[0], density)
    heads = range(len(best[0]["recall"]["1 key x 64 queries"]))
    lines = []
    for name in best[0]["recall"]:
        lines.append([f"oracle {name}", *(f"{mean(row['recall'][name][h][place] for row in best):.2f}" for h in heads)])
    for row in of(rows, "matched"):
        if row["key"]["target"] == density:
            recall, kept = (
                [mean(one[name][h] for one in row["samples"]) for h in heads] for name in ("recall", "density")
            )
            cells = [f"{r:.2f} ({100 * d:.0f} %)" for r, d in zip(recall, kept, strict=True)]
            lines.append([name_of(row["key"]["method"]) + _missed(row, _means(row)[0]), *cells])
    title = f"Recall (density) of each head at {100 * density:g} % of all pairs"
    return Table(title, ("method", *(head_name(best[0], h) for h in heads)), lines)


def _means(row: Row) -> list[float]:
    """Density, recall, L1 and L2, means over samples and heads."""
    return [mean(mean(one[name]) for one in row["samples"]) for name in ("density", "recall", "l1", "l2")]


def _place(row: Row) -> tuple[float, bool, float]:
    """Sorts by target; then what reached it first, and by recall."""
    density, recall, *_ = _means(row)
    return row["key"]["target"], bool(_missed(row, density)), -recall


def _missed(row: Row, density: float) -> str:
    target, knob = row["key"]["target"], parse(row["key"]["method"]).knob
    if knob is None or abs(density - target) <= MISSED * target:
        return ""
    if row["setting"] in (knob.sparse, knob.dense):
        return f" (cannot reach {100 * target:g} %)"
    return " (nearest step)"


def _seconds(row: Row, part: str) -> str:
    spent = 1000 * median(row["seconds"][part])
    return f"{spent:.0f}" if spent >= 100 else f"{spent:.3g}"
