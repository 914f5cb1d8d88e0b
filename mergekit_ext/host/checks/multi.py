"""The documents of a multi-merge, seen together: their names, and who depends on whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from mergekit_ext.core.wording import shown
from mergekit_ext.errors import Problem
from mergekit_ext.host.checks.layout import groups_of, references
from mergekit_ext.host.checks.schema import parse


def names_of(documents: Sequence[Any]) -> list[str | None]:
    """The `name:` of each document; None where there is none, or none that can be used."""
    written = [_written(document) for document in documents]
    return [name if _is_component(name) else None for name in written]


def between_documents(documents: Sequence[Any]) -> dict[int, list[Problem]]:
    """What is wrong with names, and with references from one document to another.

    Returns the problems of each document, by its index.
    """
    problems: dict[int, list[Problem]] = {}
    names = names_of(documents)
    seen: set[str | None] = set()
    for i, (document, name) in enumerate(zip(documents, names, strict=True)):
        written = _written(document)
        if name is None and written is not None:
            problems[i] = [_no_component(written)]
            continue
        if name in seen:
            found = "a second document without a name" if name is None else f"{name!r} again"
            expected = "a name of its own for every document but the last"
            problems[i] = [Problem("name", found, expected, "Give it another `name:`.")]
        seen.add(name)
    for i in _in_circles(documents, names):
        found = f"{names[i]!r}, which depends on itself"
        expected = "documents that depend on earlier results only"
        remedy = "Take one of the references in the circle out."
        problems.setdefault(i, []).append(Problem("models", found, expected, remedy))
    return problems


def _written(document: Any) -> Any:
    return document.get("name") if isinstance(document, Mapping) else None


def _is_component(name: Any) -> bool:
    """Whether a name is one step down from a folder, on any system, and can be printed."""
    return (
        isinstance(name, str)
        and name not in ("", "..")
        and name.isprintable()
        and PurePosixPath(name).name == name == PureWindowsPath(name).name
    )


def _no_component(name: Any) -> Problem:
    expected = "a text that can be the name of one folder"
    return Problem("name", shown(name), expected, "Write letters, digits, `-`, `_` and `.`.")


def _in_circles(documents: Sequence[Any], names: Sequence[str | None]) -> list[int]:
    known = {name for name in names if name is not None}
    used = [_names_used(document, known) for document in documents]
    edges = {name: used[i] for i, name in enumerate(names) if name is not None}
    found = []
    for i, name in enumerate(names):
        reached, new = set[str](), edges.get(name, set()) if name is not None else set()
        while new:
            reached |= new
            new = set[str]().union(*(edges[other] for other in new)) - reached
        if name in reached:
            found.append(i)
    return found


def _names_used(document: Any, names: set[str]) -> set[str]:
    from mergekit.config import MergeConfiguration

    config = parse(document, MergeConfiguration)[0] if names else None
    if config is None:
        return set()
    models = [model for _, model in references(groups_of(config), config.base_model)]
    return {model.model.path for model in models} & names
