"""JSON from a stranger: decoded strictly, and read with every mistake noted."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from mergekit_ext.errors import Problem

T = TypeVar("T")

MOST_64_BITS = 2**63 - 1
MOST_PROBLEMS = 100


class EnoughError(Exception):
    """`MOST_PROBLEMS` are noted: nobody reads more, and a hostile text may have millions."""


def decode(text: str) -> Any:
    """Decode JSON.

    Raises:
        ValueError: it is not JSON, is nested too deeply, names a key twice in one object, or holds
            a number that is not finite (NaN and Infinity are not JSON, 1e999 is too large).
    """
    try:
        return json.loads(
            text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class Value:
    """One value of the JSON: what it is, where it stands, and where to note what is wrong with it.

    A method that does not find what it is for notes a problem and returns something empty, so that
    the rest of the text is read too. The one that notes the last of `MOST_PROBLEMS` raises
    `EnoughError`.
    """

    def __init__(self, value: Any, where: str, problems: list[Problem]):
        self.value, self.where, self._problems = value, where, problems

    def wrong(self, expected: str) -> None:
        """Note that the value is not what is expected."""
        self._note(Problem(self.where, shown(self.value), expected))

    def _note(self, problem: Problem) -> None:
        self._problems.append(problem)
        if len(self._problems) >= MOST_PROBLEMS:
            raise EnoughError

    def __getitem__(self, key: str) -> Value:
        """The value of a key of `members`; notes it when it is missing."""
        where = f"{self.where}.{key}" if self.where else key
        if isinstance(self.value, dict) and key in self.value:
            return Value(self.value[key], where, self._problems)
        if isinstance(self.value, dict):
            self._note(Problem(where, "nothing", "a value"))
        # Nothing more is noted of what is not there.
        return Value(None, where, [])

    def members(self) -> dict[str, Any]:
        """An object."""
        if isinstance(self.value, dict):
            return self.value
        self.wrong("an object")
        return {}

    def each(self, read: Callable[[Value], T], least: int = 0) -> tuple[T, ...]:
        """A list of `least` entries or more, each of them read by `read`."""
        if not isinstance(self.value, list) or len(self.value) < least:
            self.wrong("a list" if not least else f"a list of {least} or more")
            return ()
        return tuple(
            read(Value(item, f"{self.where}[{index}]", self._problems))
            for index, item in enumerate(self.value)
        )

    def text(
        self, valid: Callable[[str], object] = lambda text: True, expected: str = "a string"
    ) -> str:
        """A string of Unicode characters for which `valid` holds."""
        if isinstance(self.value, str) and _is_unicode(self.value) and valid(self.value):
            return self.value
        self.wrong(expected)
        return ""

    def name(self) -> str:
        """A string that is not empty."""
        return self.text(bool, "a name")

    def choice(self, known: tuple[str, ...]) -> str:
        """One of a few strings."""
        return self.text(known.__contains__, f"one of {', '.join(known)}")

    def flag(self) -> bool:
        """True or false."""
        if isinstance(self.value, bool):
            return self.value
        self.wrong("true or false")
        return False

    def count(self) -> int:
        """A whole number, not negative, that fits into 64 bits."""
        # Not isinstance: bool is a subclass of int.
        if type(self.value) is int and 0 <= self.value <= MOST_64_BITS:
            return self.value
        self.wrong("a whole number, 0 or more")
        return 0

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        """A number in 64 bits, `low` at least and `high` at most."""
        value = self.value
        sound = type(value) is float or (type(value) is int and abs(value) <= MOST_64_BITS)
        if sound and low <= value <= high:
            return float(value)
        self.wrong("a number" if math.isinf(low) else f"a number from {low:g} to {high:g}")
        return 0.0


def shown(value: Any) -> str:
    """A value as a message shows it: short and printable, whatever it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if type(value) is int and abs(value) > MOST_64_BITS:
        return "a number of more than 64 bits"
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:120]}... ({len(text)} characters)"


def depth(value: Any) -> int:
    """How many objects and lists lie in each other."""
    level, inner = 0, [value]
    while inner := [item for item in inner if isinstance(item, (dict, list))]:
        level += 1
        inner = [
            child for item in inner for child in (item.values() if isinstance(item, dict) else item)
        ]
    return level


def _is_unicode(text: str) -> bool:
    """Whether it holds no half of a surrogate pair, which no file name and no output can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return content


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {shown(text)} is too large")
    return number
