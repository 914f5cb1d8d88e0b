"""Which tensors the shards of a checkpoint hold: what follows from the manifest's blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from mergekit_ext.errors import Problem
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.flexmerge.manifest import (
    BASE,
    DENSE,
    MASKED,
    MASKS,
    UNIFIED,
    Manifest,
    ShardFile,
)
from mergekit_ext.io.headers import TensorHeader


class Shelf(NamedTuple):
    """The files of one kind that belong to one set of tasks. A name is in one of them."""

    kind: str
    tasks: tuple[str, ...]

    def __str__(self) -> str:
        return f"the {self.kind} files of {', '.join(self.tasks)}" if self.tasks else "the base"


def shelf_of(file: ShardFile) -> Shelf:
    """Where a file's tensors stand. Those of the base are one set, whoever needs them."""
    return Shelf(file.kind, () if file.kind == BASE else file.tasks)


def expected_shapes(manifest: Manifest) -> dict[Shelf, dict[str, tuple[int, ...]]]:
    """Name and shape of every tensor that the blocks and the private tensors call for."""
    shelves: dict[Shelf, dict[str, tuple[int, ...]]] = {}

    def put(kind: str, tasks: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
        shelves.setdefault(Shelf(kind, tasks), {}).update(shapes)

    for block in manifest.blocks:
        shapes = {tensor.name: tensor.shape for tensor in block.tensors}
        size = sum(math.prod(shape) for shape in shapes.values())
        for group in block.groups:
            if group.kind != MASKED:
                put(DENSE, group.tasks, shapes)
                continue
            put(BASE, (), shapes)
            put(UNIFIED, group.tasks, shapes)
            for task in group.tasks:
                put(MASKS, (task,), {block.name: (-(-size // 8),)})
    for entry in manifest.private:
        put(DENSE, (entry.task,), {tensor.name: tensor.shape for tensor in entry.tensors})
    return shelves


def content_problems(
    manifest: Manifest, stored: Iterable[tuple[ShardFile, Mapping[str, TensorHeader]]]
) -> Iterator[Problem]:
    """What the files hold and should not, and what they lack.

    Args:
        manifest: a sound one.
        stored: the headers of all its files.
    """
    expected = expected_shapes(manifest)
    found: dict[Shelf, dict[str, str]] = {}
    total = 0
    for file, headers in stored:
        shelf = shelf_of(file)
        places = found.setdefault(shelf, {})
        for name, header in headers.items():
            total += header.nbytes
            if name in places:
                yield Problem(
                    file.path, f"{name}, which {places[name]} holds too", "each tensor in one file"
                )
            places[name] = file.path
            yield from _tensor(file, header, expected.get(shelf, {}).get(name))
    for shelf, shapes in expected.items():
        for name in (name for name in shapes if name not in found.get(shelf, {})):
            yield Problem(name, f"nothing in {shelf}", "every tensor of the manifest's blocks")
    if total != manifest.size.bytes:
        yield Problem(
            "size.bytes",
            f"{manifest.size.bytes}",
            f"{total}, the bytes of all tensors in the files",
        )


def _tensor(
    file: ShardFile, header: TensorHeader, shape: tuple[int, ...] | None
) -> Iterator[Problem]:
    where = f"{file.path}, tensor {header.name}"
    if shape is None:
        yield Problem(where, "a tensor that is not called for", "tensors of the manifest's blocks")
        return
    if header.shape != shape:
        yield Problem(where, f"shape {list(header.shape)}", f"{list(shape)}")
    if file.kind == MASKS and header.dtype != "U8":
        yield Problem(where, f"dtype {header.dtype}", "U8, as masks have")
    if file.kind in (BASE, UNIFIED) and header.dtype not in FLOATING:
        yield Problem(where, f"dtype {header.dtype}", f"one of {', '.join(FLOATING)}")
