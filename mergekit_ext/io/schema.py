"""Schemas of the project's own JSON files: pydantic, with every mistake as a `Problem`."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, FailFast, Field, Strict, ValidationError
from pydantic_core import from_json

from mergekit_ext.core.parameters import schema_problems
from mergekit_ext.errors import MOST_SHOWN, CheckpointError, Problem, require
from mergekit_ext.io.documents import bounded_text, parse_json

T = TypeVar("T", bound="Schema")
Item = TypeVar("Item")

# One entry a tensor: a model of 100,000 tensors takes some 20 MB.
LARGEST = 64 * 1024 * 1024
MOST_64_BITS = 2**63 - 1

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0, le=MOST_64_BITS)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _known(version: int) -> int:
    if version != 1:
        raise ValueError("1, the version that this release reads")
    return version


Version = Annotated[int, pydantic.AfterValidator(_known)]

# Checking stops at the first wrong entry: a hostile list may have millions.
Items = Annotated[tuple[Item, ...], Strict(False), FailFast()]
Some = Annotated[tuple[Item, ...], Strict(False), FailFast(), Field(min_length=1)]


class Schema(BaseModel):
    """An object of a file; other keys are passed over, so that later releases can add some."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)

    def rules(self) -> Iterator[Problem]:
        """Yield what is wrong with the fields together; `where` is relative to this object."""
        yield from ()

    def to_json(self) -> str:
        """Return the object as JSON: the fields that have been set, in their order."""
        content = self.model_dump(exclude_unset=True)
        return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @pydantic.model_validator(mode="after")
    def _keep_rules(self: T) -> T:
        require([*islice(self.rules(), MOST_SHOWN)])
        return self


def parse(schema: type[T], text: str, where: str) -> T:
    """Return an object of `schema` from JSON of the file `where`, or raise `CheckpointError`.

    If the fields ``format`` or ``version`` are wrong, nothing else is reported.
    """
    try:
        content = from_json(text, allow_inf_nan=False)
        parse_json(text, unique=True)  # the other takes the last of equal keys
    except ValueError as error:
        problem = Problem(where, f"no JSON ({error})", "JSON in UTF-8")
        raise CheckpointError([problem], where) from None
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = schema_problems(error, content)
    heads = [problem for problem in problems if problem.where in ("format", "version")]
    raise CheckpointError(heads or problems, where) from None


def read(schema: type[T], path: Path, expected: str, remedy: str) -> T:
    """Return the object in a file of `LARGEST` bytes at most, or raise `CheckpointError`."""
    try:
        text = bounded_text(path, LARGEST)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        found = "no such file" if missing else f"no readable file ({error})"
        problem = Problem(str(path), found, expected, remedy)
        raise CheckpointError([problem], str(path.parent)) from None
    return parse(schema, text, str(path))
