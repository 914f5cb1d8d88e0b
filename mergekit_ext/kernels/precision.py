"""Products of float32 matrices in float32, whatever the process has chosen for its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_before: list[tuple[Any, str, Any]] = []


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32: TF32 keeps ten bits, too few to converge.

    The setting is the process's own. The first thread inside changes it, the last one to leave puts
    it back; what inherits from ``torch.backends.fp32_precision`` inherits again.
    """
    global _inside
    with _lock:
        if not _inside:
            _before[:] = map(_changed, (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for place, name, value in _before:
                    setattr(place, name, value)


def _changed(place: Any) -> tuple[Any, str, Any]:
    # torch before 2.9 has the older setting only; after it, reading that one may raise.
    if not hasattr(torch.backends, "fp32_precision"):
        place = torch.backends.cuda.matmul
        before = place.allow_tf32
        place.allow_tf32 = False
        return place, "allow_tf32", before
    before = place.fp32_precision
    place.fp32_precision = "ieee"
    return place, "fp32_precision", "none" if before == torch.backends.fp32_precision else before
