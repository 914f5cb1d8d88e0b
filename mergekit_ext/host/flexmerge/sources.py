"""From mergekit's model references to tensors that can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.layout import Layout, complete_ties, make_layout
from mergekit_ext.flexmerge.source import BlockReader, FileSource, LoadedSource, Source
from mergekit_ext.host.adapters.fitted import Fitted, applies, base_of, fit, read_adapter
from mergekit_ext.host.adapters.source import AdaptedSource, adapter_folder
from mergekit_ext.host.checks.settings import dtype_of
from mergekit_ext.host.flexmerge.base_names import as_in_models
from mergekit_ext.host.flexmerge.prepare import Prepared
from mergekit_ext.host.inputs import folder_of
from mergekit_ext.io.headers import TensorHeader, read_folder
from mergekit_ext.parallel.ranks import Ranks


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
    base, _ = as_in_models(owners[0], owners[1:])
    headers = complete_ties([base, *read[1:]], prepared.naming)
    layout = make_layout(prepared.layout.tasks, headers[0], headers[1:], prepared.naming)
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
