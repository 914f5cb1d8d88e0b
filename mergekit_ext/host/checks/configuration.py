"""config.json of a model, before transformers and mergekit make something of it.

Both go through its layers and experts one by one, some classes already when they are made: a count
of 10^12 would fill the memory before anything is compared with it.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_NAME = "config.json"
_LARGEST = 64 << 20
_COUNT = re.compile(r"(^|_)(num|n)(_.*)?(layer|expert|head|block|label|group)|_layers$|^layers$")
_MOST = 100_000
# Every tensor of every layer is named: several times what the largest models have.
_LAYERS, _MOST_LAYERS = re.compile("layer|block"), 1_000
_EXPERTS, _MOST_OF_BOTH = re.compile("expert"), 100_000


def unreadable(folder: Path) -> tuple[str, str] | None:
    """What keeps a model's config.json from being read: what was found, and what is expected."""
    path = folder / FILE_NAME
    content, wrong = json_object(path, "a model's configuration", _LARGEST)
    return wrong or _too_many(content, path)


def json_object(
    path: Path, expected: str, largest: int
) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """The object in a file of JSON, or what was found in its place and what is expected.

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


def _too_many(content: dict[str, Any], path: Path) -> tuple[str, str] | None:
    layers = experts = 0
    for name, value in _numbers(content):
        if not _COUNT.search(name):
            continue
        most = _MOST_LAYERS if _LAYERS.search(name) else _MOST
        if not 0 <= value <= most:
            shown = str(value) if abs(value) < 2**63 else "more than 64 bits"
            return f"{name} of {shown} in {path}", f"0 to {most:,}"
        layers = max(layers, value) if _LAYERS.search(name) else layers
        experts = max(experts, value) if _EXPERTS.search(name) else experts
    if layers * experts > _MOST_OF_BOTH:
        found = f"{layers:,} layers of {experts:,} experts in {path}"
        return found, f"{_MOST_OF_BOTH:,} experts at most"
    return None


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Whole numbers, and the keys that they stand under."""
    inner = [(name, value)]
    while inner:
        name, item = inner.pop()
        if isinstance(item, dict):
            inner += item.items()
        elif isinstance(item, list):
            inner += [(name, each) for each in item]
        elif type(item) is int:
            yield name, item
