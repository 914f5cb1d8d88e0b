"""Fixtures for the tests of peft_merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.peft_merge.models import KINDS, saved


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Callable[..., Path]:
    """``adapter_folder(kind, seed, **changes)``: a new folder with an adapter of that kind."""

    def make(kind: str, seed: int = 1, **changes: Any) -> Path:
        return saved(KINDS[kind], tmp_path / f"{kind}-{seed}", seed, **changes)

    return make
