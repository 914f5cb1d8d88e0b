"""What a check returns, and the collector that the single checks write to."""

import contextlib
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mergekit_ext.core.memory import Need
from mergekit_ext.errors import Problem, tensors_at


@dataclass(frozen=True)
class Estimate:
    """What a merge will cost, from headers alone."""

    bytes_read: int  # of tensors, times the passes over the inputs; without adapters
    bytes_written: int  # of tensors; at least where the vocabulary is not known
    bytes_held: int  # memory that tensors take at the worst moment, at most (`core.memory`)
    tensors: int
    parameters: int  # elements of all tensors of the output
    need: Need  # `bytes_held` by what it is for
    planned: bool = True  # False where the weights decide which tensors are written
    operations: Mapping[str, float] = field(default_factory=dict)  # of tensors, where counted
    seconds: float = 0.0  # that products usually take, where they are many; 0 if it is not known
    seconds_of_embeddings: float = 0.0  # of these

    @property
    def time(self) -> str:
        """The time in words; empty if it is not known."""
        minutes, part = (math.ceil(s / 60) for s in (self.seconds, self.seconds_of_embeddings))
        of_it = f", {part:,} min of it for embeddings" if part else ""
        return f"about {minutes:,} min on this CPU{of_it}" if minutes else ""


@dataclass(frozen=True)
class CheckReport:
    """Everything found about one merge. No problems: it can start."""

    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()  # what is worth knowing and stops nothing
    estimate: Estimate | None = None  # None when some input is not known well enough
    warnings: tuple[str, ...] = ()  # those of `notes` that are also issued before the merge
    dequantised: Mapping[str, str] = field(default_factory=dict)  # models, and from what


class Findings:
    """Collects problems and notes in the order in which they are found, each of them once.

    A problem that several tensors share is one, located at all of them.
    """

    def __init__(self) -> None:
        self._problems: dict[Problem, dict[str, None]] = {}  # with the tensors that share it
        self._notes: dict[str, bool] = {}  # whether each is a warning too
        self.dequantised: dict[str, str] = {}

    def problem(self, where: str, found: str, expected: str, remedy: str = "") -> None:
        self.extend([Problem(where, found, expected, remedy)])

    def tensor(self, name: str, found: str, expected: str, remedy: str = "") -> None:
        self._problems.setdefault(Problem("", found, expected, remedy), {})[name] = None

    def extend(self, problems: Iterable[Problem], within: str = "") -> None:
        """Add problems that were made elsewhere; `within` is the place of their places."""
        for problem in problems:
            if within:
                problem = replace(problem, where=f"{within} ({problem.where})")
            self._problems.setdefault(problem, {})

    def note(self, text: str) -> None:
        self._notes.setdefault(text, False)

    def warn(self, text: str) -> None:
        """Add a note that is issued as a warning before the merge as well."""
        self._notes[text] = True

    def absorb(self, other: "Findings") -> None:
        """Add what another collector has found."""
        for problem, names in other._problems.items():
            self._problems.setdefault(problem, {}).update(names)
        self._notes |= other._notes

    @property
    def count(self) -> int:
        return len(self._problems)

    def report(self, estimate: Estimate | None = None) -> CheckReport:
        problems = tuple(
            replace(problem, where=tensors_at(list(names))) if names else problem
            for problem, names in self._problems.items()
        )
        notes, warned = self._notes, tuple(text for text, warns in self._notes.items() if warns)
        return CheckReport(problems, tuple(notes), estimate, warned, self.dequantised)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the libraries' warnings during a check, and keep everything away from stdout."""
    # mergekit repeats the warnings when it merges, and a check's output may be JSON.
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(before)
