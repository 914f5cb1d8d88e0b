"""Merging weights that are in memory, or read tensor by tensor, with any registered method.

For weights that are no folders of a Hugging Face model: snapshots of a model that is trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.merge_methods.base import (
    BasePolicy,
    MergeMethod,
    ParameterScope,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from torch import Tensor

from mergekit_ext.core.parameters import unfit
from mergekit_ext.core.wording import did_you_mean, shown
from mergekit_ext.errors import Problem
from mergekit_ext.events import Dispatcher, MergeBegin, MergeEnd, TensorMerged
from mergekit_ext.host import session as sessions
from mergekit_ext.host.method import ExtMethod, WholeModelMethod
from mergekit_ext.host.methods import register_methods
from mergekit_ext.host.session import Session
from mergekit_ext.kernels.numerics import compute_dtype
from mergekit_ext.methods import Inputs

Tensors = Mapping[str, Tensor]
BASE = "base"


def known_methods() -> tuple[str, ...]:
    """The names of the methods that make one model of several."""
    register_methods()
    methods = merge_methods.registered_methods()
    return tuple(m.spec.name for m in methods if not isinstance(m, WholeModelMethod))


def needs_base(name: str) -> bool:
    """Whether the method cannot do without a base model."""
    return bool(_method(name).spec.contract.base == BasePolicy.REQUIRED)


def problems(
    name: str, parameters: Mapping[str, Any], count: int, has_base: bool
) -> Iterable[Problem]:
    """What is wrong with a merge of `count` models beside the base.

    Args:
        name: one of `known_methods`.
        parameters: shared ones, and per-model ones as a value for all or one for each.
    """
    method = _method(name)
    specs = {spec.name: spec for spec in method.spec.parameters}
    given = _with_weight(method, parameters)
    sound: dict[str, Any] = {}
    for key, value in given.items():
        where = f"parameters.{key}"
        if key not in specs:
            found = f"a parameter that `{name}` does not have"
            expected = f"one of {', '.join(sorted(specs))}" if specs else "no parameters at all"
            yield Problem(where, found, expected, did_you_mean(key, set(specs)))
            continue
        if specs[key].scope != ParameterScope.SHARED:
            wanted = count + (has_base and specs[key].scope == ParameterScope.INPUT)
            expected = f"one value for all snapshots, or a list of {wanted}, one for each"
            if isinstance(value, Mapping):
                yield Problem(where, "a mapping", expected)
                continue
            if isinstance(value, (list, tuple)) and len(value) != wanted:
                yield Problem(where, f"{len(value)} values", expected)
        wrong = [
            (item, problem)
            for item in _items(specs[key], value)
            if (problem := unfit(specs[key].validate, item)) is not None
        ]
        for item, (expected, remedy) in wrong:
            yield Problem(where, shown(item), expected, remedy)
        if not wrong:
            sound[key] = value
    for key, spec in specs.items():
        if spec.required and key not in given:
            expected = f"a value: `{name}` has no default for it"
            yield Problem(f"parameters.{key}", "nothing", expected)
    policy = method.spec.contract.base
    if has_base and policy in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN):
        yield Problem("base", "a base", f"none: `{name}` has no base", "Leave it out.")
        has_base = False
    if not has_base and policy == BasePolicy.REQUIRED:
        yield Problem("base", "none", f"a base: `{name}` merges changes of one", "Give `base`.")
        has_base = True
    inputs = [f"{i}" for i in range(count)]
    try:
        method.validate_inputs([*inputs, *([BASE] if has_base else [])], BASE if has_base else None)
    except ValueError as error:
        yield Problem("keep", f"{count} snapshots", f"what `{name}` takes ({error})")
    if isinstance(method, ExtMethod):
        shared = {k: v for k, v in sound.items() if specs[k].scope == ParameterScope.SHARED}
        defaults = {
            k: s.default
            for k, s in specs.items()
            if s.scope == ParameterScope.SHARED and not s.required
        }
        yield from method.problems({**defaults, **shared}, Inputs(count, has_base))


def merge(
    name: str,
    models: Mapping[str, Tensors],
    base: Tensors | None,
    parameters: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    callbacks: Iterable[object] = (),
) -> dict[str, Tensor]:
    """Merge models with the same tensors.

    Computed in float32 at least; each tensor has the dtype of the last model's. Tensors that are
    not floating point come from the last model. One tensor of all models is in memory at a time,
    unless the method measures whole blocks or models first.

    Args:
        name: one of `known_methods`.
        models: by the names that events and warnings call them.
        base: the base model, or None.
        parameters: as in `problems`, which must have found nothing.
        device: where is computed.
        callbacks: see `mergekit_ext.events`.

    Returns:
        New tensors by name, on the CPU.

    Raises:
        NonFiniteError: an input holds NaN or infinity.
        MergeError: what a method says.
        ValueError: shapes differ.
    """
    method = _method(name)
    given = _with_weight(method, parameters)
    last = list(models.values())[-1]
    floating = {key: last[key].dtype for key in last if last[key].is_floating_point()}
    ids = [*models, *([BASE] if base is not None else [])]
    session = Session(Dispatcher(callbacks))
    try:
        with sessions.active(session), torch.no_grad():
            session.emit(MergeBegin(name, "", tuple(ids), len(floating)))
            merged: dict[str, Tensor] = {}
            for keys in _batches(given, list(floating)):
                started = time.perf_counter()
                groups = [_group(key, models, base, device) for key in keys]
                results = [
                    *_merged(method, groups, given, [floating[key] for key in keys]),
                ]
                seconds = (time.perf_counter() - started) / len(keys)
                for key, tensor in zip(keys, results, strict=True):
                    # A method may return an input as it is.
                    merged[key] = tensor.to("cpu", copy=True)
                    details = session.details(key)
                    session.emit(TensorMerged(key, tuple(tensor.shape), details, seconds))
            session.emit(MergeEnd("", time.perf_counter() - session.started))
            if isinstance(method, ExtMethod):
                session.warn(method.warnings(session.records))
    finally:
        session.close()
    return {key: merged[key] if key in merged else last[key].clone() for key in last}


def _merged(
    method: MergeMethod,
    groups: Sequence[TensorGroup],
    parameters: Mapping[str, Any],
    dtypes: Sequence[torch.dtype],
) -> tuple[Tensor, ...]:
    wide = compute_dtype([tensor for group in groups for tensor in group.tensors])
    # `out_dtype` is one for all groups of a call.
    out = dtypes[0] if len(set(dtypes)) == 1 else None
    results = method(groups, parameters=parameters, dtype=wide, out_dtype=out)
    return tuple(tensor.to(dtype) for tensor, dtype in zip(results, dtypes, strict=True))


def _batches(parameters: Mapping[str, Any], keys: list[str]) -> list[list[str]]:
    """What is merged in one call: all tensors where norms are taken over more than one."""
    if parameters.get("granularity", "tensor") != "tensor" and keys:
        return [keys]
    return [[key] for key in keys]


def _group(
    key: str, models: Mapping[str, Tensors], base: Tensors | None, device: torch.device | str
) -> TensorGroup:
    entries = [TensorEntry(name, tensors[key].to(device)) for name, tensors in models.items()]
    if base is not None:
        entries.append(TensorEntry(BASE, base[key].to(device), is_base=True))
    return TensorGroup(tuple(entries), TensorMetadata(name=key))


def _method(name: str) -> MergeMethod:
    register_methods()
    return merge_methods.get(name)


def _with_weight(method: MergeMethod, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with a weight of 1 where a method asks for weights and none is given."""
    asked = any(s.name == "weight" and s.required for s in method.spec.parameters)
    return {**({"weight": 1.0} if asked else {}), **parameters}


def _items(spec: Any, value: Any) -> list[Any]:
    if spec.scope == ParameterScope.SHARED or isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, Sequence) else [value]
