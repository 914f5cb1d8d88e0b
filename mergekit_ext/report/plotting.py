"""matplotlib, which only plots need (extra ``plots``)."""

from __future__ import annotations

import importlib.util
from typing import Any

MISSING = "the plot needs matplotlib; install it with pip install 'mergekit-ext[plots]'"


def available() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def figure(width: float, height: float) -> Any:
    """An empty figure, without a window.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(MISSING) from error
    return Figure(figsize=(width, height), layout="tight")
