"""``flexmerge.json`` of adapters, which docs/adapters-flexmerge.md describes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from mergekit_ext.errors import MOST_SHOWN, CheckpointError, Problem
from mergekit_ext.flexmerge.files import attempted, digest_of, regular_file
from mergekit_ext.flexmerge.manifest import FILE_NAME, Similarity, Tasks, sharing_problems
from mergekit_ext.io.schema import Count, Digest, Items, Name, Schema, Some, Version, read
from peft_merge.io.read import CONFIG, SAFETENSORS

# A task's name is the name of its folder, and of its adapter in a PeftModel, where a dot would
# separate modules.
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_PREFIXES = ("lora_", "ia3_")


def task_name_problem(name: str) -> str | None:
    """Return why `name` cannot be the name of a task, or None when it can."""
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


def _task_name(name: str) -> str:
    if reason := task_name_problem(name):
        raise ValueError(f"a task's name: {reason}")
    return name


class AdapterFile(Schema):
    """One file of a task: its length and SHA-256."""

    name: Literal["adapter_config.json", "adapter_model.safetensors"]
    bytes: Count
    sha256: Digest


class Task(Schema):
    """One adapter of the merge; its folder has its name."""

    name: Annotated[str, AfterValidator(_task_name)]
    source: str | None
    files: Items[AdapterFile]

    def rules(self) -> Iterator[Problem]:
        """See `Schema.rules`."""
        found = [file.name for file in self.files]
        if sorted(found) != [CONFIG, SAFETENSORS]:
            yield Problem("files", ", ".join(found) or "none", f"{CONFIG} and {SAFETENSORS}")


class Group(Schema):
    """Tasks that share a block.

    Attributes:
        tasks: their names, in the manifest's order.
        similarity: of the merge that completed the group; None for one task.
        modules: whose tensors are equal in the folders of all members (or the one task's own).
    """

    tasks: Tasks
    similarity: Similarity
    modules: Items[Name]


class Block(Schema):
    """Modules with the same groups, which partition the tasks."""

    name: Name
    groups: Items[Group]


class Manifest(Schema):
    """What m adapters share."""

    format: Literal["peft-flexmerge"]
    version: Version
    kind: Literal["lora", "ia3"]
    method: dict[str, Any]
    size: dict[str, Any]
    tasks: Some[Task]
    blocks: Items[Block]

    def rules(self) -> Iterator[Problem]:
        """See `Schema.rules`."""
        yield from sharing_problems([task.name for task in self.tasks], self.blocks)


def described(folder: Path, name: str, source: str | None) -> Task:
    """Return the manifest's entry of a task whose files lie in ``folder/name``."""
    paths = [folder / name / file for file in (CONFIG, SAFETENSORS)]
    files = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": digest_of(path)}
        for path in paths
    ]
    return Task(name=name, source=source, files=tuple(map(AdapterFile.model_validate, files)))


def open_manifest(folder: str | os.PathLike[str], *, verify: bool = True) -> Manifest:
    """Read the manifest of a folder and compare its files with it.

    Args:
        folder: that a merge wrote.
        verify: also compare digests, which reads every file once.

    Raises:
        CheckpointError: something is not as docs/adapters-flexmerge.md says; it lists everything.
    """
    remedy = "Give the folder that `merge_method: flexmerge` wrote."
    manifest = read(Manifest, Path(folder) / FILE_NAME, "the manifest of a FlexMerge", remedy)
    root = Path(folder).resolve()
    files = [(f"{task.name}/{file.name}", file) for task in manifest.tasks for file in task.files]
    _, problems = attempted(
        lambda each: regular_file(root, each[0], each[1].sha256, each[1].bytes, verify), files
    )
    if problems:
        raise CheckpointError(problems[:MOST_SHOWN], str(folder))
    return manifest
