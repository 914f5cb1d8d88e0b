"""One FlexMerge from configuration to folder."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from mergekit_ext.events import MergeBegin
from mergekit_ext.flexmerge import task_folders
from mergekit_ext.flexmerge.analysis_file import FILE_NAME as ANALYSIS_NAME
from mergekit_ext.flexmerge.manifest import FILE_NAME as MANIFEST_NAME
from mergekit_ext.flexmerge.manifest import Manifest
from mergekit_ext.host import session as sessions
from mergekit_ext.host.flexmerge.engine import Engine
from mergekit_ext.host.flexmerge.sources import Prepared, open_inputs
from mergekit_ext.host.out_config import agree
from mergekit_ext.host.session import Session
from mergekit_ext.io.model_files import companions, copy
from mergekit_ext.parallel import ranks
from mergekit_ext.report.card import flexmerge_section


def generator() -> str:
    """Who writes a checkpoint."""
    return f"mergekit-ext {metadata.version('mergekit-ext')}"


def write(prepared: Prepared, config: Any, folder: Path, options: Any, source: str) -> None:
    """Merge into `folder`, and make it complete but for its name.

    Args:
        prepared: a merge that has passed its checks.
        config: mergekit's configuration.
        folder: empty, or with what a run that was stopped has left. That of the main process
            counts in all of them.
        options: mergekit's.
        source: the text of the configuration.
    """
    session = sessions.current() or Session()
    together = ranks.current()
    folder = together.from_main(lambda: folder)
    if session.journal is not None and session.journal.finished:
        session.say("Going on with a merge that was stopped.")
    inputs = open_inputs(prepared, options, together)
    models = tuple(str(model) for model in (prepared.base, *prepared.models))
    session.emit(
        MergeBegin("flexmerge", session.output, models, len(inputs.layout.blocks), "block")
    )
    neighbours = Path(session.output or folder).resolve().parent
    engine = Engine(prepared, inputs, options, neighbours, session.emit, session.journal, together)
    plan = engine.planner.plan(prepared.target)
    manifest = engine.write(folder, plan, generator())
    if not together.is_main:
        return
    engine.save_analysis(folder / ANALYSIS_NAME)
    homes = {folder / n: home for n, home in zip(inputs.layout.tasks, inputs.folders, strict=True)}
    if (folder / "model.safetensors.index.json").exists():
        homes[folder] = inputs.folders[0]
    for place, home in homes.items():
        copy(home, place, companions(home))
        agree(place, _dtype_name(prepared))
    for task in manifest.tasks:
        if not task.ordinary:
            _explain_masks(folder / task.name)
    digests = task_folders.described(folder, inputs.layout.tasks)
    manifest = manifest.model_copy(update={"task_files": digests})
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    _describe(folder, config, options, source, manifest)


def _dtype_name(prepared: Prepared) -> str | None:
    return None if prepared.forced is None else str(prepared.forced).removeprefix("torch.")


def _describe(folder: Path, config: Any, options: Any, source: str, manifest: Manifest) -> None:
    if not options.write_model_card:
        return
    from mergekit.card import generate_card

    card = generate_card(config=config, config_yaml=source, name=folder.name)
    kinds: dict[str, tuple[int, int]] = {}
    for block in manifest.blocks:
        blocks, groups = kinds.get(block.kind, (0, 0))
        kinds[block.kind] = (blocks + 1, groups + len(block.groups))
    size = manifest.size.model_dump()
    section = flexmerge_section(size, [(t.name, t.ordinary) for t in manifest.tasks], kinds)
    (folder / "README.md").write_text(f"{card.rstrip()}\n\n{section}\n", encoding="utf-8")
    (folder / "mergekit_config.yml").write_text(source, encoding="utf-8")


def _explain_masks(folder: Path) -> None:
    """Say in a task's folder that holds no weights where they are."""
    task = folder.name
    (folder / "README.md").write_text(
        f"""# {task}

This folder has no weights: those of `{task}` are stored as masks over a vector that it shares with
other tasks, in `../shards/`. Load the model with

    from mergekit_ext import flexmerge
    model = flexmerge.load("..", task="{task}")

(the path is that of the folder above), or write it as an ordinary checkpoint with

    mergekit-ext export .. {task} OUT
""",
        encoding="utf-8",
    )
