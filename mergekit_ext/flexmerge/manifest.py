"""``flexmerge.json``: docs/flexmerge-format.md, "The manifest".

`Manifest` is that of models. That of adapters is in `peft_merge.flexmerge.manifest`; what both have
in common is here: tasks, and blocks whose groups of tasks share something (`sharing_problems`).
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from mergekit_ext.errors import Problem, listing
from mergekit_ext.io.schema import Count, Digest, Items, Name, Schema, Some, Version, read

FILE_NAME = "flexmerge.json"
SHARDS = "shards"

FileKind = Literal["dense", "base", "unified", "masks", "factors"]
GroupKind = Literal["dense", "masked", "residual"]

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What lies beside the tasks' folders under a fixed name.
_TAKEN = {
    *(SHARDS, FILE_NAME, "flexmerge_analysis.json"),
    *("readme.md", "mergekit_config.yml", "merge_report.json"),
}
_COSINE = 1.0 + 1e-6  # it is rounded
_MOST_ENTRIES = 100_000


def task_name_problem(name: str) -> str | None:
    """Return why `name` cannot be the name of a task, and of its folder; None when it can."""
    if not _TASK_NAME.fullmatch(name):
        return "it is 1 to 100 of A-Z, a-z, 0-9, '.', '_' and '-', a letter or digit first"
    if name.lower() in _TAKEN:
        return "the checkpoint has a file or folder of this name"
    return None


def _task_name(name: str) -> str:
    if reason := task_name_problem(name):
        raise ValueError(f"the name of a folder, but {reason}")
    return name


def colliding_names(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of names, the later one second, that are equal but for their case."""
    seen: dict[str, str] = {}
    for name in names:
        key = name.casefold()
        if key in seen:
            yield seen[key], name
        else:
            seen[key] = name


def _bounded(mapping: Any) -> Any:
    """Refuse a hostile mapping before each of its millions of entries is an error."""
    if isinstance(mapping, dict) and len(mapping) > _MOST_ENTRIES:
        raise ValueError(f"{_MOST_ENTRIES:,} entries at most")
    return mapping


Tasks = Some[Name]
Ranks = Annotated[dict[str, Annotated[int, Field(ge=1)]], BeforeValidator(_bounded)]
Similarity = Annotated[float, Field(ge=-_COSINE, le=_COSINE)] | None


def sharing_problems(tasks: Sequence[str], blocks: Sequence[Any]) -> Iterator[Problem]:
    """Yield what is wrong with the names of tasks, and with the groups that should partition them.

    `blocks` are the manifest's; they have `name` and `groups`, and these have `tasks`.
    """
    for first, second in colliding_names(tasks):
        yield Problem("tasks", f"{first} and {second}", "names that differ also in lower case")
    yield from _repeats("blocks", "block", (block.name for block in blocks))
    place = {task: index for index, task in enumerate(tasks)}
    for index, block in enumerate(blocks):
        where = f"blocks[{index}].groups"
        members = Counter(task for group in block.groups for task in group.tasks)
        wrong = [task for task in {**place, **members} if members[task] != (task in place)]
        for task in wrong:
            expected = "each task in one" if task in place else f"some of {listing(tasks)}"
            yield Problem(where, f"task {task} in {members[task]} groups", expected)
        places = [] if wrong else [[place[task] for task in group.tasks] for group in block.groups]
        if places != sorted(map(sorted, places)):
            yield Problem(where, "another order", "groups and their tasks in the order of `tasks`")


def _repeats(where: str, what: str, names: Iterable[str]) -> Iterator[Problem]:
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(where, f"{what} {name} {count} times", "each of them once")


class TensorInfo(Schema):
    """One tensor under its ordinary name. Dtypes are in the shards."""

    name: Name
    shape: Annotated[Items[Count], Field(max_length=64)]


class Group(Schema):
    """Tasks that share one block.

    Its kind is ``dense`` (final values are stored), ``masked`` (a unified vector and masks are), or
    ``residual`` (a base, and factors of what each task adds to it, are).
    """

    tasks: Tasks
    kind: GroupKind
    similarity: Similarity  # of the merge that completed the group; None without one
    # Of each member of a masked group; absent from others.
    rescale: Annotated[dict[str, float], BeforeValidator(_bounded)] = Field(default={})
    # Of each member of a residual group, by tensor, those above 0; absent from others.
    ranks: Annotated[dict[str, Ranks], BeforeValidator(_bounded)] = Field(default={})
    own: Items[Name] = ()  # of a residual group, the tensors that each member stores itself
    stacked: Items[Name] = ()  # whose last two axes are matrices; of others they are flattened

    def rules(self) -> Iterator[Problem]:
        for name, kind in (("rescale", "masked"), ("ranks", "residual")):
            given = getattr(self, name)
            if set(given) != set(self.tasks if self.kind == kind else ()):
                found = f"values of {listing(list(given)) or 'no task'}"
                expected = f"one for each of {listing(self.tasks)} if {kind}, or else none"
                yield Problem(name, found, expected)


class Block(Schema):
    """A block; its tensors come in the order in which they are concatenated."""

    name: Name
    kind: Name
    tensors: Some[TensorInfo]
    groups: Some[Group]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.shape for tensor in self.tensors}

    def rules(self) -> Iterator[Problem]:
        """Check that the tensors of residual groups are known, and have the axes of matrices."""
        shapes = self.shapes
        for index, group in enumerate(self.groups):
            where, ranked = f"groups[{index}]", {n for r in group.ranks.values() for n in r}
            for name in sorted({*group.own, *group.stacked, *ranked} - shapes.keys()):
                yield Problem(where, f"tensor {name}", "tensors of the block")
            for names, least in ((ranked, 2), (group.stacked, 3)):
                for name in names:
                    if len(shapes.get(name, (0,) * least)) < least:
                        found = f"{name} of {len(shapes[name])} axes"
                        yield Problem(where, found, f"{least} axes or more")
            for name in sorted(ranked.intersection(group.own)):
                yield Problem(where, f"{name} in `own` and in `ranks`", "it in one of them")


class Task(Schema):
    """One model of the checkpoint. `ordinary`: its folder is a Hugging Face checkpoint."""

    name: Annotated[str, AfterValidator(_task_name)]
    model: str
    ordinary: bool


class ShardFile(Schema):
    """One file of weights.

    That `tasks` are right follows when the reader compares what the file holds with the blocks.
    """

    # One file name on every system: no separator, no drive, no control character.
    path: Annotated[str, Field(pattern=rf"^{SHARDS}/[A-Za-z0-9][A-Za-z0-9._-]{{0,199}}$")]
    kind: FileKind
    tasks: Items[Name]
    bytes: Count
    sha256: Digest


class Private(Schema):
    """The tensors that only this task has, or has in this shape."""

    task: Name
    tensors: Items[TensorInfo]


class Size(Schema):
    """What is stored; ``models = (bytes - private_bytes) / unit_bytes``, rounded for people."""

    models: Annotated[float, Field(ge=0)]
    bytes: Count
    unit_bytes: Count
    private_bytes: Count


class Manifest(Schema):
    """What the models of a checkpoint share, and where it is stored.

    Attributes:
        task_files: the digests of the files beside weights in the tasks' folders.
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
    task_files: Annotated[dict[str, Digest], BeforeValidator(_bounded)]

    def rules(self) -> Iterator[Problem]:
        names = {task.name for task in self.tasks}
        yield from sharing_problems([task.name for task in self.tasks], self.blocks)
        shared = [tensor.name for block in self.blocks for tensor in block.tensors]
        yield from _repeats("blocks", "tensor", shared)
        yield from _repeats("private", "task", (entry.task for entry in self.private))
        in_blocks = set(shared)
        for index, entry in enumerate(self.private):
            if entry.task not in names:
                where = f"private[{index}].task"
                yield Problem(where, f"unknown task {entry.task}", "one of `tasks`")
            own = [tensor.name for tensor in entry.tensors]
            twice = in_blocks.intersection(own)
            yield from _repeats(f"private[{index}] and blocks", "tensor", [*own, *twice])
        groups = (group for block in self.blocks for group in block.groups)
        masked = {task for group in groups if group.kind != "dense" for task in group.tasks}
        for index, task in enumerate(self.tasks):
            if task.ordinary == (task.name in masked):
                where, found = f"tasks[{index}].ordinary ({task.name})", f"{task.ordinary}".lower()
                yield Problem(where, found, "true if all of its blocks are dense, or else false")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read ``flexmerge.json`` and check every rule that needs no other file.

    Raises:
        CheckpointError: it is missing, unreadable, not a manifest of version 1, or breaks a rule.
            Rules that relate one value to another are checked once each value is sound.
    """
    # Not `resolve`, which a loop of links stops.
    parent = Path(os.path.realpath(folder))
    remedy = (
        "Give the folder that a `flexmerge` merge wrote; load other models with transformers, "
        "adapters with PEFT."
    )
    if (parent.parent / FILE_NAME).is_file():
        remedy = f"Give the folder above, {parent.parent}, and the task {parent.name!r}."
    expected = "the manifest of a FlexMerge checkpoint"
    return read(Manifest, Path(folder) / FILE_NAME, expected, remedy)
