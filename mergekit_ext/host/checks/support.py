"""Wording shared by the checks, and the silence that they run in."""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

_SHOWN = 80


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most probably meant to be, or None."""
    if len(name) > _SHOWN:  # comparing takes as long as both are, multiplied
        return None
    folded = {k.lower().replace("-", "_"): k for k in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A remedy: the nearest name, or all of them when none is near."""
    close = nearest(name, known)
    if close is not None:
        return f"Write `{close}`."
    return f"Take it out, or use one of: {', '.join(sorted(known))}." if known else "Take it out."


def shown(value: Any) -> str:
    """A value as an error shows it: its repr, cut when it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def listing(names: Sequence[str], limit: int = 3) -> str:
    """Names for a grouped message: the first few, and how many there are besides."""
    head = ", ".join(names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"


def tensors_at(names: Sequence[str]) -> str:
    """The `where` of a problem that several tensors share."""
    return names[0] if len(names) == 1 else f"{len(names)} tensors ({listing(names)})"


def join(path: str, key: str | int) -> str:
    """One step further down in a configuration: ``models`` and 1 give ``models[1]``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings away during a check, and everything away from stdout.

    mergekit says the same things again when it merges, and a check's output may be JSON.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(before)
