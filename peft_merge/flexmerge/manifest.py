"""``flexmerge.json`` of adapters, and the folder that it describes: docs/adapters-flexmerge.md."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator

from mergekit_ext.errors import MOST_SHOWN, CheckpointError, Problem, attempted, require
from mergekit_ext.flexmerge.files import digest_of, regular_file
from mergekit_ext.flexmerge.manifest import FILE_NAME, Similarity, Tasks, sharing_problems
from mergekit_ext.io.hub import Pushable, in_folder
from mergekit_ext.io.schema import Count, Digest, Items, Name, Schema, Some, Version, read
from mergekit_ext.io.staging import new_folder
from mergekit_ext.report.card import CARD, REPORT_NAME, table
from peft_merge.adapter import Adapter
from peft_merge.io.read import CONFIG, SAFETENSORS
from peft_merge.io.write import MERGE_CONFIG, PROJECT, card_of, fill_folder, page

# A task's name is the name of its folder, and of its adapter in a PeftModel, where a dot would
# separate modules.
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_PREFIXES = ("lora_", "ia3_")


def task_name_problem(name: str) -> str | None:
    """Return why `name` cannot be the name of a task, or None when it can."""
    if not _TASK_NAME.fullmatch(name):
        return "it is 1 to 100 of A-Z, a-z, 0-9, '_' and '-', a letter or digit first"
    holders = (torch.nn.ModuleDict, torch.nn.ParameterDict)
    if any(name in prefix for prefix in _PREFIXES) or any(hasattr(held, name) for held in holders):
        return "PEFT, or torch's modules that hold adapters, have something else of this name"
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
        found = [file.name for file in self.files]
        if sorted(found) != [CONFIG, SAFETENSORS]:
            yield Problem("files", ", ".join(found) or "none", f"{CONFIG} and {SAFETENSORS}")


class Group(Schema):
    """Tasks that share a block."""

    tasks: Tasks  # in the manifest's order
    similarity: Similarity  # of the merge that completed the group; None for one task
    modules: Items[Name]  # whose tensors are equal in the folders of all members


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
        yield from sharing_problems([task.name for task in self.tasks], self.blocks)


def open_manifest(folder: str | os.PathLike[str], *, verify: bool = True) -> Manifest:
    """Read the manifest of a folder and compare its files with it.

    To `verify` their digests reads every file once. Raises `CheckpointError` with all that is not
    as docs/adapters-flexmerge.md says.
    """
    remedy = "Give the folder that `merge_method: flexmerge` wrote."
    manifest = read(Manifest, Path(folder) / FILE_NAME, "the manifest of a FlexMerge", remedy)
    root = Path(folder).resolve()
    files = [(f"{task.name}/{file.name}", file) for task in manifest.tasks for file in task.files]
    _, problems = attempted(
        lambda each: regular_file(root, each[0], each[1].sha256, each[1].bytes, verify), files
    )
    require(problems[:MOST_SHOWN], str(folder), CheckpointError)
    return manifest


@dataclass(frozen=True)
class FlexMerged(Pushable):
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
                text = card_of(adapter, None, made if self._shared(adapter.name) else {})
                (folder / adapter.name).mkdir()
                fill_folder(adapter, folder / adapter.name, {CARD: text})
            texts = {
                FILE_NAME: self._manifest(folder).to_json(),
                REPORT_NAME: json.dumps(self.report, indent=1),
                MERGE_CONFIG: self.config,
                CARD: self._card(),
            }
            for name, text in texts.items():
                (folder / name).write_text(text.rstrip() + "\n", encoding="utf-8")

    def _named(self, name: str) -> AbstractContextManager[Path]:
        return in_folder(self.save)

    def _manifest(self, folder: Path) -> Manifest:
        report = self.report
        tasks = [{"name": a["name"], "source": a["source"]} for a in report["adapters"]]
        for task in tasks:
            paths = [folder / task["name"] / file for file in (CONFIG, SAFETENSORS)]
            task["files"] = [
                {"name": path.name, "bytes": path.stat().st_size, "sha256": digest_of(path)}
                for path in paths
            ]
        disk = sum(file["bytes"] for task in tasks for file in task["files"])
        content = {
            "format": "peft-flexmerge",
            "version": 1,
            "kind": report["kind"],
            "method": report["flexmerge"] | {key: report[key] for key in ("space", "seed", "rank")},
            "size": {**report["size"], "disk_bytes": disk},
            "tasks": tasks,
            # Of modules the names: details of their merges are in the report.
            "blocks": [
                b | {"groups": [g | {"modules": [*g["modules"]]} for g in b["groups"]]}
                for b in report["blocks"]
            ],
        }
        return Manifest.model_validate(content)

    def _card(self) -> str:
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
        return sum(
            len(group["modules"])
            for block in self.report["blocks"]
            for group in block["groups"]
            if task in group["tasks"] and len(group["tasks"]) > 1
        )
