"""The models of a FlexMerge: what their headers say of it, and tensors that can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from mergekit.io.tasks import LoaderCache

from mergekit_ext import parallel
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.algorithm import Algorithm
from mergekit_ext.flexmerge.layout import (
    Layout,
    Naming,
    Renaming,
    complete_ties,
    find_renaming,
    make_layout,
)
from mergekit_ext.flexmerge.source import FileSource, LoadedSource, Source
from mergekit_ext.flexmerge.storage import Storage, Target
from mergekit_ext.host.adapters.fitted import (
    AdaptedSource,
    adapted_headers,
    applies,
    base_of,
    fit,
    read_adapter,
)
from mergekit_ext.host.checks.settings import dtype_of
from mergekit_ext.host.inputs import folder_of
from mergekit_ext.io.class_model import class_names
from mergekit_ext.io.headers import TensorHeader, read_folder
from peft_merge.io.read import locate
from peft_merge.weights import AdaptedWeights

Headers = Mapping[str, TensorHeader]
# Stored tensors, and the configuration that says what their class calls them.
Stored = tuple[Headers, Any]


@dataclass(frozen=True)
class Prepared:
    """A FlexMerge that has passed its checks.

    Attributes:
        references: mergekit's references of the base and of each task's model, in order.
        naming: how names become blocks.
        layout: blocks and private tensors.
        algorithm: how groups are merged; its parameters are all of the merge.
        forced: the dtype of all shareable tensors, if one is asked for.
        options: mergekit's.
        adapted: names of the tensors that an adapter changes, or brings, in some model.
    """

    references: Sequence[Any]
    naming: Naming
    layout: Layout
    algorithm: Algorithm
    forced: torch.dtype | None
    options: Any
    adapted: frozenset[str] = frozenset()

    @cached_property
    def storage(self) -> Storage:
        """How groups are stored."""
        return Storage(self.layout, self.algorithm.masks, self.forced)

    @property
    def target(self) -> Target:
        """The size asked for."""
        target: Target = self.algorithm.parameters.shared["target_size"]
        return target


@dataclass(frozen=True)
class Inputs:
    """Models that are on this machine.

    Attributes:
        layout: as prepared, from the files that will be read.
        base: the base model's tensors.
        models: each task's.
        folders: the folder of each task's model.
    """

    layout: Layout
    base: Source
    models: Sequence[Source]
    folders: Sequence[Path]


def open_inputs(prepared: Prepared) -> Inputs:
    """Fetch what is not here yet, as mergekit does and in the main process; read headers again.

    Raises:
        ConfigError: the files are not what the check saw.
    """
    options, references = prepared.options, prepared.references
    folders = parallel.current().from_main(lambda: [folder_of(r, options) for r in references])
    stored = [read_folder(folder, allow_pickle=True) for folder in folders]
    configs = [r.config(trust_remote_code=options.trust_remote_code) for r in references]
    adapters = [
        fit(read_adapter(reference.lora), tensors, config) if applies(reference) else None
        for reference, tensors, config in zip(references, stored, configs, strict=True)
    ]
    dtype = dtype_of(options.lora_merge_dtype)
    read = [
        tensors if adapter is None else adapted_headers(adapter, tensors, dtype)
        for adapter, tensors in zip(adapters, stored, strict=True)
    ]
    owners = list(zip(read, configs, strict=True))
    layout, headers, _ = laid_out(prepared.layout.tasks, owners, prepared.naming)
    if [b.name for b in layout.blocks] != [b.name for b in prepared.layout.blocks]:
        found = "weights that changed after they were checked"
        raise ConfigError([Problem("models", found, "files that stay", "Try again.")])
    LoaderCache().setup(options=options)
    base, *models = (
        _opened(reference, folder, tensors)
        if adapter is None
        else _adapted(reference, folder, tensors, own, adapter, options.device)
        for reference, folder, tensors, own, adapter in zip(
            references, folders, headers, stored, adapters, strict=True
        )
    )
    return Inputs(layout, base, models, folders[1:])


def _opened(reference: Any, folder: Path, tensors: Headers) -> Source:
    if all(header.file is not None for header in tensors.values()):
        return FileSource(str(reference), tensors)
    loader = LoaderCache().get(reference)
    return LoadedSource(str(reference), tensors, loader.get_tensor, _files(folder))


def _adapted(
    reference: Any,
    folder: Path,
    tensors: Headers,
    stored: Headers,
    adapter: AdaptedWeights,
    device: str,
) -> Source:
    own = {h.name: stored[h.name] for h in tensors.values() if h.name in stored}
    base = _opened(base_of(reference), folder, own)
    place = locate(reference.lora.path, reference.lora.revision, allow_pickle=True)
    files = [*base.files, *_files(place)]
    return AdaptedSource(str(reference), tensors, base, adapter, files, device)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


def laid_out(
    tasks: Sequence[str], stored: Sequence[Stored], naming: Naming
) -> tuple[Layout, list[Headers], Renaming | None]:
    """Return the blocks and private tensors of a base, which comes first, and of the models.

    And the headers of all by the models' names, and the change of prefix in the base's.
    """
    base, renaming = _as_in_models(stored[0], stored[1:])
    headers = complete_ties([base, *(model for model, _ in stored[1:])], naming)
    return make_layout(tasks, headers[0], headers[1:], naming), list(headers), renaming


def _as_in_models(base: Stored, models: Sequence[Stored]) -> tuple[Headers, Renaming | None]:
    """Return the base's headers by the models' names, and the change of prefix in it.

    Names are taken as they are stored, or else as the classes call them, whichever gives more
    that all models have. Each header keeps its stored name.
    """
    headers, config = base
    shared = reduce(set.intersection, (set(names) for names, _ in models))
    own = class_names(headers, config).of
    theirs = {name: stored for stored, name in _by_class(models) if stored in shared}
    renamed = {n: n if n in shared else theirs.get(own[n], own[n]) for n in headers}
    ways = [headers]
    if len(set(renamed.values())) == len(renamed):
        ways.append({renamed[name]: header for name, header in headers.items()})
    found = []
    for way in ways:
        renaming = find_renaming(way, [names for names, _ in models])
        if renaming is not None:
            way = {renaming.apply(name): header for name, header in way.items()}
        found.append((len(shared & way.keys()), way, renaming))
    _, named, renaming = max(found, key=lambda item: item[0])
    return named, renaming


def named_otherwise(models: Sequence[Stored]) -> list[tuple[str, str]]:
    """Return pairs of stored names that the models have for one tensor of their class."""
    first: dict[str, str] = {}
    pairs = []
    for stored, name in _by_class(models):
        if first.setdefault(name, stored) != stored:
            pairs.append((first[name], stored))
    return list(dict.fromkeys(pairs))


def _by_class(models: Sequence[Stored]) -> list[tuple[str, str]]:
    return [pair for headers, config in models for pair in class_names(headers, config).of.items()]
