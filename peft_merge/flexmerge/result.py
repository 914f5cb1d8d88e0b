"""The result of a FlexMerge of adapters, and its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ext.flexmerge.manifest import FILE_NAME
from mergekit_ext.io.staging import new_folder
from mergekit_ext.report.card import table
from peft_merge.adapter import Adapter
from peft_merge.flexmerge.manifest import Block, Group, Manifest, described
from peft_merge.io.write import CARD, MERGE_CONFIG, PROJECT, REPORT, card, fill_folder, page


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
                made = {"method": "flexmerge", "adapters": self.report["adapters"]}
                text = card(adapter, None, made if self._shared(adapter.name) else {})
                (folder / adapter.name).mkdir()
                fill_folder(adapter, folder / adapter.name, {CARD: text})
            texts = {
                FILE_NAME: self.manifest(folder).to_json(),
                REPORT: json.dumps(self.report, indent=1),
                MERGE_CONFIG: self.config,
                CARD: self._card(),
            }
            for name, text in texts.items():
                (folder / name).write_text(text.rstrip() + "\n", encoding="utf-8")

    def manifest(self, folder: Path) -> Manifest:
        """Return the manifest of the tasks' folders in `folder`."""
        report = self.report
        sources = {item["name"]: item["source"] for item in report["adapters"]}
        tasks = tuple(described(folder, a.name, sources[a.name]) for a in self.adapters)
        disk = sum(file.bytes for task in tasks for file in task.files)
        options = {name: report[name] for name in ("space", "seed", "rank")}
        return Manifest(
            format="peft-flexmerge",
            version=1,
            kind=report["kind"],
            method={**report["flexmerge"], **options},
            size={**report["size"], "disk_bytes": disk},
            tasks=tasks,
            blocks=tuple(
                Block(name=block["name"], groups=tuple(map(_group, block["groups"])))
                for block in report["blocks"]
            ),
        )

    def _card(self) -> str:
        """Return README.md: what the folder holds, how much it takes, how to load it."""
        size, adapters = self.report["size"], self.adapters
        rows = [[f"`{a.name}`", str(len(a.infos)), str(self._shared(a.name))] for a in adapters]
        apart = size["unit_bytes"] * len(adapters) + size["private_bytes"]
        algorithm = self.report["flexmerge"]["algorithm"]
        return page(
            f"{len(adapters)} adapters in the space of {size['adapters']:.4g}",
            ["peft", self.report["kind"], "merge", "mergekit-ext"],
            [
                f"Made with `flexmerge` (`{algorithm}`) from {PROJECT}. Each folder is an ordinary "
                "PEFT adapter of one task. Tasks whose changes of a module are alike have the same "
                "tensors there.",
                table(["task", "modules", "shared with others"], rows),
                f"Loaded together, with shared tensors, they take {size['bytes']:,} bytes instead "
                f"of {apart:,.0f}. On disk each folder is complete.",
            ],
            [
                "from peft import PeftModel",
                "",
                f'model = PeftModel.from_pretrained(base_model, "{adapters[0].name}")  # one task',
                "",
                "from peft_merge import load_tasks",
                "",
                'model = load_tasks(base_model, ".")  # all tasks, with shared tensors',
                f'model.set_adapter("{adapters[-1].name}")',
            ],
            self.config,
        )

    def _shared(self, task: str) -> int:
        """Return how many of a task's modules others have, too."""
        return sum(
            len(group["modules"])
            for block in self.report["blocks"]
            for group in block["groups"]
            if task in group["tasks"] and len(group["tasks"]) > 1
        )


def _group(group: Mapping[str, Any]) -> Group:
    return Group(
        tasks=tuple(group["tasks"]),
        similarity=group["similarity"],
        modules=tuple(group["modules"]),
    )
