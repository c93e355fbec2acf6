"""Records of measurements: JSON lines, appended one by one, so that a run can be cut off and taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vecattention import machine

SCHEMA = 1
Record = dict[str, Any]
Step = tuple[dict[str, Any], Callable[[], "list[Record] | Record"]]


def read(path: Path) -> list[Record]:
    """The records of a file, in order; an unfinished last line is left out.

    Raises:
        ValueError: a line in the middle that is no record.
    """
    if not path.is_file():
        return []
    found: list[Record] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number >= len(lines) - 1:
                break
            raise ValueError(
                f"{path} line {number} is no JSON record ({error}); remove that line, or pass another file"
            ) from error
    return found


def run(path: Path, steps: Iterable[Step], now: bool = False) -> Iterator[Record]:
    """Do the steps whose key no record of the file has, and append what they give; yields all records as they come.

    Args:
        path: the file; made when it is not there.
        steps: (key, function) pairs; the key's entries are put into each record that the function gives.
        now: measure again what is there already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = [] if now else read(path)
    with path.open("a", encoding="utf-8") as file:
        for key, step in steps:
            done = [record for record in old if record.get("key") == key]
            if done:
                yield from done
                continue
            for record in _as_list(_safe(step)):
                full = {"key": key, **record, "schema": SCHEMA, "made": _time(), "machine": _where()}
                file.write(json.dumps(full) + "\n")
                file.flush()
                if not now:
                    old.append(full)
                yield full


def _safe(step: Callable[[], list[Record] | Record]) -> list[Record] | Record:
    """What a step gives, or a record of why it could not run.

    Too little memory, a package of a peer that is not there or fails, or a method that does not take the shape must not
    end a long run.
    """
    import torch

    try:
        return step()
    except (RuntimeError, ImportError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0]}"}


def _as_list(given: list[Record] | Record) -> list[Record]:
    return given if isinstance(given, list) else [given]


def _time() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _where() -> dict[str, Any]:
    facts = machine.facts()
    return {
        "gpu": facts["gpus"][0]["name"] if facts["gpus"] else None, "cuda": facts["cuda"],
        "versions": {name: facts["versions"][name] for name in ("vecattention", "torch", "triton")},
        "commit": machine.commit(),
    }  # fmt: skip
