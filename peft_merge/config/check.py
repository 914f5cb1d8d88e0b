"""A `Request` -> a `MergePlan`, or one error with everything that is wrong.

Only configurations and headers are read (and whole tensors, when they may be averaged).
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from typing import Annotated, Any, Literal, NoReturn

import torch
from pydantic import AfterValidator, BeforeValidator, Field, Strict

from mergekit_ext.core import memory
from mergekit_ext.core.parameters import Count, Parameter, Share, Switch, read_all, remedy_if_open
from mergekit_ext.declared import ADAPTERS, Method
from mergekit_ext.errors import ConfigError, Problem, did_you_mean, listing, shown, warn
from peft_merge import saved
from peft_merge.adapter import Adapter, Ia3Adapter, LoraAdapter, modules_of
from peft_merge.algebra.spaces import SPACES
from peft_merge.config.document import Request
from peft_merge.config.plan import Kind, MergePlan, Resolver
from peft_merge.flexmerge import method as flexmerge
from peft_merge.io.compatible import compatible, different_bases, few_shared
from peft_merge.io.diffusers_lora import is_of_diffusers
from peft_merge.io.forms import one_form
from peft_merge.io.read import load_adapter
from peft_merge.io.write import PATTERNS, WHOLE
from peft_merge.memory_estimate import need_of
from peft_merge.modules import VECTOR_SPACES, log_problems, rules

# The first is the default: every method is there what its definition says.
_SPACES: dict[Kind, tuple[str, ...]] = {"lora": tuple(SPACES), "ia3": VECTOR_SPACES}


def _rank(value: Any) -> Any:
    """``energy=0.99`` is what stands on the command line for {energy: 0.99}."""
    if isinstance(value, str):
        name, _, share = value.partition("=")
        if name.strip() == "energy":
            return {"energy": share}
        with suppress(ValueError):  # YAML takes 1e2 for a text
            return float(value)
    return value


def _name(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else value


def _device(value: Any) -> Any:
    try:
        device = torch.device(value)
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend raises errors of its own where it is not there
        why = (str(error).splitlines() or [""])[0].split(". ")[0] or type(error).__name__
        raise ValueError(f"a device that can be used here, such as cpu ({why})") from None
    return device


_Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"],
    BeforeValidator(_name),
    AfterValidator(lambda name: getattr(torch, name)),
]
DEVICE = Parameter("device", Annotated[Any, BeforeValidator(_device)])
_Energy = Annotated[dict[Literal["energy"], Share], Field(min_length=1)]
_Rank = Annotated[Count | Literal["lossless"] | _Energy, BeforeValidator(_rank)]
# Beside the parameters of the method.
_OPTIONS = (
    Parameter("rank", _Rank | None),
    Parameter("patterns", Switch | None),
    Parameter("seed", Annotated[int, Strict(), Field(ge=0, lt=2**63)]),
    Parameter("dtype", _Dtype | None),
    DEVICE,
    Parameter("base_model", str | None),
)
# Where the type's own message does not say it.
_EXPECTED = {
    "rank": "a whole number from 1, `lossless`, or {energy: 0.99} with a share above 0 up to 1",
    "seed": "a whole number from 0, below 2^63",
    "base_model": "a model's name, which goes into the card and adapter_config.json",
}


def checked(request: Request, problems: Iterable[Problem] = ()) -> MergePlan:
    """Check a request as far as configurations and headers go.

    Raises:
        ConfigError: with all problems, those of its form (`problems`) among them.
    """
    found = list(problems)
    adapters, renamings, unclear = one_form(_adapters(request, found))
    found += [*unclear, *compatible(adapters)] if adapters else []
    modules = tuple(modules_of(adapters))
    resolve = _resolver(request, modules, found)
    options, wrong = read_all(_OPTIONS, vars(request))
    found += [replace(each, expected=_EXPECTED.get(each.where, each.expected)) for each in wrong]
    if not 0 < len(adapters) == len(request.inputs) or len({type(a) for a in adapters}) > 1:
        _stop(request, found)
    kind: Kind = "lora" if isinstance(adapters[0], LoraAdapter) else "ia3"
    found += _misfits(request, options.get("rank"), kind, adapters)
    rule = None
    saved_from: Mapping[str, tuple[int, ...]] = {}
    if request.method == flexmerge.NAME:
        found += flexmerge.check_inputs(request, adapters)
        if any(map(is_of_diffusers, adapters)):
            what, expected = "LoRAs of diffusers", "adapters of PEFT, for `flexmerge`"
            found.append(Problem("models", what, expected, "Use another method."))
    else:
        rule = rules().get(request.method) if isinstance(request.method, str) else None
        unfit = list(saved.problems_of(request.modules_to_save, adapters))
        found += unfit
        if not unfit:
            saved_from = saved.carriers(request.modules_to_save or saved.AVERAGE, adapters)
    if resolve is not None:
        absent = list(resolve.missing())
        found += absent
        if rule is not None and not absent:
            found += [*resolve.checked(rule), *_whole_problems(rule, resolve)]
        found += saved.weights_problems(saved_from, resolve.weights)
    if resolve is None or found:
        _stop(request, found)
    bases = different_bases(adapters, options["base_model"])
    if (base := options.pop("base_model")) is not None:
        named = {"base_model_name_or_path": base}
        adapters = [replace(adapter, config={**adapter.config, **named}) for adapter in adapters]
    # The dtype of all adapters, or the smallest that holds the values of each.
    dtypes = (info.dtype for adapter in adapters for info in adapter.infos.values())
    options["dtype"] = options["dtype"] or reduce(torch.promote_types, dtypes)
    patterns = options["patterns"] = bool(options["patterns"])
    plan = MergePlan(
        request=replace(request, rank=options["rank"]),
        rule=rule,
        kind=kind,
        adapters=tuple(adapters),
        modules=modules,
        resolve=resolve,
        space=request.space or _SPACES[kind][0],
        saved=saved_from,
        notes=(
            *(*renamings, *resolve.idle_filters()),
            *([PATTERNS] * patterns + [WHOLE] * bool(saved_from and kind == "lora")),
        ),
        forewarnings=() if rule is None else resolve.forewarnings(rule, [len(adapters)]),
        **options,
    )
    wrong = list(flexmerge.check(plan)) if rule is None else []
    if wrong := wrong or list(memory.problems(need_of(plan))):
        _stop(request, wrong)
    averaged = saved.averaged(plan.saved, adapters) if request.modules_to_save is None else None
    for warning in (bases, few_shared(adapters), averaged):
        if warning is not None:
            warn(warning)
    return plan


def _stop(request: Request, problems: Iterable[Problem]) -> NoReturn:
    raise ConfigError(dict.fromkeys(problems), request.subject)


def _adapters(request: Request, found: list[Problem]) -> list[Adapter]:
    adapters = []
    for item in request.inputs:
        try:
            source, pickle = item.source, request.allow_pickle
            if isinstance(source, Adapter):
                adapter = replace(source, name=item.name or source.name)
            else:
                own = {"name": item.name, "revision": item.revision}
                adapter = load_adapter(source, allow_pickle=pickle, **own)
        except ConfigError as error:
            found += [
                replace(problem, where=f"{item.where}.name") if problem.where == "name" else problem
                for problem in error.problems
            ]
            continue
        adapters.append(adapter)
    for name, count in Counter(adapter.name for adapter in adapters).items():
        if count > 1:
            remedy = "Give each a name of its own with `name:`."
            called = f"{count} adapters called {name!r}"
            found.append(Problem("models", called, "names that differ", remedy))
    return adapters


def _resolver(request: Request, modules: Collection[str], found: list[Problem]) -> Resolver | None:
    name, known = request.method, (*rules(), flexmerge.NAME)
    if not isinstance(name, str) or name not in known:
        what = "nothing" if name is None else shown(name)
        remedy = "Add it." if name is None else remedy_if_open(name, "merge_method")
        remedy = remedy or did_you_mean(name, known)
        found.append(Problem("merge_method", what, "a merge method", remedy))
        return None
    if name == flexmerge.NAME:
        parameters = flexmerge.parameters(request)
    else:
        parameters = rules()[name].for_driver(ADAPTERS)
    resolve = Resolver(parameters, request, modules)
    found += resolve.problems
    return None if resolve.problems else resolve


def _misfits(
    request: Request, rank: Any, kind: Kind, adapters: Sequence[Adapter]
) -> Iterator[Problem]:
    space, names = request.space, _SPACES[kind]
    if space is not None and space not in names:
        title = "LoRA" if kind == "lora" else "(IA)^3"
        remedy = did_you_mean(space, names, listed=True)
        yield Problem("space", shown(space), f"for {title} one of {', '.join(names)}", remedy)
    if kind == "ia3":
        for name, value in (("rank", request.rank), ("patterns", request.patterns)):
            if value is not None:
                expected = "none: (IA)^3 vectors have no rank"
                yield Problem(name, shown(value), expected, "Take it out.")
        if space == "log":
            yield from log_problems([a for a in adapters if isinstance(a, Ia3Adapter)])
        return
    loras = [adapter for adapter in adapters if isinstance(adapter, LoraAdapter)]
    infos = [(module, info) for adapter in loras for module, info in adapter.infos.items()]
    first = dict(reversed(infos))
    unequal = dict.fromkeys(m for m, info in infos if info.rank != first[m].rank)
    if space == "factors" and unequal:
        what = f"factors, with different ranks in {listing([*unequal])}"
        yield Problem("space", what, "equal ranks, to merge factors", "Use `space: delta`.")
    possible = max((min(info.rows, info.columns) for _, info in infos), default=rank)
    if isinstance(rank, int) and rank > possible:
        expected = f"at most {possible}, the smaller side of the largest module"
        yield Problem("rank", shown(rank), expected)


def _whole_problems(rule: Method, resolve: Resolver) -> Iterator[Problem]:
    values = {module: resolve(module) for module in resolve.modules}
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
