"""Fixtures that every part of the suite may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The suite runs in as many processes as there are cores; torch reads this when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Nothing in the suite may reach the network: models are made on the spot.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Examples must be the same on every run, and a slow machine is not a failure.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("ci")

# Tests that take long begin: at the end, one process would wait for another that runs them.
_LONG = (
    "tests/limits/",
    "tests/examples/",
    "tests/bench/",
    "tests/processes/",
    "tests/callbacks/test_everywhere.py",
    "tests/host/test_flexmerge_killed.py",
    "tests/host/test_stopped_merges.py",
    "tests/test_packaging.py",
    "tests/test_autoload.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long tests first, the rest in its order."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))


def _devices() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.append("xpu")
    return found


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each accelerator present, and the CPU."""
    return torch.device(request.param)
