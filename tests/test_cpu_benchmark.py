"""benchmarks/cpu.py runs, and its record holds what a figure needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cpu.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_the_cpu_benchmark_measures_and_records(tmp_path: Path) -> None:
    out = tmp_path / "cpu.jsonl"
    command = [
        sys.executable, "-W", "error", str(SCRIPT), "--lengths", "512", "--head-dim", "32", "--dtypes", "float32",
        "--density", "0.5", "--repeats", "3", "--threads", "1", "--out", str(out),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second run finds everything measured
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert str(out) in done.stdout and "float32      512" in done.stdout
    (line,) = out.read_text().splitlines()
    found = json.loads(line)
    assert found["key"] == {
        "study": "cpu", "length": 512, "head_dim": 32, "heads": 4, "dtype": "float32", "density": 0.5, "threads": 1,
    }  # fmt: skip
    assert abs(found["density"] - 0.5) < 0.01
    assert set(found["times"]) == {"dense", "sparse", "select", "attend"}
    assert all(0 < t["ms_q1"] <= t["ms"] <= t["ms_q3"] and t["calls"] == 3 for t in found["times"].values())
    assert found["ratio"] == pytest.approx(found["times"]["dense"]["ms"] / found["times"]["sparse"]["ms"], abs=0.01)
    assert all(0 < error < 1e-5 for error in found["error"].values())
    assert all(factor >= 1 for factor in found["memory"].values())
    assert found["machine"]["versions"]["torch"] and found["processor"]["cores"]
