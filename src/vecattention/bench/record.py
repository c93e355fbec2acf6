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

    A step that fails leaves a record that says why, and is tried again the next time: too little memory, or a package
    of a peer that is not there, must not end a long run.

    Args:
        path: the file; made when it is not there.
        steps: (key, function) pairs; the key's entries are put into each record that the function gives. A key names
            everything that decides the result; the GPU is compared as well.
        now: measure again what is there already.

    Raises:
        RuntimeError: a CUDA error after which nothing can be measured in this process; nothing is recorded of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = [] if now else [record for record in read(path) if "failed" not in record]
    where = _where()
    with path.open("a", encoding="utf-8") as file:
        for key, step in steps:
            done = [r for r in old if r.get("key") == key and (r.get("machine") or {}).get("gpu") == where["gpu"]]
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


def remaining(path: Path, steps: Iterable[Step]) -> list[Step]:
    """The steps that `run` would do."""
    gpu = _where()["gpu"]
    done = [
        r["key"] for r in read(path) if "failed" not in r and "key" in r and (r.get("machine") or {}).get("gpu") == gpu
    ]
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
