"""Merging tensors that are in memory, with each method, as each family of methods is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from torch import Tensor

import mergekit_ext
from mergekit_ext.declared import BLOCKS, Method, methods
from mergekit_ext.errors import ConfigError
from mergekit_ext.flexmerge.reader import open_checkpoint
from mergekit_ext.kernels.numerics import compute_dtype
from peft_merge.adapter import Ia3Adapter, VectorInfo
from peft_merge.modules import log_problems, rules
from tests.models import config, state, write_yaml
from tests.peft_merge import loras

State = Mapping[str, Tensor]

# The methods of mergekit-yaml, with what they cannot do without. nan_ties stands for nan_<method>.
HOST: dict[str, dict[str, Any]] = {
    "nan": {},
    "nan_ties": {"density": 0.5},
    "lore": {"mu_relative": 0.1, "lambda": 1.0, "combine": "mean"},
    "tsv_m": {"lambda": 1.0},
    "iso_c": {},
    "iso_cts": {},
    "pcb": {"density": 0.5},
    "emr": {},
}
FLEXMERGE = tuple(methods(BLOCKS))


def host(name: str, models: Sequence[State], base: State | None = None, **more: Any) -> State:
    """The merged tensors of a method of mergekit-yaml."""
    named = {f"model{index}": model for index, model in enumerate(models)}
    mergekit_ext.register()
    tensors = list(models[0].values())
    return merge_state_dicts(
        {**named, **({} if base is None else {"base": base})},
        name,
        base=None if base is None else "base",
        parameters={**HOST[name], **more},
        dtype=compute_dtype(tensors),
        out_dtype=tensors[0].dtype,
    )


def host_files(folder: Path, name: str, models: Sequence[State], base: State | None) -> State:
    """The same of files, by the names in them."""
    first, *paths = _saved(folder, [base or {}, *models])
    content, out = config(name, paths, first if base else None, HOST[name]), folder / "out"
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    mergekit_ext.merge(write_yaml(folder / "m.yml", content), out, options)
    return state(out)


def _saved(folder: Path, states: Sequence[State]) -> list[Path]:
    """Save tensors as models of a class that transformers does not have."""
    paths = []
    for index, tensors in enumerate(states):
        place = folder / f"m{index}"
        place.mkdir(parents=True)
        save_file(dict(tensors), place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(
            json.dumps({"architectures": ["OwnModel"], "model_type": "llama"})
        )
        paths.append(place)
    return paths


def flexmerge(
    folder: Path, name: str, models: Sequence[State], base: State, **more: Any
) -> list[State]:
    """Each task's tensors of a FlexMerge in one group."""
    paths = _saved(folder, [base, *models])
    # One block of everything: of three models one group, with masks or without.
    size = 2.9 if methods(BLOCKS)[name].mask else 1.0
    parameters = {"target_size": size, "algorithm": name, "granularity": "model", **more}
    text = config("flexmerge", paths[1:], paths[0], parameters)
    out = folder / "out"
    mergekit_ext.merge(write_yaml(folder / "m.yml", text), out, MergeOptions(quiet=True))
    checkpoint = open_checkpoint(out)
    return [dict(checkpoint.tensors(task)) for task in checkpoint.tasks]


def given(rule: Method, count: int, **options: Any) -> Callable[[str], Any]:
    """Settings of a rule, with values for what has no default."""
    wanted = {"lore": {"mu_relative": 0.1}}.get(rule.name.removeprefix("nan_"), {})
    names = loras.defaults(rule, count).options
    wanted = {k: v for k, v in {**wanted, **options}.items() if k in names}
    return loras.always(loras.settings(rule, count, **wanted))


def lora(
    rule: Method,
    factors: Sequence[tuple[Tensor, Tensor]],
    dtype: torch.dtype | None = None,
    rank: Any = "lossless",
    **options: Any,
) -> Tensor:
    """The merged change B A of adapters with factors (A, B), in float64."""
    adapters = []
    for index, (a, b) in enumerate(factors):
        adapters.append(loras.adapter(f"a{index}", {"q": loras.Update(a[None], b[None], 1.0)}))
    merged, _, _ = loras.merge(
        adapters, rule, given(rule, len(factors), **options), dtype=dtype, rank=rank
    )
    return (merged["q"].b.double() @ merged["q"].a.double())[0]


def ia3(rule: Method, vectors: Sequence[Tensor], space: str = "additive", **options: Any) -> Tensor:
    """The merged vector of (IA)^3 adapters."""
    adapters = []
    for index, vector in enumerate(vectors):
        info = VectorInfo(shape=tuple(vector.shape), feedforward=False, dtype=vector.dtype)
        load = partial(lambda v, module: v, vector)
        adapters.append(Ia3Adapter(f"a{index}", {}, {"k": info}, load, {}))
    if space == "log" and (problems := list(log_problems(adapters))):
        raise ConfigError(problems)  # as the driver does before it merges
    merged, _, _ = loras.merge(adapters, rule, given(rule, len(vectors), **options), space=space)
    return merged["k"]


RULES = dict(rules())
