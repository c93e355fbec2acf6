"""Rows of JSON in a file: appended whole, found again by their key, so that an interrupted study goes on."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vecattention import machine

SCHEMA = 2
Row = dict[str, Any]


class Records:
    """A JSONL file of rows, each with a "key" that says what was measured.

    A line that an interrupted process left unfinished is dropped when the file is opened.

    Args:
        path: of the file; it and its folder are made when the first row is written.

    Raises:
        ValueError: a line in the middle of the file is not JSON, or a row has no key or another schema.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._rows: dict[str, Row] = {}
        if self.path.exists():
            self._read()

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether a row with this key was written."""
        return _name(key) in self._rows

    def get(self, key: Mapping[str, Any]) -> Row | None:
        """The row of this key, None when there is none."""
        return self._rows.get(_name(key))

    def add(self, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Append a row; it is on the disk when this returns."""
        row = {"schema": SCHEMA, "key": dict(key), **values}
        line = json.dumps(row, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._rows[_name(key)] = json.loads(line)

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole, newline, rest = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            self._take(line, number)
        if rest:
            _replace(self.path, whole + newline)

    def _take(self, line: str, number: int) -> None:
        try:
            row = json.loads(line)
            key, schema = row["key"], row["schema"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {str(self.path)!r} is no row of a fidelity study ({error!r}); pass another "
                "--out, or remove the line"
            ) from error
        if schema != SCHEMA:
            raise ValueError(
                f"line {number} of {str(self.path)!r} has schema {schema}, wanted {SCHEMA}; pass another --out"
            )
        self._rows[_name(key)] = row


def provenance() -> Row:
    """Where and with what this runs: the machine, the versions, and the commit when run from a checkout."""
    here = Path(__file__).parent
    commit = _git(here, "rev-parse", "HEAD")
    changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    return {"machine": machine.facts(), "commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _replace(path: Path, text: str) -> None:
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(partial, path)
