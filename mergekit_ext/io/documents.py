"""YAML and JSON of unknown origin, parsed within bounds, with every reason not to as one error.

PyYAML's safe loader runs no code, but it follows aliases without counting (a few lines stand for
billions of values), recurses, and lets exceptions of Python's conversions through.
"""

from __future__ import annotations

import copy
import json
import math
import stat
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from mergekit_ext.errors import ConfigError, Problem

# Several times what a merge of hundreds of layers needs that says something of each.
_MOST_CHARACTERS = 2 << 20
_MOST_VALUES = 50_000
_MOST_DOCUMENTS = 1_000
_DEEPEST = 64
_MOST_64_BITS = 1 << 64
_MOST_PROBLEMS = 100
_REMEDY = "Mend the indentation, quotes or colons there."


class DocumentError(Exception):
    """A text that is not YAML, or beyond the bounds of what is read."""

    def __init__(self, problem: Problem):
        super().__init__(str(problem))
        self.problem = problem


def text_of(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        found = f"a file that cannot be read ({reason})"
        raise ConfigError([Problem(str(path), found, "a YAML file")]) from None


def json_object(
    path: Path, expected: str, largest: int
) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """Return the object in a file of JSON, or what was found in its place and what is expected.

    Args:
        path: the file.
        expected: what it should hold, for the message.
        largest: the most bytes that are read.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for its other end
            return {}, (f"{path}, which is no file", expected)
        if state.st_size > largest:
            return {}, (f"{path} of {state.st_size:,} bytes", f"{largest:,} at most")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, (f"{path}, which is not JSON ({error})", expected)
    if not isinstance(content, dict):
        return {}, (f"{path}, which is no JSON object", expected)
    return content, None


def read(text: str) -> tuple[list[Any], list[Problem]]:
    """Return the documents of a YAML text, and the keys that stand twice in one mapping.

    The last text is remembered: a command, its checks and its merge all read the same one.

    Raises:
        DocumentError: it is no YAML, nested too deeply, stands for too many values, or holds one
            that Python cannot convert.
    """
    return copy.deepcopy(_parsed(text))


@lru_cache(maxsize=1)
def _parsed(text: str) -> tuple[list[Any], list[Problem]]:
    if len(text) > _MOST_CHARACTERS:
        found = f"{len(text):,} characters"
        raise _error("the file", found, f"{_MOST_CHARACTERS:,} at most")
    try:
        nodes = list(islice(yaml.compose_all(text, Loader=_Bounded), _MOST_DOCUMENTS + 1))
        if len(nodes) > _MOST_DOCUMENTS:
            raise _error("the file", "more documents", f"{_MOST_DOCUMENTS:,} at most")
        for node in nodes:
            _bound(node)
        each = (problem for node in nodes for problem in _repeated(node, ""))
        repeated = list(islice(each, _MOST_PROBLEMS))  # before merge keys are put into the nodes
        # From the nodes: reading the text again would take as long as before.
        loader = yaml.SafeLoader("")
        documents = [loader.construct_document(node) for node in nodes]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
        found = str(getattr(error, "problem", None) or " ".join(str(error).split()))
        found = found.removeprefix("found ")
        raise _error(where, found, "YAML", _REMEDY) from None
    except RecursionError:
        raise _too_deep("the file") from None
    except (ValueError, KeyError, AttributeError, OverflowError) as error:
        # PyYAML's constructors: 2024-13-45 is no date, `!!bool maybe` no truth.
        found = f"a value that cannot be read ({error})"
        raise _error("the file", found, "numbers, texts and true/false") from None
    for document in documents:
        _bound_numbers(document)
    return documents, repeated


class _Bounded(yaml.SafeLoader):
    """Stops at the first value too many; PyYAML takes a minute to read a million."""

    _composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._composed += 1
        if self._composed > _MOST_VALUES:
            raise _error("the file", f"more than {_MOST_VALUES:,} values", "fewer")
        return super().compose_node(parent, index)


def _bound(root: yaml.Node | None) -> None:
    """Refuse what is too deep, too much or endless once its aliases are followed."""
    sizes: dict[int, tuple[int, int]] = {}  # values and levels below a node
    open_nodes: set[int] = set()

    def measure(node: yaml.Node, above: int) -> tuple[int, int]:
        key = id(node)
        if key in sizes:
            return sizes[key]
        where = f"line {node.start_mark.line + 1}"
        if key in open_nodes:
            raise _error(where, "an alias for what it stands in", "YAML without circles")
        if above > _DEEPEST:
            raise _too_deep(where)
        open_nodes.add(key)
        below = [measure(child, above + 1) for child in _children(node)]
        open_nodes.discard(key)
        values = 1 + sum(count for count, _ in below)
        levels = 1 + max((level for _, level in below), default=0)
        if values > _MOST_VALUES:
            expected = f"{_MOST_VALUES:,} at most"
            raise _error(where, f"{values:,} values, with aliases followed", expected)
        if levels > _DEEPEST:
            raise _too_deep(where)
        sizes[key] = values, levels
        return sizes[key]

    if root is not None:
        measure(root, 0)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _bound_numbers(value: Any) -> None:
    """Nothing that is merged needs a whole number that fits into no machine word."""
    inner = [value]
    while inner:
        item = inner.pop()
        if isinstance(item, dict):
            inner += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            inner += item
        elif type(item) is int and abs(item) >= _MOST_64_BITS:
            found = f"a whole number of {int(math.log10(abs(item))) + 1} digits"
            raise _error("the file", found, "numbers of 64 bits at most")


def _repeated(root: yaml.Node | None, place: str) -> Iterator[Problem]:
    """YAML keeps the last of equal keys and forgets the others."""
    if isinstance(root, yaml.SequenceNode):
        for i, item in enumerate(root.value):
            yield from _repeated(item, f"{place}[{i}]")
    elif isinstance(root, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in root.value:
            name, line = str(key.value), key.start_mark.line + 1
            where = f"{place}.{name}" if place else name
            if name in lines and name != "<<":
                yield Problem(
                    where,
                    f"the key twice, on lines {lines[name]} and {line}",
                    "each key once (YAML keeps the last one only)",
                    "Remove one of the two.",
                )
            lines.setdefault(name, line)
            yield from _repeated(value, where)


def _too_deep(where: str) -> DocumentError:
    return _error(where, f"more than {_DEEPEST} levels", "a document with fewer levels")


def _error(where: str, found: str, expected: str, remedy: str = "") -> DocumentError:
    return DocumentError(Problem(where, found, expected, remedy))
