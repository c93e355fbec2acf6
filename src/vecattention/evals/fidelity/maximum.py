"""Tables of the maximum study: rules head by head, and what a running maximum wastes."""

from __future__ import annotations

from statistics import mean
from typing import Any

from vecattention.evals.fidelity.tables import Table, head_name, mean_of, of, place_of, text_of

Row = dict[str, Any]
GROUPS = (4, 16, 64, 8192)
"""Windows of the study, in tiles of 16 keys."""

THETAS = (0.9, 0.4, 0.1, 0.01)
"""Thresholds at which waste is shown."""

ORACLE = "1 key x 64 queries"


def heads(rows: list[Row], density: float) -> Table:
    """Recall of every rule at one density, by layer and head (means over what was read), beside the oracle's.

    The last line counts the heads in which the row rule is ahead of a column.
    """
    found, oracles = of(rows, "maximum"), of(rows, "oracle")
    place = place_of(found[0], density)
    names = ["row", "top-p", *(f"window {group} {kind}" for group in GROUPS for kind in ("running", "final"))]
    lines = []
    ahead: list[list[bool]] = [[] for _ in names]
    every: list[list[float | None]] = []
    for layer in dict.fromkeys(map(_layer, found)):
        here = [row for row in found if _layer(row) == layer]
        for head in range(len(here[0]["recall"])):
            best = mean(row["recall"][ORACLE][head][place] for row in oracles if _layer(row) == layer)
            values = [_recall(here, name, head, place) for name in names]
            every.append([best, *values])
            lines.append([f"{layer} {head_name(found[0], head)}".strip(), *map(text_of, every[-1])])
            for verdicts, x in zip(ahead, values, strict=True):
                if x is not None and values[0] is not None:
                    verdicts.append(values[0] > x)
    lines.append(["mean", *(text_of(mean_of(column)) for column in zip(*every, strict=True))])
    lines.append(["row is ahead in", "", "", *(f"{sum(them)} of {len(them)}" for them in ahead[1:])])
    title = f"The maximum rule by layer and head: recall at {100 * density:g} % of all pairs"
    return Table(title, ("map", "oracle", *names), lines)


def waste(rows: list[Row]) -> Table:
    """What a running maximum keeps beyond the final one at the same threshold: keys that only lead early.

    The share is of the keys that were chosen: the ones that are kept anyway do not count.
    """
    found = of(rows, "maximum")
    lines = []
    for group in GROUPS:
        running, final = (
            [row for row in found if row["key"]["rule"] == f"window {group} {kind}"] for kind in ("running", "final")
        )
        always = mean(x for row in running for x in row["floor"])
        for theta in THETAS:
            place = running[0]["thetas"].index(theta)
            (wide, gain), (narrow, rest) = (_reached(these, place) for these in (running, final))
            share = (wide - narrow) / (wide - always) if wide > always else 0.0
            figures = [f"{100 * x:.1f} %" for x in (wide, narrow, share)]
            lines.append([str(group), f"{theta:g}", *figures, f"{gain:.3f}", f"{rest:.3f}"])
    columns = (
        "G",
        "threshold",
        "density",
        "with the final one",
        "of the chosen dropped",
        "recall",
        "with the final one",
    )
    return Table("What the running maximum keeps beyond the final one at the same threshold", columns, lines, words=2)


def _recall(rows: list[Row], name: str, head: int, place: int) -> float | None:
    """Mean over samples, None where a density is below the least."""
    return mean_of([row["recall"][head][place] for row in rows if row["key"]["rule"] == name])


def _reached(rows: list[Row], place: int) -> tuple[float, float]:
    """Density and recall at a threshold, means over samples and heads."""
    pairs = [head[place] for row in rows for head in row["at"]]
    return mean(density for density, _ in pairs), mean(recall for _, recall in pairs)


def _layer(row: Row) -> str:
    """Of a sample's name what comes after the movie or the seed."""
    name: str = row["key"]["sample"].partition("-")[2]
    return name if name.startswith("layer") else ""
