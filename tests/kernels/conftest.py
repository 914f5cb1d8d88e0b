from __future__ import annotations

import pytest

from mergekit_ext.kernels import numerics, selection


@pytest.fixture(params=[(1 << 18, 1 << 20), (48, 20)], ids=["one chunk", "many chunks"])
def chunk(request, monkeypatch):
    """Tensors in one piece, or in many with thresholds that take several passes."""
    monkeypatch.setattr(numerics, "_CPU_CHUNK", request.param[0])
    monkeypatch.setattr(numerics, "_ACCELERATOR_CHUNK", request.param[0])
    monkeypatch.setattr(selection, "GATHER", request.param[1])
