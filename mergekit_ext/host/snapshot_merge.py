"""Saved models of one training run, as one merge of whole models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.merge_methods.base import BasePolicy, MergeMethodSpec
from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.errors import Problem
from mergekit_ext.host.checks.merge import check_merge
from mergekit_ext.host.commands import parsed
from mergekit_ext.host.method import WholeModelMethod, ext_method


def configuration(
    method: str, models: Sequence[Path], base: Path | None, parameters: Mapping[str, Any]
) -> str:
    """Return the YAML of a merge; a `weight` that the method requires is 1 unless it is given."""
    spec = _spec(method)
    asked = spec is not None and any(p.name == "weight" and p.required for p in spec.parameters)
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": os.fspath(model)} for model in models],
        "parameters": {**({"weight": 1.0} if asked else {}), **parameters},
    }
    if base is not None:
        document["base_model"] = os.fspath(base)
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def needs_base(method: str) -> bool:
    """Whether a registered method cannot do without a base model."""
    spec = _spec(method)
    return spec is not None and bool(spec.contract.base == BasePolicy.REQUIRED)


def options(folder: Path, device: str, seed: int) -> MergeOptions:
    """Return the options of a merge of models like that in `folder`."""
    tokenizer = any(folder.glob("tokenizer*"))
    # 0 is the seed without one; MergeOptions sets torch's global seed to any other.
    return MergeOptions(
        quiet=True, device=device, random_seed=seed or None, copy_tokenizer=tokenizer
    )


def problems(source: str, options: MergeOptions) -> Sequence[Problem]:
    """Return what is wrong with a merge, from configurations and headers.

    Raises:
        ConfigError: `source` is no configuration.
    """
    config = parsed(source)
    if isinstance(ext_method(config.merge_method), WholeModelMethod):
        expected = "a method that makes one model"
        return [Problem("method", repr(config.merge_method), expected)]
    return check_merge(config, options, source)[0].problems


def _spec(method: str) -> MergeMethodSpec | None:
    mergekit_ext.register()
    specs = (known.spec for known in merge_methods.registered_methods())
    return next((spec for spec in specs if spec.name == method), None)
