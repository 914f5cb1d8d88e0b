"""``flexmerge.json``: docs/flexmerge-format.md, "The manifest".

`Manifest` is that of models. That of adapters is in `peft_merge.flexmerge.result`; what both have
in common is here: tasks, and blocks whose groups of tasks share something (`sharing_problems`).
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from mergekit_ext.errors import Problem
from mergekit_ext.io.schema import (
    MOST_64_BITS,
    Count,
    Digest,
    Items,
    Name,
    Schema,
    Some,
    Version,
    is_digest,
    read,
    values,
)

FILE_NAME = "flexmerge.json"
SHARDS = "shards"

FileKind = Literal["dense", "base", "unified", "masks"]
DENSE: Final = "dense"
BASE: Final = "base"
UNIFIED: Final = "unified"
MASKS: Final = "masks"
# Groups are dense or
MASKED: Final = "masked"

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What lies beside the tasks' folders under a fixed name.
_TAKEN = frozenset(
    {SHARDS, FILE_NAME, "flexmerge_analysis.json", "readme.md", "mergekit_config.yml"}
)
# One file name on every system: no separator, no drive, no control character.
_SHARD_PATH = re.compile(SHARDS + r"/(?!\.$)(?!.*\.\.)[^/\\:\x00-\x1f\x7f]{1,200}")
# A cosine is rounded.
_COSINE = 1.0 + 1e-6
# `models` is written for people and may be rounded.
_ROUNDING = 1e-3


def task_name_problem(name: str) -> str | None:
    """Return why `name` cannot be the name of a task, and of its folder; None when it can."""
    if not _TASK_NAME.fullmatch(name):
        return (
            "it is 1 to 100 of A-Z, a-z, 0-9, '.', '_' and '-', of which a letter or digit is first"
        )
    if name.lower() in _TAKEN:
        return "the checkpoint has a file or folder of this name"
    return None


def colliding_names(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of names, the later one second, that are equal but for their case."""
    seen: dict[str, str] = {}
    for name in names:
        key = name.casefold()
        if key in seen:
            yield seen[key], name
        else:
            seen[key] = name


def _task_name(name: str) -> str:
    if reason := task_name_problem(name):
        raise ValueError(f"the name of a folder, but {reason}")
    return name


def _shard_path(path: str) -> str:
    if not _SHARD_PATH.fullmatch(path):
        raise ValueError(f"{SHARDS}/ and one file name")
    return path


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > MOST_64_BITS:
        raise ValueError("sizes whose product fits into 64 bits")
    return shape


def _is_factor(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= MOST_64_BITS
    return type(value) is float and math.isfinite(value)


Tasks = Some[Name]
Similarity = Annotated[float, Field(ge=-_COSINE, le=_COSINE)] | None


def sharing_problems(tasks: Sequence[str], blocks: Sequence[Any]) -> Iterator[Problem]:
    """Yield what is wrong with the names of tasks, and with the groups that should partition them.

    Args:
        tasks: their names.
        blocks: the manifest's; they have `name` and `groups`, and these have `tasks`.
    """
    for first, second in colliding_names(tasks):
        yield Problem("tasks", f"{first} and {second}", "names that differ also in lower case")
    yield from repeats("blocks", "block", (block.name for block in blocks))
    place = {task: index for index, task in enumerate(tasks)}
    for index, block in enumerate(blocks):
        where = f"blocks[{index}].groups"
        firsts = [place.get(group.tasks[0], 0) for group in block.groups]
        if firsts != sorted(firsts):
            yield Problem(where, "groups in another order", "the order of their first task")
        members = Counter(task for group in block.groups for task in group.tasks)
        for task in place:
            if members[task] != 1:
                yield Problem(where, f"task {task} in {members[task]} groups", "each task in one")
        for inner, group in enumerate(block.groups):
            yield from _subset(f"{where}[{inner}].tasks", group.tasks, place)


def repeats(where: str, what: str, names: Iterable[str]) -> Iterator[Problem]:
    """Yield the names that occur more than once."""
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(where, f"{what} {name} {count} times", "each of them once")


class TensorInfo(Schema):
    """One tensor under its ordinary name. Dtypes are in the shards."""

    name: Name
    shape: Annotated[Items[Count], Field(max_length=64), AfterValidator(_sizes)]


class Group(Schema):
    """Tasks that share one block.

    Attributes:
        tasks: their names, in the order of the manifest's tasks.
        kind: ``dense`` (final values are stored) or ``masked`` (a unified vector and masks are).
        similarity: that of the merge that completed the group; None for one task.
        rescale: the rescaler of each member of a masked group; absent from a dense one.
    """

    tasks: Tasks
    kind: Literal["dense", "masked"]
    similarity: Similarity
    rescale: Annotated[dict[str, Any], values(_is_factor, "a number")] = Field(default={})

    def rules(self) -> Iterator[Problem]:
        if len(self.tasks) == 1 and self.similarity is not None:
            yield Problem("similarity", f"{self.similarity:g}", "null for one task")
        if set(self.rescale) != set(self.tasks if self.kind == MASKED else ()):
            found = f"factors of {_some(list(self.rescale)) or 'no task'}"
            expected = f"one for each of {_some(self.tasks)} if masked, or else none"
            yield Problem("rescale", found, expected)


class Block(Schema):
    """A block; its tensors come in the order in which they are concatenated."""

    name: Name
    kind: Name
    tensors: Some[TensorInfo]
    groups: Some[Group]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of its tensors by name, in order."""
        return {tensor.name: tensor.shape for tensor in self.tensors}


class Task(Schema):
    """One model of the checkpoint. `ordinary`: its folder is a Hugging Face checkpoint."""

    name: Annotated[str, AfterValidator(_task_name)]
    model: str
    ordinary: bool


class ShardFile(Schema):
    """One file of weights. `path` is relative to the manifest's folder."""

    path: Annotated[str, AfterValidator(_shard_path)]
    kind: FileKind
    tasks: Items[Name]
    bytes: Count
    sha256: Digest

    def rules(self) -> Iterator[Problem]:
        # The base belongs to no task: every task with a masked block reads it.
        if not self.tasks and self.kind != BASE:
            yield Problem("tasks", "no task", "the tasks that the file belongs to")
        if self.kind == MASKS and len(self.tasks) > 1:
            yield Problem("tasks", f"{len(self.tasks)} tasks", "one task, as masks have")


class Private(Schema):
    """The tensors that only this task has, or has in this shape."""

    task: Name
    tensors: Items[TensorInfo]


class Size(Schema):
    """What is stored; ``models = (bytes - private_bytes) / unit_bytes``."""

    models: Annotated[float, Field(ge=0)]
    bytes: Count
    unit_bytes: Count
    private_bytes: Count

    def rules(self) -> Iterator[Problem]:
        if self.private_bytes > self.bytes:
            yield Problem("private_bytes", f"{self.private_bytes}", f"{self.bytes} at most")
        # Where nothing can be shared there is no unit to count in.
        shareable = self.bytes - self.private_bytes
        models, rounding = 0.0, _ROUNDING
        if self.unit_bytes:  # which is a rounded mean
            models, rounding = shareable / self.unit_bytes, _ROUNDING + 0.5 / self.unit_bytes
        if not math.isclose(self.models, models, rel_tol=rounding, abs_tol=_ROUNDING):
            expected = f"{models:g}, (bytes - private_bytes) / unit_bytes"
            yield Problem("models", f"{self.models:g}", expected)


Digests = Annotated[dict[str, Any], values(is_digest, "64 digits, 0-9 and a-f")]


class Manifest(Schema):
    """What the models of a checkpoint share, and where it is stored.

    Attributes:
        task_files: the digests of the files beside weights in the folders that are Hugging Face
            checkpoints; empty where an older version has written the manifest.
    """

    format: Literal["flexmerge"]
    version: Version
    generator: str
    method: dict[str, Any]
    base_model: str
    size: Size
    tasks: Some[Task]
    files: Items[ShardFile]
    blocks: Items[Block]
    private: Items[Private]
    task_files: Digests = Field(default={})

    def rules(self) -> Iterator[Problem]:
        tasks = [task.name for task in self.tasks]
        yield from sharing_problems(tasks, self.blocks)
        place = {task: index for index, task in enumerate(tasks)}
        for first, second in colliding_names(file.path for file in self.files):
            yield Problem("files", f"{first} and {second}", "paths that differ also in lower case")
        for index, file in enumerate(self.files):
            yield from _subset(f"files[{index}].tasks", file.tasks, place)
        shared = [tensor.name for block in self.blocks for tensor in block.tensors]
        yield from repeats("blocks", "tensor", shared)
        yield from repeats("private", "task", (entry.task for entry in self.private))
        in_blocks = set(shared)
        for index, entry in enumerate(self.private):
            where, names = f"private[{index}]", [tensor.name for tensor in entry.tensors]
            yield from _subset(f"{where}.task", [entry.task], place)
            yield from repeats(where, "tensor", names)
            for name in in_blocks.intersection(names):
                yield Problem(where, f"the tensor {name} of a block", "tensors in no block")
        # A task is ordinary if every tensor of it is in a dense shard.
        groups = (group for block in self.blocks for group in block.groups)
        masked = {task for group in groups if group.kind == MASKED for task in group.tasks}
        for index, task in enumerate(self.tasks):
            where = f"tasks[{index}].ordinary ({task.name})"
            if task.ordinary and task.name in masked:
                yield Problem(where, "true", "false, as it has masked blocks")
            if not task.ordinary and task.name not in masked:
                yield Problem(where, "false", "true, as its blocks are dense")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read ``flexmerge.json`` and check every rule that needs no other file.

    Raises:
        CheckpointError: it is missing, unreadable, not a manifest of version 1, or breaks a rule.
            Rules that relate one value to another are checked once each value is sound.
    """
    # Not `resolve`, which a loop of links stops.
    parent = Path(os.path.realpath(folder))
    remedy = "Give the folder that a `flexmerge` merge wrote; load other models with transformers."
    if (parent.parent / FILE_NAME).is_file():
        remedy = f"Give the folder above, {parent.parent}, and the task {parent.name!r}."
    expected = "the manifest of a FlexMerge checkpoint"
    return read(Manifest, Path(folder) / FILE_NAME, expected, remedy)


def _subset(where: str, names: Sequence[str], place: Mapping[str, int]) -> Iterator[Problem]:
    """Yield problems of a list that should hold some of the tasks, each once, in their order."""
    if unknown := [name for name in names if name not in place]:
        yield Problem(where, f"unknown tasks {_some(unknown)}", f"some of {_some(list(place))}")
        return
    places = [place[name] for name in names]
    if any(later <= earlier for earlier, later in pairwise(places)):
        yield Problem(where, _some(names), "each task once, in the order of `tasks`")


def _some(names: Sequence[str]) -> str:
    """Return the first ones of a list of names, which may be long."""
    return ", ".join([*names[:20], *(["..."] if len(names) > 20 else [])])
