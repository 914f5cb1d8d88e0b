"""One prepared FlexMerge, from its inputs to plans, and to the folder of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext import parallel
from mergekit_ext.events import (
    BlockMerged,
    Event,
    MergeBegin,
    SizeReached,
    StatisticsBegin,
    StatisticsEnd,
    TensorMeasured,
)
from mergekit_ext.flexmerge import analysis_file, task_folders
from mergekit_ext.flexmerge.algorithm import Algorithm, Cuts
from mergekit_ext.flexmerge.analysis import Analysis, analyse, passes, trimmed_grams
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.manifest import FILE_NAME, Manifest
from mergekit_ext.flexmerge.merging import Merging
from mergekit_ext.flexmerge.plan import Clusters, Dendrograms, Plan, Planner
from mergekit_ext.flexmerge.storage import StoredGroup
from mergekit_ext.flexmerge.writer import Provenance, write_checkpoint
from mergekit_ext.host import session as sessions
from mergekit_ext.host.flexmerge.parameters import for_manifest
from mergekit_ext.host.flexmerge.sources import DEFAULT_SEED, Inputs, Prepared, open_inputs
from mergekit_ext.host.out_config import agree
from mergekit_ext.host.session import Session
from mergekit_ext.io.journal import Finished, Journal
from mergekit_ext.io.model_files import companions, copy
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.parallel import Ranks
from mergekit_ext.report.card import flexmerge_section


class Engine:
    """Analyses once, then plans and writes any size.

    Args:
        prepared: a merge that has passed its checks.
        inputs: its models.
        options: mergekit's; the device and the seed are used.
        analyses_in: the folder in which earlier analyses are looked for.
        emit: gets the events.
        journal: of what is finished; None to begin with nothing, and to note nothing.
        ranks: the processes that share out the blocks. All of them make the same calls.
    """

    def __init__(
        self,
        prepared: Prepared,
        inputs: Inputs,
        options: Any,
        analyses_in: Path,
        emit: Callable[[Event], None],
        journal: Journal | None = None,
        ranks: Ranks | None = None,
    ):
        self._journal, self._ranks = journal, ranks or Ranks()
        self._prepared, self._inputs, self._options = prepared, inputs, options
        self._analyses_in, self._emit = analyses_in, emit
        self.reader = inputs.reader(options.device)
        self.subject = analysis_file.Subject.of(inputs.layout, inputs.base, inputs.models)

    @property
    def algorithm(self) -> Algorithm:
        """How groups are merged."""
        return self._prepared.written.algorithm

    @property
    def seed(self) -> int:
        """mergekit's ``--random-seed``."""
        seed: int | None = self._options.random_seed
        return DEFAULT_SEED if seed is None else seed

    @cached_property
    def analysis(self) -> Analysis:
        """That of an earlier run on the same files, or a new one."""
        densities = self.algorithm.densities
        found = self._ranks.from_main(lambda: analysis_file.find(self._analyses_in, self.subject))
        if found is not None and (densities is None or tuple(densities) in found.cuts):
            return found
        started = time.perf_counter()
        layout = self._inputs.layout
        total = passes(layout, densities) * len(layout.blocks)
        self._emit(StatisticsBegin(total, "block"))
        made = analyse(
            self.reader, densities, self._measured, self._finished("statistics"), self._ranks
        )
        if found is not None:
            made = Analysis(made.tasks, made.grams, {**found.cuts, **made.cuts})
        self._emit(StatisticsEnd({}, time.perf_counter() - started))
        return made

    @property
    def cuts(self) -> Cuts | None:
        """What trimming keeps of each whole model."""
        densities = self.algorithm.densities
        return None if densities is None else self.analysis.cuts[tuple(densities)]

    @cached_property
    def grams(self) -> Sequence[Tensor]:
        """For each block the inner products that similarities are made of."""
        blocks = self._inputs.layout.blocks
        found = self.analysis.grams
        if self._prepared.written.shared["similarity_on"] == "trimmed":
            self._emit(StatisticsBegin(len(blocks), "block"))
            started = time.perf_counter()
            finished = self._finished("trimmed", self._acting)
            found = trimmed_grams(
                self.reader, self.algorithm, self.cuts, self._measured, finished, self._ranks
            )
            self._emit(StatisticsEnd({}, time.perf_counter() - started))
        return [found[block.name] for block in blocks]

    @cached_property
    def planner(self) -> Planner:
        """Find the groups of each block at a target size."""
        shared = self._prepared.written.shared
        if self.algorithm.kmeans:
            return Clusters(self._prepared.storage, self.grams, self.seed)
        similarities = [cosines(gram) for gram in self.grams]
        return Dendrograms(
            self._prepared.storage, similarities, shared["linkage"], shared["order"], self.seed
        )

    @property
    def merging(self) -> Merging:
        """How groups are merged."""
        return Merging(self.algorithm, self.cuts, self.forced)

    def write(self, folder: Path, plan: Plan) -> Manifest:
        """Write one size into an empty folder, without configurations and cards."""
        patterns = None if self.cuts is None else [cut.pattern for cut in self.cuts]
        manifest = write_checkpoint(
            folder,
            self.reader,
            plan,
            self.merging,
            Provenance(
                f"mergekit-ext {metadata.version('mergekit-ext')}",
                self._settings,
                str(self._prepared.base),
                [str(model) for model in self._prepared.models],
            ),
            shard_size=self._options.out_shard_size,
            merged=self._merged,
            finished=self._finished("blocks", self._acting, patterns, str(self.forced)),
            ranks=self._ranks,
        )
        self._emit(SizeReached(self.algorithm.name, plan.size.models, plan.size.bytes))
        return manifest

    @property
    def forced(self) -> torch.dtype | None:
        """The dtype of all shareable tensors, if one is asked for."""
        return self._prepared.forced

    def keep_analysis(self) -> Path:
        """Write the analysis where later runs look for it."""
        path = self._analyses_in / analysis_file.FILE_NAME
        self.save_analysis(path)
        return path

    def save_analysis(self, path: Path) -> None:
        """Write the analysis, with what a reader may want to know of the blocks."""
        blocks = [
            {"name": b.name, "kind": b.kind, "depth": b.depth, "elements": b.size}
            for b in self._inputs.layout.blocks
        ]
        analysis_file.save(path, self.analysis, self.subject, {"blocks": blocks})

    @property
    def _settings(self) -> dict[str, Any]:
        settings = for_manifest(self._prepared.written, self._inputs.layout.tasks)
        return {**settings, "seed": self.seed}

    @property
    def _acting(self) -> dict[str, Any]:
        """What decides how a group is merged: the target size decides only which groups are."""
        return {name: value for name, value in self._settings.items() if name != "target_size"}

    def _finished(self, *what: Any) -> Finished:
        """Finished that hold for these inputs on this device, and for whatever else is given."""
        device = torch.device(self._options.device).type
        text = json.dumps([self.subject.digest, device, *what], sort_keys=True)
        return Finished(self._journal, hashlib.sha256(text.encode()).hexdigest())

    def _measured(self, name: str) -> None:
        self._emit(TensorMeasured(name))

    def _merged(self, block: BlockLayout, groups: Sequence[StoredGroup]) -> None:
        tasks = self._inputs.layout.tasks
        named = tuple(tuple(tasks[task] for task in group.tasks) for group in groups)
        self._emit(BlockMerged(block.name, named))


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
    together = parallel.current()
    folder = together.from_main(lambda: folder)
    if session.journal is not None and session.journal.finished:
        session.say("Going on with a merge that was stopped.")
    inputs = open_inputs(prepared, options, together)
    models = tuple(str(model) for model in (prepared.base, *prepared.models))
    session.emit(
        MergeBegin("flexmerge", session.output, models, len(inputs.layout.blocks), "block")
    )
    analyses_in = Path(session.output or folder).resolve().parent
    engine = Engine(prepared, inputs, options, analyses_in, session.emit, session.journal, together)
    plan = engine.planner.plan(prepared.target)
    manifest = engine.write(folder, plan)
    if not together.is_main:
        return
    engine.save_analysis(folder / analysis_file.FILE_NAME)
    homes = {folder / n: home for n, home in zip(inputs.layout.tasks, inputs.folders, strict=True)}
    if (folder / "model.safetensors.index.json").exists():
        homes[folder] = inputs.folders[0]
    dtype = None if prepared.forced is None else str(prepared.forced).removeprefix("torch.")
    for place, home in homes.items():
        copy(home, place, companions(home))
        agree(place, dtype)
    for task in manifest.tasks:
        if not task.ordinary:
            _explain_masks(folder / task.name)
    digests = task_folders.described(folder, inputs.layout.tasks)
    manifest = manifest.model_copy(update={"task_files": digests})
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    _describe(folder, config, options, source, manifest)


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
