"""YAML and JSON of unknown origin, parsed within bounds; what is refused is one kind of error.

PyYAML's safe loader runs no code, but it follows aliases without counting (a few lines stand for
billions of values), recurses, and lets exceptions of Python's conversions through.
"""

import json
import os
import stat
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from mergekit_ext.errors import MOST_SHOWN, ConfigError, FileError, Problem, join

# Several times what a merge of hundreds of layers needs that says something of each.
_MOST_CHARACTERS = 2 << 20
_MOST_VALUES = 50_000
_MOST_DOCUMENTS = 1_000
_DEEPEST = 64
_TOO_DEEP, _FEWER_LEVELS = f"more than {_DEEPEST} levels", "a document with fewer levels"
_LONGEST_INTEGER = 100  # 64 binary digits, and their signs and underscores
StrPath = str | os.PathLike[str]


def text_of(path: Path) -> str:
    """Return the text of a configuration file, or raise `ConfigError`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        found = f"a file that cannot be read ({reason})"
        raise ConfigError([Problem(str(path), found, "a YAML file")]) from None


def regular(path: Path) -> os.stat_result:
    """Return the state of a regular file, or raise `OSError`: opening a pipe would wait."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError("not a regular file")
    return state


def bounded_text(path: Path, largest: int) -> str:
    """Return the text of a regular file of at most `largest` bytes, or raise `ValueError`."""
    if (size := regular(path).st_size) > largest:
        raise ValueError(f"{size:,} bytes, more than {largest:,}")
    return path.read_text(encoding="utf-8")


def parse_json(text: str, *, unique: bool = False) -> Any:
    """Return what a JSON text stands for, or raise `ValueError`.

    Of a key that is given twice some readers take the first value and others the last: `unique`
    refuses it.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:80]!r} is given twice")
    return found


def json_object(
    path: Path, expected: str, largest: int
) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """Return the object in a JSON file, or what was found in its place and what is `expected`."""
    try:
        content = parse_json(bounded_text(path, largest))
    except (OSError, ValueError) as error:
        return {}, (f"{path}, which cannot be read as JSON ({error})", expected)
    if not isinstance(content, dict):
        return {}, (f"{path}, which is no JSON object", expected)
    return content, None


def read(text: str) -> tuple[list[Any], list[Problem]]:
    """Return the documents of a YAML text, and the keys that stand twice in one mapping.

    Raises:
        FileError: it is no YAML, nested too deeply, or stands for too many values.
    """
    if len(text) > _MOST_CHARACTERS:
        found = f"{len(text):,} characters"
        raise FileError("the file", found, f"{_MOST_CHARACTERS:,} at most")
    try:
        loader = _Bounded(text)
        nodes = list(islice(iter(loader.next_node, None), _MOST_DOCUMENTS + 1))
        if len(nodes) > _MOST_DOCUMENTS:
            raise FileError("the file", "more documents", f"{_MOST_DOCUMENTS:,} at most")
        sizes: dict[int, tuple[int, int]] = {}
        for node in nodes:
            _measure(node, sizes)
        documents = [loader.construct_document(node) for node in nodes]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
        found = str(getattr(error, "problem", None) or " ".join(str(error).split()))
        remedy = "Mend the indentation, quotes or colons there."
        raise FileError(where, found.removeprefix("found "), "YAML", remedy) from None
    except RecursionError:
        raise FileError("the file", _TOO_DEEP, _FEWER_LEVELS) from None
    except FileError:
        raise
    except (ValueError, KeyError, AttributeError, OverflowError) as error:
        # PyYAML's constructors: 2024-13-45 is no date, `!!bool maybe` no truth.
        found = f"a value that cannot be read ({error})"
        raise FileError("the file", found, "numbers, texts and true/false") from None
    return documents, loader.repeated[:MOST_SHOWN]


class _Bounded(yaml.SafeLoader):
    """Stops at the first value too many; PyYAML takes a minute to read a million."""

    def __init__(self, text: str):
        super().__init__(text)
        self._composed = 0
        self._path: list[Any] = []  # of the node: positions in lists, keys as nodes, None
        self.repeated: list[Problem] = []  # keys that stand twice in a mapping

    def next_node(self) -> yaml.Node | None:
        return self.get_node() if self.check_node() else None

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._composed += 1
        if self._composed > _MOST_VALUES:
            raise FileError("the file", f"more than {_MOST_VALUES:,} values", "fewer")
        self._path.append(index)
        node = super().compose_node(parent, index)
        self._path.pop()
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) <= _LONGEST_INTEGER:
            value = int(super().construct_yaml_int(node))
            if abs(value) < 1 << 64:  # no merge needs a larger one
                return value
        found = f"a whole number of {len(node.value):,} digits"
        raise FileError(_line(node), found, "numbers of 64 bits at most")

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and name != "<<":
                found = f"the key twice, on lines {lines[name]} and {line}"
                expected = "each key once (YAML keeps the last one only)"
                where = ""
                for step in (*self._path, key):
                    if step is not None:
                        where = join(where, step if isinstance(step, int) else str(step.value))
                self.repeated.append(Problem(where, found, expected, "Remove one of the two."))
            lines.setdefault(name, line)
        return node


_Bounded.add_constructor("tag:yaml.org,2002:int", _Bounded.construct_yaml_int)


def _measure(node: yaml.Node, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the values and levels of a node with its aliases followed, kept in `sizes`."""
    # A node that contains itself ends in a `RecursionError`.
    key = id(node)
    if key not in sizes:
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = chain.from_iterable(children)
        below = [_measure(child, sizes) for child in children]
        values = 1 + sum(count for count, _ in below)
        levels = 1 + max((level for _, level in below), default=0)
        if values > _MOST_VALUES:
            found = f"{values:,} values, with aliases followed"
            raise FileError(_line(node), found, f"{_MOST_VALUES:,} at most")
        if levels > _DEEPEST:
            raise FileError(_line(node), _TOO_DEEP, _FEWER_LEVELS)
        sizes[key] = values, levels
    return sizes[key]


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
