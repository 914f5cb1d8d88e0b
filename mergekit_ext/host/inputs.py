"""What a merge reads: the models that its configuration names, their folders and files."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
from mergekit.common import ModelReference
from mergekit.tokenizer.config import ModelTokenEmbedding

from mergekit_ext.errors import FileError
from mergekit_ext.host.adapters.fitted import applies, base_of
from mergekit_ext.host.checks.layout import groups_of, models_at
from mergekit_ext.io import headers, model_files

# The parameter of a merge that names the model whose heads the output has.
HEADS = "heads"


def models_of(config: Any) -> list[Any]:
    """Return every model that is merged, bases of slices too, or that a tokenizer comes from."""
    sources = [config.tokenizer_source]
    if config.tokenizer is not None:
        tokens = (config.tokenizer.tokens or {}).values()
        sources += [config.tokenizer.source, *(token.source for token in tokens)]
    named = [item.model if isinstance(item, ModelTokenEmbedding) else item for item in sources]
    others = [item for item in named if isinstance(item, ModelReference)]
    return list(dict.fromkeys([*models_at(config), *others]))


def named_model(config: Any, parameter: str) -> Any:
    """Return the model that a parameter of the whole merge names, or None."""
    name = (config.parameters or {}).get(parameter)
    return next((model for model in models_at(config) if str(model) == name), None)


def donor_of(config: Any) -> Any:
    """Return the model that gives configuration, tokenizer and heads: `heads`, base, or first."""
    return named_model(config, HEADS) or config.base_model or next(iter(models_at(config)), None)


def in_order(stock: Callable[..., Any], config: Any) -> list[Any]:
    """Extend ``referenced_models``: the base, and the others in the order of the file."""
    models = [source.model for group in groups_of(config) for source in group.sources]
    return list(dict.fromkeys([config.base_model, *models] if config.base_model else models))


def donor_first(config: Any) -> list[Any]:
    """Return all models, first the one that gives configuration and tokenizer."""
    return list(dict.fromkeys([donor_of(config), *config.referenced_models()]))


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files of a local model, and those in folders that belong to it."""
    yield from (file for file in sorted(folder.iterdir()) if file.is_file())
    yield from (folder / name for name in model_files.companions(folder) if "/" in name)
    weights = headers.weights_of(folder)
    if weights is not None and weights.name.endswith(".index.json"):
        # Of a model that is merged the index was checked; one of a tokenizer may have any.
        with suppress(FileError):
            shards = {folder / shard for shard in headers.read_index(weights).values()}
            yield from sorted(shard for shard in shards if shard.parent != folder)


def cached_folder(path: Any, options: Any = None, file: str = "config.json") -> Path | None:
    """Return the cached snapshot of a repository (a `ModelPath`) that holds `file`, or None."""
    if not model_files.may_be_hub_name(path.path):
        return None
    for cache in dict.fromkeys((options and options.transformers_cache, None)):
        found = huggingface_hub.try_to_load_from_cache(
            path.path, file, cache_dir=cache, revision=path.revision
        )
        if isinstance(found, str):
            return Path(found).parent
    return None


def local_folder(path: Any, options: Any) -> Path | None:
    """Return the folder of a `ModelPath`, or its cached snapshot; None if it is not here."""
    return Path(path.path) if os.path.isdir(path.path) else cached_folder(path, options)


def folder_of(reference: Any, options: Any) -> Path:
    """Return a model's folder, without its adapter; fetch from the Hub what is not here yet."""
    # mergekit fetches weights and JSON alone: code, vocabularies and templates are fetched besides.
    if applies(reference):
        reference = base_of(reference)
    merged = reference.merged(
        cache_dir=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
        lora_merge_dtype=options.lora_merge_dtype,
    )
    folder = Path(merged.local_path(cache_dir=options.transformers_cache))
    if not os.path.exists(merged.model.path):
        weights = [f"*{end}" for end in model_files.WEIGHTS]
        _fetch(merged.model, folder, options, ignore_patterns=weights)
        fetch_modules(merged.model, folder, options)
    return folder


def fetch_modules(model: Any, folder: Path, options: Any) -> None:
    """Fetch ``modules.json`` of a model of the Hub, and the folders that it names."""
    _fetch(model, folder, options, allow_patterns=[model_files.MODULES])
    if modules := model_files.module_folders(folder):
        _fetch(model, folder, options, allow_patterns=[f"{name}*" for name in modules])


def _fetch(model: Any, folder: Path, options: Any, **patterns: Any) -> None:
    """Fetch more files of the commit that a snapshot's folder is called after."""
    huggingface_hub.snapshot_download(
        model.path, revision=folder.name, cache_dir=options.transformers_cache, **patterns
    )
