"""Tables and pictures of GPU records: speed against density, speed-ups over dense attention, where the time goes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vecattention.atomic import replacing

Record = dict[str, Any]
NONE: Record = {"kernel": None, "ms": None}  # instead of a dense record
MOST = 300  # percent of the dense time at which a bar is cut off
INK, QUIET, COLOURS = "#1b1f24", "#8a94a0", ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e")


def best_dense(records: Sequence[Record]) -> dict[str, Record]:
    """The fastest dense record of each case."""
    found: dict[str, Record] = {}
    for record in records:
        if record.get("study") == "dense":
            old = found.get(record["case"])
            found[record["case"]] = record if old is None or record["ms"] < old["ms"] else old
    return found


def speed_ups(records: Sequence[Record]) -> list[Record]:
    """Whole calls beside the best dense kernel: case, rule, density, which, both times, the ratio, extra memory.

    Here and below what a dense record is needed for is None where there is none of that case.
    """
    dense = best_dense(records)
    return [
        {
            "case": r["case"], "pool": r["pool"], "block": r["block"], "scope": r["scope"], "density": r["density"],
            "dense": dense.get(r["case"], NONE)["kernel"], "dense_ms": dense.get(r["case"], NONE)["ms"],
            "ms": r["ms"], "ms_graph": r["ms_graph"], "ratio": _over(dense.get(r["case"], NONE)["ms"], r["ms"]),
            "extra_mib": r["extra_mib"],
        }
        for r in records
        if r.get("study") == "call" and not _crosses(r)
    ]  # fmt: skip


def shares(records: Sequence[Record]) -> list[Record]:
    """Selection, as a CUDA graph where it was one, beside the best dense kernel: percent of the dense time.

    ``right``: whether it agreed with the reference and with itself; None: it was not compared.
    """
    dense = best_dense(records)
    return [
        {
            "case": r["case"], "pool": r["pool"], "block": r["block"], "scope": r["scope"],
            "backend": r.get("backend", "auto"), "ms": r.get("ms_graph") or r["ms"],
            "percent": _over(100 * (r.get("ms_graph") or r["ms"]), dense.get(r["case"], NONE)["ms"]),
            "right": r["right"] and r.get("repeats_equal") is not False if "right" in r else None,
        }
        for r in records
        if r.get("study") == "selection"
    ]  # fmt: skip


def lengths(records: Sequence[Record]) -> list[Record]:
    """Whole calls of growing length beside the best dense kernel: their ratios called one by one, and as a graph."""
    dense = best_dense(records)
    return [
        {**r, "dense_ms": whole, "ratio": _over(whole, r["ms"]), "ratio_graph": _over(whole, r["ms_graph"])}
        for r, whole in ((r, dense.get(r["case"], NONE)["ms"]) for r in records if _crosses(r))
    ]


def draw(records: Sequence[Record], path: Path) -> None:
    """The picture of a record file, a panel for each kind of records in it.

    Raises:
        ValueError: it holds none that are drawn.
    """
    panels = [(panel, rows) for panel, chosen in PANELS if (rows := chosen(records))]
    if not panels:
        raise ValueError(
            f"picture is {path}, wanted records that are drawn (attention by auto, methods, calls with lists of 128 "
            "rows or of growing length), there is none; leave the picture out"
        )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    tall = -(-len(panels) // columns)
    figure, axes = plt.subplots(tall, columns, figsize=(5 * columns, 4.6 * tall), layout="constrained", squeeze=False)
    for (panel, rows), place in zip(panels, axes.flat, strict=False):
        panel(place, rows)
    for place in list(axes.flat)[len(panels) :]:
        place.axis("off")
    figure.suptitle(title(records), color=INK, fontsize=11)
    with replacing(path) as name:
        figure.savefig(name, dpi=150)
    plt.close(figure)


def machines(records: Sequence[Record]) -> list[str]:
    """The GPUs (or "CPU") that the records are of; those whose key names no device are of a GPU."""
    found = {
        "CPU" if r["key"].get("device") == "cpu" else (r.get("machine") or {}).get("gpu") or "CPU" for r in records
    }
    return sorted(found)


def title(records: Sequence[Record]) -> str:
    """GPU and dtype of the records."""
    dtypes = sorted({r["key"].get("dtype", "bfloat16") for r in records})
    return f"{', '.join(dtypes)}, {', '.join(machines(records))}"


def methods(records: Sequence[Record]) -> list[Record]:
    """Every method's selection and attention beside the best dense kernel: recall, density, milliseconds, the ratio."""
    dense = best_dense(records)
    return [
        {
            "case": r["case"], "method": r["method"], "recall": r["recall"], "density": r["density"],
            "select_ms": r["select_ms"], "attend_ms": r["attend_ms"], "ms": r["ms"],
            "dense_ms": dense.get(r["case"], NONE)["ms"], "ratio": _over(dense.get(r["case"], NONE)["ms"], r["ms"]),
        }
        for r in records
        if r.get("study") == "method"
    ]  # fmt: skip


def _rated(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r.get("study") == "attention" and r["backend"] == "auto"]


def _rates(axes: Any, rows: Sequence[Record]) -> None:
    groups: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for r in rows:
        groups.setdefault((r["case"], r["block"], r["lists"]), []).append((100 * r["density"], r["tflops"]))
    for i, ((case, block, kind), points) in enumerate(sorted(groups.items(), key=lambda g: (-g[0][1], g[0]))):
        xs, ys = zip(*sorted(points), strict=True)
        style = {"color": COLOURS[(i // 2) % 4], "ls": "-" if kind == "clustered" else "--", "marker": "o", "ms": 4}
        axes.plot(xs, ys, label=f"{case}, lists of {block}, {kind}", **style)
    axes.set(
        title="attend over ready lists", xlabel="density, %", ylabel="useful TFLOP/s", xscale="log", ylim=(0, None)
    )
    axes.minorticks_off()
    axes.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    axes.legend(fontsize=6.5, frameon=False, ncols=2, loc="lower center")
    _plain(axes)


def _timed(records: Sequence[Record]) -> list[Record]:
    rules = ((64, 128, "window"), (32, 128, "window"))
    return [r for r in speed_ups(records) if (r["pool"], r["block"], r["scope"]) in rules]


def _ratios(axes: Any, rows: Sequence[Record]) -> None:
    """Times as fast as dense; milliseconds where a dense record is missing."""
    shown = "ratio" if all(r["ratio"] for r in rows) else "ms"
    for i, case in enumerate(dict.fromkeys(r["case"] for r in rows)):
        for pool, marker in ((64, "o"), (32, "s")):
            points = sorted((100 * r["density"], r[shown]) for r in rows if (r["case"], r["pool"]) == (case, pool))
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, color=COLOURS[i % 4], marker=marker, ls="-" if pool == 64 else ":", ms=5,
                          label=f"{case}, P={pool}")  # fmt: skip
    axes.set(title="whole call, selection included", xlabel="density, %", ylabel="ms")
    if shown == "ratio":
        axes.axhline(1, color=QUIET, lw=0.8)
        axes.set(title="whole call, selection included, over the best dense kernel", ylabel="times faster")
    axes.legend(fontsize=7, frameon=False)
    _plain(axes)


def _parted(records: Sequence[Record]) -> list[Record]:
    """Whole calls whose selection was timed, too: ``select_ms`` of it and ``attend_ms``, the rest."""
    chosen = {(s["case"], s["pool"], s["block"], s["scope"]): s["ms"] for s in shares(records)}
    calls = [r for r in _timed(records) if r["pool"] == 64]
    times = [chosen.get((r["case"], r["pool"], r["block"], r["scope"])) for r in calls]
    return [
        {**r, "select_ms": select, "attend_ms": r["ms"] - select}
        for r, select in zip(calls, times, strict=True) if select is not None
    ]  # fmt: skip


def _stacks(axes: Any, rows: Sequence[Record]) -> None:
    _bars(axes, rows)
    axes.set_yticks(range(len(rows)), [f"{r['case']}\n{100 * r['density']:.3g} %" for r in rows], fontsize=7)
    axes.set(title="time of a call, P=64, R=128")
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _grown(records: Sequence[Record]) -> list[Record]:
    return [r for r in lengths(records) if re.fullmatch(r"(causal|full)-\d+", r["case"])]


def _lengths(axes: Any, rows: Sequence[Record]) -> None:
    for kind, style in (("causal", "-"), ("full", "--")):
        mine = [r for r in rows if r["case"].startswith(f"{kind}-")]
        dense = sorted({(int(r["case"].split("-")[1]), r["dense_ms"]) for r in mine if r["dense_ms"]})
        if dense:
            xs, ys = zip(*dense, strict=True)
            axes.plot(xs, ys, color=INK, ls=style, marker=".", label=f"dense, {kind}")
        mine = [r for r in mine if r["block"] == max(r["block"] for r in mine)]
        for i, density in enumerate(sorted({r["asked"] for r in mine})):
            points = sorted((int(r["case"].split("-")[1]), r["ms"]) for r in mine if r["asked"] == density)
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color=COLOURS[i % 4], ls=style, marker=".", label=f"{100 * density:g} %, {kind}")
    axes.set(title="whole call against length, the widest lists", xlabel="keys", ylabel="ms", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7, frameon=False)
    _plain(axes)


def _methods(axes: Any, rows: Sequence[Record]) -> None:
    percent = _bars(axes, rows)
    for i, r in enumerate(rows if percent else ()):
        if (share := 100 * (r["select_ms"] + r["attend_ms"]) / r["dense_ms"]) > MOST:
            axes.text(MOST, i, f"{share:.0f} % ", ha="right", va="center", color="white", fontsize=7)
    said = [f"{r['method']}, {r['case']}\nrecall {r['recall']:.2f}, {100 * r['density']:.0f} %" for r in rows]
    axes.set_yticks(range(len(rows)), said, fontsize=7)
    axes.set(title="methods at equal recall")
    if percent:
        axes.axvline(100, color=QUIET, lw=0.8)
        axes.set_xlim(0, min(MOST, axes.get_xlim()[1]))
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _bars(axes: Any, rows: Sequence[Record]) -> bool:
    """Selection and attention of each row; in percent of dense, or (False) in ms where a dense record is missing."""
    percent = all(r["dense_ms"] for r in rows)
    for i, r in enumerate(rows):
        select, attend = (r[name] * (100 / r["dense_ms"] if percent else 1) for name in ("select_ms", "attend_ms"))
        axes.barh(i, select, color=COLOURS[1], label="selection" if not i else None)
        axes.barh(i, attend, left=select, color=COLOURS[0], label="attention" if not i else None)
    axes.set_xlabel("% of the best dense kernel" if percent else "ms")
    return percent


def _over(ms: float | None, other: float | None) -> float | None:
    return None if ms is None or other is None else ms / other


def _crosses(record: Record) -> bool:
    return record.get("study") == "call" and record["key"].get("use") == "crossover"


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_size(10)
    axes.grid(alpha=0.25)


Rows = Callable[[Sequence[Record]], Sequence[Record]]
PANELS: tuple[tuple[Callable[[Any, Sequence[Record]], None], Rows], ...] = (
    (_rates, _rated), (_ratios, _timed), (_stacks, _parted), (_lengths, _grown), (_methods, methods),
)  # fmt: skip
"""What is drawn, and of which rows: where there are none, it is left out."""
