"""Keys that mergekit would drop without a word: misspelt, misplaced or given twice.

The known keys come from the fields of mergekit's own pydantic models, so that a new mergekit
needs no new list here.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Any, Union

from mergekit_ext.core.wording import did_you_mean, join, nearest
from mergekit_ext.errors import MOST_SHOWN, Problem
from mergekit_ext.io.documents import DocumentError, read

# mergekit-multi reads `name` and takes it out before mergekit's schema sees the document.
DOCUMENT_KEYS = frozenset({"name"})


def unknown_keys(
    source: str | Mapping[str, Any], *, schema: Any = None, also: Collection[str] = DOCUMENT_KEYS
) -> list[Problem]:
    """Keys of a configuration that its schema does not know, each with the nearest known key.

    At most as many of one document as an error shows.

    Args:
        source: YAML text (of one or several documents) or one parsed document.
        schema: the pydantic model; mergekit's `MergeConfiguration` by default.
        also: further keys accepted at the top level.
    """
    if schema is None:
        from mergekit.config import MergeConfiguration

        schema = MergeConfiguration
    if not isinstance(source, str):
        return _first(source, schema, also) if isinstance(source, Mapping) else []
    try:
        documents, problems = read(source)
    except DocumentError:
        return []  # `check_source` reports it; elsewhere the configuration is already parsed
    for i, document in enumerate(documents):
        path = f"document {i + 1}: " if len(documents) > 1 else ""
        if isinstance(document, Mapping):
            problems += [
                Problem(path + p.where, p.found, p.expected, p.remedy)
                for p in _first(document, schema, also)
            ]
    return problems


def _first(document: Mapping[str, Any], schema: Any, also: Collection[str]) -> list[Problem]:
    return list(islice(_in_model(document, schema, "", also), MOST_SHOWN))


def _in_model(
    value: Mapping[str, Any], schema: Any, path: str, also: Collection[str] = ()
) -> Iterator[Problem]:
    fields = {field.alias or name: field for name, field in schema.model_fields.items()}
    known = {*fields, *also}
    for key, item in value.items():
        name = str(key)
        if name in fields:
            yield from _in_value(item, fields[name].annotation, join(path, name))
        elif name not in known:
            yield Problem(
                join(path, name),
                "an unknown key, which mergekit drops without a word",
                f"one of {', '.join(sorted(known))}",
                _remedy(name, known),
            )


def _remedy(name: str, known: Collection[str]) -> str:
    if nearest(name, known) is None and "parameters" in known and name in _parameter_names():
        return f"Put `{name}:` under `parameters:`."
    return did_you_mean(name, known)


def _parameter_names() -> set[str]:
    from mergekit import merge_methods

    methods = merge_methods.registered_methods()
    return {parameter.name for method in methods for parameter in method.spec.parameters}


def _in_value(value: Any, annotation: Any, path: str) -> Iterator[Problem]:
    branches = _branches(annotation)
    if isinstance(value, Mapping):
        models = [b for b in branches if isinstance(b, type) and hasattr(b, "model_fields")]
        if models:
            # Of several possible models, the one that shares most keys was meant.
            best = max(models, key=lambda m: len(set(m.model_fields) & set(value)))
            yield from _in_model(value, best, path)
            return
        items = [(join(path, str(k)), v, 1) for k, v in value.items()]
        origin: Any = dict
    elif isinstance(value, list):
        items = [(join(path, i), v, 0) for i, v in enumerate(value)]
        origin = list
    else:
        return
    inner = [typing.get_args(b) for b in branches if typing.get_origin(b) is origin]
    for where, item, index in items:
        kinds = [arguments[index] for arguments in inner if len(arguments) > index]
        if kinds:
            yield from _in_value(item, Union[tuple(kinds)], where)  # noqa: UP007


def _branches(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is Union or origin is types.UnionType:
        return [b for arg in typing.get_args(annotation) for b in _branches(arg)]
    if origin is typing.Annotated:
        return _branches(typing.get_args(annotation)[0])
    return [annotation]
