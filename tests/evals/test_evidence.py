"""The evidence pages: every table is what its command prints from the records, every link and command works."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from vecattention.evals.fidelity.records import Records
from vecattention.evals.fidelity.tables import of

ROOT = Path(__file__).parent.parent.parent


def script() -> ModuleType:
    """The script that fills the pages."""
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "docs" / "evidence.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EVIDENCE = script()


@pytest.mark.parametrize("page", EVIDENCE.PAGES, ids=lambda page: page.name)
def test_the_tables_are_what_the_records_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = [found[1] for found in EVIDENCE.PLACE.finditer(text)]
    assert len(commands) == text.count("<!-- vecattention") == text.count("<!-- end -->") >= 3
    assert EVIDENCE.placed(text) == text, "run python docs/evidence.py --write"
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (page.parent / link).is_file(), link


def test_a_table_that_is_not_up_to_date_is_told() -> None:
    text = EVIDENCE.PAGES[0].read_text(encoding="utf-8")
    place = EVIDENCE.PLACE.search(text)
    assert place is not None and "0." in place[3]
    wrong = text[: place.start(3)] + place[3].replace("0.", "1.", 1) + text[place.end(3) :]
    assert EVIDENCE.placed(wrong) == text != wrong


def test_commands_that_fail_are_told() -> None:
    with pytest.raises(ValueError, match="ended with 2, wanted 0; correct the comment"):
        EVIDENCE.printed("eval fidelity --show nowhere.jsonl")


@pytest.mark.parametrize("name", ["testbed", "synthetic-causal", "synthetic-full", "lengths"])
def test_records_say_where_they_were_made(name: str) -> None:
    rows = list(Records(ROOT / "benchmarks" / "results" / f"fidelity-{name}.jsonl"))
    runs, times = of(rows, "run"), of(rows, "times")
    assert rows[0] in runs and all(run["commit"] and run["dirty"] is False for run in runs)
    assert times and all(time["threads"] == 1 and time["dtype"] == "float32" for time in times)
    for time in times:
        assert min(len(spent) for spent in time["seconds"].values()) >= 3
