"""The manifest of a FlexMerge checkpoint, as data: docs/flexmerge-format.md, "The manifest"."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = "flexmerge"
VERSION = 1
FILE_NAME = "flexmerge.json"
SHARDS = "shards"

DENSE, BASE, UNIFIED, MASKS = "dense", "base", "unified", "masks"
FILE_KINDS = (DENSE, BASE, UNIFIED, MASKS)
MASKED = "masked"
GROUP_KINDS = (DENSE, MASKED)

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_TASK_NAME = 100
# What lies beside the tasks' folders under a fixed name.
_TAKEN = frozenset(
    {SHARDS, FILE_NAME, "flexmerge_analysis.json", "readme.md", "mergekit_config.yml"}
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor under its ordinary name. Dtypes are in the shards."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Tasks that share one block.

    Attributes:
        tasks: their names, in the order of the manifest's tasks.
        kind: ``dense`` (final values are stored) or ``masked`` (a unified vector and masks are).
        similarity: that of the merge that completed the group; None for one task.
        rescale: the rescaler of each member of a masked group; empty for a dense one.
    """

    tasks: tuple[str, ...]
    kind: str = DENSE
    similarity: float | None = None
    rescale: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """A block, its tensors in the order in which they are concatenated, and who shares it."""

    name: str
    kind: str
    tensors: tuple[TensorInfo, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Task:
    """One model of the checkpoint. `ordinary`: its folder is a Hugging Face checkpoint."""

    name: str
    model: str
    ordinary: bool


@dataclass(frozen=True)
class ShardFile:
    """One file of weights. `path` is relative to the manifest's folder."""

    path: str
    kind: str
    tasks: tuple[str, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Private:
    """The tensors that only this task has, or has in this shape."""

    task: str
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Size:
    """What is stored; ``models = (bytes - private_bytes) / unit_bytes``."""

    models: float
    bytes: int
    unit_bytes: int
    private_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What the models of a checkpoint share, and where it is stored.

    Building one checks nothing: `from_json` does.

    Attributes:
        task_files: the digests of the files beside weights in the folders that are Hugging Face
            checkpoints; empty where an older version has written the manifest.
    """

    generator: str
    method: Mapping[str, Any]
    base_model: str
    size: Size
    tasks: tuple[Task, ...]
    files: tuple[ShardFile, ...]
    blocks: tuple[Block, ...]
    private: tuple[Private, ...] = ()
    task_files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of ``flexmerge.json``.

        Raises:
            ValueError: a number is not finite.
        """
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        for block in content["blocks"]:
            for group in block["groups"]:
                if group["kind"] == DENSE:
                    del group["rescale"]
        return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read a manifest and check every rule that needs no other file.

        Args:
            text: JSON.
            where: what the text is, for messages: the path of the file.

        Raises:
            CheckpointError: the text is not a manifest of version 1, or breaks a rule. Values of
                the wrong type or range are listed first; rules that relate one value to another
                are checked once there are none.
        """
        from mergekit_ext.flexmerge.parse import parse

        return parse(text, where)


def task_name_problem(name: str) -> str | None:
    """Why `name` cannot be the name of a task, or None when it can.

    A task's name is the name of its folder. Besides the names that the format reserves, those of
    the files beside that folder are taken.
    """
    if not name:
        return "it is empty"
    if len(name) > _LONGEST_TASK_NAME:
        return f"it has {len(name)} characters, more than {_LONGEST_TASK_NAME}"
    if not _TASK_NAME.fullmatch(name):
        return "only A-Z, a-z, 0-9, '.', '_' and '-' are possible, and a letter or digit is first"
    if name.lower() in _TAKEN:
        return "the checkpoint has a file or folder of this name"
    return None


def colliding_names(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names, the later one second, that some file systems cannot keep apart.

    Those are equal names, and names that differ in case only.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = name.casefold()
        if key in seen:
            yield seen[key], name
        else:
            seen[key] = name
