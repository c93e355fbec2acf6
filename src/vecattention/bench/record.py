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
    return list(numbered(path).values())


def numbered(path: Path) -> dict[int, Record]:
    """The same by their line's number, from 1 on."""
    if not path.is_file():
        return {}
    found: dict[int, Record] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found[number] = _record(line)
        except (ValueError, RecursionError) as error:
            if number >= len(lines) - 1:
                break
            raise ValueError(
                f"{path} line {number} is no JSON record ({error}); remove that line, or pass another file"
            ) from error
    return found


def made_here(records: Iterable[Record]) -> list[Record]:
    """Those that were made with this GPU and these versions of the library, torch and Triton."""
    where = _where()
    return [record for record in records if _alike(record, where)]


def run(path: Path, steps: Iterable[Step], now: bool = False) -> Iterator[Record]:
    """Do the steps whose key no record of the file has, and append what they give; yields all records as they come.

    A record of another GPU, or of another version of the library, torch or Triton, does not count as one.
    A step that fails leaves a record that says why, and is tried again the next time: too little memory, or a package
    of a peer that is not there, must not end a long run.

    Args:
        path: the file; made when it is not there.
        steps: (key, function) pairs; the key's entries are put into each record that the function gives. A key names
            everything that decides the result; the GPU and the versions are compared as well.
        now: measure again what is there already.

    Raises:
        RuntimeError: a CUDA error after which nothing can be measured in this process; nothing is recorded of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    where, held = _where(), read(path)
    old = [] if now else [r for r in held if "failed" not in r and _alike(r, where)]
    _end_line(path)
    with path.open("a", encoding="utf-8") as file:
        for key, step in steps:
            done = [r for r in old if r.get("key") == key]
            if done:
                yield from done
                continue
            found = _as_list(_safe(step))
            state = {"gpu_state": machine.gpu_state()} if where["gpu"] else {}  # while it is as the step left it
            for record in found:
                full = {"key": key, **record, **state, "schema": SCHEMA, "made": _time(), "machine": where}
                file.write(json.dumps(full) + "\n")
                file.flush()
                if not now and "failed" not in full:
                    old.append(full)
                yield full


def _end_line(path: Path) -> None:
    """End the last line of a file, or take it away where a run was cut off within it: records are appended.

    Raises:
        ValueError: it is no beginning of a record.
    """
    if not path.is_file():
        return
    with path.open("rb+") as file:
        held = file.read()
        start = held.rfind(b"\n") + 1
        if start == len(held):
            return
        if not held[start:].startswith(b"{"):
            raise ValueError(
                f"{path} ends in {held[start:][:40]!r}, wanted JSON records, one a line; pass another file"
            )
        try:
            json.loads(held[start:])
        except (ValueError, RecursionError):
            file.truncate(start)
        else:
            file.write(b"\n")


def remaining(path: Path, steps: Iterable[Step]) -> list[Step]:
    """The steps that `run` would do."""
    done = [r["key"] for r in made_here(read(path)) if "failed" not in r and "key" in r]
    return [step for step in steps if step[0] not in done]


def why(error: Exception) -> str:
    """One line of an error, for a record.

    Raises:
        RuntimeError: the error itself, when it left the GPU in a state in which nothing works any more.
    """
    import torch

    if isinstance(error, torch.AcceleratorError):
        raise error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _safe(step: Callable[[], list[Record] | Record]) -> list[Record] | Record:
    try:
        return step()
    except Exception as error:  # compilers of kernels raise what they like
        return {"failed": why(error)}


def _record(line: str) -> Record:
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, wanted an object")
    return found


def _alike(record: Record, where: dict[str, Any]) -> bool:
    """Whether a record was made with this GPU and these versions."""
    machine = record.get("machine") or {}
    return all(machine.get(name) == where[name] for name in ("gpu", "versions"))


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
