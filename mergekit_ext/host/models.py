"""`merge_models`: modules and state dicts in memory, merged as mergekit merges saved models."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from mergekit.merge_methods.base import ParameterScope
from torch import Tensor

import mergekit_ext
from mergekit_ext.declared import Inputs
from mergekit_ext.errors import listing, require, shown
from mergekit_ext.host.blocks import block_of
from mergekit_ext.host.checks.copied import OF_MERGES
from mergekit_ext.host.checks.layout import Group, Source
from mergekit_ext.host.checks.merge import method_named
from mergekit_ext.host.checks.parameters import check_parameters
from mergekit_ext.host.checks.plan import PlannedTensor
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.flexmerge import FlexMergeMethod
from mergekit_ext.host.method import ExtMethod, group_of
from mergekit_ext.host.session import Session, active
from mergekit_ext.io.headers import is_counter
from mergekit_ext.io.quantised import stored_codes
from mergekit_ext.io.state import named
from mergekit_ext.kernels.precision import full_precision
from mergekit_ext.kernels.seeds import derived, seeded
from mergekit_ext.report.rho import rho_of

_BASE = "base"
_CONFIGURED = "Take it out, or save the models and use `mergekit_ext.merge`."
_QUANTISED = "Call `dequantize()` of transformers' modules, or save them and merge the folders."
_TENSORS = {Tensor, torch.nn.Parameter}
# Tensors, each with the first of its names.
_State = Mapping[str, tuple[str, Tensor]]


def merge_models(
    models: Sequence[Any] | Mapping[str, Any],
    method: str,
    *,
    base: Any = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    **parameters: Any,
) -> Any:
    """Merge torch modules or state dicts in memory, as the YAML merges the same models saved.

    Args:
        models: modules or state dicts with the same tensors; a mapping gives them names. They are
            not changed.
        method: any merge method but `flexmerge` and `decompose`; ``print(mergekit_ext.methods())``.
        base: the base model, likewise.
        weights: one for each model; the same as the parameter `weight`.
        seed: of random methods, as ``--random-seed``.
        **parameters: of the method: one value, or a list with one for each model if models can
            have their own. A trailing underscore is left out: ``lambda_=0.5``.

    Returns:
        A module of the first one's class; of state dicts a state dict. Tensors are computed on the
        device that they are on, in float32 at least, and tied ones stay tied.

    Raises:
        ConfigError: with all that is wrong with arguments and models.
        NonFiniteError, MergeError: an input holds NaN or infinity, or the result would.

    Example:
        >>> merged = mergekit_ext.merge_models([code, maths], "ties", base=base, density=0.5)
        >>> merged = mergekit_ext.merge_models([code, maths], "linear", weights=[0.7, 0.3])
    """
    mergekit_ext.register()
    findings = Findings()
    found = method_named(method, "method", findings)
    if isinstance(found, FlexMergeMethod):
        remedy = "Save the models, and use `mergekit_ext.merge`."
        findings.problem("method", repr(method), "a method that makes one model", remedy)
        found = None
    inputs = _inputs(models, base, findings)
    if weights is not None:
        parameters["weight"] = weights
    group = _group(found, inputs, base, parameters, findings)
    if found is not None and inputs:
        _check_parameters(found, group, findings)
    states = {key: named(model) for key, model in inputs.items()}
    if codes := {key: code for key, state in states.items() for code in stored_codes(state)}:
        what = f"codes of quantised models, such as {next(iter(codes.values()))}"
        findings.problem(listing([*codes]), what, "weights", _QUANTISED)
    else:
        _check_tensors(states, findings)
    require(findings.report().problems, "these models")
    first, *others = states.values()
    # Tensors that all models tie are one.
    in_all = {n: kept for n, (kept, _) in first.items() if all(s[n][0] == kept for s in others)}
    tied = {name: in_all.get(name, name) for name in first}
    merged = _merge(found, group, states, dict.fromkeys(tied.values()), seed)
    model = next(iter(inputs.values()))
    if isinstance(model, Mapping):
        return {name: merged[kept] for name, kept in tied.items()}
    model = copy.deepcopy(model)
    for name, (_, tensor) in named(model).items():
        tensor.copy_(merged[tied[name]])
    return model


def _inputs(models: Any, base: Any, findings: Findings) -> dict[str, Any]:
    """Return the models and the base by name; report what is none."""
    found = models
    if isinstance(models, (list, tuple)):
        found = {f"models[{i}]": model for i, model in enumerate(models)}
    if not isinstance(found, Mapping) or not found:
        expected = "a list of one model at least, or a mapping from names to models"
        findings.problem("models", shown(models), expected)
        return {}
    found = {str(name): model for name, model in found.items()}
    if base is not None and all(model is not base for model in found.values()):
        if _BASE in found:
            findings.problem("models", f"a model called {_BASE!r} beside `base`", "another name")
        found[_BASE] = base
    for name, model in list(found.items()):
        state = isinstance(model, Mapping) and {type(tensor) for tensor in model.values()}
        if not isinstance(model, torch.nn.Module) and not (state and state <= _TENSORS):
            expected = "a torch module, or a state dict of tensors"
            findings.problem(name, f"a {type(model).__name__}", expected)
            del found[name]
    return found


def _group(
    method: Any, inputs: Mapping[str, Any], base: Any, given: Mapping[str, Any], findings: Findings
) -> Group:
    """Return inputs and parameters as a configuration has them; report what it cannot."""
    specs = {} if method is None else {spec.name: spec for spec in method.spec.parameters}
    based = next((key for key, model in inputs.items() if model is base), None)
    sources = [Source(key, key, {}, implicit=key == _BASE == based) for key in inputs]
    models = [source for source in sources if not source.implicit]
    shared: dict[str, Any] = {}
    for key, value in given.items():
        name, own = key.removesuffix("_"), None
        if hasattr(value, "tolist"):  # of torch and NumPy
            value = value.tolist()
        if (spec := specs.get(name)) is not None and spec.scope != ParameterScope.SHARED:
            own = f", or a list of {len(models)}, one for each model"
        if name in OF_MERGES:
            findings.problem(name, "it", "nothing: it is for saved models", _CONFIGURED)
        elif spec is None or not isinstance(value, (list, tuple, Mapping)):
            shared[name] = value
        elif own and not isinstance(value, Mapping) and len(value) == len(models):
            for source, one in zip(models, value, strict=True):
                source.parameters[name] = one.item() if hasattr(one, "item") else one  # type: ignore[index]
        else:
            findings.problem(name, shown(value), f"one value{own or ''}", _CONFIGURED)
    return Group("models", tuple(sources), based, {"parameters": shared})


def _check_parameters(method: Any, group: Group, findings: Findings) -> None:
    (shared,) = group.shared.values()
    weight = SimpleNamespace(name="")
    one = PlannedTensor(
        weight,
        dict.fromkeys(group.by_model, weight),
        group,
        lambda key: [shared] if key is None else [group.by_model[key].parameters, shared],
    )
    own = Findings()
    check_parameters(method, [group], [one], own)
    for problem in own.report().problems:
        given = re.sub(r"Add `(\w+):`( there, or [^.]*)?", r"Give `\1=`", problem.remedy)
        remedy = given.replace("`base_model=`", f"`{_BASE}`")
        where = problem.where.replace("base_model", _BASE)
        findings.extend([replace(problem, where=where, remedy=remedy)])


def _check_tensors(states: Mapping[str, _State], findings: Findings) -> None:
    (first, known), *others = [*states.items()] or [("", {})]
    remedy = "Give state dicts of what all have, or save the models and use `mergekit_ext.merge`."
    for key, state in others:
        for name in dict.fromkeys((*known, *state)):
            one, other = _shown(known, name), _shown(state, name)
            if one != other:
                findings.tensor(name, f"{other} in {key}", f"{one}, as in {first}", remedy)


def _shown(state: _State, name: str) -> str:
    """Return shape and device of a tensor, and whole numbers, which are copied, too."""
    if name not in state:
        return "nothing"
    tensor = state[name][1]
    copied = not tensor.is_floating_point() and not is_counter(name)
    return f"{[*tensor.shape]} on {tensor.device}" + copied * f" ({shown(tensor.tolist())})"


def _merge(
    method: Any, group: Group, states: Mapping[str, _State], names: Iterable[str], seed: int
) -> dict[str, Tensor]:
    """Return the merged tensors called `names`; none is an input's."""
    (shared,) = group.shared.values()
    given = dict(shared) | {
        spec.name: {
            source.model: {**shared, **source.parameters}.get(spec.name, spec.default)
            for source in group.sources
        }
        for spec in method.spec.input_parameters
    }
    copied = states[group.base] if group.base else next(iter(states.values()))
    merged = {n: copied[n][1].clone() for n in names if not copied[n][1].is_floating_point()}
    groups = [
        group_of(name, {key: of[name][1] for key, of in states.items()}, group.base)
        for name in names
        if name not in merged
    ]
    with active(Session()) as session, full_precision(), torch.no_grad():
        bound = method._bind_parameters(groups, given)
        if isinstance(method, ExtMethod) and bound:
            weights = [bound[0]["weight"][entry.id] for entry in groups[0].non_base]
            about = Inputs(len(weights), group.base is not None, weights=weights)
            session.warn(method.declared.forewarn(bound[0], about))
        for one, values in zip(groups, bound, strict=True):
            name = str(one.metadata.name)
            with seeded(derived(seed, name), one.tensors[0].device):
                (found,) = method._execute_resolved((one,), [values])
            is_input = found.data_ptr() in map(Tensor.data_ptr, one.tensors)
            merged[name] = found.clone() if is_input else found
        if isinstance(method, ExtMethod):
            far = rho_of({one.name: one.details for one in session.records}, block_of)
            session.warn([*far.warnings(method.spec.name), *method.warnings(session.records)])
    return merged
