"""Exceptions and warnings of the project.

A configuration is checked as a whole: every problem found is kept as a `Problem`, and one
`ConfigError` carries them all, so that a user mends a file once and not once per mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SHORT, _LONG = 1_000, 10_000
# Of several problems.
MOST_SHOWN = 100


def printable(text: str, longest: int = _SHORT) -> str:
    """Return a text of unknown origin as it is shown: cut, and on one line.

    Control characters would move a terminal's cursor, or pass for messages of ours.
    """
    if len(text) > longest:
        text = f"{text[:longest]}... ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration or with its inputs.

    Attributes:
        where: the key, parameter, tensor or file, as the user would look for it
            (``parameters.mu``, ``models[1].parameters.weight``, a tensor's name).
        found: what is there.
        expected: what would be right.
        remedy: what to do about it, as an imperative sentence; may be empty.
    """

    where: str
    found: str
    expected: str
    remedy: str = ""

    def __str__(self) -> str:
        where, found = printable(self.where), printable(self.found)
        text = f"{where}: found {found}; expected {printable(self.expected, _LONG)}."
        return f"{text} {printable(self.remedy, _LONG)}" if self.remedy else text


class MergekitExtError(Exception):
    """Base class of every error that the project raises on purpose."""


class _ProblemsError(MergekitExtError, ValueError):
    """Several problems in one exception, numbered in its message."""

    _consequence: str

    def __init__(self, problems: Iterable[Problem], subject: str):
        self.problems = tuple(problems)
        if not self.problems:
            raise ValueError(f"{type(self).__name__} needs at least one problem")
        self.subject = subject
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} with {subject}; {self._consequence}:"
        super().__init__("\n".join([head, *numbered(self.problems)]))


def numbered(problems: Sequence[Problem]) -> list[str]:
    """The lines of a message with several problems: the first `MOST_SHOWN`, and how many more."""
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems[:MOST_SHOWN], 1)]
    more = len(problems) - MOST_SHOWN
    return [*lines, f"  and {more:,} more"] if more > 0 else lines


class ConfigError(_ProblemsError):
    """A merge cannot start. `problems` lists everything that is wrong, in order of the file."""

    _consequence = "nothing was written"

    def __init__(self, problems: Iterable[Problem], subject: str = "this merge"):
        super().__init__(problems, subject)


class CheckpointError(_ProblemsError):
    """A FlexMerge checkpoint cannot be used. `problems` lists what is wrong; none of it is used."""

    _consequence = "nothing of it was used"


class NonFiniteError(MergekitExtError, ValueError):
    """An input holds NaN or infinity. The merge stops and leaves no output."""

    def __init__(self, tensor: str, model: str, count: int, size: int):
        self.tensor, self.model, self.count, self.size = tensor, model, count, size
        values = "values" if count != 1 else "value"
        super().__init__(
            f"{printable(tensor)} of model {printable(model)}: found {count} non-finite {values} "
            f"among {size}; expected finite weights. Check that checkpoint (a diverged training "
            "run or a float16 overflow leaves such values) or take it out of the merge."
        )


class MergeError(MergekitExtError, ValueError):
    """A tensor cannot be merged as asked. The merge stops and leaves no output."""


class RankError(MergekitExtError, RuntimeError):
    """Another process of this merge has ended: this one ends, too. What is finished is kept."""

    resumable = True

    def __init__(self, advice: str = ""):
        text = "another process of this merge stopped; its own message says why"
        super().__init__(f"{text}. {advice}" if advice else text)


class StoppedError(MergekitExtError, RuntimeError):
    """The machine stopped the merge: a full disk, an input that is gone, no memory.

    Raised from the error that says it. What is finished is kept for the same merge to go on with.
    """

    resumable = True


class HostVersionError(MergekitExtError, RuntimeError):
    """The installed mergekit lacks something that the plugin relies on."""


class MergeWarning(UserWarning):
    """Base class of the project's warnings: the merge goes on, but may not mean what you think."""


class UniformCoefficientsWarning(MergeWarning):
    """NAN's coefficients came out (nearly) equal, so that only weights and `scale` acted."""


class TwoModelsWarning(MergeWarning):
    """LoRE with two models and no base returns the plain average whatever its parameters."""


class NotConvergedWarning(MergeWarning):
    """LoRE's solver stopped at `max_iterations` before reaching `tolerance`."""
