"""A `Request` -> a `MergePlan`, or one error with everything that is wrong.

Only configurations and headers are read (and whole tensors, when they may be averaged).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NoReturn

import torch

from mergekit_ext import memory
from mergekit_ext.core.wording import did_you_mean, listing, shown
from mergekit_ext.errors import ConfigError, MergeWarning, Problem
from peft_merge import saved
from peft_merge.adapter import Adapter, Ia3Adapter, LoraAdapter
from peft_merge.config.document import Input, Request
from peft_merge.config.options import (
    default_space,
    device_of,
    dtype_of,
    rank_problem,
    seed_problem,
    space_problems,
)
from peft_merge.config.plan import Kind, MergePlan, Method, WholeMethod
from peft_merge.config.resolve import Resolver, unknown_everywhere
from peft_merge.footprint import need_of
from peft_merge.io import compatible, different_bases, few_shared, load_adapter, one_form
from peft_merge.methods import methods, of_any_method, parameters_of

PATTERNS = (
    "Ranks may differ between modules (`patterns`), which PEFT alone reads from rank_pattern and "
    "alpha_pattern: llama.cpp, vLLM, SGLang and LoRAX scale such modules wrongly."
)


def checked(request: Request, problems: Iterable[Problem] = ()) -> MergePlan:
    """Check a request as far as configurations and headers go.

    Args:
        problems: what was found wrong with its form.

    Raises:
        ConfigError: with all problems.
    """
    found = list(problems)
    method = _method(request.method, found)
    resolve = _settings(request, method, found)
    dtype, device = _options(request, found)
    adapters = _adapters(request, found)
    forms = one_form(adapters)
    adapters = forms.adapters
    found += [*forms.problems, *compatible(adapters)] if adapters else []
    if not 0 < len(adapters) == len(request.inputs) or len({type(a) for a in adapters}) > 1:
        _stop(request, found)
    kind: Kind = "lora" if isinstance(adapters[0], LoraAdapter) else "ia3"
    found += _fitting(request, kind, adapters)
    if method is None or resolve is None:
        _stop(request, [*found, *_of_inputs(request, method, adapters)])
    modules = dict.fromkeys(name for adapter in adapters for name in adapter.infos)
    resolve = replace(resolve, modules=tuple(modules))
    absent = list(resolve.missing())
    found += absent or _value_problems(method, resolve)
    unfit = _of_inputs(request, method, adapters)
    whole = isinstance(method, WholeMethod)
    taken = {} if whole or unfit else _taken(request, resolve, adapters, found)
    if found or (unfit and not whole):
        _stop(request, [*found, *unfit])
    plan = MergePlan(
        request=request,
        method=method,
        kind=kind,
        adapters=tuple(adapters),
        modules=tuple(modules),
        resolve=resolve,
        rank=request.rank,
        patterns=bool(request.patterns),
        space=request.space or default_space(kind),
        seed=request.seed,
        dtype=dtype or _common_dtype(adapters),
        device=device,
        saved=taken,
        notes=(*forms.notes, *resolve.idle_filters(), *([PATTERNS] if request.patterns else [])),
        forewarnings=_forewarnings(method, resolve),
    )
    if isinstance(method, WholeMethod) and (wrong := [*unfit, *method.check(plan)]):
        _stop(request, wrong)
    if wrong := list(memory.problems(need_of(plan))):
        _stop(request, wrong)
    averaged = saved.averaged(plan.saved, adapters) if request.modules_to_save is None else None
    for warning in (different_bases(adapters), few_shared(adapters), averaged):
        if warning is not None:
            warnings.warn(warning, stacklevel=4)
    return plan


def _stop(request: Request, problems: Iterable[Problem]) -> NoReturn:
    raise ConfigError(dict.fromkeys(problems), request.subject)


def _method(name: Any, found: list[Problem]) -> Method | None:
    known = methods()
    if isinstance(name, str) and name in known:
        return known[name]
    if name is None:
        found.append(Problem("merge_method", "nothing", "a merge method", "Add it."))
    else:
        remedy = did_you_mean(name, known)
        found.append(Problem("merge_method", shown(name), "a merge method", remedy))
    return None


def _settings(request: Request, method: Method | None, found: list[Problem]) -> Resolver | None:
    """The settings, if they are right by themselves."""
    if method is None:
        found += unknown_everywhere(of_any_method(), request.parameters, request.inputs)
        return None
    parameters = parameters_of(method, request.parameters)
    resolve = Resolver(method.name, parameters, request.parameters, request.inputs)
    wrong = list(resolve.problems())
    found += wrong
    return None if wrong else resolve


def _options(request: Request, found: list[Problem]) -> tuple[torch.dtype | None, torch.device]:
    if request.rank is not None and (wrong := rank_problem(request.rank)):
        found.append(wrong)
    if request.patterns not in (None, True, False):
        found.append(Problem("patterns", shown(request.patterns), "true or false"))
    if (wrong := seed_problem(request.seed)) is not None:
        found.append(wrong)
    if request.base_model is not None and not isinstance(request.base_model, str):
        expected = "a model's name, which goes into the card and adapter_config.json"
        found.append(Problem("base_model", shown(request.base_model), expected))
    dtype = None if request.dtype is None else dtype_of(request.dtype)
    device = device_of(request.device)
    found += [item for item in (dtype, device) if isinstance(item, Problem)]
    return (
        dtype if isinstance(dtype, torch.dtype) else None,
        device if isinstance(device, torch.device) else torch.device("cpu"),
    )


def _adapters(request: Request, found: list[Problem]) -> list[Adapter]:
    adapters = [_adapter(item, request, found) for item in request.inputs]
    found += _same_names(request.inputs, adapters)
    return [adapter for adapter in adapters if adapter is not None]


def _adapter(item: Input, request: Request, found: list[Problem]) -> Adapter | None:
    if isinstance(item.source, (LoraAdapter, Ia3Adapter)):
        return item.source if item.name is None else replace(item.source, name=item.name)
    try:
        return load_adapter(
            item.source,
            name=item.name,
            revision=item.revision,
            allow_pickle=request.allow_pickle,
        )
    except ConfigError as error:
        found += [
            replace(problem, where=f"{item.where}.name") if problem.where == "name" else problem
            for problem in error.problems
        ]
        return None


def _same_names(inputs: Sequence[Input], adapters: Sequence[Adapter | None]) -> Iterator[Problem]:
    places: dict[str, list[str]] = {}
    for item, adapter in zip(inputs, adapters, strict=True):
        if adapter is not None:
            places.setdefault(adapter.name, []).append(item.where)
    for name, where in places.items():
        if len(where) > 1:
            remedy = "Give each a name of its own with `name:`."
            found = f"{len(where)} adapters called {name!r}"
            yield Problem(", ".join(where), found, "names that differ", remedy)


def _fitting(request: Request, kind: Kind, adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Rank and space against the kind of adapters."""
    if request.space is not None:
        yield from space_problems(request.space, kind, adapters)
    if kind == "ia3":
        for name, value in (("rank", request.rank), ("patterns", request.patterns)):
            if value is not None:
                expected = "none: (IA)^3 vectors have no rank"
                yield Problem(name, shown(value), expected, "Take it out.")
    elif isinstance(request.rank, int) and request.rank > (possible := _largest_rank(adapters)):
        expected = f"at most {possible}, the smaller side of the largest module"
        yield Problem("rank", shown(request.rank), expected)


def _largest_rank(adapters: Sequence[Adapter]) -> int:
    return max(
        min(info.rows, info.columns)
        for adapter in adapters
        if isinstance(adapter, LoraAdapter)
        for info in adapter.infos.values()
    )


def _value_problems(method: Method, resolve: Resolver) -> list[Problem]:
    """What a rule says of its options and weights, as each module gets them."""
    if isinstance(method, WholeMethod):
        return []
    problems: dict[Problem, None] = {}
    cancelled = []
    for module in resolve.modules:
        values = resolve(module)
        if method.without_mean(values):
            cancelled.append(module)
        problems.update(dict.fromkeys(method.check(len(values.weights), values.options)))
        for own in values.each:
            problems.update(dict.fromkeys(method.check_each(values.options, own)))
    if method.coefficients is not None:
        problems.update(dict.fromkeys(_granularity_problems(resolve)))
    if cancelled:
        some = f" for {listing(cancelled)}" if len(cancelled) < len(resolve.modules) else ""
        problems[_cancelled(some)] = None
    return list(problems)


def _cancelled(some: str) -> Problem:
    found = f"weights that sum to 0{some}, which have no mean"
    remedy = "Change `weight`, or leave the sum undivided (`normalize: false`, `combine: sum`)."
    return Problem("parameters.weight", found, "a sum other than 0", remedy)


def _granularity_problems(resolve: Resolver) -> Iterator[Problem]:
    found = sorted({resolve(module).options["granularity"] for module in resolve.modules})
    if len(found) > 1:
        found_text = f"{' and '.join(found)}, by module"
        remedy = "Give one value, without filters."
        yield Problem("parameters.granularity", found_text, "one for the whole merge", remedy)


def _of_inputs(
    request: Request, method: Method | None, adapters: Sequence[Adapter]
) -> list[Problem]:
    """What is wrong whatever the parameters are; without a method what is wrong for each."""
    if isinstance(method, WholeMethod):  # says itself what becomes of whole tensors
        return list(method.check_inputs(request, adapters))
    if method is None and request.modules_to_save is None:
        return []
    return list(saved.problems_of(request.modules_to_save, adapters))


def _taken(
    request: Request, resolve: Resolver, adapters: Sequence[Adapter], found: list[Problem]
) -> dict[str, tuple[int, ...]]:
    """For each whole tensor of the output the positions of the adapters that give it."""
    taken = saved.carriers(request.modules_to_save or saved.AVERAGE, adapters)
    for name, positions in taken.items():
        if len(positions) > 1:
            wrong = saved.weights_problem(name, resolve.weights(name), positions)
            found += [wrong] if wrong else []
    return taken


def _forewarnings(method: Method, resolve: Resolver) -> tuple[MergeWarning, ...]:
    """Each once, however many modules it is about."""
    if isinstance(method, WholeMethod):
        return ()
    found: dict[str, MergeWarning] = {}
    for module in resolve.modules:
        values = resolve(module)
        for warning in method.forewarnings(len(values.weights), values.options):
            found.setdefault(str(warning), warning)
    return tuple(found.values())


def _common_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """That of all, or the smallest that holds the values of each."""
    dtypes = (info.dtype for adapter in adapters for info in adapter.infos.values())
    return reduce(torch.promote_types, dtypes)
