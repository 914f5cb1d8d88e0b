"""The rules that relate one part of a manifest to another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from mergekit_ext.errors import Problem
from mergekit_ext.flexmerge.manifest import (
    BASE,
    DENSE,
    MASKED,
    MASKS,
    Block,
    Manifest,
    Size,
    TensorInfo,
    colliding_names,
)

# `models` is written for people and may be rounded.
_ROUNDING = 1e-3


def broken_rules(manifest: Manifest) -> Iterator[Problem]:
    """What is wrong with a manifest whose values are each of the right type and range.

    These are the rules of docs/flexmerge-format.md that need no file but the manifest.
    """
    yield from _size(manifest.size)
    tasks = [task.name for task in manifest.tasks]
    for first, second in colliding_names(tasks):
        yield Problem("tasks", f"{first} and {second}", "names that differ also in lower case")
    place = {task: index for index, task in enumerate(tasks)}
    yield from _files(manifest, place)
    yield from _repeats("blocks", "block", (block.name for block in manifest.blocks))
    for index, block in enumerate(manifest.blocks):
        yield from _groups(f"blocks[{index}] ({block.name})", block, place)
    yield from _tensors(manifest, place)
    yield from _ordinary(manifest)


def _size(size: Size) -> Iterator[Problem]:
    if size.private_bytes > size.bytes:
        yield Problem(
            "size.private_bytes", f"{size.private_bytes}", f"{size.bytes} (size.bytes) at most"
        )
    # Where nothing can be shared there is no unit to count in.
    models = (size.bytes - size.private_bytes) / size.unit_bytes if size.unit_bytes else 0.0
    if not math.isclose(size.models, models, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
        yield Problem(
            "size.models", f"{size.models:g}", f"{models:g}, (bytes - private_bytes) / unit_bytes"
        )


def _files(manifest: Manifest, place: Mapping[str, int]) -> Iterator[Problem]:
    for first, second in colliding_names(file.path for file in manifest.files):
        yield Problem("files", f"{first} and {second}", "paths that differ also in lower case")
    for index, file in enumerate(manifest.files):
        where = f"files[{index}].tasks ({file.path})"
        yield from _subset(where, file.tasks, place)
        # The base belongs to nobody: who reconstructs a block reads it.
        if not file.tasks and file.kind != BASE:
            yield Problem(where, "no task", "the tasks that the file belongs to")
        if file.kind == MASKS and len(file.tasks) > 1:
            yield Problem(where, f"{len(file.tasks)} tasks", "one task, as masks have")


def _groups(where: str, block: Block, place: Mapping[str, int]) -> Iterator[Problem]:
    firsts = [place.get(group.tasks[0], 0) for group in block.groups]
    if firsts != sorted(firsts):
        yield Problem(f"{where}.groups", "groups in another order", "the order of their first task")
    members = Counter(task for group in block.groups for task in group.tasks)
    for task in place:
        if members[task] != 1:
            yield Problem(
                f"{where}.groups", f"task {task} in {members[task]} groups", "each task in one"
            )
    for index, group in enumerate(block.groups):
        inner = f"{where}.groups[{index}]"
        yield from _subset(f"{inner}.tasks", group.tasks, place)
        if len(group.tasks) == 1 and group.similarity is not None:
            yield Problem(f"{inner}.similarity", f"{group.similarity:g}", "null for one task")
        if group.kind == MASKED and set(group.rescale) != set(group.tasks):
            yield Problem(
                f"{inner}.rescale",
                f"factors of {_some(list(group.rescale)) or 'no task'}",
                f"one for each of {_some(group.tasks)}",
            )


def _tensors(manifest: Manifest, place: Mapping[str, int]) -> Iterator[Problem]:
    shared = [tensor.name for block in manifest.blocks for tensor in block.tensors]
    yield from _repeats("blocks", "tensor", shared)
    yield from _repeats("private", "task", (entry.task for entry in manifest.private))
    in_blocks = set(shared)
    for index, entry in enumerate(manifest.private):
        where = f"private[{index}]"
        yield from _subset(f"{where}.task", [entry.task], place)
        yield from _repeats(where, "tensor", (tensor.name for tensor in entry.tensors))
        for tensor in entry.tensors:
            yield from _not_in_a_block(where, tensor, in_blocks)


def _not_in_a_block(where: str, tensor: TensorInfo, in_blocks: set[str]) -> Iterator[Problem]:
    if tensor.name in in_blocks:
        yield Problem(where, f"the tensor {tensor.name} of a block", "tensors in no block")


def _ordinary(manifest: Manifest) -> Iterator[Problem]:
    """A task is ordinary if every tensor of it is in a dense shard."""
    masked = {
        task
        for block in manifest.blocks
        for group in block.groups
        if group.kind != DENSE
        for task in group.tasks
    }
    for index, task in enumerate(manifest.tasks):
        if task.ordinary == (task.name in masked):
            yield Problem(
                f"tasks[{index}].ordinary ({task.name})",
                str(task.ordinary).lower(),
                "false, as it has masked blocks"
                if task.ordinary
                else "true, as its blocks are dense",
            )


def _subset(where: str, names: Sequence[str], place: Mapping[str, int]) -> Iterator[Problem]:
    """Problems of a list that should hold some of the tasks, each once, in their order."""
    unknown = [name for name in names if name not in place]
    if unknown:
        yield Problem(where, f"unknown tasks {_some(unknown)}", f"some of {_some(list(place))}")
        return
    places = [place[name] for name in names]
    if any(later <= earlier for earlier, later in pairwise(places)):
        yield Problem(where, _some(names), "each task once, in the order of `tasks`")


def _some(names: Sequence[str]) -> str:
    """The first ones of a list of names, which may be long."""
    return ", ".join([*names[:20], *(["..."] if len(names) > 20 else [])])


def _repeats(where: str, what: str, names: Iterable[str]) -> Iterator[Problem]:
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(where, f"{what} {name} {count} times", "each of them once")
