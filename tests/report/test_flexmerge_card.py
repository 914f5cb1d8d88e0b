"""What the model card says of a FlexMerge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.flexmerge.reader import read_manifest
from mergekit_ext.report.card import flexmerge_section
from tests.models import bert, config, family, write_yaml

SIZE = {"models": 2.25, "bytes": 1234567, "private_bytes": 0}


def test_size_tasks_and_copies() -> None:
    section = flexmerge_section(SIZE, [("a", True), ("b", True)], {"attention": (4, 6)})
    assert section.startswith("### FlexMerge\n")
    assert "2 tasks in the space of 2.25 models: 1,234,567 bytes in all." in section
    assert "Ordinary checkpoints, one folder each: a, b." in section
    assert "| attention | 4 | 1.50 of 2 |" in section
    assert "mask" not in section and "only one task" not in section


def test_private_bytes() -> None:
    section = flexmerge_section({**SIZE, "private_bytes": 4096}, [("a", True)], {"mlp": (1, 1)})
    assert "2.25 models, and 4,096 bytes that only one task each has: 1,234,567" in section


def test_masked_tasks_are_named_with_what_they_need() -> None:
    tasks = [("a", True), ("b", False), ("c", False)]
    section = flexmerge_section(SIZE, tasks, {"mlp": (1, 1)})
    assert "one folder each: a." in section
    (line,) = [line for line in section.splitlines() if line.startswith("Stored as masks: b, c.")]
    assert "flexmerge.load(" in line and "mergekit-ext export" in line
    assert "Ordinary" not in flexmerge_section(SIZE, tasks[1:], {"mlp": (1, 1)})


@pytest.mark.parametrize("algorithm", ["ties", "emr"])
def test_the_card_of_a_merge(tmp_path: Path, algorithm: str) -> None:
    base, models = family(tmp_path, bert)
    parameters = {"target_size": 2.4, "algorithm": algorithm}
    document: dict[str, Any] = config("flexmerge", models, base, parameters)
    out = tmp_path / "out"
    mergekit_ext.merge(write_yaml(tmp_path / "m.yml", document), out, MergeOptions(quiet=True))
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and "merge" in card.data.tags
    manifest = read_manifest(out)
    assert f"3 tasks in the space of {manifest.size.models:.4g} models" in card.text
    assert f"{manifest.size.bytes:,} bytes in all" in card.text
    assert f"{manifest.size.private_bytes:,} bytes that only one task" in card.text
    attention = [len(block.groups) for block in manifest.blocks if block.kind == "attention"]
    copies = sum(attention) / len(attention)
    assert f"| attention | {len(attention)} | {copies:.2f} of 3 |" in card.text
    masked = [task.name for task in manifest.tasks if not task.ordinary]
    assert bool(masked) == (algorithm == "emr")
    assert ("Stored as masks: " + ", ".join(masked) in card.text) == bool(masked)
