"""Writing a FlexMerge checkpoint: docs/flexmerge-format.md. One block in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ext.flexmerge.declared import Key, Order, declared, names_of
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.links import link_model
from mergekit_ext.flexmerge.manifest import (
    DENSE,
    FILE_NAME,
    MASKED,
    SHARDS,
    Block,
    Group,
    Manifest,
    Private,
    ShardFile,
    Size,
    Task,
    TensorInfo,
)
from mergekit_ext.flexmerge.notes import Notes
from mergekit_ext.flexmerge.pieces import Pieces, Rescale
from mergekit_ext.flexmerge.plan import Plan, StoredGroup
from mergekit_ext.flexmerge.shards import ShardWriter, planned_shards
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.parallel.ranks import Ranks


@dataclass(frozen=True)
class Provenance:
    """What the manifest says of where a checkpoint comes from."""

    generator: str
    method: Mapping[str, Any]
    base_model: str
    models: Sequence[str]


def write_checkpoint(
    folder: Path,
    reader: BlockReader,
    order: Order,
    provenance: Provenance,
    merged: Callable[[BlockLayout, Sequence[StoredGroup]], None] = lambda block, groups: None,
    notes: Notes | None = None,
    ranks: Ranks | None = None,
) -> Manifest:
    """Write shards, task folders with their links and indexes, and the manifest.

    Args:
        folder: exists; nothing of it counts before this function has returned. What an earlier
            run with the same notes has finished there is not made again.
        reader: reads the blocks of the base and the models.
        order: what to write.
        provenance: for the manifest.
        merged: told of each block that is done, in the process that did it.
        notes: which blocks are finished. Their subject is what decides the bytes of a block,
            but for its groups.
        ranks: the processes that share out the blocks, all of which call this.

    Raises:
        MergeError: a merged tensor is not finite in its dtype.
        NonFiniteError: a private tensor holds NaN or infinity.
        OSError: a file cannot be read or written.
    """
    ranks = ranks or Ranks()
    shards = planned_shards(declared(reader.layout, order), order.shard_size)
    writer = ShardWriter(folder, shards, whole=ranks.size == 1)
    try:
        ranks.from_main(lambda: _begin(folder, writer))
        rescale = Pieces(reader, order, writer, notes or Notes(), ranks).write(merged)
        files = writer.finish(ranks)
    finally:
        writer.close()
    return ranks.from_main(
        lambda: _complete(folder, reader.layout, order.plan, writer, provenance, files, rescale)
    )


def _begin(folder: Path, writer: ShardWriter) -> None:
    """Leave nothing of an earlier run but shards: the rest is made last, and quickly."""
    for path in folder.iterdir():
        if path.name != SHARDS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    writer.create()


def _complete(
    folder: Path,
    layout: Layout,
    plan: Plan,
    shards: ShardWriter,
    provenance: Provenance,
    files: tuple[ShardFile, ...],
    rescale: Mapping[str, Rescale],
) -> Manifest:
    ordinary = _link(folder, layout, plan, shards)
    size = plan.size
    manifest = Manifest(
        format="flexmerge",
        version=1,
        generator=provenance.generator,
        method=dict(provenance.method),
        base_model=provenance.base_model,
        size=Size(
            models=size.models,
            bytes=size.bytes,
            unit_bytes=round(size.unit_bytes),
            private_bytes=size.private_bytes,
        ),
        tasks=tuple(
            Task(name=name, model=model, ordinary=name in ordinary)
            for name, model in zip(layout.tasks, provenance.models, strict=True)
        ),
        files=files,
        blocks=tuple(
            _block_entry(layout, block, groups, rescale[block.name])
            for block, groups in zip(layout.blocks, plan.groups, strict=True)
        ),
        private=tuple(
            Private(
                task=name,
                tensors=tuple(TensorInfo(name=h.name, shape=tuple(h.shape)) for h in headers),
            )
            for name, headers in zip(layout.tasks, layout.private, strict=True)
            if headers
        ),
    )
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _block_entry(
    layout: Layout, block: BlockLayout, groups: Sequence[StoredGroup], rescale: Rescale
) -> Block:
    entries = []
    for group in groups:
        masked = group.kind == MASKED
        factors = {layout.tasks[task]: rescale[task] for task in group.tasks if masked}
        entries.append(
            Group(
                tasks=names_of(layout, group),
                kind=MASKED if masked else DENSE,
                similarity=group.similarity,
                **({"rescale": factors} if masked else {}),
            )
        )
    return Block(
        name=block.name,
        kind=block.kind,
        tensors=tuple(TensorInfo(name=part.name, shape=part.shape) for part in block.parts),
        groups=tuple(entries),
    )


def _link(folder: Path, layout: Layout, plan: Plan, shards: ShardWriter) -> set[str]:
    """Make the task folders; return the tasks that are ordinary checkpoints."""
    masked = {
        layout.tasks[task]
        for groups in plan.groups
        for group in groups
        if group.kind == MASKED
        for task in group.tasks
    }
    sets = {names_of(layout, group) for groups in plan.groups for group in groups}
    sets |= {(name,) for name in layout.tasks}
    ordinary = set()
    for name in layout.tasks:
        home = folder / name
        home.mkdir()
        if name in masked:
            continue
        ordinary.add(name)
        keys: list[Key] = [(DENSE, names) for names in sorted(sets) if name in names]
        link_model(folder, home, [file for key in keys for file in shards.where(key)])
    whole = all(len(groups) == 1 and groups[0].kind == DENSE for groups in plan.groups)
    if whole and not any(layout.private):
        link_model(folder, folder, list(shards.where((DENSE, layout.tasks))))
    return ordinary
