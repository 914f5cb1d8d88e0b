r"""Regular expressions of a configuration that would take for ever.

Python's `re` knows no time limit, and a short expression like ``(\w*\.?)*!`` can try more ways to
match a name than there is time for; one with large sets of characters takes as long to compile.
Expressions without repetitions and sets are quick; others are compiled and tried in a process of
its own, which can be stopped, before they are used here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ext.errors import Problem
from peft_merge.patterns import keyed

# For all expressions of one adapter; they need milliseconds.
SECONDS = 5.0
# Fields whose texts must be expressions.
EXPRESSIONS = (
    *("rank_pattern", "alpha_pattern", "feedforward_modules"),
    *("target_modules", "exclude_modules", "layers_pattern"),
)

# Of characters: of one expression, and of all if they are quick. Merged adapters name every module
# in one, which is quick, but takes its time to compile.
_LONGEST, _LONGEST_QUICK = 1 << 16, 1 << 22
# Compiled in less than a second, whatever is in them; a process takes nearly as long to start.
_SHORT = 500
_SECONDS_A_CHARACTER = 5e-6
_REMEDY = "Name the modules, or take repetitions out that stand in another."

# One character, an escaped one, or the start of a group: nothing that repeats or looks around.
_TOKEN = re.compile(r"\(\?:|\\\D|[^*+?{\[\\]")

_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for position, (how, pattern) in enumerate(patterns):
    print(position, end="", flush=True)
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        print(" wrong")
        continue
    for name in names:
        getattr(compiled, how)(name)
    print(" done")
"""

# How `re` is asked, and for what.
_Expression = tuple[str, str]


@dataclass(frozen=True)
class _Text:
    """A text of a configuration that PEFT takes for an expression, and what it makes of it."""

    field: str
    text: str
    expression: _Expression

    def problem(self, where: str, reason: str, expected: str, remedy: str = "") -> Problem:
        return Problem(f"{where}: {self.field}", f"{self.text[:80]!r}{reason}", expected, remedy)


def unusable(config: Mapping[str, Any], fields: Iterable[str], where: str) -> Iterator[Problem]:
    """Texts in some fields that are no expressions, or take too long to compile.

    Args:
        config: of an adapter.
        fields: of `EXPRESSIONS`, each of its type.
        where: the file, for the messages.
    """
    texts = _texts(config, fields)
    total = sum(len(each.text) for each in texts)
    if total > _LONGEST_QUICK:
        found, expected = f"expressions of {total:,} characters", f"{_LONGEST_QUICK:,} at most"
        yield Problem(where, found, expected, "Name the modules.")
        return
    others = [each for each in texts if not _quick(each.text)]
    doubtful = sum(len(each.text) for each in others)
    if doubtful > _LONGEST:
        reason, expected = f" and more, {total:,} characters", f"{_LONGEST:,} at most"
        yield others[0].problem(where, reason, expected, "Name the modules.")
        return
    seconds = SECONDS + total * _SECONDS_A_CHARACTER
    expressions = [each.expression for each in texts]
    wrong, stopped = (
        _tried(expressions, [], seconds)
        if doubtful > _SHORT or total > _LONGEST
        else (_wrong(expressions), None)
    )
    for position in wrong:
        yield texts[position].problem(where, "", "a regular expression")
    if stopped is not None:
        reason = f", which is not compiled after {seconds:.0f} seconds"
        expected = "a regular expression that is compiled at once"
        yield texts[stopped].problem(where, reason, expected, "Name the modules.")


def slow(
    config: Mapping[str, Any], fields: Iterable[str], names: Iterable[str], where: str
) -> Iterator[Problem]:
    """The first expression in some fields of a configuration that takes too long, if one does.

    Args:
        config: of an adapter, every field of its type, and no expression of it `unusable`.
        fields: that hold expressions.
        names: of the modules and parameters that they are matched with.
        where: the file, for the messages.
    """
    found = [each for each in _texts(config, fields) if not _quick(each.text)]
    if not found:
        return
    expressions = [each.expression for each in found]
    _, stopped = _tried(expressions, sorted(set(names)), SECONDS)
    if stopped is not None:
        reason = f", which is not done with the modules' names after {SECONDS:g} seconds"
        expected = "a regular expression that is matched at once"
        yield found[stopped].problem(where, reason, expected, _REMEDY)


def _texts(config: Mapping[str, Any], fields: Iterable[str]) -> list[_Text]:
    return [
        _Text(field, text, expression)
        for field in fields
        for text, expression in _expressions(field, config.get(field))
    ]


def _expressions(field: str, value: Any) -> Iterator[tuple[str, _Expression]]:
    """Each text that PEFT takes for an expression, and what it makes of it."""
    if field in ("rank_pattern", "alpha_pattern"):
        yield from ((key, ("match", keyed(key))) for key in value or ())
    elif field == "layers_pattern":
        texts = [value] if isinstance(value, str) else value or ()
        yield from ((t, ("match", rf"(?:^|.*?\.){t}\.(?P<idx>\d+)\.")) for t in texts)
    elif field == "modules_to_save":
        yield from ((t, ("match", rf"(^|.*\.){t}($|\..*)")) for t in value or ())
    elif isinstance(value, str):
        yield value, ("fullmatch", value)


def _quick(text: str) -> bool:
    """Whether an expression repeats nothing and has no more ways to match than characters."""
    ways: list[list[int]] = [[0, 1]]
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return False
        position = token.end()
        if token[0] in ("(", "(?:"):
            ways.append([0, 1])
        elif token[0] == "|":
            ways[-1] = [sum(ways[-1]), 1]
        elif token[0] == ")":
            inner = sum(ways.pop())
            if not ways:
                return False
            ways[-1][1] *= inner
            if ways[-1][1] > len(text):
                return False
    return len(ways) == 1 and sum(ways[0]) <= len(text) + 1


def _wrong(patterns: Sequence[_Expression]) -> list[int]:
    """The positions of what is no expression, told in this process."""
    return [position for position, (_, pattern) in enumerate(patterns) if not _compiles(pattern)]


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _tried(
    patterns: Sequence[_Expression], names: Sequence[str], seconds: float
) -> tuple[list[int], int | None]:
    """The positions of what is no expression, and of the one at which time was up, if it was."""
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD]
    task = json.dumps([patterns, names])
    try:
        said = subprocess.run(
            command, input=task.encode(), capture_output=True, timeout=seconds, check=False
        ).stdout
        if not said:
            return _wrong(patterns), None
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
    except OSError:  # no processes here
        return _wrong(patterns), None
    # A line is ended when its expression is done with.
    lines = said.split(b"\n")[:-1]
    wrong = [int(line.split()[0]) for line in lines if line.endswith(b"wrong")]
    return wrong, len(lines) if len(lines) < len(patterns) else None
