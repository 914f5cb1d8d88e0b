"""Which process writes which block, and which blocks need not be written again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergekit_ext.flexmerge.block_writer import write_block
from mergekit_ext.flexmerge.declared import Key, Order, block_entries, private_entries
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.notes import Notes
from mergekit_ext.flexmerge.plan import StoredGroup
from mergekit_ext.flexmerge.private import stored_private
from mergekit_ext.flexmerge.shards import ShardWriter
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.io.planned import Entry
from mergekit_ext.parallel.ranks import Ranks

# Kinds of lines in the journal.
_BLOCK, _PRIVATE = "block", "private"
Rescale = dict[int, float]


class Pieces:
    """The blocks and private tensors that this process writes, and those that are written."""

    def __init__(
        self, reader: BlockReader, order: Order, shards: ShardWriter, notes: Notes, ranks: Ranks
    ):
        self._reader, self._order, self._shards = reader, order, shards
        self._notes, self._ranks = notes, ranks

    def write(
        self, merged: Callable[[BlockLayout, Sequence[StoredGroup]], None]
    ) -> dict[str, Rescale]:
        """Write what is missing; return the rescalers of every block, in every process."""
        layout, forced = self._reader.layout, self._order.forced
        blocks = list(zip(layout.blocks, self._order.plan.groups, strict=True))
        private = [
            (task, key, entry)
            for task in range(len(layout.tasks))
            for key, entry in private_entries(layout, task)
        ]
        # A block costs what is read of it: all models that share something, and the base.
        sizes = [
            *(block.bytes(range(len(layout.tasks)), forced) for block, _ in blocks),
            *(entry.nbytes for _, _, entry in private),
        ]
        owners = self._ranks.share(sizes)
        rescale = {}
        for (block, groups), owner in zip(blocks, owners, strict=False):
            if owner == self._ranks.rank:
                rescale[block.name] = self._block(block, groups)
                merged(block, groups)
        for (task, key, entry), owner in zip(private, owners[len(blocks) :], strict=True):
            if owner == self._ranks.rank:
                self._private(task, key, entry)
        self._shards.wait()
        return {name: found for part in self._ranks.gather(rescale) for name, found in part.items()}

    def _block(self, block: BlockLayout, groups: Sequence[StoredGroup]) -> Rescale:
        layout, order = self._reader.layout, self._order
        entries = list(block_entries(layout, block, groups, order.forced))
        shared = [[list(group.tasks), group.kind] for group in groups]
        noted = self._notes.found(_BLOCK, block.name, _is_block)
        if noted and noted["groups"] == shared and self._shards.holds(entries, noted["crcs"]):
            return dict(noted["rescale"])
        rescale = write_block(block, groups, self._reader, order, self._shards)
        value = {"groups": shared, "rescale": [list(item) for item in rescale.items()]}
        self._note(_BLOCK, block.name, len(entries), value)
        return rescale

    def _private(self, task: int, key: Key, entry: Entry) -> None:
        name = f"{self._reader.layout.tasks[task]}/{entry.name}"
        noted = self._notes.found(_PRIVATE, name, _is_piece)
        if noted and self._shards.holds([(key, entry)], noted["crcs"]):
            return
        header = self._reader.layout.private[task]
        (found,) = (h for h in header if h.name == entry.name)
        self._shards.write(key, entry.name, stored_private(self._reader, task, found))
        self._note(_PRIVATE, name, 1, {})

    def _note(self, kind: str, key: str, count: int, value: Mapping[str, Any]) -> None:
        def add(crcs: list[int]) -> None:
            if len(crcs) != count:
                raise AssertionError(f"{key}: {len(crcs)} of {count} tensors were written")
            self._notes.add(kind, key, {**value, "crcs": crcs})

        self._shards.done(add)


def _is_piece(value: Any) -> bool:
    """Whether `_note` may have noted it."""
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
