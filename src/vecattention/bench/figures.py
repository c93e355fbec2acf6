"""Tables and pictures of GPU records: speed against density, speed-ups over dense attention, where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vecattention.atomic import replacing

Record = dict[str, Any]
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
    """Whole calls beside the best dense kernel: case, rule, density, which, both times, the ratio, extra memory."""
    dense = best_dense(records)
    return [
        {
            "case": r["case"], "pool": r["pool"], "block": r["block"], "scope": r["scope"], "density": r["density"],
            "dense": dense[r["case"]]["kernel"], "dense_ms": dense[r["case"]]["ms"], "ms": r["ms"],
            "ms_graph": r["ms_graph"], "ratio": dense[r["case"]]["ms"] / r["ms"], "extra_mib": r["extra_mib"],
        }
        for r in records
        if r.get("study") == "call" and r["case"] in dense and not _crosses(r)
    ]  # fmt: skip


def shares(records: Sequence[Record]) -> list[Record]:
    """Selection, as a CUDA graph where it was one, beside the best dense kernel: its share of the dense time."""
    dense = best_dense(records)
    return [
        {
            "case": r["case"], "pool": r["pool"], "block": r["block"], "scope": r["scope"],
            "ms": r.get("ms_graph", r["ms"]), "share": r.get("ms_graph", r["ms"]) / dense[r["case"]]["ms"],
        }
        for r in records
        if r.get("study") == "selection" and r["case"] in dense
    ]  # fmt: skip


def lengths(records: Sequence[Record]) -> list[Record]:
    """Whole calls of growing length beside the best dense kernel: their ratios called one by one, and as a graph."""
    dense = best_dense(records)
    return [
        {**r, "dense_ms": dense[r["case"]]["ms"], "ratio": dense[r["case"]]["ms"] / r["ms"],
         "ratio_graph": dense[r["case"]]["ms"] / r["ms_graph"]}
        for r in records
        if _crosses(r) and r["case"] in dense
    ]  # fmt: skip


def draw(records: Sequence[Record], path: Path) -> None:
    """The picture of a record file, a panel for each kind of records in it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [panel for panel, wanted in PANELS if any(wanted(r) for r in records)]
    columns = min(3, max(1, len(panels)))
    tall = -(-len(panels) // columns) or 1
    figure, axes = plt.subplots(tall, columns, figsize=(5 * columns, 4.6 * tall), layout="constrained", squeeze=False)
    for panel, place in zip(panels, axes.flat, strict=False):
        panel(place, records)
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
            "ratio": dense[r["case"]]["ms"] / r["ms"],
        }
        for r in records
        if r.get("study") == "method" and r["case"] in dense
    ]  # fmt: skip


def _rates(axes: Any, records: Sequence[Record]) -> None:
    groups: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for r in records:
        if r.get("study") == "attention" and r["backend"] == "auto":
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


def _ratios(axes: Any, records: Sequence[Record]) -> None:
    rows = [r for r in speed_ups(records) if r["block"] == 128 and r["scope"] == "window"]
    for i, case in enumerate(dict.fromkeys(r["case"] for r in rows)):
        for pool, marker in ((64, "o"), (32, "s")):
            points = sorted((100 * r["density"], r["ratio"]) for r in rows if (r["case"], r["pool"]) == (case, pool))
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, color=COLOURS[i % 4], marker=marker, ls="-" if pool == 64 else ":", ms=5,
                          label=f"{case}, P={pool}")  # fmt: skip
    axes.axhline(1, color=QUIET, lw=0.8)
    axes.set(
        title="whole call, selection included, over the best dense kernel", xlabel="density, %", ylabel="times faster"
    )
    axes.legend(fontsize=7, frameon=False)
    _plain(axes)


def _stacks(axes: Any, records: Sequence[Record]) -> None:
    dense = best_dense(records)
    calls = [r for r in records if r.get("study") == "call" and not _crosses(r)]
    calls = [r for r in calls if (r["pool"], r["block"]) == (64, 128) and r["case"] in dense]
    calls = [r for r in calls if r["scope"] == "window"]
    chosen = {(s["case"], s["pool"], s["block"], s["scope"]): s["ms"] for s in shares(records)}
    calls = [r for r in calls if (r["case"], r["pool"], r["block"], r["scope"]) in chosen]
    for i, r in enumerate(calls):
        whole = dense[r["case"]]["ms"]
        select = chosen[r["case"], r["pool"], r["block"], r["scope"]]
        axes.barh(i, 100 * select / whole, color=COLOURS[1], label="selection" if not i else None)
        axes.barh(i, 100 * (r["ms"] - select) / whole, left=100 * select / whole, color=COLOURS[0],
                  label="attention" if not i else None)  # fmt: skip
    axes.set_yticks(range(len(calls)), [f"{r['case']}\n{100 * r['density']:.3g} %" for r in calls], fontsize=7)
    axes.set(title="time of a call, P=64, R=128", xlabel="% of the best dense kernel")
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _lengths(axes: Any, records: Sequence[Record]) -> None:
    dense = best_dense(records)
    for kind, style in (("causal", "-"), ("full", "--")):
        lengths = sorted(int(c.split("-")[1]) for c in dense if c.startswith(f"{kind}-"))
        axes.plot(lengths, [dense[f"{kind}-{n}"]["ms"] for n in lengths], color=INK, ls=style, marker=".",
                  label=f"dense, {kind}")  # fmt: skip
        mine = [r for r in records if _crosses(r) and r["case"].startswith(f"{kind}-")]
        mine = [r for r in mine if r["block"] == max(r["block"] for r in mine)]
        for i, density in enumerate(sorted({r["asked"] for r in mine})):
            points = sorted((int(r["case"].split("-")[1]), r["ms"]) for r in mine if r["asked"] == density)
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color=COLOURS[i % 4], ls=style, marker=".", label=f"{100 * density:g} %, {kind}")
    axes.set(title="whole call against length, the widest lists", xlabel="keys", ylabel="ms", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7, frameon=False)
    _plain(axes)


def _methods(axes: Any, records: Sequence[Record]) -> None:
    rows = methods(records)
    dense = best_dense(records)
    for i, r in enumerate(rows):
        whole = dense[r["case"]]["ms"]
        select, attend = (100 * r[name] / whole for name in ("select_ms", "attend_ms"))
        axes.barh(i, select, color=COLOURS[1], label="selection" if not i else None)
        axes.barh(i, attend, left=select, color=COLOURS[0], label="attention" if not i else None)
        if select + attend > MOST:
            axes.text(MOST, i, f"{select + attend:.0f} % ", ha="right", va="center", color="white", fontsize=7)
    said = [f"{r['method']}, {r['case']}\nrecall {r['recall']:.2f}, {100 * r['density']:.0f} %" for r in rows]
    axes.set_yticks(range(len(rows)), said, fontsize=7)
    axes.axvline(100, color=QUIET, lw=0.8)
    axes.set(title="methods at equal recall", xlabel="% of the best dense kernel")
    axes.set_xlim(0, min(MOST, axes.get_xlim()[1]))
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)


def _crosses(record: Record) -> bool:
    return record.get("study") == "call" and record["key"].get("use") == "crossover"


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_size(10)
    axes.grid(alpha=0.25)


PANELS: tuple[tuple[Callable[[Any, Sequence[Record]], None], Callable[[Record], bool]], ...] = (
    (_rates, lambda r: r.get("study") == "attention"),
    (_ratios, lambda r: r.get("study") == "call" and not _crosses(r)),
    (_stacks, lambda r: r.get("study") == "call" and not _crosses(r)),
    (_lengths, _crosses),
    (_methods, lambda r: r.get("study") == "method"),
)
"""What is drawn, and the records that it is drawn of."""
