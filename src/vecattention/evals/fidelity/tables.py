"""Tables, for a terminal or in Markdown; those of the oracle and of rules at equal density."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from vecattention.evals.fidelity.curves import together
from vecattention.evals.fidelity.synthetic import HEADS

if TYPE_CHECKING:
    import rich.table

Row = dict[str, Any]
SHOWN = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Densities of the columns of a curve."""

SHORT = {
    "vecattention": "vecattention G=16 (published)",
    "vecattention:max_scope=row": "vecattention row",
    "vecattention:max_scope=row,q_pooling_size=32,q_block_size=128": "vecattention row P32 R128",
    "vecattention:group_k_block=8192": "vecattention G=8192 (published)",
    "vecattention@coverage:max_scope=row,q_pooling_size=32,q_block_size=128": "vecattention row P32 R128 by coverage",
    "vecattention@density:max_scope=row,q_pooling_size=32,q_block_size=128": "vecattention row P32 R128 by density",
    "vecattention@density": "vecattention G=16 by density",
    "vecattention@density:group_k_block=8192": "vecattention G=8192 by density",
}


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: what it shows.
        columns: names; the first ``words`` hold text, the others numbers.
        rows: cells as text.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    words: int = 1

    def markdown(self) -> str:
        """In Markdown, the title left out.

        >>> print(Table("of ages", ("who", "age"), [["Ann", "7"]]).markdown(), end="")
        | who | age |
        | --- | ---: |
        | Ann | 7 |
        """
        rule = ["---" if i < self.words else "---:" for i in range(len(self.columns))]
        return "".join(f"| {' | '.join(line)} |\n" for line in (self.columns, rule, *self.rows))

    def rich(self) -> rich.table.Table:
        """For a terminal."""
        from rich.table import Table as Shown

        shown = Shown(title=self.title)
        for i, name in enumerate(self.columns):
            shown.add_column(name, justify="left" if i < self.words else "right")
        for line in self.rows:
            shown.add_row(*line)
        return shown


def name_of(label: str) -> str:
    """A candidate's label as tables show it."""
    return SHORT.get(label, label)


def of(rows: Iterable[Row], study: str) -> list[Row]:
    """The rows of one study."""
    return [row for row in rows if row["key"]["study"] == study]


def oracle(rows: list[Row]) -> Table:
    """Best recall at each density for each granularity: mean over heads alone, and all heads under one budget."""
    found = of(rows, "oracle")
    places = _places(found[0])
    lines = []
    for name in sorted(found[0]["recall"], key=lambda name: -_alone(found, name, places[-1])):
        joint = together([row["bins"][name] for row in found], SHOWN)
        cells = [f"{_alone(found, name, i):.3f}, {text_of(j)}" for i, j in zip(places, joint, strict=True)]
        lines.append([name, *cells])
    title = "Oracle: best recall at each density (each head with its own budget, all heads and layers with one)"
    return Table(title, ("granularity", *_percent(SHOWN)), lines)


def curves(rows: list[Row], study: str, title: str) -> Table:
    """Recall at equal density of the rules of a study, each head at its own cut-off and all heads under one."""
    found = of(rows, study)
    places = _places(found[0])
    lines = []
    for name in dict.fromkeys(rule_of(row) for row in found):
        these = [row for row in found if rule_of(row) == name]
        alone = [mean_of([head[i] for row in these for head in row["recall"]]) for i in places]
        joint = [mean_of([row["together"][i] for row in these]) for i in places]
        lines.append([name, *(f"{text_of(a)}, {text_of(t)}" for a, t in zip(alone, joint, strict=True))])
    title += ": recall at equal density (each head at its own cut-off, the heads of a layer under one)"
    return Table(title, ("rule", *_percent(SHOWN)), lines)


def price(rows: list[Row]) -> Table:
    """The density that each P and R needs for the recall of the published ones, as a multiple of theirs.

    The heads of a layer are under one cut-off; recall is taken as linear in density between those recorded.
    """
    found = of(rows, "pooling")
    densities = found[0]["densities"]
    curve = {}
    for name in dict.fromkeys(rule_of(row) for row in found):
        together = [row["together"] for row in found if rule_of(row) == name]
        curve[name] = [mean_of([one[i] for one in together]) for i in range(len(densities))]
    lines = []
    for name, recall in curve.items():
        base = curve[name.partition(" P=")[0] + " P=64 R=64"]
        cells = []
        for density in SHOWN:
            needed = density_for(base[densities.index(density)], densities, recall)
            cells.append("-" if needed is None else f"{needed / density:.2f}x")
        lines.append([name, *cells])
    title = "Density for the recall that P=64, R=64 has at these densities by the same rule"
    return Table(title, ("rule", *_percent(SHOWN)), lines)


def density_for(wanted: float | None, densities: Sequence[float], recall: Sequence[float | None]) -> float | None:
    """The density at which a curve reaches a recall; None outside of what was recorded.

    >>> density_for(0.5, (0.1, 0.2, 0.4), (None, 0.4, 0.6))
    0.30000000000000004
    """
    there = [(d, r) for d, r in zip(densities, recall, strict=True) if r is not None]
    if wanted is not None:
        for (low, less), (high, more) in zip(there, there[1:], strict=False):
            if less <= wanted <= more:
                return low + (high - low) * (wanted - less) / max(more - less, 1e-12)
    return None


def head_name(row: Row, head: int) -> str:
    """A head's number, and its kind where the maps are synthetic."""
    synthetic = row["key"]["data"].startswith("synthetic")
    return f"{head} {HEADS[head]}" if synthetic else f"head {head}"


def place_of(row: Row, density: float) -> int:
    """Where a density stands in a row's lists.

    Raises:
        ValueError: it was not recorded.
    """
    if density not in row["densities"]:
        raise ValueError(f"--at is {density}, wanted one of {row['densities']}, which were recorded; pass one of them")
    place: int = row["densities"].index(density)
    return place


def rule_of(row: Row) -> str:
    """The rule of a row of the maximum or the pooling study."""
    key = row["key"]
    return f"{key['rule']} P={key['P']} R={key['R']}" if "P" in key else str(key["rule"])


def _places(row: Row) -> list[int]:
    return [place_of(row, density) for density in SHOWN]


def _percent(densities: Sequence[float]) -> list[str]:
    return [f"{100 * density:g} %" for density in densities]


def _alone(rows: list[Row], name: str, place: int) -> float:
    return float(mean(mean(head[place] for head in row["recall"][name]) for row in rows))


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean, None where one is missing."""
    there = [x for x in values if x is not None]
    return mean(there) if len(there) == len(values) else None


def text_of(value: float | None) -> str:
    """With three digits; a dash for none."""
    return "-" if value is None else f"{value:.3f}"
