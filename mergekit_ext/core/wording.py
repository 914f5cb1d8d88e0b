"""Word problems: values, paths, the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_SHOWN = 80


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """Return the known name that `name` was most probably meant to be, or None."""
    text = str(name)
    if len(text) > _SHOWN:  # comparing takes as long as both are, multiplied
        return None
    folded = {k.lower().replace("-", "_"): k for k in known}
    close = difflib.get_close_matches(text.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def did_you_mean(name: Any, known: Collection[str], *, listed: bool = False) -> str:
    """Return a remedy: the nearest name; without one all of them, unless `listed` before."""
    close = nearest(name, known)
    if close is not None:
        return f"Write `{close}`."
    if listed or not known:
        return "Take it out."
    return f"Take it out, or use one of: {', '.join(sorted(known))}."


def shown(value: Any) -> str:
    """Return a value as an error shows it: its repr, cut when it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def listing(names: Sequence[str], limit: int = 3) -> str:
    """Return the first few names, and how many there are besides."""
    head = ", ".join(names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"


def tensors_at(names: Sequence[str]) -> str:
    """Return the `where` of a problem that several tensors share."""
    return names[0] if len(names) == 1 else f"{len(names)} tensors ({listing(names)})"


def join(path: str, key: str | int) -> str:
    """Return the path of one step further down: ``models`` and 1 give ``models[1]``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)
