"""Records in words and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]
WRONG = "its result is wrong"
FIELDS = {
    "dense": ("case", "kernel", "ms"),
    "call": ("case", "pool", "block", "scope", "density", "asked", "ms", "ms_graph", "extra_mib"),
    "selection": ("case", "pool", "block", "scope", "ms"),
    "attention": ("case", "block", "lists", "density", "backend", "ms", "tflops", "error"),
    "method": ("case", "method", "recall", "density", "select_ms", "attend_ms", "ms"),
    "peer": ("case", "kernel", "lists", "density", "ms", "tflops"),
    "variants": ("case", "block", "lists", "density", "variant", "turns", "tflops"),
    "trials": ("run", "case", "of", "variant", "ms"),
    "layer": (
        "case", "pool", "block", "dense.ms", "density", "sparse.ms", "ratio", "coverage.density", "coverage.ms",
    ),
}  # fmt: skip
"""The studies that come into a table, and what a record of each has to hold; after a point: inside of that field."""

OPTIONAL = {"machine": dict, "missing": dict, "right": bool, "ms_graph": float, "block": int}
"""Of what type other fields are, where a record of any study has them."""

TEXTS = ("case", "kernel", "scope", "lists", "backend", "method", "of", "variant")
SHOWN = ("kernel", "method", "fields", "backend", "pool", "block", "scope", "lists", "density", "structure")


def line(record: Record) -> str:
    """One record on one line."""
    what = " ".join(f"{name}={_short(record[name])}" for name in SHOWN if record.get(name) not in (None, ""))
    head = f"{record['key']['study']:<9} {record['key'].get('case', ''):<18} {what}"
    if "failed" in record:
        return f"{head}  {record['failed']}"
    parts = [f"{record['ms']:9.3f} ms ({record['ms_q1']:.3f} .. {record['ms_q3']:.3f})"]
    if "tflops" in record:
        parts.append(f"{record['tflops']:6.1f} TFLOP/s")
    if "select_ms" in record:
        parts.append(f"selection {record['select_ms']:.3f} ms, recall {record['recall']:.3f}")
    if "ms_graph" in record:
        parts.append(f"graph {record['ms_graph']:.3f} ms")
    if "extra_mib" in record:
        parts.append(f"extra {record['extra_mib']} MiB")
    if "error" in record:
        parts.append(f"error {record['error']:.1e} (torch {record['error_torch']:.1e})")
    if "differ" in record:
        parts.append(f"{record['differ']} of {record['kept_compared']} keys differ")
    if record.get("right") is False:
        parts.append("ITS RESULT IS WRONG")
    if record.get("repeats_equal") is False:
        parts.append("TWO RUNS DIFFER")
    return f"{head}  {'  '.join(parts)}"


def wrong(record: Record) -> bool:
    """Whether a result is wrong, or missing where it is one of ours; a peer or a launch shape may not be to be had."""
    if "failed" in record:
        optional = record["key"]["study"] in ("peer", "method") or record["key"].get("fields")
        return record["failed"] == WRONG or not optional
    return any(record.get(name) is False for name in ("error_ok", "right", "repeats_equal"))


def check(path: Path, records: Mapping[int, Record]) -> None:
    """Refuse records, by their line's number, that cannot be told of.

    Raises:
        ValueError: one lacks a field of `FIELDS`, or has something else in it.
    """
    for number, record in records.items():
        study = record["study"]
        told = () if study == "layer" and "coverage" not in record else FIELDS.get(str(study), ())
        wrong = [_unfit("study", study, str), _unfit("key", record["key"], dict)]
        wrong += [_unfit(name, record[name], kind) for name, kind in OPTIONAL.items() if record.get(name) is not None]
        wrong += [_unfit(name, _field(record, name), _wanted(name, study)) for name in told]
        for what in filter(None, wrong):
            raise ValueError(
                f"{path} line {number}: a record of {study} {what}; remove that line, or measure it again with "
                "vecattention bench"
            )


ABSENT = object()
"""Instead of the value of a field that a record lacks."""


def _field(record: Any, name: str) -> object:
    for part in name.split("."):
        record = record.get(part, ABSENT) if isinstance(record, dict) else ABSENT
    return record


def _wanted(name: str, study: str) -> type | None:
    """The type of a field: text, a number, or (None) what `_unfit` lets be anything."""
    free = name == "turns" or (study, name) == ("trials", "ms")  # None where there is nothing to say
    return None if free else str if name in TEXTS else float


def _unfit(name: str, value: object, wanted: type | None) -> str:
    """What is wrong with the value of a field; empty: nothing."""
    said = {str: "a text", dict: "an object", float: "a number", bool: "true or false"}
    if value is ABSENT:
        return f"lacks {name!r}, wanted {said[wanted] if wanted else 'one, or null'} in it"
    if wanted is None:
        return ""
    if wanted is not float:
        return "" if isinstance(value, wanted) else f"has {name} {value!r}, wanted {said[wanted]}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name.rpartition(".")[2] not in ("ms", "ms_graph"):
        return "" if number else f"has {name} {value!r}, wanted a number"
    return "" if number and value > 0 else f"has {name} {value!r}, wanted milliseconds above 0"  # type: ignore[operator]


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{x}" for name, x in value.items()) or "default"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
