"""One prepared FlexMerge, from its inputs to plans, and to the folder of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext import parallel
from mergekit_ext.events import (
    BlockMerged,
    MergeBegin,
    SizeReached,
    StatisticsBegin,
    StatisticsEnd,
    TensorMeasured,
)
from mergekit_ext.flexmerge import analysis_file, files
from mergekit_ext.flexmerge.analysis import Analysis, analyse, passes, trimmed_grams
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.manifest import FILE_NAME, Manifest
from mergekit_ext.flexmerge.merging import Merging
from mergekit_ext.flexmerge.plan import Clusters, Dendrograms, Plan, Planner
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.flexmerge.storage import StoredGroup, Target
from mergekit_ext.flexmerge.writer import write_checkpoint
from mergekit_ext.host import session as sessions
from mergekit_ext.host.flexmerge.sources import Inputs, Prepared, open_inputs
from mergekit_ext.host.out_config import agree
from mergekit_ext.host.session import Session
from mergekit_ext.io.journal import Finished
from mergekit_ext.io.model_files import companions, copy
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.report.card import flexmerge_section


class Engine:
    """Analyses once, then plans and writes any size. All processes make the same calls.

    Args:
        prepared: a merge that has passed its checks.
        inputs: its models.
        analyses_in: the folder in which earlier analyses are looked for.
        session: gets the events; its journal says what is finished.
    """

    def __init__(self, prepared: Prepared, inputs: Inputs, analyses_in: Path, session: Session):
        self.prepared, self.inputs = prepared, inputs
        self._analyses_in, self._session = analyses_in, session
        device = prepared.options.device
        self.reader = BlockReader(inputs.layout, inputs.base, inputs.models, device)
        self._subject = analysis_file.subject_of(inputs.layout, inputs.base, inputs.models)
        self._seed: int = prepared.options.random_seed or 0

    @cached_property
    def analysis(self) -> Analysis:
        """That of an earlier run on the same files, or a new one."""
        densities, layout = self.prepared.algorithm.densities, self.inputs.layout
        found = parallel.current().from_main(
            lambda: analysis_file.find(self._analyses_in, self._subject, layout)
        )
        if found is not None and (densities is None or tuple(densities) in found.cuts):
            return found
        finished = self._finished("statistics")
        with self._measuring(passes(layout, densities) * len(layout.blocks)):
            made = analyse(self.reader, densities, self._measured, finished)
        if found is None:
            return made
        return Analysis(made.grams, {**found.cuts, **made.cuts})

    @cached_property
    def grams(self) -> Sequence[Tensor]:
        """For each block the inner products that similarities are made of."""
        layout, algorithm, found = self.inputs.layout, self.merging.algorithm, self.analysis.grams
        if algorithm.parameters.shared["similarity_on"] == "trimmed":
            finished = self._finished("trimmed", self._acting)
            with self._measuring(len(layout.blocks)):
                found = trimmed_grams(self.reader, algorithm, self._measured, finished)
        return [found[block.name] for block in layout.blocks]

    @cached_property
    def planner(self) -> Planner:
        """Finds the groups of each block at a target size."""
        storage, shared = self.prepared.storage, self.prepared.algorithm.parameters.shared
        if self.prepared.algorithm.kmeans:
            return Clusters(storage, self.grams, self._seed)
        similarities = [cosines(gram) for gram in self.grams]
        return Dendrograms(storage, similarities, shared["linkage"], shared["order"], self._seed)

    @cached_property
    def merging(self) -> Merging:
        """How groups are merged, with what trimming keeps of each whole model."""
        algorithm = self.prepared.algorithm
        if algorithm.densities is not None:
            algorithm.cuts = self.analysis.cuts[tuple(algorithm.densities)]
        return Merging(algorithm, self.prepared.forced)

    def write(self, folder: Path, plan: Plan) -> Manifest:
        """Write one size into an empty folder, without configurations and cards."""
        cuts, forced = self.merging.algorithm.cuts, self.prepared.forced
        patterns = None if cuts is None else [cut.pattern for cut in cuts]
        base, *models = map(str, self.prepared.references)
        manifest = write_checkpoint(
            folder,
            self.reader,
            plan,
            self.merging,
            {
                "generator": f"mergekit-ext {metadata.version('mergekit-ext')}",
                "method": self._settings,
                "base_model": base,
            },
            models,
            shard_size=self.prepared.options.out_shard_size,
            merged=self._merged,
            finished=self._finished("blocks", self._acting, patterns, str(forced)),
        )
        self.reached(plan)
        return manifest

    def reached(self, plan: Plan) -> None:
        """Emit that a size is reached."""
        name, size = self.prepared.algorithm.parameters.shared["algorithm"], plan.size
        self._session.emit(SizeReached(name, size.models, size.bytes))

    def save_analysis(self, folder: Path) -> None:
        """Write the analysis."""
        path = folder / analysis_file.FILE_NAME
        analysis_file.save(path, self.analysis, self._subject, self.inputs.layout)

    @property
    def _settings(self) -> dict[str, Any]:
        """Every parameter that acted, for the manifest."""
        parameters = self.prepared.algorithm.parameters
        shared = {
            name: str(value) if isinstance(value, Target) else value
            for name, value in parameters.shared.items()
            if value is not None
        }
        models = dict(zip(self.inputs.layout.tasks, parameters.models, strict=True))
        return {**shared, "models": models, "seed": self._seed}

    @property
    def _acting(self) -> dict[str, Any]:
        """What decides how a group is merged: the target size decides only which groups are."""
        return {name: value for name, value in self._settings.items() if name != "target_size"}

    def _finished(self, *what: Any) -> Finished:
        """Finished that hold for these inputs on this device, and for whatever else is given."""
        device = torch.device(self.prepared.options.device).type
        text = json.dumps([self._subject, device, *what], sort_keys=True)
        return Finished(self._session.journal, hashlib.sha256(text.encode()).hexdigest())

    @contextmanager
    def _measuring(self, blocks: int) -> Iterator[None]:
        self._session.emit(StatisticsBegin(blocks, "block"))
        started = time.perf_counter()
        yield
        self._session.emit(StatisticsEnd({}, time.perf_counter() - started))

    def _measured(self, name: str) -> None:
        self._session.emit(TensorMeasured(name))

    def _merged(self, block: BlockLayout, groups: Sequence[StoredGroup]) -> None:
        tasks = self.inputs.layout.tasks
        named = tuple(tuple(tasks[task] for task in group.tasks) for group in groups)
        self._session.emit(BlockMerged(block.name, named))


def write(prepared: Prepared, config: Any, folder: Path, source: str) -> None:
    """Merge into `folder`, and make it complete but for its name.

    Args:
        prepared: a merge that has passed its checks.
        config: mergekit's configuration.
        folder: empty, or with what a run that was stopped has left. That of the main process
            counts in all of them.
        source: the text of the configuration.
    """
    session = sessions.current() or Session()
    folder = parallel.current().from_main(lambda: folder)
    if session.journal is not None and session.journal.finished:
        session.say("Going on with a merge that was stopped.")
    inputs = open_inputs(prepared)
    tasks, models = inputs.layout.tasks, tuple(map(str, prepared.references))
    session.emit(
        MergeBegin("flexmerge", session.output, models, len(inputs.layout.blocks), "block")
    )
    engine = Engine(prepared, inputs, Path(session.output or folder).resolve().parent, session)
    manifest = engine.write(folder, engine.planner.plan(prepared.target))
    if not parallel.current().is_main:
        return
    engine.save_analysis(folder)
    homes = {folder / name: home for name, home in zip(tasks, inputs.folders, strict=True)}
    if (folder / "model.safetensors.index.json").exists():
        homes[folder] = inputs.folders[0]
    dtype = None if prepared.forced is None else str(prepared.forced).removeprefix("torch.")
    for place, home in homes.items():
        copy(home, place, companions(home))
        agree(place, dtype)
    for task in manifest.tasks:
        if not task.ordinary:
            text = _MASKED.format(task=task.name)
            (folder / task.name / "README.md").write_text(text, encoding="utf-8")
    digests = files.described(folder, tasks)
    manifest = manifest.model_copy(update={"task_files": digests})
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    if prepared.options.write_model_card:
        _write_card(folder, config, source, manifest)


def _write_card(folder: Path, config: Any, source: str, manifest: Manifest) -> None:
    from mergekit.card import generate_card

    card = generate_card(config=config, config_yaml=source, name=folder.name)
    blocks = Counter(block.kind for block in manifest.blocks)
    groups = Counter(block.kind for block in manifest.blocks for _ in block.groups)
    section = flexmerge_section(
        manifest.size.model_dump(),
        [(task.name, task.ordinary) for task in manifest.tasks],
        {kind: (blocks[kind], groups[kind]) for kind in blocks},
    )
    (folder / "README.md").write_text(f"{card.rstrip()}\n\n{section}\n", encoding="utf-8")
    (folder / "mergekit_config.yml").write_text(source, encoding="utf-8")


# Of a task's folder that holds no weights.
_MASKED = """# {task}

This folder has no weights: those of `{task}` are stored as masks over a vector that it shares with
other tasks, in `../shards/`. Load the model with

    from mergekit_ext import flexmerge
    model = flexmerge.load("..", task="{task}")

(the path is that of the folder above), or write it as an ordinary checkpoint with

    mergekit-ext export .. {task} OUT
"""
