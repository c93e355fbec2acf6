"""The README: every code block runs, its table is what the backends say, its files and targets exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vecattention import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_there_is_no_block_that_is_not_run() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "console"}
    assert README.count("```") == 2 * len(BLOCKS)


def test_the_python_blocks_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for number, (kind, code) in enumerate(BLOCKS):
        if kind == "python":
            exec(compile(code, f"README.md, block {number}", "exec"), names)
    assert names["out"].shape == names["query"].shape
    told = capsys.readouterr().out
    assert names["movie"].asked.colour in told.splitlines(), "the model answers right"
    assert names["run"].stats.sparse_calls == 3 and 0 < names["run"].stats.mean_density < 0.6


def test_the_command_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for kind, code in BLOCKS if kind == "console" for line in code.splitlines()]
    assert len(lines) >= 3
    for line in lines:
        name, *words = shlex.split(line)
        assert name == "vecattention" and cli.main(words) == 0, line
    assert (tmp_path / "out" / "small" / "demo.png").is_file()


def test_the_table_is_what_the_backends_say() -> None:
    assert where().placed(README) == README, "run python docs/what_runs_where.py --write"


def where() -> ModuleType:
    """The script that makes the table."""
    spec = importlib.util.spec_from_file_location("what_runs_where", ROOT / "docs" / "what_runs_where.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_and_targets_that_it_names_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).is_file(), link
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z]+)`", README)) <= set(targets)
