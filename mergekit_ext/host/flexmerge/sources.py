"""From mergekit's model references to tensors that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.layout import Layout, make_layout
from mergekit_ext.flexmerge.source import BlockReader, FileSource, LoadedSource, Source
from mergekit_ext.headers import read_folder
from mergekit_ext.host.flexmerge.prepare import Prepared


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


def open_inputs(prepared: Prepared, options: Any) -> Inputs:
    """Fetch what is not here yet (as mergekit does), and look at the files again.

    Raises:
        ConfigError: they are not what the check saw.
    """
    from mergekit.io.tasks import LoaderCache

    cache = LoaderCache()
    cache.setup(options=options)
    opened = [_open(reference, options, cache) for reference in (prepared.base, *prepared.models)]
    (base, _), *models = opened
    layout = make_layout(
        prepared.layout.tasks,
        base.tensors,
        [source.tensors for source, _ in models],
        prepared.naming,
    )
    if [b.name for b in layout.blocks] != [b.name for b in prepared.layout.blocks]:
        problem = Problem(
            "models",
            "weights that changed after they were checked",
            "files that stay",
            "Try again.",
        )
        raise ConfigError([problem])
    return Inputs(layout, base, [s for s, _ in models], [folder for _, folder in models])


def _open(reference: Any, options: Any, cache: Any) -> tuple[Source, Path]:
    folder = Path(
        reference.merged(
            cache_dir=options.lora_merge_cache,
            trust_remote_code=options.trust_remote_code,
            lora_merge_dtype=options.lora_merge_dtype,
        ).local_path(cache_dir=options.transformers_cache)
    )
    tensors = read_folder(folder)
    name = str(reference)
    if all(header.file is not None for header in tensors.values()):
        return FileSource(name, tensors), folder
    loader = cache.get(reference)
    files = [path for path in folder.iterdir() if path.is_file()]
    return LoadedSource(name, tensors, lambda tensor: loader.get_tensor(tensor), files), folder
