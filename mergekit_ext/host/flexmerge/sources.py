"""The models of a FlexMerge: what their headers say of it, and tensors that can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.layout import (
    Layout,
    Naming,
    Renaming,
    complete_ties,
    find_renaming,
    make_layout,
    named_as,
)
from mergekit_ext.flexmerge.source import BlockReader, FileSource, LoadedSource, Source
from mergekit_ext.flexmerge.storage import Storage
from mergekit_ext.flexmerge.target import Target
from mergekit_ext.host.adapters.fitted import Fitted, applies, base_of, fit, read_adapter
from mergekit_ext.host.adapters.source import AdaptedSource, adapter_folder
from mergekit_ext.host.checks.settings import dtype_of
from mergekit_ext.host.class_model import class_names
from mergekit_ext.host.flexmerge.parameters import Written
from mergekit_ext.host.inputs import folder_of
from mergekit_ext.io.headers import TensorHeader, read_folder
from mergekit_ext.parallel import Ranks

DEFAULT_SEED = 0
Headers = Mapping[str, TensorHeader]
# Stored tensors, and the configuration that says what their class calls them.
Stored = tuple[Headers, Any]


@dataclass(frozen=True)
class Prepared:
    """A FlexMerge that can start.

    Attributes:
        base: mergekit's reference of the base model.
        models: the reference of each task's model, in order.
        naming: how names become blocks.
        layout: blocks and private tensors.
        written: the parameters.
        forced: the dtype of all shareable tensors, if one is asked for.
        adapted: names of the tensors that an adapter changes, or brings, in some model.
    """

    base: Any
    models: Sequence[Any]
    naming: Naming
    layout: Layout
    written: Written
    forced: torch.dtype | None
    adapted: frozenset[str] = frozenset()

    @cached_property
    def storage(self) -> Storage:
        """How groups are stored."""
        return Storage(self.layout, self.written.algorithm.masks, self.forced)

    @property
    def target(self) -> Target:
        """The size asked for."""
        target: Target = self.written.shared["target_size"]
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

    def reader(self, device: str) -> BlockReader:
        """A reader of blocks."""
        return BlockReader(self.layout, self.base, self.models, device)


def open_inputs(prepared: Prepared, options: Any, ranks: Ranks | None = None) -> Inputs:
    """Fetch what is not here yet (as mergekit does), and look at the files again.

    Args:
        prepared: a merge that has passed its checks.
        options: mergekit's.
        ranks: the processes that do this; the main one fetches.

    Raises:
        ConfigError: they are not what the check saw.
    """
    from mergekit.io.tasks import LoaderCache

    cache = LoaderCache()
    cache.setup(options=options)
    references = (prepared.base, *prepared.models)
    folders = (ranks or Ranks()).from_main(lambda: [folder_of(r, options) for r in references])
    stored = [read_folder(folder, allow_pickle=True) for folder in folders]
    adapters = [
        _fitted(reference, tensors, options) if applies(reference) else None
        for reference, tensors in zip(references, stored, strict=True)
    ]
    dtype = dtype_of(options.lora_merge_dtype)
    read = [
        tensors if adapter is None else adapter.tensors(tensors, dtype)
        for adapter, tensors in zip(adapters, stored, strict=True)
    ]
    configs = [r.config(trust_remote_code=options.trust_remote_code) for r in references]
    owners = list(zip(read, configs, strict=True))
    layout, headers, _ = laid_out(prepared.layout.tasks, owners, prepared.naming)
    if [b.name for b in layout.blocks] != [b.name for b in prepared.layout.blocks]:
        problem = Problem(
            "models",
            "weights that changed after they were checked",
            "files that stay",
            "Try again.",
        )
        raise ConfigError([problem])
    source, *models = (
        _open(reference, folder, tensors, cache)
        if adapter is None
        else _open_adapted(reference, folder, tensors, own, adapter, cache, options)
        for reference, folder, tensors, own, adapter in zip(
            references, folders, headers, stored, adapters, strict=True
        )
    )
    return Inputs(layout, source, models, folders[1:])


def _fitted(reference: Any, tensors: Mapping[str, TensorHeader], options: Any) -> Fitted:
    config = reference.config(trust_remote_code=options.trust_remote_code)
    return fit(read_adapter(reference.lora), tensors, config)


def _open(reference: Any, folder: Path, tensors: Mapping[str, TensorHeader], cache: Any) -> Source:
    name = str(reference)
    if all(header.file is not None for header in tensors.values()):
        return FileSource(name, tensors)
    loader = cache.get(reference)
    return LoadedSource(name, tensors, lambda tensor: loader.get_tensor(tensor), _files(folder))


def _open_adapted(
    reference: Any,
    folder: Path,
    tensors: Mapping[str, TensorHeader],
    stored: Mapping[str, TensorHeader],
    adapter: Fitted,
    cache: Any,
    options: Any,
) -> Source:
    own = {name: stored[h.name] for name, h in tensors.items() if h.name in stored}
    base = _open(base_of(reference), folder, own, cache)
    files = [*base.files, *_files(adapter_folder(reference.lora))]
    return AdaptedSource(str(reference), tensors, base, adapter, files, options.device)


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
        named = named_as(way, renaming)
        found.append((len(shared & named.keys()), named, renaming))
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
