"""matplotlib, which only plots need (extra ``plots``)."""

from __future__ import annotations

from typing import Any


def figure(width: float, height: float) -> Any:
    """Return an empty figure, without a window.

    Raises:
        ImportError: matplotlib is not installed, or cannot be loaded.
    """
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # a broken installation raises anything
        reason = str(error).partition("\n")[0]
        raise ImportError(
            "the plot needs matplotlib; install it with pip install 'mergekit-ext[plots]' "
            f"({type(error).__name__}: {reason})"
        ) from error
    return Figure(figsize=(width, height), layout="tight")
