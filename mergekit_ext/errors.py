"""Exceptions and warnings of the project; one `ConfigError` carries every `Problem` found."""

import difflib
import sys
import sysconfig
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")
_SHOWN, _SHORT, _LONG = 80, 1_000, 10_000
# Of several problems.
MOST_SHOWN = 100
_LIBRARIES = (
    *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
    *(str(Path(__file__).parents[1] / package) for package in ("mergekit_ext", "peft_merge")),
)


def printable(text: str, longest: int = _SHORT) -> str:
    """Return a text of unknown origin cut, on one line, and without a terminal's commands."""
    if len(text) > longest:
        text = f"{text[:longest]}... ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """Return the known name that `name` was most probably meant to be, or None."""
    text = str(name)
    if len(text) > _SHOWN:  # comparing takes as long as both are, multiplied
        return None
    digits = sorted(filter(str.isdigit, text))  # `float8` is no misspelt `float64`
    same = (k for k in known if digits in ([], sorted(filter(str.isdigit, k))))
    folded = {k.lower().replace("-", "_"): k for k in same}
    close = difflib.get_close_matches(text.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def did_you_mean(
    name: Any, known: Collection[str], *, listed: bool = False, otherwise: str = "Take it out."
) -> str:
    """Return a remedy: the nearest name; without one all of them, unless `listed` before."""
    close = nearest(name, known)
    if close is not None:
        return f"Write `{close}`."
    if listed or not known:
        return otherwise
    return f"Take it out, or use one of: {', '.join(sorted(known))}."


def shown(value: Any) -> str:
    """Return the repr of a value, cut when it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def one_line(error: BaseException) -> str:
    """Return an error of a library as messages quote it: its type, and the first of its text."""
    first, *_ = str(error).splitlines() or [""]
    cut = first[:200] + "..." * (len(first) > 200)  # some hold a whole configuration
    return f"{type(error).__name__}: {cut}"


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
    """Return the lines of the first `MOST_SHOWN` problems, and how many more there are."""
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems[:MOST_SHOWN], 1)]
    more = len(problems) - MOST_SHOWN
    return [*lines, f"  and {more:,} more"] if more > 0 else lines


class ConfigError(_ProblemsError):
    """A merge cannot start. `problems` lists everything that is wrong, in order of the file."""

    _consequence = "nothing was done"

    def __init__(self, problems: Iterable[Problem], subject: str = "this merge"):
        super().__init__(problems, subject)


class FileError(ConfigError):
    """One file cannot be used; `problem` says why."""

    def __init__(self, where: str, found: str, expected: str, remedy: str = ""):
        self.problem = Problem(where, found, expected, remedy)
        super().__init__([self.problem], "this file")


class CheckpointError(_ProblemsError):
    """A FlexMerge checkpoint cannot be used. `problems` lists what is wrong; none of it is used."""

    _consequence = "nothing of it was used"


def require(
    wrong: Iterable[Problem], subject: str = "this merge", kind: type[_ProblemsError] = ConfigError
) -> None:
    """Raise one error with all that is `wrong`, if anything is."""
    if found := list(wrong):
        raise kind(found, subject)


def attempted(
    make: Callable[[_Item], _Made], items: Iterable[_Item]
) -> tuple[list[_Made], list[Problem]]:
    """Return what `make` returns of each item, and the problems of those that it refuses."""
    made, problems = list[_Made](), list[Problem]()

    def attempt(item: _Item) -> None:
        try:
            made.append(make(item))
        except _ProblemsError as refused:
            problems.extend(refused.problems)

    for item in items:
        attempt(item)
    return made, problems


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


class UploadError(MergekitExtError, RuntimeError):
    """An upload to the Hub stopped. What was merged is complete."""

    def __init__(self, name: str, reason: str):
        again = f"`push_to_hub` of the result, or `hf upload {name} FOLDER`"
        rest = f"What was merged is complete; {again}, sends what the Hub does not have."
        super().__init__(f"the upload to {name} stopped ({reason}). {rest}")


class HostVersionError(MergekitExtError, RuntimeError):
    """The installed mergekit lacks something that the plugin relies on."""


class MergeWarning(UserWarning):
    """Base class of the project's warnings: the merge goes on, but may not mean what you think."""


def warn(warning: MergeWarning) -> None:
    """Issue a warning at the line of the user's code that all this was called from.

    That is the innermost one in no library; the outermost one where there is none.
    """
    frame = sys._getframe()
    while frame.f_code.co_filename.startswith(_LIBRARIES) and frame.f_back is not None:
        frame = frame.f_back
    names, line = frame.f_globals, (frame.f_code.co_filename, frame.f_lineno)
    seen = names.setdefault("__warningregistry__", {})
    warnings.warn_explicit(warning, type(warning), *line, names.get("__name__"), seen)


class UniformCoefficientsWarning(MergeWarning):
    """NAN's coefficients came out (nearly) equal, so that only weights and `scale` acted."""


class TwoModelsWarning(MergeWarning):
    """LoRE with two models and no base returns the plain average whatever its parameters."""


class OvershootWarning(MergeWarning):
    """The merged task vector is longer than those of its inputs."""


class NotConvergedWarning(MergeWarning):
    """LoRE's solver stopped at `max_iterations` before reaching `tolerance`."""
