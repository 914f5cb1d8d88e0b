"""Fixtures for the tests of peft_merge."""

from __future__ import annotations

import pytest

from tests.peft_merge.models import KINDS, saved


@pytest.fixture
def adapter_folder(tmp_path):
    """``adapter_folder(kind, seed, **changes)``: a new folder with an adapter of that kind."""

    def make(kind, seed=1, **changes):
        return saved(KINDS[kind], tmp_path / f"{kind}-{seed}", seed, **changes)

    return make
