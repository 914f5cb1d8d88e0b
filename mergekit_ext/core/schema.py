"""Errors of a pydantic schema as problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_ext.core.wording import join, shown
from mergekit_ext.errors import Problem


def schema_problems(error: Any, document: Any, root: str = "") -> list[Problem]:
    """Return one problem for each place of a ``pydantic.ValidationError``.

    Args:
        error: raised by a model of pydantic.
        document: what was validated.
        root: its name, for the front of each place.
    """
    places: dict[str, tuple[str, list[str]]] = {}
    for item in error.errors(include_url=False):
        where, value = root, document
        for step in item["loc"]:  # names the branches of unions and keys, too
            if isinstance(value, Mapping) and step in value:
                where, value = join(where, str(step)), value[step]
            elif item["type"] == "missing":
                where, value = join(where, str(step)), None
        found = "nothing" if item["type"] == "missing" else shown(value)
        messages = places.setdefault(where, (found, []))[1]
        text = str(item["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
        messages += [text] if text not in messages else []
    return [Problem(at, found, " or ".join(texts)) for at, (found, texts) in places.items()]
