"""Processes that are started once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from parallel.processes import Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.end()
