"""flexmerge.json: which tasks share what. docs/adapters-flexmerge.md describes it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = "peft-flexmerge"
VERSION = 1
FILE_NAME = "flexmerge.json"

# A task's name is the name of its folder, and of its adapter in a PeftModel, where a dot would
# separate modules.
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_PREFIXES = ("lora_", "ia3_")
_READ = 1 << 22


@dataclass(frozen=True)
class StoredFile:
    """One file of a task: its length and SHA-256."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> StoredFile:
        """What lies at `path`."""
        digest = hashlib.sha256()
        with path.open("rb") as content:
            while part := content.read(_READ):
                digest.update(part)
        return cls(path.name, path.stat().st_size, digest.hexdigest())


@dataclass(frozen=True)
class Task:
    """One adapter of the merge; its folder has its name."""

    name: str
    source: str | None
    files: tuple[StoredFile, ...]


@dataclass(frozen=True)
class Group:
    """Tasks that share a block.

    Attributes:
        tasks: their names, in the manifest's order.
        similarity: of the merge that completed the group; None for one task.
        modules: whose tensors are equal in the folders of all members (or the one task's own).
    """

    tasks: tuple[str, ...]
    similarity: float | None
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Modules with the same groups, which partition the tasks."""

    name: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Manifest:
    """What m adapters share. Building one checks nothing: `parse.from_json` does."""

    kind: str
    method: Mapping[str, Any]
    size: Mapping[str, Any]
    tasks: tuple[Task, ...]
    blocks: tuple[Block, ...]

    def to_json(self) -> str:
        """The text of flexmerge.json."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def task_name_problem(name: str) -> str | None:
    """Why `name` cannot be the name of a task, or None when it can."""
    if not _TASK_NAME.fullmatch(name):
        return (
            "only A-Z, a-z, 0-9, '_' and '-' are possible, 100 at most, and a letter or digit is "
            "first"
        )
    if any(name in prefix for prefix in _PREFIXES):
        return "PEFT takes it for a part of its own names"
    import torch

    if hasattr(torch.nn.ModuleDict, name) or hasattr(torch.nn.ParameterDict, name):
        return "torch's modules, which hold adapters by name, have an attribute of this name"
    return None
