"""What a check returns, and the collector that the single checks write to."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.memory import Need


@dataclass(frozen=True)
class Estimate:
    """What a merge will cost, from headers alone.

    Attributes:
        bytes_read: stored bytes of every tensor that the merge reads, each tensor of each input
            once, times the passes that the method makes over its inputs. Tensors that the merge
            does not use are not counted; adapters of ``base+adapter`` inputs are not either.
        bytes_written: data bytes of the output's weights in the dtype they are saved in, without
            the headers, the tokenizer and the configuration.
        bytes_held: memory at the worst moment that tensors take, an upper estimate: what the
            method holds for the largest tensor, block or module, inputs that are not mapped, and
            where mergekit writes the output, one shard, which it collects first. Python and the
            libraries come on top (`mergekit_ext.memory`).
        tensors: tensors in the output.
        parameters: elements in the output.
        need: `bytes_held` by what it is for, and what an accelerator holds.
    """

    bytes_read: int
    bytes_written: int
    bytes_held: int
    tensors: int
    parameters: int
    need: Need


@dataclass(frozen=True)
class CheckReport:
    """Everything found about one merge. No problems: it can start.

    Attributes:
        problems: what stops the merge or would make it mean something else than it says.
        notes: what is worth knowing and stops nothing.
        warnings: those of `notes` that are also issued before the merge.
        estimate: the costs; None when some input is not known well enough.
    """

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    estimate: Estimate | None
    warnings: tuple[str, ...] = ()

    def raise_for_problems(self, subject: str) -> None:
        """Raise one `ConfigError` with every problem, if there is any."""
        if self.problems:
            raise ConfigError(self.problems, subject)


class Findings:
    """Collects problems and notes in order, each of them once."""

    def __init__(self) -> None:
        self._problems: dict[Problem, None] = {}
        self._notes: dict[str, None] = {}
        self._warnings: dict[str, None] = {}

    def problem(self, where: str, found: str, expected: str, remedy: str = "") -> None:
        """Add one problem."""
        self._problems[Problem(where, found, expected, remedy)] = None

    def extend(self, problems: Iterable[Problem]) -> None:
        """Add problems that were made elsewhere."""
        self._problems.update(dict.fromkeys(problems))

    def note(self, text: str) -> None:
        """Add one note."""
        self._notes[text] = None

    def warn(self, text: str) -> None:
        """Add a note that is issued as a warning before the merge as well."""
        self.note(text)
        self._warnings[text] = None

    def merge(self, other: Findings) -> None:
        """Add everything that another collector has."""
        self._warnings.update(other._warnings)
        self._problems.update(other._problems)
        self._notes.update(other._notes)

    @property
    def count(self) -> int:
        """How many problems there are by now."""
        return len(self._problems)

    def report(self, estimate: Estimate | None = None) -> CheckReport:
        """Freeze what was found."""
        return CheckReport(
            tuple(self._problems), tuple(self._notes), estimate, tuple(self._warnings)
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the libraries' warnings during a check, and keep everything away from stdout.

    mergekit repeats the warnings when it merges, and a check's output may be JSON.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(before)
