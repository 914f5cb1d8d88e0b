"""The checks of a mergekit-pytorch merge: weight files without an architecture."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mergekit_ext.errors import listing
from mergekit_ext.host.adapters.loader import config_beside, file_with_adapter
from mergekit_ext.host.checks.adapters import adapted_tensors
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.merge import check_costs, find_method
from mergekit_ext.host.checks.models import ModelFacts, refuse_codes
from mergekit_ext.host.checks.plan import Inventory, PlannedTensor, locate
from mergekit_ext.host.checks.report import CheckReport, Findings, quiet
from mergekit_ext.host.checks.schema import unknown_keys
from mergekit_ext.host.checks.settings import check_multi_gpu, check_settings
from mergekit_ext.host.checks.tensors import check_tensors
from mergekit_ext.io.headers import HeaderError, TensorHeader, pickles_allowed, read_file

if TYPE_CHECKING:
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig


def check_flat(
    config: RawPyTorchMergeConfig,
    options: MergeOptions,
    *,
    union: bool = False,
    intersection: bool = False,
    source: str | Mapping[str, Any] | None = None,
) -> CheckReport:
    """Check a merge of single weight files. Arguments as in `check_merge`.

    Args:
        union: `--tensor-union`: tensors may be missing in some files.
        intersection: `--tensor-intersection`: only tensors that all files have are merged.
    """
    findings, files = Findings(), Findings()
    costs = None
    with quiet():
        if source is not None:
            findings.extend(unknown_keys(source, schema=type(config), also=()))
        check_settings(config, options, findings)
        check_multi_gpu(options, findings)
        method = find_method(config.merge_method, findings)
        if not config.models:
            findings.problem("models", "an empty list", "the files to merge", "Add them.")
            return findings.report()
        places = {m: where.removesuffix(".model") for m, where in models_at(config).items()}
        models = {
            model: ModelFacts(model, where, tensors=_tensors(model, where, files))
            for model, where in places.items()
        }
        inventory = Inventory(config, options, method, files, models)
        inventory.planned = _planned(config, models, union, intersection, files)
        locate(inventory)
        check_tensors(dataclasses.replace(inventory, method=_without_policy(method)))
        costs = check_costs(inventory, findings, collects=True)
        findings.merge(files)
    return findings.report(costs)


def adapter_problems(places: Mapping[str, str]) -> Findings:
    """Check the files with adapters among models and their places.

    For merges with methods that the project does not check further.
    """
    findings = Findings()
    for path, where in places.items():
        if file_with_adapter(path) is not None:
            _tensors(path, where, findings)
    return findings


def _tensors(path: str, where: str, findings: Findings) -> dict[str, TensorHeader] | None:
    reference = file_with_adapter(path)
    if reference is None:
        return _file_tensors(path, where, findings)
    file = reference.model.path
    base, config = _file_tensors(file, where, findings), config_beside(file)
    folder = str(Path(file).resolve().parent)
    return adapted_tensors(reference.lora, folder, base, config, where, findings, otherwise="")


def _file_tensors(path: str, where: str, findings: Findings) -> dict[str, TensorHeader] | None:
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        findings.problem(
            where,
            f"{path}, which {what}",
            "a file, .safetensors or a PyTorch pickle",
            "Check the path; whole models are merged with mergekit-yaml.",
        )
        return None
    allow_pickle = pickles_allowed()
    if Path(path).suffix != ".safetensors" and allow_pickle:
        findings.note(f"{where}: {path} is a pickle, as allowed; only tensors are read from it.")
    try:
        tensors = read_file(Path(path), allow_pickle=allow_pickle)
    except HeaderError as error:
        findings.unreadable(where, error)
        return None
    refuse_codes(tensors, path, where, findings)
    return tensors


def _planned(
    config: Any,
    facts: Mapping[Any, ModelFacts],
    union: bool,
    intersection: bool,
    findings: Findings,
) -> list[PlannedTensor]:
    """What mergekit-pytorch would merge: the tensors of the models, the base not among them."""
    from mergekit.architecture import WeightInfo

    own = {item.model: item.parameters for item in config.models}
    known = {path: fact.tensors for path, fact in facts.items() if fact.tensors is not None}
    names = list(dict.fromkeys(name for path in own for name in known.get(path, ())))
    if intersection:
        kept = [name for name in names if all(name in tensors for tensors in known.values())]
        if rest := [name for name in names if name not in kept]:
            findings.note(f"Tensors that some file lacks are left out: {listing(rest)}.")
        names = kept
    weights = [WeightInfo(name=name, optional=union and not intersection) for name in names]
    return [
        PlannedTensor(
            weight=weight,
            inputs=tuple((path, weight) for path in known),
            base=config.base_model,
            sources=lambda path: (own.get(path), config.parameters),
            t=0.0,
            group="models",
        )
        for weight in weights
    ]


def _without_policy(method: Any) -> Any:
    """The method as mergekit-pytorch treats it: no exceptions for tensors that some files lack."""
    if method is None:
        return None
    from mergekit.merge_methods.base import OptionalTensorPolicy

    spec = dataclasses.replace(method.spec, optional_tensor_policy=OptionalTensorPolicy.ERROR)
    return SimpleNamespace(spec=spec, validate_inputs=method.validate_inputs)
