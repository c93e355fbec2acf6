"""Records in words and tables."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
WRONG = "its result is wrong"
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
    if record.get("repeats_equal") is False:
        parts.append("TWO RUNS DIFFER")
    return f"{head}  {'  '.join(parts)}"


def wrong(record: Record) -> bool:
    """Whether a result is wrong, or missing where it is one of ours; a peer or a launch shape may not be to be had."""
    if "failed" in record:
        optional = record["key"]["study"] in ("peer", "method") or record["key"].get("fields")
        return record["failed"] == WRONG or not optional
    return record.get("error_ok") is False or record.get("repeats_equal") is False


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{x}" for name, x in value.items()) or "default"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
