"""Weights in the folders that ``modules.json`` names, such as a ``2_Dense``.

Where all models have the same, they are copied; others are merged like any tensor, by the method
and with the parameters of the merge. Gradients over layers have their last value.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap
from mergekit.parameter_resolver import resolve_parameters
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ext.host.model_folders import module_home
from mergekit_ext.host.tasks import MergeTensorTask
from mergekit_ext.io.model_files import module_weights

_LAST_LAYER = 1.0


def differing(folders: Mapping[Any, Path]) -> list[str]:
    """Return the files of weights in the output's modules that not all models have alike.

    A model without modules, such as a bare base, has a part in none.
    """
    home = module_home(folders.values())
    found = []
    for name in module_weights(home) if home is not None else ():
        files = [folder / name for folder in folders.values() if module_home([folder])]
        same = all(file.is_file() for file in files) and all(
            filecmp.cmp(one, other, shallow=False) for one, other in pairwise(files)
        )
        if not same:
            found.append(name)
    return found


def merge_modules(config: Any, folders: Mapping[Any, Path], target: Path, options: Any) -> None:
    """Merge what is `differing` into files of the same names in `target`."""
    for file in differing(folders):
        models = {model: _load(folder / file) for model, folder in folders.items()}
        first = next(iter(models.values()))
        merged = {}
        for name in first:
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
    models = list(dict.fromkeys([*own, *([config.base_model] if config.base_model else [])]))
    shared, of_models = resolve_parameters(
        merge_methods.get(config.merge_method).spec,
        tensor_name=name,
        inputs=dict.fromkeys(models, name),
        sources=lambda model: (own.get(model), config.parameters),
        base_model=config.base_model,
        t=_LAST_LAYER,
    )
    return MergeTensorTask.model_construct(
        method_name=config.merge_method,
        gather_tensors=None,
        model_order=tuple(models),
        base_model=config.base_model,
        output_weight=WeightInfo(name=name),
        parameters=ImmutableMap(shared),
        input_parameters=ImmutableMap(
            {model: ImmutableMap(values) for model, values in of_models.items()}
        ),
        dtype=config.dtype,
        out_dtype=config.out_dtype,
        seed=options.random_seed or 0,
    )


def _load(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    return dict(state.get("state_dict", state))
