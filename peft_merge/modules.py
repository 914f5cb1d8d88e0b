r"""The merge of adapters module by module: updates of LoRAs, vectors of (IA)^3.

(IA)^3 (Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning", arXiv:2205.05638, section 3.3) multiplies a module's output, or the input of
a feedforward module, with a vector :math:`\ell`. The paper says nothing on merging. Here a vector
is a change of the vector of ones, and a merge rule F sees the changes:

- additive: :math:`\ell = 1 + F(\ell_1 - 1, \dots, \ell_m - 1)`;
- log: :math:`\ell = \exp F(\log \ell_1, \dots, \log \ell_m)`, so that a linear rule gives the
  weighted geometric mean: the function of adapters applied one after the other.

An adapter without a module counts as a change of zero there: :math:`B A = 0`, or
:math:`\ell_i = 1`. So no weights, whatever their sum, scale a module that no adapter has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial, reduce
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mergekit_ext.core.parameters import WEIGHT, Parameter
from mergekit_ext.errors import MergeError, Problem
from mergekit_ext.kernels.seeds import generators
from mergekit_ext.kernels.threads import in_turn
from mergekit_ext.methods import ADAPTERS, Merged, Method, Settings, methods
from mergekit_ext.methods.nan import with_nan
from peft_merge.adapter import (
    Adapter,
    Ia3Adapter,
    ModuleInfo,
    Update,
    VectorInfo,
    finite,
    finite_update,
    modules_of,
)
from peft_merge.algebra.spaces import SMALL, SPACES, Job
from peft_merge.algebra.truncated import Factored, Rank

V = TypeVar("V")
I = TypeVar("I")  # noqa: E741

# Receives a module's name, and iteration, objective and change of a solver.
OnModuleIteration = Callable[[str, int, float, float], None]

# Of (IA)^3; the first is the default.
VECTOR_SPACES = ("additive", "log")


_with_nan = cache(with_nan)


def rules() -> Mapping[str, Method]:
    """Return every method that makes one adapter module by module, `nan_<method>` included."""
    found = methods(ADAPTERS)
    wrapped = (_with_nan(rule) for rule in found.values() if not rule.nan)
    return {**found, **{rule.name: rule for rule in wrapped}}


def of_any_rule(others: Iterable[Parameter] = ()) -> tuple[Parameter, ...]:
    """Return a parameter for each name in some rule or `others`, of any value where they differ."""
    every = (p for rule in rules().values() for p in rule.for_driver(ADAPTERS))
    found: dict[str, Parameter] = {}
    for parameter in (*others, WEIGHT, *every):
        known = found.setdefault(parameter.name, parameter)
        if known != parameter:
            per_model = known.per_model or parameter.per_model
            found[known.name] = Parameter(known.name, Any, None, per_model=per_model)
    return tuple(found.values())


@dataclass(frozen=True)
class Piece(Generic[V, I]):
    """One module of an adapter that is made.

    Attributes:
        value: the update or the vector.
        info: what it is.
        details: of its merge, for the report.
    """

    value: V
    info: I
    details: Mapping[str, Any] = field(default_factory=dict)


def merge_modules(
    adapters: Sequence[Any],
    rule: Method,
    resolve: Callable[[str], Settings],
    *,
    space: str,
    **options: Any,
) -> Iterator[tuple[str, Piece[Any, Any]]]:
    """Yield every module that some adapter has, merged as `merge_module` does, in order.

    Args:
        resolve: a module's weights (NAN's coefficients multiplied in) and parameters.
        options: those of `merge_module`. `on_iteration` may be called from several threads.
    """
    modules = modules_of(adapters)

    def merge(module: str) -> Piece[Any, Any]:
        return merge_module(adapters, module, rule, resolve(module), space=space, **options)

    if small(adapters, rule, resolve, space):
        results = in_turn(merge, modules, torch.device(options.get("device", "cpu")))
    else:
        results = map(merge, modules)
    yield from zip(modules, results, strict=True)


def small(
    adapters: Sequence[Adapter], rule: Method, resolve: Callable[[str], Settings], space: str
) -> bool:
    """Return whether no module needs a large dense change.

    Small algebra does not fill the cores, so that modules are done side by side; large dense
    changes do, and only one of them should be in memory.
    """
    sizes = {
        module: math.prod(info.shape)
        for adapter in adapters
        for module, info in adapter.infos.items()
    }
    return space != "delta" or all(
        size <= SMALL or rule.invariant(resolve(module).options) for module, size in sizes.items()
    )


def merge_module(
    adapters: Sequence[Any],
    module: str,
    rule: Method,
    settings: Settings,
    *,
    space: str,
    rank: Rank | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    on_iteration: OnModuleIteration | None = None,
) -> Piece[Any, Any]:
    """Merge one module that some adapter has.

    Args:
        adapters: m of one kind that agree (`peft_merge.io.compatible`).
        rule: sees m changes of one matrix, their coordinates (see `peft_merge.algebra.spaces`), or
            m float64 vectors of shape (length,).
        settings: weights (NAN's coefficients multiplied in) and parameters.
        space: of LoRAs one of `SPACES` (for `factors` the ranks must be equal), of (IA)^3 one of
            `VECTOR_SPACES` (for `log` see `log_problems`).
        rank: of LoRAs: a number (zeros fill up what is not needed; never above rows or columns),
            "lossless", or {"energy": share}. Default: lossless for rotation-invariant rules and
            in the small spaces; for elementwise rules the sum of the input ranks.
        dtype: of the result, cast to once; default: the adapters' own, promoted where they differ.
        device: where to compute; the result lies there.
        seed: of random rules.
        on_iteration: called after each iteration of a solver with the module's name, iteration,
            objective and change.

    Returns:
        An update of scale 1, balanced (the roots of the singular values on both sides), or a
        vector in its stored shape; and the rule's details beside `shape`, `adapters` (how many
        have it), and of a LoRA `rank`, `error` (relative Frobenius error of the truncation) and
        `singular_values_kept` (the largest and the smallest), of a vector `feedforward`. The bias
        of B (`lora_bias`) is a change of its own, :math:`s_i` times the bias, merged by the same
        rule with the same weights.

    Raises:
        NonFiniteError: an input holds NaN or infinity; it names module, factor and adapter.
        MergeError: the merged change leaves the range of the arithmetic or of `dtype`.
    """
    own = [adapter.infos[module] for adapter in adapters if module in adapter.infos]
    count = len(adapters)
    out = dtype or reduce(torch.promote_types, (info.dtype for info in own))
    info: Any = replace(own[0], dtype=out)
    call = settings.call(
        short_side=min(info.shape[1:]) if isinstance(info, ModuleInfo) else 1,
        generators=generators(seed, module, count),
        on_iteration=None if on_iteration is None else partial(on_iteration, module),
    )
    try:
        if not isinstance(info, ModuleInfo):
            changes = vector_changes(adapters, module, space)
            merged = rule.apply([change.to(device).flatten() for change in changes], call)
            return _vector(merged, space, info, len(own))
        updates = [finite_update(a, module) if module in a.infos else None for a in adapters]
        job = Job(updates, info.shape, rule, call, rank, device)
        factored, details = SPACES[space](job)
        bias = _bias(job, generators(seed, module, count, "bias"))
        return _update(factored, bias, info, len(own), details)
    except MergeError as error:
        raise MergeError(f"{module}: {error}") from error


def _vector(merged: Merged, space: str, info: VectorInfo, count: int) -> Piece[Tensor, VectorInfo]:
    change = merged.tensor.to(torch.float64)
    vector = _cast(torch.exp(change) if space == "log" else 1 + change, info.dtype)
    details = {"shape": list(info.shape), "feedforward": info.feedforward, "adapters": count}
    return Piece(vector.reshape(info.shape), info, {**details, **merged.details})


def _update(
    factored: Factored,
    bias: Tensor | None,
    info: ModuleInfo,
    count: int,
    details: Mapping[str, Any],
) -> Piece[Update, ModuleInfo]:
    a, b = _cast(factored.a, info.dtype), _cast(factored.b, info.dtype)
    bias = None if bias is None else _cast(bias, info.dtype)
    sigma = factored.sigma
    entry = {
        "shape": list(info.shape),
        "rank": factored.rank,
        "error": factored.error,
        "adapters": count,
        "singular_values_kept": [float(sigma[:, 0].max()), float(sigma[:, -1].min())],
        **details,
    }
    info = replace(info, rank=factored.rank, bias=bias is not None)
    return Piece(Update(a, b, 1.0, bias), info, entry)


def _bias(job: Job, drawn: Sequence[torch.Generator]) -> Tensor | None:
    biases = [None if update is None else update.bias for update in job.updates]
    known = next((bias for bias in biases if bias is not None), None)
    if known is None:
        return None
    nothing = torch.zeros(known.shape, dtype=torch.float64, device=job.device)
    changes = [
        nothing
        if update is None or update.bias is None
        else update.scale * update.bias.to(job.device, torch.float64)
        for update in job.updates
    ]
    call = replace(job.call, short_side=1, generators=drawn, on_iteration=None)
    return job.rule.apply(changes, call).tensor


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise MergeError(
            f"the merged change leaves the range of {dtype}. Use smaller weights, or a wider dtype."
        )
    return cast


def vector_changes(adapters: Sequence[Ia3Adapter], module: str, space: str) -> list[Tensor]:
    """Return the changes of a module that one of the adapters has, in float64, as stored.

    Raises:
        NonFiniteError: a vector holds NaN or infinity.
    """
    shape = next(adapter.infos[module].shape for adapter in adapters if module in adapter.infos)
    found = []
    for adapter in adapters:
        if module in adapter.infos:
            vector = finite(adapter.load(module), module, adapter.name).to(torch.float64)
            found.append(torch.log(vector) if space == "log" else vector - 1)
        else:
            found.append(torch.zeros(shape, dtype=torch.float64))
    return found


def log_problems(adapters: Sequence[Ia3Adapter]) -> Iterator[Problem]:
    """Yield the vectors that have no logarithms, which reads all of them."""
    for adapter in adapters:
        for module in adapter.infos:
            vector = adapter.load(module)
            if bool((vector <= 0).any()):
                yield Problem(
                    f"{module} of adapter {adapter.name}",
                    f"a smallest value of {float(vector.min()):.6g}",
                    "positive values, of which logarithms exist",
                    "Use `space: additive`.",
                )
