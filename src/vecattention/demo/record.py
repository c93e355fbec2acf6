"""The record of a demonstration: JSON lines, the first with where and how, one for each row, one for each answer."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vecattention import machine
from vecattention.atomic import replacing
from vecattention.demo.run import Outcome

SCHEMA = 1


def lines(outcome: Outcome) -> list[dict[str, Any]]:
    """The record's lines, JSON-ready. Each names its kind: "demo", then "row"s, then "answer"s."""
    head = {
        "kind": "demo",
        "schema": SCHEMA,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": outcome.settings.record(),
        "machine": machine.facts(),
        "commit": machine.commit(),
        "remarks": list(outcome.remarks),
    }
    rows = [{"kind": "row", **asdict(row), "accuracy": row.accuracy} for row in outcome.rows]
    answers = [{"kind": "answer", **asdict(result)} for result in outcome.results]
    return [head, *rows, *answers]


def save(outcome: Outcome, path: str | os.PathLike[str]) -> None:
    """Write the record; the file appears whole or not at all."""
    with replacing(path) as name:
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines(outcome)))
