"""The folders that ``modules.json`` names (sentence-transformers), and weights in them.

Weights that all models have alike are copied; others, such as those of a ``2_Dense``, are merged
like any tensor. Gradients over layers have their last value.
"""

import filecmp
import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from mergekit import merge_methods
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap
from mergekit.parameter_resolver import resolve_parameters
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ext.errors import listing
from mergekit_ext.host.checks.models import ModelFacts, read_tensors
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.inputs import cached_folder, donor_first, fetch_modules
from mergekit_ext.host.naming import Headers
from mergekit_ext.host.tasks import MergeTensorTask
from mergekit_ext.io.model_files import (
    MODULES,
    companions,
    is_weights,
    module_folders,
    module_weights,
)

_LAST_LAYER = 1.0
_REMEDY = "Make those folders the same in all models, or use `flexmerge`, which keeps each one's."


def with_modules(folders: Mapping[Any, Path]) -> dict[Any, Path]:
    """Return those that have ``modules.json``; the output gets that of the first, and its own."""
    return {model: at for model, at in folders.items() if (at / MODULES).is_file()}


def check_modules(
    config: Any, options: Any, facts: Mapping[Any, ModelFacts], findings: Findings
) -> None:
    """Report weights of modules that can be neither copied nor merged, and unequal settings."""
    folders = _folders({model: facts[model] for model in donor_first(config)}, options)
    having = with_modules(folders)
    if not having:
        return
    first = next(iter(having.values()))
    found = {model: _headers(facts[model], f, findings) for model, f in having.items()}
    tensorwise = (config.parameters or {}).get("granularity", "tensor") == "tensor"
    for name in _differing(folders):
        stored = [found.get(model, {}).get(name, {}) for model in folders]
        shapes = [{key: header.shape for key, header in headers.items()} for headers in stored]
        mergeable = config.models and name.endswith((".safetensors", ".bin", ".pt"))
        if not mergeable or any(other != shapes[0] for other in shapes):
            what = f"different {name}, or none, in {listing([str(model) for model in folders])}"
            wanted = "equal files, or the same tensors in single files of merges of whole models"
            findings.problem("models", what, wanted, _REMEDY)
        elif not tensorwise:
            what = f"not `tensor`, while {name} differs between the models"
            findings.problem("parameters.granularity", what, "`tensor`", f"Write it. {_REMEDY}")
    for name in companions(first):  # settings, such as the pooling
        if name.startswith(module_folders(first)) and not is_weights(Path(name)):
            mine = _content(first / name)
            others = [str(m) for m, f in having.items() if _content(f / name) != mine]
            if others:
                findings.warn(f"The output has {name} of {first}; {listing(others)} differ.")


def check_copied_modules(facts: Mapping[Any, ModelFacts], options: Any, findings: Findings) -> None:
    """Report weights of modules that cannot be copied with their task."""
    for model, folder in _folders(facts, options).items():
        _headers(facts[model], folder, findings)


def _folders(facts: Mapping[Any, ModelFacts], options: Any) -> dict[Any, Path]:
    """Return the models' folders; none of them while one is not here."""
    found = {}
    for model, fact in facts.items():
        path = model.model
        folder = Path(path.path) if os.path.isdir(path.path) else None
        if folder is None and not fact.pending and not is_offline_mode():
            folder = cached_folder(path, options)
            if folder is not None:
                fetch_modules(path, folder, options)
        if folder is None:
            return {}
        found[model] = folder
    return found


def _headers(fact: ModelFacts, folder: Path, findings: Findings) -> dict[str, Headers]:
    names = [name for name in module_weights(folder) if not name.endswith(".index.json")]
    return {name: read_tensors(folder / name, fact.where, findings) or {} for name in names}


def _content(file: Path) -> Any:
    try:
        content = file.read_bytes()
        return json.loads(content)
    except OSError:
        return None
    except (ValueError, RecursionError):
        return content


def _differing(folders: Mapping[Any, Path]) -> list[str]:
    """Return the files of weights in the output's modules that not all models have alike."""
    # A model without modules, such as a bare base, has a part in none.
    having = [*with_modules(folders).values()]

    def is_alike(name: str) -> bool:
        files = [folder / name for folder in having]
        return all(file.is_file() for file in files) and all(
            filecmp.cmp(one, other, shallow=False) for one, other in pairwise(files)
        )

    return [n for folder in having[:1] for n in module_weights(folder) if not is_alike(n)]


def merge_modules(config: Any, folders: Mapping[Any, Path], target: Path, options: Any) -> None:
    """Merge weights of modules that differ into files of the same names in `target`."""
    for file in _differing(folders):
        models = {model: _load(folder / file) for model, folder in folders.items()}
        merged = {}
        for name in next(iter(models.values())):
            task = _task(config, f"{Path(file).parent.as_posix()}.{name}", options)
            result = task.execute({model: tensors[name] for model, tensors in models.items()})
            assert result is not None
            merged[name] = result.contiguous()
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".safetensors"):
            save_file(merged, target / file, metadata={"format": "pt"})
        else:
            torch.save(merged, target / file)


def _task(config: Any, name: str, options: Any) -> MergeTensorTask:
    own = {item.model: item.parameters for item in config.models}
    base = config.base_model
    models = list(dict.fromkeys([*own, *([base] if base else [])]))
    shared, of_models = resolve_parameters(
        merge_methods.get(config.merge_method).spec,
        tensor_name=name,
        inputs=dict.fromkeys(models, name),
        sources=lambda model: (own.get(model), config.parameters),
        base_model=base,
        t=_LAST_LAYER,
    )
    return MergeTensorTask.model_construct(
        method_name=config.merge_method,
        gather_tensors=None,
        model_order=tuple(models),
        base_model=base,
        output_weight=WeightInfo(name=name),
        parameters=ImmutableMap(shared),
        input_parameters=ImmutableMap({m: ImmutableMap(own) for m, own in of_models.items()}),
        dtype=config.dtype,
        out_dtype=config.out_dtype,
        seed=options.random_seed or 0,
    )


def _load(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    return dict(state.get("state_dict", state))
