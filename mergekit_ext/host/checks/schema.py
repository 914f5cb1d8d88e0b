"""mergekit's schema errors as problems: one for each place, in the words of the user's file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_ext.core.wording import join, shown
from mergekit_ext.errors import Problem

_SETTING = (
    "a number, a text or true/false, a list of them (a gradient over the layers), "
    "or entries with `value:` and `filter:`"
)
_INPUTS = ("models", "slices", "modules")


def parse(document: Any, schema: Any) -> tuple[Any, list[Problem]]:
    """Build a configuration from a parsed document: it, or None and what is wrong."""
    from pydantic import ValidationError

    if not isinstance(document, Mapping):
        return None, [
            Problem("the document", shown(document), "a mapping with `merge_method:` and inputs")
        ]
    sliced = "slices" in schema.model_fields
    problems = _structure(document) if sliced else []
    empty = list(_without_sources(document)) if sliced else []
    problems += empty
    try:
        config = schema.model_validate(dict(document))
        return None if empty else config, problems
    except ValidationError as error:
        return None, problems + _located(error, document)
    except RuntimeError as error:  # mergekit's validators raise it, past pydantic
        if problems:
            return None, problems
        return None, [Problem("the document", str(error), "a configuration that mergekit accepts")]


def _structure(document: Mapping[str, Any]) -> list[Problem]:
    problems = []
    given = [key for key in _INPUTS if document.get(key)]
    if len(given) != 1:
        problems.append(
            Problem(
                "models, slices, modules",
                " and ".join(given) if given else "none of them",
                "exactly one of the three",
                "Keep one of them." if given else "Add `models:` with the models to merge.",
            )
        )
    if document.get("tokenizer_source") and document.get("tokenizer"):
        problems.append(
            Problem(
                "tokenizer_source, tokenizer",
                "both",
                "one of the two",
                "Remove `tokenizer_source:`, which is the older form.",
            )
        )
    return problems


def _without_sources(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Slices without a model, which mergekit accepts until it looks for the first."""
    modules = document.get("modules")
    named = modules if isinstance(modules, Mapping) else {}
    parts = {f"modules.{name}.": part for name, part in named.items()}
    for where, part in {"": document, **parts}.items():
        slices = part.get("slices") if isinstance(part, Mapping) else None
        for index, piece in enumerate(slices if isinstance(slices, list) else ()):
            if isinstance(piece, Mapping) and piece.get("sources") == []:
                yield Problem(
                    f"{where}slices[{index}].sources",
                    "an empty list",
                    "the layers of one model at least",
                    "Add `- model:` with its `layer_range:`, or remove the slice.",
                )


def _located(error: Any, document: Mapping[str, Any]) -> list[Problem]:
    # A union gives one error for each of its branches: they become one problem.
    places: dict[str, tuple[str, list[str]]] = {}
    for item in error.errors():
        where, found = _place(item, document)
        messages = places.setdefault(where, (found, []))[1]
        text = expectation(item)
        if text not in messages:
            messages.append(text)
    problems = []
    for where, (found, messages) in places.items():
        setting = "parameters." in where and len(messages) > 1
        expected = _SETTING if setting else " or ".join(messages)
        remedy = "Add it." if found == "nothing" else ""
        problems.append(Problem(where or "the document", found, expected, remedy))
    return problems


def _place(item: Any, document: Any) -> tuple[str, str]:
    """The path as far as it exists in the file, and what is there."""
    path, value = "", document
    location: Sequence[Any] = item["loc"]
    for step in location:
        inside = (isinstance(value, Mapping) and step in value) or (
            isinstance(value, list) and isinstance(step, int) and step < len(value)
        )
        if not inside:
            if item["type"] == "missing" and step == location[-1]:
                return join(path, step), "nothing"
            break
        path, value = join(path, step), value[step]
    return path, shown(value)


def expectation(item: Any) -> str:
    """What one pydantic error wanted, as the end of "expected ..."."""
    if item["type"] == "missing":
        return "this key, which is required"
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message.removeprefix("Input should be ")
    return message[:1].lower() + message[1:] if message[1:2].islower() else message
