"""A parsed document and mergekit's schema: errors in the words of the file, and dropped keys.

Keys that a schema does not know are dropped by pydantic: misspelt or misplaced, they would have no
effect.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from mergekit.config import MergeConfiguration
from pydantic import ValidationError

from mergekit_ext.core.parameters import place_of, schema_problems
from mergekit_ext.errors import MOST_SHOWN, FileError, Problem, did_you_mean, join, shown
from mergekit_ext.host.checks.copied import OF_MERGES
from mergekit_ext.host.checks.layout import groups_of, models_at
from mergekit_ext.host.method import registered
from mergekit_ext.io.documents import read

_A_MERGE = "a mapping with `merge_method:` and inputs"
NO_DOCUMENT = Problem("the file", "no document", _A_MERGE)
# pydantic's types of errors.
_UNKNOWN = frozenset({"extra_forbidden", "invalid_key"})
_INPUTS = ("models", "slices", "modules")


def parse(document: Any) -> tuple[Any, list[Problem]]:
    """Build a configuration from a parsed document: it, or None and what is wrong.

    Of a document that is refused, unknown keys are wrong, too.
    """
    if not isinstance(document, Mapping):
        return None, [Problem("the document", shown(document), _A_MERGE)]
    problems, given = [], [key for key in _INPUTS if document.get(key)]
    if len(given) != 1:
        found = " and ".join(given) or "none of them, or an empty one"
        problems.append(Problem("models, slices, modules", found, "exactly one of the three"))
    try:
        config = MergeConfiguration.model_validate(dict(document))
    except ValidationError as error:
        problems += schema_problems(error, document)
    except RuntimeError as error:  # mergekit's validators raise it, past pydantic
        expected = "a configuration that mergekit accepts"
        problems = problems or [Problem("the document", str(error), expected)]
    else:
        expected = "the layers of one model at least"
        remedy = "Add `- model:` with its `layer_range:`, or remove the slice."
        problems += [
            Problem(f"{group.where}.sources", "an empty list", expected, remedy)
            for group in groups_of(config)
            if not group.sources
        ]
        if not problems:
            return config, []
    return None, [*problems, *unknown_keys(document)]


def unknown_keys(source: str | Mapping[str, Any] | None) -> list[Problem]:
    """Return the keys that mergekit does not know, each with the nearest known key.

    At most as many as an error shows. `source` is YAML text, or a parsed document.
    """
    try:
        documents, problems = read(source) if isinstance(source, str) else ([source], [])
    except FileError:
        return []  # `check_source` reports it; elsewhere the configuration is already parsed
    for document in documents:
        if isinstance(document, Mapping):
            problems += islice(_unknown(document), MOST_SHOWN)
    return problems


def _unknown(document: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        # `name` is mergekit-multi's.
        given = {key: value for key, value in document.items() if key != "name"}
        MergeConfiguration.model_validate(given, extra="forbid")
        return
    except ValidationError as error:
        errors = [item for item in error.errors() if item["type"] in _UNKNOWN]
    except RuntimeError:  # of mergekit's validators: `parse` reports it
        return
    # Of the branches of a union, the one that knows most keys was meant.
    branches: dict[str, dict[Any, list[str]]] = {}
    for item in errors:
        *branch, key = item["loc"]
        at, _ = place_of({**item, "loc": branch}, document)
        branches.setdefault(at, {}).setdefault(tuple(branch), []).append(str(key))
    described = MergeConfiguration.model_json_schema()
    levels = (described, *described["$defs"].values())
    known = {name for level in levels for name in level.get("properties", ())}
    for at, unknown in branches.items():
        for name in min(unknown.values(), key=len):
            found, expected = "an unknown key, which mergekit drops", "a key that is read there"
            yield Problem(join(at, name), found, expected, _remedy(name, known))


def _remedy(name: str, known: Collection[str]) -> str:
    parameters = {p.name for method in registered().values() for p in method.spec.parameters}
    if name in known:
        return "Move it to where it belongs."
    if name in {*parameters, *OF_MERGES}:
        return f"Put `{name}:` under `parameters:`."
    return did_you_mean(name, known, listed=True)


def between_documents(documents: Sequence[Any]) -> dict[int, list[Problem]]:
    """Return the problems of a multi-merge's names and references, by the document's index."""
    problems: dict[int, list[Problem]] = {i: [] for i in range(len(documents))}
    names = [name_of(document) for document in documents]
    seen: set[str | None] = set()
    for i, (document, name) in enumerate(zip(documents, names, strict=True)):
        written = document.get("name") if isinstance(document, Mapping) else None
        if name is None and written is not None:
            expected = "a text of letters, digits, `-`, `_` and `.`: the name of one folder"
            problems[i].append(Problem("name", shown(written), expected))
        elif name in seen:
            found = "a second document without a name" if name is None else f"{name!r} again"
            expected = "a name of its own for every document but the last"
            problems[i].append(Problem("name", found, expected))
        else:
            seen.add(name)
    used = {name: _models(document) for name, document in zip(names, documents, strict=True)}
    for i, name in enumerate(names):
        reached, new = set[str](), used[name]
        while new:
            reached |= new
            new = set[str]().union(*(used.get(other, ()) for other in new)) - reached
        if name in reached:
            found = f"{name!r}, which depends on itself"
            expected = "documents that depend on earlier results only"
            remedy = "Take one of the references in the circle out."
            problems[i].append(Problem("models", found, expected, remedy))
    return problems


def name_of(document: Any) -> str | None:
    """Return the name that a document gives itself; None if it can be no folder's."""
    name = document.get("name") if isinstance(document, Mapping) else None
    if not isinstance(name, str) or name in ("", "..") or not name.isprintable():
        return None
    return name if PurePosixPath(name).name == name == PureWindowsPath(name).name else None


def _models(document: Any) -> set[str]:
    config = parse(document)[0]
    return {model.model.path for model in models_at(config)} if config else set()
