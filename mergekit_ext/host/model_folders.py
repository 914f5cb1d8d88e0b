"""Where the folders of a merge's models are, and which of them gives the output what it needs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergekit_ext.host.adapters import applies, base_of
from mergekit_ext.io import paths
from mergekit_ext.io.model_files import MODULES, WEIGHTS, module_folders


def folder_of(reference: Any, options: Any) -> Path:
    """Return a model's folder, without its adapter; fetch from the Hub what is not here yet.

    mergekit fetches weights and JSON alone: code, vocabularies and templates are fetched besides.
    """
    if applies(reference):
        reference = base_of(reference)
    merged = reference.merged(
        cache_dir=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
        lora_merge_dtype=options.lora_merge_dtype,
    )
    folder = Path(merged.local_path(cache_dir=options.transformers_cache))
    if not paths.exists(merged.model.path):
        _fetch(merged.model, folder, options, ignore_patterns=[f"*{end}" for end in WEIGHTS])
        fetch_modules(merged.model, folder, options)
    return folder


def fetch_modules(model: Any, folder: Path, options: Any) -> None:
    """Fetch ``modules.json`` of a model of the Hub, and the folders that it names."""
    _fetch(model, folder, options, allow_patterns=[MODULES])
    if modules := module_folders(folder):
        _fetch(model, folder, options, allow_patterns=[f"{name}*" for name in modules])


def donor_first(config: Any) -> list[Any]:
    """Return all models, first the one that mergekit takes configuration and tokenizer from."""
    models = config.referenced_models()
    return list(dict.fromkeys([config.base_model or models[0], *models]))


def module_home(folders: Iterable[Path]) -> Path | None:
    """Return the first of these folders that has ``modules.json``: that of the output."""
    return next((folder for folder in folders if (folder / MODULES).is_file()), None)


def _fetch(model: Any, folder: Path, options: Any, **patterns: Any) -> None:
    """Fetch more files of the commit that a snapshot's folder is called after."""
    from huggingface_hub import snapshot_download

    snapshot_download(
        model.path, revision=folder.name, cache_dir=options.transformers_cache, **patterns
    )
