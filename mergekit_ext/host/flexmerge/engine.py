"""One prepared FlexMerge, from its inputs to plans, and to the folder of a checkpoint."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from mergekit_ext import events, parallel
from mergekit_ext.core.memory import in_models
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge import analysis_file, files
from mergekit_ext.flexmerge.analysis import Analysis, analyse, passes, trimmed_grams
from mergekit_ext.flexmerge.decomposition import Decomposition
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.manifest import FILE_NAME, Manifest
from mergekit_ext.flexmerge.merging import Merging
from mergekit_ext.flexmerge.plan import Clusters, Dendrograms, Plan, Planner
from mergekit_ext.flexmerge.residual import Kept, Residuals, ResidualStorage, kept, shortfall, total
from mergekit_ext.flexmerge.source import BlockReader, FileSource, Source
from mergekit_ext.flexmerge.storage import ANY_SIZE, Target
from mergekit_ext.flexmerge.stored import StoredGroup
from mergekit_ext.flexmerge.writer import pieces_of, write_checkpoint, write_pieces
from mergekit_ext.host import session as sessions
from mergekit_ext.host.adapters.fitted import adapted_headers, applies, fit, read_adapter
from mergekit_ext.host.checks.settings import dtype_of
from mergekit_ext.host.flexmerge import adapters
from mergekit_ext.host.flexmerge.parameters import idle_with
from mergekit_ext.host.flexmerge.shared_tensors import Prepared, laid_out
from mergekit_ext.host.inputs import folder_of
from mergekit_ext.host.out_config import agree
from mergekit_ext.host.session import Session
from mergekit_ext.io.headers import read_folder
from mergekit_ext.io.journal import Finished
from mergekit_ext.io.model_files import classes_of, companions, copy, is_weights
from mergekit_ext.io.planned_files import INDEX, PlannedFile, write_index
from mergekit_ext.io.quantised import dequantised, detach
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.report import card
from mergekit_ext.report.rho import Distance, Rho, rho_of
from peft_merge.adapter import LoraAdapter
from peft_merge.io.read import locate
from peft_merge.io.write import card_of, fill_folder


class Engine:
    """Analyses once, then plans and writes any size. All processes make the same calls.

    Earlier analyses are looked for in the folder `beside`; the session gets the events, and
    its journal holds what is finished. Decompositions lie in `scratch` meanwhile.
    """

    def __init__(
        self, prepared: Prepared, reader: BlockReader, beside: Path, session: Session, scratch: Path
    ):
        self.prepared, self.reader, self.layout = prepared, reader, reader.layout
        self._beside, self._session, self._scratch = beside, session, scratch
        self._subject = analysis_file.subject_of(reader)
        self.seed: int = prepared.options.random_seed or 0
        self._distances: dict[str, Mapping[str, Distance]] = {}

    @cached_property
    def analysis(self) -> Analysis:
        """That of an earlier run on the same files, or a new one."""
        densities, layout = self.prepared.algorithm.densities, self.layout
        find = partial(analysis_file.find, self._beside, self._subject, layout)
        found = parallel.current().from_main(find)
        if found is not None and (densities is None or tuple(densities) in found.cuts):
            return found
        finished = self._finished("statistics")
        with self._measuring(passes(layout, densities) * len(layout.blocks)):
            made = analyse(self.reader, densities, self._measured, finished)
        known = {} if found is None else found.cuts
        return Analysis(made.grams, {**known, **made.cuts})

    @cached_property
    def grams(self) -> Sequence[Tensor]:
        """For each block the inner products that similarities are made of."""
        layout, algorithm, found = self.layout, self.merging.algorithm, self.analysis.grams
        if algorithm.parameters.shared["similarity_on"] == "trimmed":
            finished = self._finished("trimmed", self._acting)
            with self._measuring(len(layout.blocks)):
                found = trimmed_grams(self.reader, algorithm, self._measured, finished)
        return [found[block.name] for block in layout.blocks]

    @cached_property
    def planner(self) -> Planner:
        storage, shared = self.prepared.storage, self.prepared.algorithm.parameters.shared
        if (found := self.merging.residuals) is not None:
            return Residuals(found.storage, found.spectra)
        if self.prepared.algorithm.kmeans:
            return Clusters(storage, self.grams, self.seed)
        similarities = [cosines(gram) for gram in self.grams]
        return Dendrograms(storage, similarities, shared["linkage"], shared["order"], self.seed)

    @cached_property
    def merging(self) -> Merging:
        """How groups are merged, with what trimming keeps of each whole model."""
        algorithm = self.prepared.algorithm
        if algorithm.densities is not None:
            algorithm.cuts = self.analysis.cuts[tuple(algorithm.densities)]
        return Merging(algorithm, self.prepared.forced, self._decomposition)

    @cached_property
    def _decomposition(self) -> Decomposition | None:
        storage = self.prepared.storage
        if not isinstance(storage, ResidualStorage):
            return None
        finished = self._finished("residuals", self._acting, str(self.prepared.forced))
        counted = partial(self._measuring, len(self.layout.blocks))
        return Decomposition(self.reader, storage, self._scratch, self._measured, counted, finished)

    def write(self, folder: Path, plan: Plan) -> Manifest:
        """Write one size into an empty folder, without configurations and cards."""
        base, *models = map(str, self.prepared.references)
        maker = f"mergekit-ext {metadata.version('mergekit-ext')}"
        manifest = write_checkpoint(
            folder,
            self.reader,
            plan,
            self.merging,
            {"generator": maker, "method": self._settings, "base_model": base},
            models,
            shard_size=self.prepared.options.out_shard_size,
            merged=self._merged,
            finished=self._blocks,
        )
        self.reached(plan)
        return manifest

    def write_base(self, folder: Path, plan: Plan) -> list[PlannedFile]:
        """Write the weights of the base of one size likewise; return their files."""
        pieces = pieces_of(self.reader, adapters.bare(plan), self.merging, self._merged)
        filed = partial(adapters.base_files, limit=self.prepared.options.out_shard_size)
        own = adapters.base_pieces(pieces, self.layout)
        shards = write_pieces(folder, own, filed, self._blocks)
        self.reached(plan)
        return list(shards.files.values())

    def complete(self, homes: Mapping[Path, Path]) -> None:
        """Copy what lies beside weights into folders, each from that of a model."""
        for place, home in homes.items():
            copy(home, place, companions(home))
            agree(place, self.prepared.forced)

    @property
    def _blocks(self) -> Finished:
        cuts = self.merging.algorithm.cuts
        patterns = None if cuts is None else [cut.pattern for cut in cuts]
        return self._finished("blocks", self._acting, patterns, str(self.prepared.forced))

    def reached(self, plan: Plan) -> None:
        """Emit that a size is reached."""
        name, size = self.prepared.algorithm.parameters.shared["algorithm"], plan.size
        self._session.emit(events.SizeReached(name, size.models, size.bytes))

    def save_analysis(self, folder: Path) -> None:
        analysis_file.save(folder, self.analysis, self._subject, self.layout)

    @property
    def _settings(self) -> dict[str, Any]:
        """Every parameter that acted, for the manifest."""
        parameters = self.prepared.algorithm.parameters
        shared = {
            name: str(value) if isinstance(value, Target) else value
            for name, value in parameters.shared.items()
            if value is not None
        }
        models = dict(zip(self.layout.tasks, parameters.models, strict=True))
        return {**shared, "models": models, "seed": self.seed}

    @property
    def _acting(self) -> dict[str, Any]:
        """What decides how a group is merged: the target size decides only which groups are."""
        return {name: value for name, value in self._settings.items() if name != "target_size"}

    def _finished(self, *what: Any) -> Finished:
        """Return what holds for these inputs on this device, and for whatever else is given."""
        device = torch.device(self.prepared.options.device).type
        text = json.dumps([self._subject, device, *what], sort_keys=True)
        return Finished(self._session.journal, hashlib.sha256(text.encode()).hexdigest())

    def _measuring(self, blocks: int) -> AbstractContextManager[Any]:
        return events.measuring(self._session.emit, blocks, "block")

    def _measured(self, name: str) -> None:
        self._session.emit(events.TensorMeasured(name))

    def far(self) -> Rho:
        """Return how far the groups that were written went. All processes call this."""
        written: dict[str, Mapping[str, Distance]] = {}
        for part in parallel.current().gather(self._distances):
            written |= part

        def block(name: str) -> str:
            return name.rpartition(" of ")[0]

        order = {own.name: at for at, own in enumerate(self.layout.blocks)}
        names = sorted(written, key=lambda name: order[block(name)])
        return rho_of({name: written[name] for name in names}, block)

    def _merged(
        self, block: BlockLayout, groups: Sequence[StoredGroup], far: Sequence[Distance]
    ) -> None:
        for each in far:
            self._distances[f"{block.name} of {', '.join(each['inputs'])}"] = {"distance": each}
        tasks = self.layout.tasks
        named = tuple(tuple(tasks[task] for task in group.tasks) for group in groups)
        self._session.emit(events.BlockMerged(block.name, named))


def open_inputs(prepared: Prepared) -> tuple[BlockReader, Sequence[Path]]:
    """Fetch what is not here yet, and read headers again; return the folders of the models, too.

    Raises:
        ConfigError: the files are not what the check saw.
    """
    options, references = prepared.options, prepared.references
    folders = parallel.current().from_main(lambda: [folder_of(r, options) for r in references])
    configs = [r.config(trust_remote_code=options.trust_remote_code) for r in references]
    read = []
    for reference, folder, config in zip(references, folders, configs, strict=True):
        stored = dequantised(read_folder(folder, allow_pickle=True), detach(config), folder)
        if applies(reference):
            adapter = fit(read_adapter(reference.lora), stored, config)
            stored = adapted_headers(adapter, stored, dtype_of(options.lora_merge_dtype))
        read.append(stored)
    owners, shared = list(zip(read, configs, strict=True)), prepared.algorithm.parameters.shared
    layout, headers, _ = laid_out(prepared.layout.tasks, references, owners, shared)
    if [b.name for b in layout.blocks] != [b.name for b in prepared.layout.blocks]:
        found = "weights that changed after they were checked"
        raise ConfigError([Problem("models", found, "files that stay", "Try again.")])
    LoaderCache().setup(options=options)

    sources: list[Source] = []
    for reference, folder, tensors in zip(references, folders, headers, strict=True):
        name, adapted = str(reference), applies(reference)
        if not adapted and all(part.file for h in tensors.values() for part in h.stored):
            sources.append(FileSource(name, tensors))
            continue
        files = [*filter(is_weights, _files(folder))]
        if adapted:
            files += _files(locate(reference.lora.path, reference.lora.revision, allow_pickle=True))
        sources.append(Source(name, tensors, LoaderCache().get(reference).get_tensor, files))
    return BlockReader(layout, sources[0], sources[1:], options.device), folders[1:]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


def write(prepared: Prepared, config: Any, folder: Path, source: str) -> None:
    """Merge into `folder`, which becomes the output, with its model card; inside of a session.

    The folder is empty, or as an earlier merge of the same inputs has left it, perhaps under
    another configuration (whose text is `source`): what the journal has as finished is continued.
    That of the main process counts in all of them.
    """
    session = sessions.current() or Session()
    folder = parallel.current().from_main(lambda: folder)
    if session.journal is not None and session.journal.finished:
        session.say("Going on with a merge that was stopped.")
    reader, folders = open_inputs(prepared)
    models, blocks = tuple(map(str, prepared.references)), len(reader.layout.blocks)
    session.emit(events.MergeBegin(config.merge_method, session.output, models, blocks, "block"))
    beside = Path(session.output or folder).resolve().parent
    engine = Engine(prepared, reader, beside, session, folder.parent / "residuals")
    own = prepared.algorithm.parameters
    idle = idle_with(prepared.algorithm)
    if prepared.target == Target.parse(ANY_SIZE):  # `rank` or `energy` says how large
        idle |= {"target_size"}
    given = {name: value for name, value in own.shared.items() if name not in idle}
    session.parameters = card.in_effect({"merge_method": config.merge_method, **given}, own.models)
    plan = engine.planner.plan(prepared.target)
    if prepared.forms is None:
        manifest = engine.write(folder, plan)
        finish: Callable[[], str] = partial(_checkpoint, engine, manifest, folder, folders)
    else:
        shards = engine.write_base(folder, plan)
        base = str(Path(session.output or folder).resolve() / adapters.FOLDER)
        finish = partial(_adapters, engine, plan, shards, folder, folders, base, source)
    far = engine.far()
    if not parallel.current().is_main:
        return
    sections, first = [finish(), far.line], engine.layout.tasks[0]
    session.task = first if (folder / first / INDEX).exists() else ""
    residuals, tensors = engine.merging.residuals, dict[str, Any]()
    more = far.stored
    size = f"{in_models(plan.size.models):.10g} models, {plan.size.bytes:,} bytes"
    session.summary = f"{size}. {far.line}".rstrip()
    session.afterwards += far.warnings(prepared.algorithm.name)
    if residuals and (found := kept(residuals.storage, plan, residuals.measured)):
        tensors, more = _lost(engine, plan, found)
        errors = ", ".join(f"{t} {lost['error']:.3g}" for t, lost in more["tasks"].items())
        short = shortfall(found, prepared.algorithm.parameters)
        session.summary = f"{size}. Relative errors: {errors}. {short}".rstrip()
        sections += [card.residual_section(more["tasks"]), short]
    if tensors or more or session.stored:
        more |= session.stored
        card.write_report(folder, config.merge_method, tensors, engine.seed, **more)
    if prepared.options.write_model_card:
        from mergekit.card import generate_card

        page = generate_card(config=config, config_yaml=source, name=folder.name)
        text = "\n\n".join([page.rstrip(), *filter(None, sections)])
        (folder / card.CARD).write_text(f"{text}\n", encoding="utf-8")
        (folder / "mergekit_config.yml").write_text(source, encoding="utf-8")


def _lost(
    engine: Engine, plan: Plan, kept: Mapping[str, Sequence[Kept]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what ``merge_report.json`` has of the residuals of each tensor, and of all."""
    tasks = engine.layout.tasks
    entries = {name: [each.entry for each in found] for name, found in kept.items()}
    tensors = {name: dict(zip(tasks, own, strict=True)) for name, own in entries.items()}
    each = zip(tasks, zip(*kept.values(), strict=True), strict=True)
    size = {"models": plan.size.models, "bytes": plan.size.bytes}
    return tensors, {"size": size, "tasks": {task: total(found) for task, found in each}}


def _checkpoint(engine: Engine, manifest: Manifest, folder: Path, folders: Sequence[Path]) -> str:
    """Complete a checkpoint but for its card, of which its section is returned."""
    if engine.merging.residuals is None:
        engine.save_analysis(folder)
    tasks = engine.layout.tasks
    homes = {folder / name: home for name, home in zip(tasks, folders, strict=True)}
    if (folder / INDEX).exists():
        homes[folder] = folders[0]
    engine.complete(homes)
    for task in manifest.tasks:
        place = folder / task.name
        made = card.model_card(*classes_of(place), task.name)
        if text := made if task.ordinary else _MASKED.format(task=task.name):
            (place / card.CARD).write_text(text, encoding="utf-8")
    digests = files.described(folder, tasks)
    manifest = manifest.model_copy(update={"task_files": digests})
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    blocks = Counter(block.kind for block in manifest.blocks)
    groups = Counter(block.kind for block in manifest.blocks for _ in block.groups)
    return card.flexmerge_section(
        manifest.size.model_dump(),
        [(task.name, task.ordinary) for task in manifest.tasks],
        {kind: (blocks[kind], groups[kind]) for kind in blocks},
    )


def _adapters(
    engine: Engine,
    plan: Plan,
    shards: Sequence[PlannedFile],
    folder: Path,
    folders: Sequence[Path],
    base: str,
    source: str,
) -> str:
    """Complete a base likewise, and write adapters; `base` is where the base will lie."""
    tasks, forms, residuals = engine.layout.tasks, engine.prepared.forms, engine.merging.residuals
    assert forms is not None and residuals is not None
    if len(shards) > 1:
        named = [(Path(file.path).name, file.entries) for file in shards]
        write_index(folder / adapters.FOLDER, named)
    homes = {folder / name: home for name, home in zip(tasks, folders, strict=True)}
    for place in homes:
        place.mkdir()
    engine.complete({**homes, folder / adapters.FOLDER: folders[0]})
    page = adapters.base_card(tasks, forms, source)
    (folder / adapters.FOLDER / card.CARD).write_text(page, encoding="utf-8")
    made = list[LoraAdapter]()
    kinds = zip(engine.prepared.references[1:], forms.kinds, strict=True)
    for index, (model, kind) in enumerate(kinds):
        adapter = adapters.adapter_of_task(forms, plan, engine.reader, residuals, index, base)
        about = {"model": str(model), "notes": [adapters.BASE_FIELD]}
        page = card_of(adapter, None, about, adapters.loading(adapter.name, kind, forms))
        fill_folder(adapter, folder / adapter.name, {card.CARD: page})
        made.append(adapter)
    return adapters.section_of(made, forms)


# Of a task's folder that holds no weights.
_MASKED = """# {task}

This folder has no weights: `../shards/` holds those of all tasks, masks and factors among them. In
the folder above, `mergekit_ext.flexmerge.load(".", task="{task}")` loads the model, and
`mergekit-ext export . {task} OUT` writes it as an ordinary checkpoint.
"""
