"""Runs the tests in ``interpreted`` in their own process: Triton decides at import whether it interprets kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreted"


def test_the_kernels_are_right_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)],
        capture_output=True, text=True, check=False, env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[2],
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 14, done.stdout[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
