"""The folders that ``modules.json`` names in the models of a merge (sentence-transformers)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_ext.core.wording import listing
from mergekit_ext.host.checks import hub
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.model_folders import donor_first, fetch_modules, module_home
from mergekit_ext.host.modules import differing
from mergekit_ext.io import paths, pickles
from mergekit_ext.io.headers import HeaderError, TensorHeader, read_file
from mergekit_ext.io.model_files import companions, is_weights, module_folders, module_weights

_REMEDY = (
    "Make those folders the same in all models, or keep each model's own with "
    "`merge_method: flexmerge`."
)


def check_modules(
    config: Any, options: Any, facts: Mapping[Any, ModelFacts], findings: Findings
) -> None:
    """Report weights of modules that can be neither copied nor merged, and unequal settings."""
    folders = _folders({model: facts[model] for model in donor_first(config)}, options)
    home = module_home(folders.values())
    if home is None:
        return
    with_modules = {model: f for model, f in folders.items() if module_home([f])}
    found = {model: _headers(facts[model], f, findings) for model, f in with_modules.items()}
    for name in differing(folders):
        lacking = [model for model, folder in folders.items() if not (folder / name).is_file()]
        shapes = [
            {key: header.shape for key, header in headers[name].items()}
            for headers in found.values()
            if name in headers
        ]
        if lacking:
            what = f"no {name} in {listing([str(model) for model in lacking])}, which others have"
            findings.problem("models", what, "equal files, or one in each model", _REMEDY)
        elif not name.endswith((".safetensors", ".bin", ".pt")) or not config.models:
            what = f"different {name}, which only merges of whole models' single files merge"
            findings.problem("models", what, "equal files", _REMEDY)
        elif any(other != shapes[0] for other in shapes):
            what = f"different {name}, whose tensors have other names or shapes"
            findings.problem("models", what, "the same tensors", _REMEDY)
        elif (config.parameters or {}).get("granularity", "tensor") != "tensor":
            what = f"not `tensor`, while {name} differs between the models"
            remedy = f"Write `granularity: tensor`. {_REMEDY}"
            findings.problem("parameters.granularity", what, "`tensor`", remedy)
    _note_settings(home, with_modules, findings)


def check_copied_modules(facts: Mapping[Any, ModelFacts], options: Any, findings: Findings) -> None:
    """Report weights of modules that cannot be copied with their task."""
    for model, folder in _folders(facts, options).items():
        _headers(facts[model], folder, findings)


def _folders(facts: Mapping[Any, ModelFacts], options: Any) -> dict[Any, Path]:
    """The models' folders; none of them while one is not here."""
    found = {}
    for model in facts:
        path = model.model.path
        folder = Path(path) if paths.is_folder(path) else None
        if folder is None and not facts[model].pending and not hub.offline():
            cache = options.transformers_cache
            folder = hub.cached_folder(path, model.model.revision, "config.json", cache)
            if folder is not None:
                fetch_modules(model.model, folder, options)
        if folder is None:
            return {}
        found[model] = folder
    return found


def _headers(
    fact: ModelFacts, folder: Path, findings: Findings
) -> dict[str, dict[str, TensorHeader]]:
    names = [name for name in module_weights(folder) if not name.endswith(".index.json")]
    return {name: _tensors(folder / name, fact.where, findings) for name in names}


def _tensors(file: Path, where: str, findings: Findings) -> dict[str, TensorHeader]:
    try:
        return read_file(file, allow_pickle=pickles.are_allowed())
    except HeaderError as error:
        findings.problem(where, f"{error.file} with {error.found}", error.expected, error.remedy)
        return {}


def _note_settings(home: Path, folders: Mapping[Any, Path], findings: Findings) -> None:
    """Name settings of modules, such as the pooling, that other models have otherwise."""
    for name in companions(home):
        if not name.startswith(module_folders(home)) or is_weights(Path(name)):
            continue
        others = [str(m) for m, f in folders.items() if _content(f / name) != _content(home / name)]
        if others:
            findings.warn(f"The output has {name} of {home}; {listing(others)} differ.")


def _content(file: Path) -> Any:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content
