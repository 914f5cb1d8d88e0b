"""Fixtures of the host's tests."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.host.flexmerge_models import Family, made


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Families by architecture and dtype; nobody changes their files."""
    found: dict[tuple[str, torch.dtype], Family] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Family:
        if (name, dtype) not in found:
            found[name, dtype] = made(tmp_path_factory.mktemp(name), name, dtype)
        return found[name, dtype]

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return get
