"""The result of a FlexMerge, and its folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ext.flexmerge.manifest import FILE_NAME
from mergekit_ext.io.staging import new_folder
from peft_merge.adapter import Adapter
from peft_merge.flexmerge.manifest import Block, Group, Manifest, described
from peft_merge.flexmerge.report import card, task_card
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
        """Return the manifest of the tasks' folders in `folder`."""
        sources = {item["name"]: item["source"] for item in self.report["adapters"]}
        tasks = tuple(described(folder, a.name, sources[a.name]) for a in self.adapters)
        options = ("space", "seed", "rank")
        disk = sum(file.bytes for task in tasks for file in task.files)
        blocks = tuple(
            Block(
                name=block["name"],
                groups=tuple(
                    Group(
                        tasks=tuple(group["tasks"]),
                        similarity=group["similarity"],
                        modules=tuple(group["modules"]),
                    )
                    for group in block["groups"]
                ),
            )
            for block in self.report["blocks"]
        )
        return Manifest(
            format="peft-flexmerge",
            version=1,
            kind=self.report["kind"],
            method={**self.report["flexmerge"], **{name: self.report[name] for name in options}},
            size={**self.report["size"], "disk_bytes": disk},
            tasks=tasks,
            blocks=blocks,
        )


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
