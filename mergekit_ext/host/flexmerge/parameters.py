"""The parameters of `flexmerge` in YAML: its own, and those of the algorithm that they make."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Annotated, Any

from mergekit.merge_methods.base import BasePolicy, MergeMethod, ParameterScope, ParameterSpec
from pydantic import BeforeValidator

from mergekit_ext.core.parameters import WEIGHT, Parameter, Share, choice
from mergekit_ext.declared import BLOCKS, Method, methods
from mergekit_ext.errors import join, listing, shown
from mergekit_ext.flexmerge.algorithm import Algorithm, Declared, Parameters
from mergekit_ext.flexmerge.plan import DEFAULT_ALGORITHM, options
from mergekit_ext.flexmerge.residual import ADAPTERS, GIVEN, LOW_RANK, PARAMETERS, SHARED, Residual
from mergekit_ext.flexmerge.storage import ANY_SIZE, Target
from mergekit_ext.host.blocks import GRANULARITIES
from mergekit_ext.host.checks.copied import EXCLUDE, INCLUDE, OTHERS
from mergekit_ext.host.checks.layout import Source, all_parameters, groups_of
from mergekit_ext.host.checks.parameters import check_parameters
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.flexmerge import DECOMPOSE, FLEXMERGE, FlexMergeMethod
from mergekit_ext.host.flexmerge.registered import Registered
from mergekit_ext.host.method import registered, spec_of
from mergekit_ext.host.nan_method import RANGES

_SHARE_OF = "what `density` is a share of (default model)"
_SIMILAR = "whose similarity: task vectors as they are, or trimmed"
OWN: tuple[Parameter, ...] = (
    *options(
        Annotated[Target, BeforeValidator(Target.parse)],
        # The default first.
        sorted(GRANULARITIES, key=lambda name: name != "component"),
        "2.25 (models)",
    ),
    Parameter("trim_scope", choice("model", "block", "tensor") | None, None, _SHARE_OF),
    Parameter("similarity_on", choice("original", "trimmed"), "original", _SIMILAR),
    Parameter("heads", choice("private", "merged"), "private", "what becomes of task heads"),
    Parameter("dare_density", Share | None, None, "thin task vectors at random (DARE) first"),
    Parameter("task", str, None, "the task's name", per_model=True),
)
_DEFAULT_BASE = "average"
# Of which residuals are given one.
_SIZES = ("target_size", "rank", "energy")
BASE = Parameter("base", str, _DEFAULT_BASE, "what makes the base of the residuals")
# Defaults of residuals that become adapters, where others are those of a checkpoint.
AS_ADAPTERS = {"output": ADAPTERS, "vectors": SHARED}
# What only algorithms that trim take, what only groups do, and what changes task vectors.
_OF_TRIMMING = frozenset({"trim_scope", "similarity_on"})
_OF_GROUPS = frozenset({"linkage", "order", "similarity_on"})
_OF_VECTORS = frozenset({"trim_scope", "dare_density"})
# Names mergekit's method where FlexMerge has an algorithm of the same name.
_STOCK_PREFIX = "mergekit:"


@dataclass(frozen=True)
class Based:
    """`residual`, over a base that a method makes; None: the base model itself."""

    method: Method | MergeMethod | None


def algorithms(base: Any = _DEFAULT_BASE) -> dict[str, Method | MergeMethod | Based]:
    """Return what `algorithm:` takes: FlexMerge's own algorithms and every registered method.

    `base` is the name of what makes the base of `residual`.
    """
    own = methods(BLOCKS)
    stock = {
        _STOCK_PREFIX * (name in own) + name: method
        for name, method in registered().items()
        if not isinstance(method, FlexMergeMethod)
    }
    made = {**own, **stock}.get(base) if isinstance(base, str) else None
    return {**own, **stock, Residual.name: Based(made)}


def make(method: Method | MergeMethod | Based, parameters: Parameters) -> Algorithm:
    """Return a method as FlexMerge's F, with its parameters."""
    if isinstance(method, Based):
        inner = None if method.method is None else make(method.method, parameters)
        return Residual(inner, parameters)
    if isinstance(method, Method):
        return Declared(method, parameters)
    return Registered(method, parameters)


def tasks_of(config: Any) -> list[Source]:
    """Return the inputs that are tasks: all but the base, each once."""
    sources = [source for group in groups_of(config) for source in group.sources]
    found = {source.model: source for source in reversed(sources)}
    return [source for source in reversed(found.values()) if source.model != config.base_model]


def named(config: Any) -> Any:
    """Return the configuration with the parameters that the name `decompose` stands for."""
    given = {"algorithm": Residual.name, **(config.parameters or {})}
    if config.merge_method != DECOMPOSE or given["algorithm"] != Residual.name:
        return config
    return config.model_copy(update={"parameters": {"output": ADAPTERS, **given}})


def read_parameters(config: Any, seed: int, findings: Findings) -> Algorithm | None:
    """Check inputs and parameters; return the algorithm that they make, None if one is wrong.

    `config` is `named`. The algorithm's `parameters` are all that were given, and the defaults of
    the others; `task` is not there.
    `seed` is for `dare_density`, and for methods that draw random numbers.
    """
    before, given = findings.count, config.parameters or {}
    known = algorithms(given.get("base", _DEFAULT_BASE))
    tasks, name = tasks_of(config), given.get("algorithm", DEFAULT_ALGORITHM)
    method = known.get(name) if isinstance(name, str) else None
    specs = {**_specs_of(method), **{parameter.name: spec_of(parameter) for parameter in OWN}}
    chosen = algorithms() if config.merge_method != DECOMPOSE else (Residual.name,)
    specs["algorithm"] = replace(specs["algorithm"], value_type=choice(*chosen))
    if isinstance(method, Based):
        sizes = [name for name in _SIZES if given.get(name) is not None]
        if len(sizes) != 1:
            written = " and ".join(f"`{name}`" for name in sizes) or "nothing"
            findings.problem("parameters", written, f"one of {', '.join(_SIZES)}", "Write one.")
        specs["target_size"] = replace(specs["target_size"], default=ANY_SIZE)
        bases = choice(GIVEN, *(name for name in known if name != Residual.name))
        specs["base"] = replace(specs["base"], value_type=bases)
        if given.get("output") == ADAPTERS:
            specs["vectors"] = replace(specs["vectors"], default=AS_ADAPTERS["vectors"])
    if method is None:  # it is not known either what it takes
        config = _reduced(config, specs.__contains__)
    elif isinstance(_merging(method), MergeMethod):
        where = "base" if isinstance(method, Based) else "algorithm"
        _check_contract(_merging(method), where, len(tasks), findings)
    owners: dict[str, list[str]] = {}
    for other, one in known.items():
        for key in _specs_of(one).keys() - specs.keys():
            owners.setdefault(key, []).append(other)
    for where, (_, _, values) in all_parameters(groups_of(config)).items():
        for key, value in values.items():
            if key in owners:  # the nearest name would have another meaning
                found = f"a parameter that `{config.merge_method}` with `{name}` does not have"
                remedy = f"Take it out, or change `algorithm:`: {listing(owners[key])} have it."
                findings.problem(join(where, key), found, "one of this algorithm", remedy)
            elif key in specs and (isinstance(value, list) or hasattr(value, "filter")):
                expected = "one value: `flexmerge` has no gradients and filters"
                remedy = "Write one value for all tensors."
                findings.problem(join(where, key), shown(value), expected, remedy)
    config = _reduced(config, lambda key: key not in owners)
    called = f"{config.merge_method}` with `{name}"  # messages have it between backticks
    spec = FlexMergeMethod(FLEXMERGE).spec
    spec = replace(spec, name=called, parameters=tuple(specs.values()))
    checked = check_parameters(SimpleNamespace(spec=spec), groups_of(config), [], findings)
    if method is None or findings.count > before or not tasks:
        return None
    shared, each = checked[0], []
    for source in tasks:
        own, values = {**given, **source.parameters}, {}
        for one in spec.input_parameters:
            values[one.name] = one.validate(own[one.name]) if one.name in own else one.default
        each.append({name: value for name, value in values.items() if name != "task"})
    selection = {name: given[name] for name in (OTHERS, INCLUDE, EXCLUDE) if name in given}
    every = {**selection, **shared}
    made = make(method, Parameters(every, each, shared["trim_scope"] or "model", seed))
    _check_fit(made, given, findings)
    return None if findings.count > before else made


def _merging(method: Any) -> Any:
    """Return the method, or algorithm, that merges groups, or makes the base of residuals."""
    if isinstance(method, Residual):
        return method.base
    return method.method if isinstance(method, Based) else method


def idle_with(method: Any) -> frozenset[str]:
    """Return which of `OWN` do not act with a method, or with the algorithm that it makes."""
    merging = _merging(method)
    idle = frozenset() if getattr(merging, "trims", False) else _OF_TRIMMING
    if isinstance(method, (Based, Residual)):
        idle |= _OF_GROUPS if merging is not None else _OF_GROUPS | _OF_VECTORS
    return idle


def _specs_of(method: Method | MergeMethod | Based | None) -> dict[str, ParameterSpec]:
    """Return the parameters of an algorithm.

    NAN's `granularity` is left out: it measures the block. A `density` out of (0, 1] would keep
    everything or nothing without a message.
    """
    if method is None:
        return {}
    if isinstance(method, Based):
        own = {p.name: spec_of(p) for p in (BASE, WEIGHT, *PARAMETERS)}
        return {**own, **_specs_of(method.method)}
    if isinstance(method, Method):
        return {p.name: spec_of(p) for p in method.for_driver(BLOCKS)}
    return {
        spec.name: replace(
            spec,
            value_type=RANGES["density"] if spec.name == "density" else spec.value_type,
            scope=spec.scope if spec.scope == ParameterScope.SHARED else ParameterScope.NON_BASE,
        )
        for spec in method.spec.parameters
    }


def _check_contract(method: MergeMethod, where: str, tasks: int, findings: Findings) -> None:
    """Report a method, named by the parameter `where`, that cannot merge groups of all sizes."""
    contract, most = method.spec.contract, [tasks]
    if contract.max_inputs is not None:
        most.append(contract.max_inputs - (contract.base != BasePolicy.IGNORED))
    if contract.max_non_base is not None:
        most.append(contract.max_non_base)
    if min(most) < tasks or contract.base == BasePolicy.FORBIDDEN:
        found = f"`{method.spec.name}`, which does not merge {tasks} models over a base"
        expected = f"a method for groups of up to {tasks} models and their base"
        findings.problem(f"parameters.{where}", found, expected, "Use another one.")


def _check_fit(algorithm: Algorithm, given: Mapping[str, Any], findings: Findings) -> None:
    """Report parameters that contradict each other, or that a registered method refuses."""
    shared = algorithm.parameters.shared
    if isinstance(algorithm, Residual):
        idle = idle_with(algorithm)
        beside = dict.fromkeys(idle, "nothing, as it does not act on residuals over this base")
        if shared["output"] != ADAPTERS:
            beside["uniform_rank"] = "`output: adapters` beside it"
        if shared["granularity"] == "model" and shared["embeddings"] != LOW_RANK:
            beside["embeddings"] = "`low_rank` beside `granularity: model`, one block of everything"
        for name in sorted(beside.keys() & given.keys()):
            found, remedy = shown(given[name]), f"Remove `{name}:`."
            findings.problem(f"parameters.{name}", found, beside[name], remedy)
        if (base := algorithm.base) is not None:
            if isinstance(base, Declared):
                _check_mean(base, findings)
            _check_fit(base, {n: v for n, v in given.items() if n not in idle}, findings)
        return
    if isinstance(algorithm, Registered):
        algorithm.check(findings)
    if not algorithm.trims:
        expected = f"it with an algorithm that trims; `{shared['algorithm']}` does not"
        for name in sorted(_OF_TRIMMING):
            if given.get(name) not in (None, "original"):
                found, remedy = shown(given[name]), f"Remove `{name}:`."
                findings.problem(f"parameters.{name}", found, expected, remedy)
    elif shared["dare_density"] is not None and algorithm.parameters.trim_scope == "model":
        found = "the scope `model` together with `dare_density`, which changes every magnitude"
        remedy = "Write `trim_scope: block`."
        findings.problem("parameters.trim_scope", found, "`block` or `tensor`", remedy)


def _check_mean(base: Declared, findings: Findings) -> None:
    """Report weights that sum to 0 where the base of residuals is divided by their sum."""
    call = base.call(range(len(base.parameters.models)))
    if base.method.without_mean(call):
        found = f"weights that sum to 0, which have no mean: {shown([*call.weights])}"
        findings.problem("parameters.weight", found, "a sum other than 0", "Change `weight`.")


def variant(config: Any, algorithm: str, chosen: Sequence[str]) -> Any:
    """Return the configuration for one of several algorithms, with a size that all reach.

    What only others of them take as a parameter is left out: a `density` for TIES does not keep
    EMR from being compared with it. A parameter that none takes stays, to be reported. The size
    that the file asks for is not used.
    """
    known = algorithms((config.parameters or {}).get("base", _DEFAULT_BASE))

    def taken(name: str) -> set[str]:
        method = known.get(name)
        return {*_specs_of(method), *({parameter.name for parameter in OWN} - idle_with(method))}

    left_out = set().union(*map(taken, chosen)) - taken(algorithm)
    reduced = _reduced(config, lambda name: name not in left_out)
    method = known.get(algorithm)
    # K-means has whole numbers only, a masked merge over a wide base no number at all.
    kmeans = isinstance(method, Method) and method.kmeans
    size = float(max(len(tasks_of(config)), 1)) if kmeans else ANY_SIZE
    parameters = {**reduced.parameters, "algorithm": algorithm, "target_size": size}
    for name in _SIZES[1:]:
        parameters.pop(name, None)
    return reduced.model_copy(update={"parameters": parameters})


def _reduced(config: Any, keeps: Callable[[str], bool]) -> Any:
    def reduced(part: Any, **changes: Any) -> Any:
        kept = {name: value for name, value in (part.parameters or {}).items() if keeps(name)}
        return part.model_copy(update={"parameters": kept, **changes})

    return reduced(config, models=[reduced(item) for item in config.models or ()] or None)
