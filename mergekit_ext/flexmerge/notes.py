"""Lines of a journal that hold for one thing: others in the same journal are passed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mergekit_ext.io.journal import Journal


class Notes:
    """What earlier runs have noted of one subject, and what this run adds.

    Args:
        journal: None to find and to keep nothing.
        subject: a digest of everything that the noted values depend on.
    """

    def __init__(self, journal: Journal | None = None, subject: str = ""):
        self._journal, self._subject = journal, subject

    def found(self, kind: str, key: str, fits: Callable[[Any], bool]) -> Any:
        """What an earlier run noted; None if it noted nothing that `fits`, or of another subject.

        A journal may hold anything after a power cut.
        """
        line = self._journal.finished.get((kind, key)) if self._journal is not None else None
        if isinstance(line, list) and len(line) == 2 and line[0] == self._subject:
            return line[1] if fits(line[1]) else None
        return None

    def add(self, kind: str, key: str, value: Any) -> None:
        """Note a finished piece; see `Journal.add`."""
        if self._journal is not None:
            self._journal.add(kind, key, [self._subject, value])
