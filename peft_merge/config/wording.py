"""How problems are worded: values, paths, the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any

_SHOWN = 80


def shown(value: Any) -> str:
    """A value as an error shows it: its repr, cut when it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def did_you_mean(name: Any, known: Collection[str], *, listed: bool = False) -> str:
    """A remedy: the nearest known name; when none is near all of them, unless `listed` before."""
    folded = {k.lower().replace("-", "_"): k for k in known}
    text = str(name).lower().replace("-", "_")
    # Comparing takes as long as both are, multiplied.
    close = difflib.get_close_matches(text, folded, n=1, cutoff=0.6) if len(text) <= _SHOWN else []
    if close:
        return f"Write `{folded[close[0]]}`."
    if listed or not known:
        return "Take it out."
    return f"Take it out, or use one of: {', '.join(sorted(known))}."


def join(path: str, key: str | int) -> str:
    """One step further down: ``models`` and 1 give ``models[1]``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def listing(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many there are besides."""
    head = ", ".join(names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"
