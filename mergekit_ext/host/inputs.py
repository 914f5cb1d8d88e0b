"""What a merge reads: every model that its configuration names, and the files of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.tokenizer.config import ModelTokenEmbedding

from mergekit_ext.host.checks.layout import groups_of, references
from mergekit_ext.io import headers
from mergekit_ext.io.model_files import companions


def models_of(config: Any) -> list[Any]:
    """Every model of a `MergeConfiguration` once: those merged, and those of its tokenizer.

    mergekit's own list has neither the tokenizer's nor the bases of slices.
    """
    merged = [model for _, model in references(groups_of(config), config.base_model)]
    return list(dict.fromkeys([*config.referenced_models(), *merged, *_of_tokenizer(config)]))


def files_of(folder: Path) -> Iterator[Path]:
    """The files of a local model: those beside each other, and in folders that belong to it.

    Other folders are other models, or the past of this one.
    """
    yield from (file for file in sorted(folder.iterdir()) if file.is_file())
    yield from (folder / name for name in companions(folder) if "/" in name)
    weights = headers.weights_of(folder)
    if weights is not None and weights.name.endswith(".index.json"):
        # Of a model that is merged the index was checked; one of a tokenizer may have any.
        with suppress(headers.HeaderError):
            shards = {folder / shard for shard in headers.read_index(weights).values()}
            yield from sorted(shard for shard in shards if shard.parent != folder)


def _of_tokenizer(config: Any) -> Iterator[ModelReference]:
    sources = [config.tokenizer_source]
    if config.tokenizer is not None:
        tokens = (config.tokenizer.tokens or {}).values()
        sources += [config.tokenizer.source, *(token.source for token in tokens)]
    for source in sources:
        if isinstance(source, ModelTokenEmbedding):
            source = source.model
        if isinstance(source, ModelReference):
            yield source
