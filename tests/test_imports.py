"""In a fresh process: `import vecattention` needs torch alone, brings nothing else in, and computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vecattention

OPTIONAL = (
    "triton", "transformers", "diffusers", "av", "numpy", "torchvision", "safetensors", "rich", "matplotlib", "PIL",
)  # fmt: skip

BLOCKED = f"""
import sys

class Without:
    # A finder that does not find what is optional, as if it was not installed.
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {OPTIONAL}:
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
import vecattention
query = torch.randn(1, 2, 100, 32)
print(vecattention.vec_attention(query, query, query).shape, vecattention.explain(query, query).backend)
for name in vecattention.__all__:
    getattr(vecattention, name)
"""

BROUGHT = f"""
import sys
import torch
before = set(sys.modules)  # numpy among them: torch takes it where it is installed
import vecattention
for name in vecattention.__all__:
    getattr(vecattention, name)
brought = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(brought & set({OPTIONAL})))
"""


def test_it_works_with_everything_optional_blocked() -> None:
    done = _run(BLOCKED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "torch.Size([1, 2, 100, 32]) cpu"


def test_it_brings_none_of_them_in() -> None:
    done = _run(BROUGHT)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    ("file", "name"), [("spec.py", "triton"), ("ops.py", "transformers"), ("integrations/__init__.py", "av")]
)
def test_both_checks_can_fail(tmp_path: Path, file: str, name: str) -> None:
    """A copy of the package with one import too many is caught."""
    copy = tmp_path / "vecattention"
    shutil.copytree(Path(vecattention.__file__).parent, copy, ignore=shutil.ignore_patterns("data", "__pycache__"))
    module = copy / file
    future = "from __future__ import annotations\n"
    assert module.read_text().count(future) == 1
    module.write_text(module.read_text().replace(future, f"{future}import {name}\n"))
    blocked, brought = _run(BLOCKED, tmp_path), _run(BROUGHT, tmp_path)
    assert blocked.returncode == 1 and f"ModuleNotFoundError: No module named '{name}'" in blocked.stderr
    assert str(module) in blocked.stderr
    assert brought.returncode == 0 and f"'{name}'" in brought.stdout


def _run(script: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The script in its own process and an empty folder; ``first`` holds a package that hides the installed one."""
    environment = os.environ | ({"PYTHONPATH": str(first)} if first else {})
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", script],
        capture_output=True, text=True, env=environment, cwd=first, check=False,
    )  # fmt: skip
