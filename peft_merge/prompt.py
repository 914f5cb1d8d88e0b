r"""Regular expressions of a configuration that would take for ever.

Python's `re` knows no time limit, and a short expression like ``(\w*\.?)*!`` can try more ways to
match a name than there is time for. Expressions without repetitions are quick; others are tried in
a process of its own, which can be stopped, before they are used here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mergekit_ext.errors import Problem
from peft_merge.patterns import keyed

# For all expressions of one adapter; they need milliseconds.
SECONDS = 5.0

# One character, an escaped one, or the start of a group: nothing that repeats or looks around.
_TOKEN = re.compile(r"\(\?:|\\\D|[^*+?{\[\\]")

_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for position, (how, pattern) in enumerate(patterns):
    print(position, flush=True)
    try:
        for name in names:
            getattr(re, how)(pattern, name)
    except re.error:
        pass
"""

# How `re` is asked, and for what.
_Expression = tuple[str, str]


def slow(
    config: Mapping[str, Any], fields: Iterable[str], names: Iterable[str], where: str
) -> Iterator[Problem]:
    """The first expression in some fields of a configuration that takes too long, if one does.

    Args:
        config: of an adapter, every field of its type.
        fields: that hold expressions.
        names: of the modules and parameters that they are matched with.
        where: the file, for the messages.
    """
    found = [
        (field, text, expression)
        for field in fields
        for text, expression in _expressions(field, config.get(field))
        if not _quick(text)
    ]
    if not found:
        return
    position = _stopped([expression for _, _, expression in found], sorted(set(names)))
    if position is not None:
        field, text, _ = found[position]
        yield Problem(
            f"{where}: {field}",
            f"{text[:80]!r}, which is not done with the modules' names after {SECONDS:g} seconds",
            "a regular expression that is matched at once",
            "Name the modules, or take repetitions out that stand in another.",
        )


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


def _stopped(patterns: list[_Expression], names: list[str]) -> int | None:
    """The position of the expression at which time was up."""
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD]
    task = json.dumps([patterns, names])
    try:
        subprocess.run(
            command, input=task.encode(), capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").split()
        return int(lines[-1]) if lines else 0
    except OSError:  # no processes here
        return None
    return None
