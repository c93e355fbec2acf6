"""The trained model that ships with the package, loaded once."""

from __future__ import annotations

from typing import Any

import pytest

from vecattention.testbed import load


@pytest.fixture(scope="session")
def trained() -> tuple[Any, Any]:
    return load()
