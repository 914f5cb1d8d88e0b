"""A `Request` -> a `MergePlan`, or one error with everything that is wrong.

Only configurations and headers are read (and whole tensors, when they may be averaged).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NoReturn

import torch

from mergekit_ext.core import memory
from mergekit_ext.errors import ConfigError, MergeWarning, Problem, did_you_mean, listing, shown
from mergekit_ext.methods import ADAPTERS, Inputs, Method, Settings
from peft_merge import saved
from peft_merge.adapter import Adapter, Ia3Adapter, LoraAdapter, modules_of
from peft_merge.config.document import Input, Request
from peft_merge.config.options import (
    common_dtype,
    default_space,
    device_of,
    dtype_of,
    fit_problems,
    option_problems,
)
from peft_merge.config.plan import AnyMethod, Kind, MergePlan, WholeMethod
from peft_merge.config.resolve import Resolver, unknown_everywhere
from peft_merge.flexmerge.method import FLEXMERGE
from peft_merge.io import load_adapter
from peft_merge.io.compatible import compatible, different_bases, few_shared
from peft_merge.io.forms import one_form
from peft_merge.memory_estimate import need_of
from peft_merge.methods import of_any_rule, rules

PATTERNS = (
    "Ranks may differ between modules (`patterns`), which PEFT alone reads from rank_pattern and "
    "alpha_pattern: llama.cpp, vLLM, SGLang and LoRAX scale such modules wrongly."
)


def methods() -> dict[str, AnyMethod]:
    """Return all merge methods by name: the rules and FlexMerge."""
    return {**rules(), FLEXMERGE.name: FLEXMERGE}


def checked(request: Request, problems: Iterable[Problem] = ()) -> MergePlan:
    """Check a request as far as configurations and headers go.

    Args:
        problems: what was found wrong with its form.

    Raises:
        ConfigError: with all problems.
    """
    found = list(problems)
    method, resolve = _settings(request, found)
    found += option_problems(request)
    dtype = None if request.dtype is None else dtype_of(request.dtype)
    device = device_of(request.device)
    found += [item for item in (dtype, device) if isinstance(item, Problem)]
    adapters, renamings, unclear = one_form(_adapters(request, found))
    found += [*unclear, *compatible(adapters)] if adapters else []
    if not 0 < len(adapters) == len(request.inputs) or len({type(a) for a in adapters}) > 1:
        _stop(request, found)
    kind: Kind = "lora" if isinstance(adapters[0], LoraAdapter) else "ia3"
    found += fit_problems(request, kind, adapters)
    # What is wrong whatever the parameters are; a whole-merge method has rules of its own.
    if isinstance(method, WholeMethod):
        unfit = list(method.check_inputs(request, adapters))
    elif method is None and request.modules_to_save is None:
        unfit = []
    else:
        unfit = list(saved.problems_of(request.modules_to_save, adapters))
    if method is None or resolve is None:
        _stop(request, [*found, *unfit])
    resolve = replace(resolve, modules=tuple(modules_of(adapters)))
    taken: Mapping[str, tuple[int, ...]] = {}
    forewarnings: dict[str, MergeWarning] = {}
    absent = list(resolve.missing())
    found += absent
    if isinstance(method, Method):
        if not absent:
            found += _value_problems(method, {name: resolve(name) for name in resolve.modules})
        if not unfit:
            taken = saved.carriers(request.modules_to_save or saved.AVERAGE, adapters)
            found += saved.weights_problems(taken, resolve.weights)
        found += unfit
    if found:
        _stop(request, [*found, *unfit])
    if isinstance(method, Method):
        for module in resolve.modules:  # each once, however many modules it is about
            for warning in method.forewarn(
                resolve(module).options, Inputs(len(adapters), driver=ADAPTERS)
            ):
                forewarnings.setdefault(str(warning), warning)
    plan = MergePlan(
        request=request,
        method=method,
        kind=kind,
        adapters=tuple(adapters),
        modules=tuple(resolve.modules),
        resolve=resolve,
        rank=request.rank,
        patterns=bool(request.patterns),
        space=request.space or default_space(kind),
        seed=request.seed,
        dtype=dtype if isinstance(dtype, torch.dtype) else common_dtype(adapters),
        device=device if isinstance(device, torch.device) else torch.device("cpu"),
        saved=taken,
        notes=(*renamings, *resolve.idle_filters(), *([PATTERNS] if request.patterns else [])),
        forewarnings=tuple(forewarnings.values()),
    )
    if isinstance(method, WholeMethod) and (wrong := [*unfit, *method.check(plan)]):
        _stop(request, wrong)
    if wrong := list(memory.problems(need_of(plan))):
        _stop(request, wrong)
    averaged = saved.averaged(plan.saved, adapters) if request.modules_to_save is None else None
    for said in (different_bases(adapters), few_shared(adapters), averaged):
        if said is not None:
            warnings.warn(said, stacklevel=4)
    return plan


def _stop(request: Request, problems: Iterable[Problem]) -> NoReturn:
    raise ConfigError(dict.fromkeys(problems), request.subject)


def _settings(request: Request, found: list[Problem]) -> tuple[AnyMethod | None, Resolver | None]:
    """The method, and the settings, if they are right by themselves."""
    name, known = request.method, methods()
    if not isinstance(name, str) or name not in known:
        if name is None:
            found.append(Problem("merge_method", "nothing", "a merge method", "Add it."))
        else:
            remedy = did_you_mean(name, known)
            found.append(Problem("merge_method", shown(name), "a merge method", remedy))
        forms = of_any_rule()
        for parameter in FLEXMERGE.parameters({}):
            forms.setdefault(parameter.name, []).append(parameter)
        found += unknown_everywhere(forms, request.parameters, request.inputs)
        return None, None
    method = known[name]
    if isinstance(method, WholeMethod):
        parameters = method.parameters(request.parameters)
    else:
        parameters = method.for_driver(ADAPTERS)
    resolve = Resolver(name, parameters, request.parameters, request.inputs)
    wrong = list(resolve.problems())
    found += wrong
    return method, None if wrong else resolve


def _adapters(request: Request, found: list[Problem]) -> list[Adapter]:
    adapters = []
    places: dict[str, list[str]] = {}
    for item in request.inputs:
        if (adapter := _adapter(item, request.allow_pickle, found)) is not None:
            adapters.append(adapter)
            places.setdefault(adapter.name, []).append(item.where)
    for name, where in places.items():
        if len(where) > 1:
            remedy = "Give each a name of its own with `name:`."
            called = f"{len(where)} adapters called {name!r}"
            found.append(Problem(", ".join(where), called, "names that differ", remedy))
    return adapters


def _adapter(item: Input, allow_pickle: bool, found: list[Problem]) -> Adapter | None:
    if isinstance(item.source, (LoraAdapter, Ia3Adapter)):
        return item.source if item.name is None else replace(item.source, name=item.name)
    try:
        return load_adapter(
            item.source, name=item.name, revision=item.revision, allow_pickle=allow_pickle
        )
    except ConfigError as error:
        found += [
            replace(problem, where=f"{item.where}.name") if problem.where == "name" else problem
            for problem in error.problems
        ]
        return None


def _value_problems(rule: Method, values: Mapping[str, Settings]) -> Iterator[Problem]:
    """What a rule finds wrong with its options and weights, as each module gets them."""
    for settings in values.values():
        yield from rule.check(settings.options, Inputs(len(settings.weights), driver=ADAPTERS))
        for own in settings.each:
            yield from rule.check_each(own)
    if rule.nan:
        each = sorted({settings.options["granularity"] for settings in values.values()})
        if len(each) > 1:
            found = f"{' and '.join(each)}, by module"
            remedy = "Give one value, without filters."
            yield Problem("parameters.granularity", found, "one for the whole merge", remedy)
    cancelled = [module for module, settings in values.items() if rule.without_mean(settings)]
    if cancelled:
        some = f" for {listing(cancelled)}" if len(cancelled) < len(values) else ""
        found = f"weights that sum to 0{some}, which have no mean"
        remedy = "Change `weight`, or leave the sum undivided (`normalize: false`, `combine: sum`)."
        yield Problem("parameters.weight", found, "a sum other than 0", remedy)
