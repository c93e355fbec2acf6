"""The project's own rules: imports point down, pins cover what is installed, the licence is the standard text."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vecattention

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts on the package that lies in `folder`/src."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", code, "--config", str(ROOT / "pyproject.toml"), "--no-cache"],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder / "src")},
    )  # fmt: skip


def test_imports_point_down_and_backends_do_not_know_one_another() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    "file, line, broken",
    [
        ("spec.py", "from vecattention import ops", "vecattention.spec -> vecattention.ops"),
        ("backends/cpu.py", "from vecattention.backends import reference", "backends.cpu -> vecattention.backends.ref"),
        ("methods/vec.py", "from vecattention.testbed import movies", "methods.vec -> vecattention.testbed"),
        ("ops.py", "def f():\n    import triton", "vecattention.ops -> triton"),
    ],
)
def test_the_check_of_imports_can_fail(tmp_path: Path, file: str, line: str, broken: str) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "data"))
    with (tmp_path / "src" / "vecattention" / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1 and "BROKEN" in done.stdout
    assert broken in done.stdout


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {normal(line.partition("==")[0]) for line in lines if line and not line.startswith("#")}
    wanted = PROJECT["project"]["dependencies"] + sum(PROJECT["project"]["optional-dependencies"].values(), [])
    names = {normal(re.split(r"[\[<>=!~; ]", one)[0]) for one in wanted} - {"vecattention"}
    assert names <= pins, f"constraints.txt lacks {sorted(names - pins)}"
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines if line and not line.startswith("#"))


def normal(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_package_needs_torch_alone_and_states_its_version() -> None:
    assert PROJECT["project"]["dependencies"] == ["torch>=2.6"]
    assert PROJECT["project"]["version"] == vecattention.__version__


def test_the_licence_is_the_text_of_apache_2() -> None:
    text = " ".join((ROOT / "LICENSE").read_text().split())
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "0ffddef9e48f8a09aed5caf2d44f7ba1c1be2d9b8e0a6f693b1635b2d5566645"
    )
    assert PROJECT["project"]["license"] == "Apache-2.0"
