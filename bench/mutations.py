"""What Hypothesis makes of sound files: nearly their bytes, and JSON of nearly their form."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

_STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**15, 10**400, -0.0, 0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", " ", ".", "..", "/", "../x", "/etc/passwd", "a\0b", "\ud800"),
    *("\x1b[2J", "a\nb", "é", "0", "NaN", "null", "(", "(a+)+$", "*", "x" * 5_000, "C:\\x", "~"),
    *([], {}, [[]], [None], [[[]]], {"": None}, {"a": {"b": []}}),
]
_VALUES = st.one_of(
    st.sampled_from(_STRANGE).map(copy.deepcopy),  # later steps change what is drawn here
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


def raw(content: bytes) -> st.SearchStrategy[bytes]:
    """A file with some of its bytes changed, taken out or put in; or any bytes."""
    places = st.integers(0, len(content))
    edits = st.tuples(places, st.integers(0, 12), st.binary(max_size=12))

    def apply(chosen: list[tuple[int, int, bytes]]) -> bytes:
        spoilt = content
        for start, gone, new in chosen:
            spoilt = spoilt[:start] + new + spoilt[start + gone :]
        return spoilt

    edited = st.lists(edits, min_size=1, max_size=4).map(apply)
    return st.one_of(edited, places.map(lambda end: content[:end]), st.binary(max_size=200))


@st.composite
def values(draw: Any, sound: Any) -> Any:
    """A value of JSON with some of its parts replaced, renamed, doubled or taken out."""
    root = [copy.deepcopy(sound)]
    for _ in range(draw(st.integers(1, 3))):
        owner, key = _one_of(draw, list(_places(root)))
        _one_of(draw, _OPERATIONS)(draw, owner, key)
        if not root:
            return draw(_VALUES)
    return root[0]


def documents(sound: Any) -> st.SearchStrategy[bytes]:
    """The same as a file. YAML reads it, too."""
    return values(sound).map(lambda value: json.dumps(value).encode())


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inner = [value]
    while inner:
        item = inner.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item))
        for key in keys:
            yield item, key
            if isinstance(item[key], (dict, list)):
                inner.append(item[key])


def _one_of(draw: Any, items: Sequence[Any]) -> Any:
    """As `sampled_from`, without a strategy for every list, which would take most of the time."""
    return items[draw(st.integers(0, len(items) - 1))]


def _replace(draw: Any, owner: Any, key: Any) -> None:
    owner[key] = draw(_VALUES)


def _remove(draw: Any, owner: Any, key: Any) -> None:
    del owner[key]


def _rename(draw: Any, owner: Any, key: Any) -> None:
    if isinstance(owner, dict):
        owner[_one_of(draw, ["", "..", "a/b", "\0", "\ud800", *owner])] = owner.pop(key)


def _repeat(draw: Any, owner: Any, key: Any) -> None:
    if isinstance(owner, list):
        owner.append(copy.deepcopy(owner[key]))


def _exchange(draw: Any, owner: Any, key: Any) -> None:
    other = _one_of(draw, list(owner) if isinstance(owner, dict) else range(len(owner)))
    owner[key], owner[other] = owner[other], owner[key]


def _nudge(draw: Any, owner: Any, key: Any) -> None:
    if type(owner[key]) in (int, float):
        owner[key] += _one_of(draw, [-1, 1, 2, 8, 2**32])


_OPERATIONS: list[Callable[[Any, Any, Any], None]] = [
    *(_replace, _remove, _rename, _repeat, _exchange, _nudge)
]
