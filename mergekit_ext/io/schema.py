"""JSON of unknown origin: a bounded file, a pydantic schema, every mistake a `Problem`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from mergekit_ext.errors import MOST_SHOWN, CheckpointError, Problem

T = TypeVar("T", bound="Schema")
Item = TypeVar("Item")

# One entry a tensor: a model of 100,000 tensors takes some 20 MB.
LARGEST = 64 * 1024 * 1024
MOST_64_BITS = 2**63 - 1
# pydantic's types of errors that are worded for Python.
_OF_JSON = {"dict_type": "an object", "model_type": "an object", "tuple_type": "a list"}

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0, le=MOST_64_BITS)]
_DIGEST = r"^[0-9a-f]{64}$"
Digest = Annotated[str, Field(pattern=_DIGEST)]


def _known(version: int) -> int:
    if version != 1:
        raise ValueError("1, the version that this release reads")
    return version


Version = Annotated[int, AfterValidator(_known)]


# Checking stops at the first wrong entry: a hostile list may have millions.
Items = Annotated[tuple[Item, ...], Strict(False), FailFast()]
Some = Annotated[tuple[Item, ...], Strict(False), FailFast(), Field(min_length=1)]


class RulesError(ValueError):
    """What breaks the rules that relate the fields of one object."""

    def __init__(self, problems: list[Problem]):
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


class Schema(BaseModel):
    """An object of a file. Values are of the very types that are annotated; other keys are passed
    over, so that later releases can add some."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)

    def rules(self) -> Iterator[Problem]:
        """Yield what is wrong with the fields together; `where` is relative to this object."""
        yield from ()

    def to_json(self) -> str:
        """Return the object as JSON: the fields that have been set, in their order.

        Raises:
            ValueError: a number is not finite.
        """
        content = self.model_dump(exclude_unset=True)
        return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @model_validator(mode="after")
    def _keep_rules(self: T) -> T:
        if problems := list(islice(self.rules(), MOST_SHOWN)):
            raise RulesError(problems)
        return self


def values(valid: Callable[[Any], bool], expected: str) -> AfterValidator:
    """Return a validator of a mapping's values, which stops at the first wrong one."""

    def check(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        for key, value in mapping.items():
            if not valid(value):
                raise RulesError([Problem(key, shown(value), expected)])
        return mapping

    return AfterValidator(check)


def is_digest(value: Any) -> bool:
    """Return whether a value is a SHA-256 in lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(_DIGEST, value) is not None


def parse(schema: type[T], text: str | bytes, where: str) -> T:
    """Read one object of `schema` from JSON.

    Args:
        schema: if its fields ``format`` or ``version`` are wrong, nothing else is reported.
        text: the JSON; bytes are UTF-8.
        where: the file that it is from.

    Raises:
        CheckpointError: the text is something else; at most a hundred problems are listed.
    """
    try:
        content = from_json(text, allow_inf_nan=False)
        json.loads(text, object_pairs_hook=no_repeats)
    except ValueError as error:
        problem = Problem(where, f"no JSON ({error})", "JSON in UTF-8")
        raise CheckpointError([problem], where) from None
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False)
    heads = [item for item in found if item["loc"] in (("format",), ("version",))]
    problems = (problem for item in heads or found for problem in _problems(item, where))
    raise CheckpointError(islice(problems, MOST_SHOWN), where) from None


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is given twice, of which readers take the first or the last.

    For the parser of `json`; pydantic's takes the last, and nothing that is too deep for this one.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:80]!r} is given twice")
    return found


def read(schema: type[T], path: Path, expected: str, remedy: str) -> T:
    """Read a file of one object, of `LARGEST` bytes at most.

    Args:
        schema: see `parse`.
        path: the file.
        expected: what should be there.
        remedy: what to do where there is none.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("a folder, a pipe or a device")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise OSError(f"more than {LARGEST:,} bytes")
    except FileNotFoundError:
        problem = Problem(str(path), "no such file", expected, remedy)
        raise CheckpointError([problem], str(path.parent)) from None
    except (OSError, ValueError) as error:
        problem = Problem(str(path), f"no readable file ({error})", expected, remedy)
        raise CheckpointError([problem], str(path.parent)) from None
    return parse(schema, content, str(path))


def shown(value: Any) -> str:
    """Return a value as a message shows it: short and printable, whatever it is."""
    if isinstance(value, (dict, BaseModel)):
        return "an object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:120]}... ({len(text)} characters)"


def _problems(item: Any, where: str) -> Iterator[Problem]:
    place = ""
    for step in item["loc"]:
        place += f"[{step}]" if isinstance(step, int) else f".{step}" if place else step
    broken = item.get("ctx", {}).get("error")
    if isinstance(broken, RulesError):
        for problem in broken.problems:
            inner = ".".join(part for part in (place, problem.where) if part)
            yield Problem(inner or where, problem.found, problem.expected, problem.remedy)
    elif item["type"] == "missing":
        yield Problem(place, "nothing", "a value")
    else:
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = _OF_JSON.get(item["type"], message)
        yield Problem(place or where, shown(item["input"]), expected)
