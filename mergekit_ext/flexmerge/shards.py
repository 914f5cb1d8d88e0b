"""The files under ``shards/``: planned, written tensor by tensor, and digested."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mergekit_ext.flexmerge.files import digest_of
from mergekit_ext.flexmerge.manifest import SHARDS, ShardFile
from mergekit_ext.flexmerge.storage import Place
from mergekit_ext.io.planned import Entry, PlannedFile, PlannedFiles, as_bytes, split
from mergekit_ext.parallel import Ranks


@dataclass(frozen=True)
class Shard:
    """One planned file of the tensors of one place; `tasks`: those that it is listed with."""

    file: PlannedFile
    place: Place
    tasks: tuple[str, ...]


def planned_shards(
    declared: Mapping[Place, Sequence[Entry]], tasks: tuple[str, ...], shard_size: int
) -> list[Shard]:
    """Cut the tensors of each place into files of at most `shard_size` bytes.

    Args:
        declared: what is stored, in order.
        tasks: all of them: files of the base, which belong to none, are listed with all.
        shard_size: 0 for one file a place.
    """
    shards: list[Shard] = []
    counts: dict[str, int] = {}
    for place, entries in declared.items():
        for part in split(entries, shard_size):
            counts[place.kind] = counts.get(place.kind, 0) + 1
            path = f"{SHARDS}/{place.kind}-{counts[place.kind]:05d}.safetensors"
            shards.append(Shard(PlannedFile(path, part), place, place.tasks or tasks))
    return shards


class _Digest:
    """SHA-256 of a file on the way, as long as its tensors come in its order."""

    def __init__(self, file: PlannedFile):
        self._names = iter([entry.name for entry in file.entries])
        self._left = len(file.entries)
        self._sum = hashlib.sha256(file.header)

    def expects(self, name: str) -> bool:
        return next(self._names, None) == name

    def update(self, data: memoryview) -> None:
        self._sum.update(data)
        self._left -= 1

    @property
    def value(self) -> str | None:
        return None if self._left else self._sum.hexdigest()


class ShardWriter:
    """Writes the tensors of planned shards, in any order, holding none of them.

    Digests are computed in the background: what is given to `write` must stay as it is until the
    call after the next.

    Args:
        folder: of the checkpoint.
        shards: its files; `create` makes them, once for all processes.
        whole: whether this process writes all tensors. Then files whose tensors come in their
            order need not be read for their digests.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], *, whole: bool = True):
        self._folder, self._shards = folder, shards
        self._files = PlannedFiles(folder)
        self._sets: dict[Place, list[PlannedFile]] = {}
        for shard in shards:
            self._sets.setdefault(shard.place, []).append(shard.file)
        self._places = {
            (shard.place, entry.name): shard.file
            for shard in shards
            for entry in shard.file.entries
        }
        self._digests = {s.file.path: _Digest(s.file) for s in shards} if whole else {}
        self._behind = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None
        self._crcs: list[int] = []

    def create(self) -> None:
        """Make the files that are not there yet; remove what belongs to no shard."""
        home = self._folder / SHARDS
        home.mkdir(exist_ok=True)
        known = {self._folder / shard.file.path for shard in self._shards}
        for path in home.iterdir():
            if path not in known:
                path.unlink()
        self._files.create(shard.file for shard in self._shards)

    def write(self, place: Place, name: str, tensor: Tensor) -> None:
        """Put a tensor, or its bytes, in its place; its size must be that declared."""
        file = self._places[place, name]
        data = as_bytes(tensor)
        digest = self._digests.get(file.path)
        if digest is not None and not digest.expects(name):
            del self._digests[file.path]
            digest = None
        before, self._last = self._last, self._behind.submit(self._sum, data, digest)
        self._files.put(file, name, data)
        if before is not None:
            before.result()

    def done(self, note: Callable[[list[int]], None]) -> None:
        """Have `note` called, in the background, when what was written since the last call is
        summed up: with the CRC-32 of each tensor, in order."""
        before, self._last = self._last, self._behind.submit(self._hand_over, note)
        if before is not None:
            before.result()

    def holds(self, entries: Iterable[tuple[Place, Entry]], crcs: Sequence[int]) -> bool:
        """Return whether these tensors lie in their places with these sums."""
        wanted = list(entries)
        return len(wanted) == len(crcs) and all(
            self._files.crc(self._places[place, entry.name], entry.name) == crc
            for (place, entry), crc in zip(wanted, crcs, strict=True)
        )

    def finish(self, ranks: Ranks) -> tuple[ShardFile, ...]:
        """Close the files; return their entries in the manifest. All processes call this.

        Files whose digests are not known are read, each by one process.
        """
        self.wait()
        self.close()
        known = {path: digest.value for path, digest in self._digests.items()}
        left = [shard.file for shard in self._shards if not known.get(shard.file.path)]
        owners = ranks.share([file.length for file in left])
        ranks.wait()
        for file, owner in zip(left, owners, strict=True):
            if owner == ranks.rank:
                known[file.path] = digest_of(self._folder / file.path)
        for others in ranks.gather(known):
            known.update({path: digest for path, digest in others.items() if digest})
        return tuple(
            ShardFile(
                path=s.file.path,
                kind=s.place.kind,
                tasks=s.tasks,
                bytes=s.file.length,
                sha256=known[s.file.path] or "",
            )
            for s in self._shards
        )

    def where(self, place: Place) -> Sequence[tuple[str, Sequence[Entry]]]:
        """Return the files of one place, with what is in each."""
        return [(file.path, file.entries) for file in self._sets.get(place, ())]

    def wait(self) -> None:
        """Wait until what was given to `done` has been called."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Close all files, whole or not."""
        self._behind.shutdown()
        self._files.close()

    def _sum(self, data: memoryview, digest: _Digest | None) -> None:
        self._crcs.append(zlib.crc32(data))
        if digest is not None:
            digest.update(data)

    def _hand_over(self, note: Callable[[list[int]], None]) -> None:
        crcs, self._crcs = self._crcs, []
        note(crcs)
