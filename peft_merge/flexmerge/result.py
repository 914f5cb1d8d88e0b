"""The result of a FlexMerge, and its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_merge.adapter import Adapter
from peft_merge.flexmerge.card import card, task_card
from peft_merge.flexmerge.manifest import FILE_NAME, Block, Group, Manifest, StoredFile, Task
from peft_merge.io.place import new_folder
from peft_merge.io.tensors import CONFIG, SAFETENSORS
from peft_merge.io.write import CARD, MERGE_CONFIG, REPORT, fill_folder


@dataclass(frozen=True)
class FlexMerged:
    """m adapters, some of whose tensors are the same.

    Attributes:
        adapters: one for each task, in the order of the inputs.
        report: what `merge_report.json` holds: size, groups, similarities, ranks and errors.
        config: the merge as YAML.
    """

    adapters: tuple[Adapter, ...]
    report: dict[str, Any]
    config: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder with one PEFT folder for each task. It appears when it is complete.

        Raises:
            ConfigError: there is something at `path`, or it cannot be written.
        """
        with new_folder(path, "writing this FlexMerge") as folder:
            for adapter in self.adapters:
                own = folder / adapter.name
                own.mkdir()
                fill_folder(adapter, own, card=task_card(adapter, self.report))
            manifest = self.manifest(folder)
            (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
            _write(folder / REPORT, json.dumps(self.report, indent=1))
            _write(folder / MERGE_CONFIG, self.config.rstrip())
            _write(folder / CARD, card(self.adapters, self.report, self.config).rstrip())

    def manifest(self, folder: Path) -> Manifest:
        """Of the tasks' folders in `folder`."""
        sources = {item["name"]: item["source"] for item in self.report["adapters"]}
        tasks = tuple(
            Task(
                adapter.name,
                sources[adapter.name],
                tuple(
                    StoredFile.of(folder / adapter.name / name) for name in (CONFIG, SAFETENSORS)
                ),
            )
            for adapter in self.adapters
        )
        options = ("space", "seed", "rank")
        method = {**self.report["flexmerge"], **{name: self.report[name] for name in options}}
        disk = sum(file.bytes for task in tasks for file in task.files)
        return Manifest(
            kind=self.report["kind"],
            method=method,
            size={**self.report["size"], "disk_bytes": disk},
            tasks=tasks,
            blocks=_blocks(self.report["blocks"]),
        )


def _blocks(found: Sequence[Mapping[str, Any]]) -> tuple[Block, ...]:
    return tuple(
        Block(
            block["name"],
            tuple(
                Group(tuple(group["tasks"]), group["similarity"], tuple(group["modules"]))
                for group in block["groups"]
            ),
        )
        for block in found
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
