"""Write a FlexMerge checkpoint: docs/flexmerge-format.md. One block in memory at a time."""

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mergekit_ext import parallel
from mergekit_ext.flexmerge.files import digest_of, link_model
from mergekit_ext.flexmerge.layout import BlockLayout, Layout, Part
from mergekit_ext.flexmerge.manifest import FILE_NAME, SHARDS, Manifest, ShardFile
from mergekit_ext.flexmerge.merging import Merging, block_tensors
from mergekit_ext.flexmerge.plan import Plan
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.flexmerge.stored import Place, StoredGroup, stored_of
from mergekit_ext.io.headers import PACKED, TensorHeader, dtype_name
from mergekit_ext.io.journal import Finished
from mergekit_ext.io.planned_files import PlannedFile, PlannedFiles, as_bytes, split
from mergekit_ext.kernels.numerics import finite
from mergekit_ext.report.rho import Distance

# Is called with a block that is written, its groups, and how far those that were merged went.
BlockDone = Callable[[BlockLayout, Sequence[StoredGroup], Sequence[Distance]], None]
# By task, the rescaler of its masked group.
Rescale = dict[int, float]
# Files by their paths: the place of their tensors, and the tensors.
Files: TypeAlias = dict[str, tuple[Place, Sequence[TensorHeader]]]
Filed: TypeAlias = Callable[[Mapping[Place, Sequence[TensorHeader]]], Files]
_KIND = "piece"  # of the lines in the journal
DTYPES = {dtype_name(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


@dataclass
class Piece:
    """Tensors that are written and recorded together: those of a block, or a private one."""

    key: str  # of its line in the journal
    bytes: int  # that are read for it
    groups: list[Any]  # tasks and kind of each, as JSON has them
    entries: list[tuple[Place, TensorHeader]]
    # As in `entries`, each made when it is asked for.
    tensors: Iterator[tuple[Place, str, Tensor]]
    # Of masked groups, known with the tensors.
    rescale: Rescale = field(default_factory=dict)
    distances: list[Distance] = field(default_factory=list)  # of dense groups, likewise
    done: Callable[[], None] = lambda: None  # called when it is written


def write_checkpoint(
    folder: Path,
    reader: BlockReader,
    plan: Plan,
    merging: Merging,
    origin: Mapping[str, Any],
    models: Sequence[str],
    *,
    shard_size: int = 0,
    merged: BlockDone = lambda block, groups, distances: None,
    finished: Finished | None = None,
) -> Manifest:
    """Write shards, task folders with their links and indexes, and the manifest.

    The processes of a merge share out the blocks, and all call this. What `finished` knows is not
    made again: its subject is what decides the bytes of a block, but for its groups.
    """
    layout, processes = reader.layout, parallel.current()
    pieces = pieces_of(reader, plan, merging, merged)
    shards = write_pieces(folder, pieces, partial(sharded, limit=shard_size), finished)
    files = shards.described(layout.tasks)
    rescale = processes.gather_items({p.key: p.rescale for p in pieces if p.rescale})

    def completed() -> Manifest:
        manifest = _manifest(layout, plan, origin, models, files, rescale)
        _link(folder, manifest, shards.files)
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    return processes.from_main(completed)


def pieces_of(reader: BlockReader, plan: Plan, merging: Merging, merged: BlockDone) -> list[Piece]:
    """Return all that is stored of a plan: its blocks, after each of which `merged` is called."""
    layout = reader.layout
    blocks = zip(layout.blocks, plan.groups, strict=True)
    return [
        *(_of_block(reader, block, groups, merging, merged) for block, groups in blocks),
        *(_copied(reader, range(len(layout.tasks)), layout.giver, h) for h in layout.given),
        *(
            _copied(reader, (task,), task, header)
            for task, headers in enumerate(layout.private)
            for header in headers
        ),
    ]


def write_pieces(
    folder: Path, pieces: Sequence[Piece], filed: Filed, finished: Finished | None = None
) -> "Shards":
    """Write pieces into the files that `filed` makes of all their tensors; they are closed then.

    The processes of a merge share out the pieces, and all call this.
    """
    processes = parallel.current()
    entries: dict[Place, list[TensorHeader]] = {}
    for place, entry in (each for piece in pieces for each in piece.entries):
        entries.setdefault(place, []).append(entry)
    with closing(Shards(folder, filed(entries), finished or Finished())) as shards:
        processes.from_main(shards.create)
        for piece in processes.own(pieces, lambda piece: piece.bytes):
            shards.make(piece)
            piece.done()
        shards.finish()
    return shards


def sharded(entries: Mapping[Place, Sequence[TensorHeader]], limit: int) -> Files:
    """Return shards of at most `limit` bytes (0: one for each place)."""
    files: Files = {}
    numbers: Counter[str] = Counter()
    for place, own in entries.items():
        for part in split(own, limit):
            numbers[place.kind] += 1
            files[f"{SHARDS}/{place.kind}-{numbers[place.kind]:05d}.safetensors"] = place, part
    return files


def _of_block(
    reader: BlockReader,
    block: BlockLayout,
    groups: Sequence[StoredGroup],
    merging: Merging,
    merged: BlockDone,
) -> Piece:
    rescale: Rescale = {}
    distances: list[Distance] = []
    return Piece(
        block.name,
        # All models that share something, and the base.
        block.bytes(range(len(reader.layout.tasks)), merging.forced),
        [group.key for group in groups],
        [
            (place, TensorHeader.of(name, dtype, shape))
            for place, name, shape, dtype in stored_of(block, groups, merging.forced)
        ],
        block_tensors(reader, block, groups, merging, reader.read_stored, rescale, distances),
        rescale,
        distances,
        partial(merged, block, groups, distances),
    )


def _copied(reader: BlockReader, tasks: Sequence[int], giver: int, header: TensorHeader) -> Piece:
    """Return the copy of a model's tensor for `tasks`, whose values must be finite."""
    owner = reader.base.name if giver < 0 else reader.layout.tasks[giver]
    place = Place("dense", tuple(tasks))

    def copied() -> Iterator[tuple[Place, str, Tensor]]:
        tensor = reader.read_stored(giver, header.name)
        if header.dtype in DTYPES and header.dtype not in PACKED:
            finite(tensor.view(DTYPES[header.dtype]), header.name, owner)
        yield place, header.name, tensor

    return Piece(f"{owner}/{header.name}", header.nbytes, [], [(place, header)], copied())


class Shards:
    """The files of an output: planned, written tensor by tensor in any order, and digested.

    Sums are computed in the background: what is given to `write` must stay as it is until the call
    after the next.
    """

    def __init__(self, folder: Path, files: Files, finished: Finished):
        self._folder, self._finished, self._open = folder, finished, PlannedFiles(folder)
        self.files = {path: PlannedFile(path, tuple(part)) for path, (_, part) in files.items()}
        self._places = {path: place for path, (place, _) in files.items()}
        filed = ((file, entry.name) for file in self.files.values() for entry in file.entries)
        self._homes = {(self._places[file.path], name): file for file, name in filed}
        # SHA-256 of each file as long as its tensors come here in its order, and how many have.
        self._digests = {p: (hashlib.sha256(f.header), 0) for p, f in self.files.items()}
        self._behind = ThreadPoolExecutor(max_workers=1)
        self._last: Future[Any] = self._behind.submit(int)

    def create(self) -> None:
        """Leave nothing of an earlier run but these files, and make all of them."""
        self._open.start(self.files.values())

    def make(self, piece: Piece) -> None:
        """Write a piece, and record it when its sums are known; or find it written."""
        found = self._finished.found(_KIND, piece.key)
        if found and found["groups"] == piece.groups and self._holds(piece, found["crcs"]):
            piece.rescale.update(found["rescale"])
            piece.distances.extend(found["distances"])
            return
        pairs = zip(piece.entries, piece.tensors, strict=True)
        crcs = [self.write(*tensor) for _, tensor in pairs]

        def record() -> None:
            rescale = [list(pair) for pair in piece.rescale.items()]
            value = {"groups": piece.groups, "rescale": rescale, "distances": piece.distances}
            sums = [crc.result() for crc in crcs]
            self._finished.add(_KIND, piece.key, {**value, "crcs": sums})

        self._later(record)

    def write(self, place: Place, name: str, tensor: Tensor) -> Future[int]:
        """Put a tensor, or its bytes, in its place; return its CRC-32 to come."""
        file, data = self._homes[place, name], as_bytes(tensor)
        self._open.put(file, name, data)
        return self._later(self._sum, file, name, data)

    def finish(self) -> None:
        """Return when all is written and recorded, in all processes, which call this."""
        self._last.result()
        parallel.current().wait()

    def described(self, tasks: tuple[str, ...]) -> tuple[ShardFile, ...]:
        """Return the entries of the files in the manifest. All processes call this."""
        # Files whose digests are not known are read, each by one process.
        processes = parallel.current()
        whole = {
            path: digest.hexdigest()
            for path, (digest, count) in self._digests.items()
            if count == len(self.files[path].entries)
        }
        known = processes.gather_items(whole)
        left = [path for path in self.files if path not in known]
        own = processes.own(left, lambda path: self.files[path].length)
        known |= processes.gather_items({path: digest_of(self._folder / path) for path in own})
        return tuple(
            ShardFile(
                path=path,
                kind=place.kind,
                # Files of the base, which belong to none, are listed with all.
                tasks=_names(tasks, place.tasks) or tasks,
                bytes=self.files[path].length,
                sha256=known[path],
            )
            for path, place in self._places.items()
        )

    def close(self) -> None:
        """Close all files, whole or not."""
        self._behind.shutdown()
        self._open.close()

    def _holds(self, piece: Piece, crcs: Sequence[int]) -> bool:
        """Return whether the tensors of a piece lie in their places with these sums."""
        return len(piece.entries) == len(crcs) and all(
            self._open.crc(self._homes[place, entry.name], entry.name) == crc
            for (place, entry), crc in zip(piece.entries, crcs, strict=True)
        )

    def _later(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have `work` done in the background, when all but one of what was given before is."""
        before, self._last = self._last, self._behind.submit(work, *arguments)
        before.result()
        return self._last

    def _sum(self, file: PlannedFile, name: str, data: memoryview) -> int:
        digest, count = self._digests[file.path]
        if [entry.name for entry in file.entries[count : count + 1]] == [name]:
            digest.update(data)
            self._digests[file.path] = digest, count + 1
        return zlib.crc32(data)


def _link(folder: Path, manifest: Manifest, planned: Mapping[str, PlannedFile]) -> None:
    """Make the task folders, and `folder` a checkpoint itself if all share everything."""
    dense = [file for file in manifest.files if file.kind == "dense"]
    dense.sort(key=lambda file: file.tasks)
    for task in manifest.tasks:
        (folder / task.name).mkdir()
        if task.ordinary:
            files = [planned[file.path] for file in dense if task.name in file.tasks]
            link_model(folder, folder / task.name, files)
    shared = all([group.kind for group in block.groups] == ["dense"] for block in manifest.blocks)
    if shared and not manifest.private:
        link_model(folder, folder, list(planned.values()))


def _manifest(
    layout: Layout,
    plan: Plan,
    origin: Mapping[str, Any],
    models: Sequence[str],
    files: tuple[ShardFile, ...],
    rescale: Mapping[str, Rescale],
) -> Manifest:
    tasks = layout.tasks
    groups = [group for found in plan.groups for group in found if group.kind != "dense"]
    made = {task for group in groups for task in group.tasks}

    def group_of(block: BlockLayout, group: StoredGroup) -> dict[str, Any]:
        found: dict[str, Any] = {"tasks": _names(tasks, group.tasks), "kind": group.kind}
        found["similarity"] = group.similarity
        if group.kind == "masked":
            found["rescale"] = {tasks[task]: rescale[block.name][task] for task in group.tasks}
        elif group.kind == "residual":
            ranks = {tasks[task]: dict(own) for task, own in group.ranks.items()}
            found |= {"ranks": ranks, "own": group.own, "stacked": group.stacked}
        return found

    def entry(name: str, kind: str, tensors: Any, groups: Any) -> dict[str, Any]:
        return {"name": name, "kind": kind, "tensors": _infos(tensors), "groups": groups}

    blocks = [
        entry(block.name, block.kind, block.parts, [group_of(block, group) for group in groups])
        for block, groups in zip(layout.blocks, plan.groups, strict=True)
    ]
    if layout.given:
        alone = {"tasks": tasks, "kind": "dense", "similarity": None}
        blocks.append(entry("given", "given", layout.given, [alone]))
    own = zip(tasks, layout.private, strict=True)
    size = {**asdict(plan.size), "unit_bytes": round(plan.size.unit_bytes)}
    return Manifest.model_validate(
        {
            "format": "flexmerge",
            "version": 1,
            **origin,
            "size": {"models": plan.size.models, **size},
            "tasks": [
                {"name": name, "model": models[task], "ordinary": task not in made}
                for task, name in enumerate(tasks)
            ],
            "files": files,
            "blocks": blocks,
            "private": [{"task": name, "tensors": _infos(held)} for name, held in own if held],
            "task_files": {},
        }
    )


def _infos(tensors: Sequence[Part | TensorHeader]) -> list[dict[str, Any]]:
    return [{"name": each.name, "shape": tuple(each.shape)} for each in tensors]


def _names(tasks: Sequence[str], chosen: Sequence[int]) -> tuple[str, ...]:
    return tuple(tasks[task] for task in chosen)
