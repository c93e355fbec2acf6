"""Importing: vecattention alone brings nothing else; with transformers, in either order, the name is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vecattention.integrations.arrival import when_imported


def run(code: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *flags, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_vecattention_imports_no_other_library() -> None:
    code = """
import sys, vecattention
others = {name.partition(".")[0] for name in sys.modules} & {"transformers", "diffusers", "triton", "av", "safetensors"}
print(sorted(others))
"""
    assert run(code) == "[]"


BOTH = """
from transformers import AttentionInterface, AttentionMaskInterface
print("vecattention" in AttentionInterface(), "vecattention" in AttentionMaskInterface())
"""


@pytest.mark.parametrize(
    "order",
    [
        "import vecattention\nfrom transformers import AutoModel",
        "import transformers.modeling_utils\nimport vecattention",
        "import vecattention\nimport vecattention.integrations.transformers",
        "import vecattention\nvecattention.register()\nvecattention.register()",
    ],
)
def test_the_name_is_known_whichever_comes_first(order: str) -> None:
    assert run(order + BOTH) == "True True"


def test_the_watch_leaves_no_trace_and_the_source_can_be_read() -> None:
    code = """
import inspect, sys
before = list(sys.meta_path)
import vecattention
assert len(sys.meta_path) == len(before) + 1
import transformers.modeling_utils as there
assert sys.meta_path == before
assert "class AttentionInterface" in inspect.getsource(there)
print(type(there.__loader__).__name__)
"""
    assert run(code) == "SourceFileLoader"


def test_without_transformers_it_works_and_says_what_is_missing() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import torch, vecattention
vecattention.select(torch.randn(1, 1, 200, 16), torch.randn(1, 1, 200, 16))
try:
    vecattention.register()
except ImportError as error:
    print(error)
"""
    assert "transformers" in run(code)


def test_a_transformers_that_is_too_old_is_named_by_those_who_need_it() -> None:
    code = """
import transformers.masking_utils
transformers.masking_utils.sdpa_mask = lambda batch_size, cache_position, kv_length: None
import vecattention
try:
    vecattention.register()
except ImportError as error:
    print(error)
"""
    assert ", wanted 5.4 or newer; update it" in run(code)


def test_an_old_library_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "an_old_library.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    called = []

    def action() -> None:
        called.append(sys.modules["an_old_library"].value)
        raise ImportError("too old")

    when_imported("an_old_library", action)
    import an_old_library  # type: ignore[import-not-found]

    assert called == [1] and an_old_library.value == 1
    when_imported("an_old_library", action)
    assert called == [1, 1]


def test_a_library_that_is_not_there_is_still_not_there() -> None:
    before = list(sys.meta_path)
    when_imported("a_library_that_nobody_has", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        import a_library_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401
    assert sys.meta_path == before
