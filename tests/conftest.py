"""Hypothesis runs the same examples every time, and processes that test side by side share the cores.

HYPOTHESIS_PROFILE=explore draws new ones, and more of them; "first failure" shows a failure without making it smaller.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Before torch is imported: threads of more than one process that wait for each other on one core take twice the time.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, suppress_health_check=SLOW)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=SLOW)
settings.register_profile("first failure", settings.get_profile("fixed"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes ``-n auto`` takes: the cores that this one may use."""
    return CORES
