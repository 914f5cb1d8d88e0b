"""Write a FlexMerge checkpoint: docs/flexmerge-format.md. One block in memory at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ext.flexmerge.finite import COPIED, require_finite, require_in_range
from mergekit_ext.flexmerge.layout import FLOATING, BlockLayout, Layout, Part
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
from mergekit_ext.flexmerge.merging import Merging, block_tensors
from mergekit_ext.flexmerge.plan import Plan
from mergekit_ext.flexmerge.shards import ShardWriter, planned_shards
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.flexmerge.storage import Place, StoredGroup, stored_of
from mergekit_ext.flexmerge.task_folders import link_model
from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.io.journal import Finished
from mergekit_ext.io.planned import Entry
from mergekit_ext.parallel import Ranks

# Kinds of lines in the journal.
_BLOCK, _PRIVATE = "block", "private"
Rescale = dict[int, float]


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from, for its manifest."""

    generator: str
    method: Mapping[str, Any]
    base_model: str
    models: Sequence[str]


def write_checkpoint(
    folder: Path,
    reader: BlockReader,
    plan: Plan,
    merging: Merging,
    provenance: Provenance,
    *,
    shard_size: int = 0,
    merged: Callable[[BlockLayout, Sequence[StoredGroup]], None] = lambda block, groups: None,
    finished: Finished | None = None,
    ranks: Ranks | None = None,
) -> Manifest:
    """Write shards, task folders with their links and indexes, and the manifest.

    Args:
        folder: exists; nothing of it counts before this function has returned. What an earlier
            run with the same finished has finished there is not made again.
        reader: reads the blocks of the base and the models.
        plan: which tasks share what.
        merging: how groups are merged.
        provenance: for the manifest.
        shard_size: the largest size of a file in bytes; 0 for one file a set of tasks.
        merged: called after each block, in the process that did it.
        finished: which blocks are finished. Their subject is what decides the bytes of a block,
            but for its groups.
        ranks: the processes that share out the blocks, all of which call this.

    Raises:
        MergeError: a merged tensor is not finite in its dtype.
        NonFiniteError: a private tensor holds NaN or infinity.
        OSError: a file cannot be read or written.
    """
    writing = _Writing(
        folder, reader, plan, merging, provenance, shard_size, finished or Finished(), ranks
    )
    try:
        return writing.run(merged)
    finally:
        writing.shards.close()


def _named(layout: Layout, place: Place) -> Place:
    """Return a place by the names of its tasks."""
    return Place(place.kind, tuple(layout.tasks[task] for task in place.tasks))


def _block_entries(
    layout: Layout, block: BlockLayout, groups: Sequence[StoredGroup], merging: Merging
) -> Iterator[tuple[Place, Entry]]:
    for place, name, shape, dtype in stored_of(block, groups, merging.forced):
        yield _named(layout, place), Entry.of(name, dtype, shape)


def _private_entry(header: TensorHeader) -> Entry:
    return Entry(header.name, header.dtype, tuple(header.shape), header.nbytes)


class _Writing:
    """One checkpoint on its way, in one of the processes that write it."""

    def __init__(
        self,
        folder: Path,
        reader: BlockReader,
        plan: Plan,
        merging: Merging,
        provenance: Provenance,
        shard_size: int,
        finished: Finished,
        ranks: Ranks | None,
    ):
        self._folder, self._reader, self._layout = folder, reader, reader.layout
        self._plan, self._merging, self._provenance = plan, merging, provenance
        self._finished, self._ranks = finished, ranks or Ranks()
        layout = self._layout
        declared: dict[Place, list[Entry]] = {}
        for block, groups in zip(layout.blocks, plan.groups, strict=True):
            for place, entry in _block_entries(layout, block, groups, merging):
                declared.setdefault(place, []).append(entry)
        for task, headers in zip(layout.tasks, layout.private, strict=True):
            for header in headers:
                declared.setdefault(Place(DENSE, (task,)), []).append(_private_entry(header))
        shards = planned_shards(declared, layout.tasks, shard_size)
        self.shards = ShardWriter(folder, shards, whole=self._ranks.size == 1)

    def run(self, merged: Callable[[BlockLayout, Sequence[StoredGroup]], None]) -> Manifest:
        """Write everything; all processes come here."""
        self._ranks.from_main(self._begin)
        rescale = self._pieces(merged)
        files = self.shards.finish(self._ranks)
        return self._ranks.from_main(lambda: self._complete(files, rescale))

    def _begin(self) -> None:
        """Leave nothing of an earlier run but shards: the rest is made last, and quickly."""
        for path in self._folder.iterdir():
            if path.name != SHARDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.shards.create()

    def _pieces(
        self, merged: Callable[[BlockLayout, Sequence[StoredGroup]], None]
    ) -> dict[str, Rescale]:
        """Write what is missing; return the rescalers of every block, in every process."""
        layout, forced = self._layout, self._merging.forced
        blocks = list(zip(layout.blocks, self._plan.groups, strict=True))
        private = [
            (task, header) for task, headers in enumerate(layout.private) for header in headers
        ]
        # A block costs what is read of it: all models that share something, and the base.
        sizes = [
            *(block.bytes(range(len(layout.tasks)), forced) for block, _ in blocks),
            *(header.nbytes for _, header in private),
        ]
        owners = self._ranks.share(sizes)
        rescale = {}
        for (block, groups), owner in zip(blocks, owners, strict=False):
            if owner == self._ranks.rank:
                rescale[block.name] = self._block(block, groups)
                merged(block, groups)
        for (task, header), owner in zip(private, owners[len(blocks) :], strict=True):
            if owner == self._ranks.rank:
                self._private(task, header)
        self.shards.wait()
        return {name: found for part in self._ranks.gather(rescale) for name, found in part.items()}

    def _block(self, block: BlockLayout, groups: Sequence[StoredGroup]) -> Rescale:
        entries = list(_block_entries(self._layout, block, groups, self._merging))
        shared = [[list(group.tasks), group.kind] for group in groups]
        found = self._finished.found(_BLOCK, block.name, _is_block)
        if found and found["groups"] == shared and self.shards.holds(entries, found["crcs"]):
            return dict(found["rescale"])
        rescale: Rescale = {}
        for place, name, tensor in block_tensors(
            self._reader, block, groups, self._merging, self._own, rescale
        ):
            self.shards.write(_named(self._layout, place), name, tensor)
        value = {"groups": shared, "rescale": [list(item) for item in rescale.items()]}
        self._record(_BLOCK, block.name, len(entries), value)
        return rescale

    def _own(self, task: int, part: Part) -> Tensor:
        """Return one task's own tensor: its very bytes, unless another dtype is asked for."""
        tensor = self._reader.read_stored(task, part.name)
        forced, dtype = self._merging.forced, part.dtypes[task]
        if forced is not None and forced != dtype:
            tensor = tensor.view(dtype).to(forced)
            require_in_range(tensor, part.name)
        return tensor

    def _private(self, task: int, header: TensorHeader) -> None:
        """Copy a tensor that no other task has, if its values are finite."""
        owner = self._layout.tasks[task]
        place, entry = Place(DENSE, (owner,)), _private_entry(header)
        name = f"{owner}/{header.name}"
        found = self._finished.found(_PRIVATE, name, _is_piece)
        if found and self.shards.holds([(place, entry)], found["crcs"]):
            return
        tensor = self._reader.read_stored(task, header.name)
        if (dtype := (FLOATING | COPIED).get(header.dtype)) is not None:
            require_finite(tensor.view(dtype), header.name, owner)
        self.shards.write(place, header.name, tensor)
        self._record(_PRIVATE, name, 1, {})

    def _record(self, kind: str, key: str, count: int, value: Mapping[str, Any]) -> None:
        def add(crcs: list[int]) -> None:
            if len(crcs) != count:
                raise AssertionError(f"{key}: {len(crcs)} of {count} tensors were written")
            self._finished.add(kind, key, {**value, "crcs": crcs})

        self.shards.done(add)

    def _complete(self, files: tuple[ShardFile, ...], rescale: Mapping[str, Rescale]) -> Manifest:
        layout, plan, provenance = self._layout, self._plan, self._provenance
        ordinary, size = self._link(), plan.size
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
                Block(
                    name=block.name,
                    kind=block.kind,
                    tensors=_infos(block.parts),
                    groups=tuple(_group(layout, group, rescale[block.name]) for group in groups),
                )
                for block, groups in zip(layout.blocks, plan.groups, strict=True)
            ),
            private=tuple(
                Private(task=name, tensors=_infos(headers))
                for name, headers in zip(layout.tasks, layout.private, strict=True)
                if headers
            ),
            task_files={},
        )
        (self._folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _link(self) -> set[str]:
        """Make the task folders; return the tasks that are ordinary checkpoints."""
        folder, layout, plan = self._folder, self._layout, self._plan
        groups = [group for found in plan.groups for group in found]
        masked = {task for group in groups if group.kind == MASKED for task in group.tasks}
        sets = {tuple(layout.tasks[task] for task in group.tasks) for group in groups}
        sets |= {(name,) for name in layout.tasks}
        ordinary = set()
        for task, name in enumerate(layout.tasks):
            (folder / name).mkdir()
            if task not in masked:
                ordinary.add(name)
                places = [Place(DENSE, names) for names in sorted(sets) if name in names]
                files = [file for place in places for file in self.shards.where(place)]
                link_model(folder, folder / name, files)
        whole = all(len(found) == 1 and found[0].kind == DENSE for found in plan.groups)
        if whole and not any(layout.private):
            link_model(folder, folder, self.shards.where(Place(DENSE, layout.tasks)))
        return ordinary


def _is_piece(value: Any) -> bool:
    """Return whether `_record` may have recorded it."""
    sums = value.get("crcs") if isinstance(value, dict) else None
    return isinstance(sums, list) and all(type(crc) is int for crc in sums)


def _is_block(value: Any) -> bool:
    return _is_piece(value) and _are_pairs(value.get("rescale")) and "groups" in value


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and type(pair[0]) is int
        and type(pair[1]) is float
        and math.isfinite(pair[1])
        for pair in value
    )


def _infos(tensors: Sequence[Part] | Sequence[TensorHeader]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=each.name, shape=tuple(each.shape)) for each in tensors)


def _group(layout: Layout, group: StoredGroup, rescale: Rescale) -> Group:
    tasks = tuple(layout.tasks[task] for task in group.tasks)
    if group.kind == DENSE:
        return Group(tasks=tasks, kind=DENSE, similarity=group.similarity)
    factors = {layout.tasks[task]: rescale[task] for task in group.tasks}
    return Group(tasks=tasks, kind=MASKED, similarity=group.similarity, rescale=factors)
