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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial, reduce
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.core.parameters import AUTO
from mergekit_ext.declared import ADAPTERS, Call, Method, methods
from mergekit_ext.declared.method import factor_in
from mergekit_ext.declared.nan import with_nan
from mergekit_ext.errors import MergeError, Problem
from mergekit_ext.kernels.calibration import auto_factor, distance
from mergekit_ext.kernels.numerics import finite
from mergekit_ext.kernels.seeds import generators
from mergekit_ext.kernels.threads import in_turn
from peft_merge import adapter as data
from peft_merge.adapter import Adapter, Ia3Adapter, ModuleInfo, Update
from peft_merge.algebra.spaces import SMALL, SPACES, Job

# Of (IA)^3; the first is the default.
VECTOR_SPACES = ("additive", "log")

_with_nan = cache(with_nan)
# Is called with the module's name, and a solver's iteration, objective and change.
OnIteration = Callable[[str, int, float, float], None]


def rules() -> Mapping[str, Method]:
    """Return every method that makes one adapter module by module, `nan_<method>` included."""
    found = methods(ADAPTERS)
    wrapped = (_with_nan(rule) for rule in found.values() if not rule.nan)
    return {**found, **{rule.name: rule for rule in wrapped}}


@dataclass(frozen=True)
class Piece:
    """One module of a merged adapter: its update or vector, and what the report says of it."""

    value: Any
    info: Any
    details: Mapping[str, Any] = field(default_factory=dict)


def merge_modules(
    plan: Any, rule: Method, resolve: Callable[[str], Call], on_iteration: OnIteration | None = None
) -> Iterator[tuple[str, Piece]]:
    """Yield every module that some adapter has, merged as `merge_module` does, in order.

    `on_iteration` may be called from several threads.
    """
    modules = data.modules_of(plan.adapters)

    def merge(module: str) -> Piece:
        return merge_module(plan, module, rule, resolve(module), on_iteration)

    beside = small(plan.adapters, rule, resolve, plan.space)
    results = in_turn(merge, modules, torch.device(plan.device)) if beside else map(merge, modules)
    yield from zip(modules, results, strict=True)


def small(
    adapters: Sequence[Adapter], rule: Method, resolve: Callable[[str], Call], space: str
) -> bool:
    """Return whether no module needs a large dense change, so that modules go side by side."""
    # Small algebra does not fill the cores; large dense changes do, and one at a time is in memory.
    infos = {module: info for adapter in adapters for module, info in adapter.infos.items()}
    return space != "delta" or all(
        math.prod(info.shape) <= SMALL or rule.invariant(resolve(module).options)
        for module, info in infos.items()
    )


def merge_module(
    plan: Any, module: str, rule: Method, settings: Call, on_iteration: OnIteration | None = None
) -> Piece:
    """Merge one module that some of m adapters has.

    The rule sees m changes of one matrix, their coordinates (`algebra.spaces`), or m vectors; the
    bias of B is a change of its own. An update has scale 1 and the roots of its singular values on
    both sides.

    Args:
        plan: a `MergePlan`, of which count `adapters`, `space`, `device`, `seed`; `rank` (None:
            lossless for rotation-invariant rules and in the small spaces, otherwise the sum of the
            input ranks); and `dtype` (None: the adapters' own, promoted where they differ).
        settings: weights (NAN's coefficients multiplied in) and parameters.

    Raises:
        NonFiniteError: an input holds NaN or infinity; it names module, factor and adapter.
        MergeError: the merged change leaves the range of the arithmetic or of `dtype`.
    """
    adapters, space, device = plan.adapters, plan.space, plan.device
    own = [adapter.infos[module] for adapter in adapters if module in adapter.infos]
    dtype = plan.dtype or reduce(torch.promote_types, (info.dtype for info in own))
    info, count = replace(own[0], dtype=dtype), len(adapters)
    details: dict[str, Any] = {"shape": list(info.shape)}
    name, inputs = factor_in(settings.options), [adapter.name for adapter in adapters]
    factor = name, settings.options.get(name)
    call = replace(
        settings,
        options={**settings.options, name: 1.0} if factor[1] == AUTO else settings.options,
        short_side=min(info.shape[1:]) if isinstance(info, ModuleInfo) else 1,
        generators=generators(plan.seed, module, count),
        on_iteration=None if on_iteration is None else partial(on_iteration, module),
    )
    try:
        if isinstance(info, ModuleInfo):
            updates = data.finite_updates(adapters, module)
            job = Job(updates, info.shape, rule, call, plan.rank, device)
            factored, said = SPACES[space](job)
            bias = _bias(job, generators(plan.seed, module, count, "bias"))
            gram = job.space.gram().cpu()
        else:
            changes = [c.to(device).flatten() for c in vector_changes(adapters, module, space)]
            merged, flat = rule.apply(changes, call), torch.stack(changes).cpu()
            gram = flat @ flat.T
    except MergeError as error:
        raise MergeError(f"{module}: {error}") from error
    if not isinstance(info, ModuleInfo):
        change = merged.tensor.to(torch.float64)
        by, far = _far(inputs, gram, factor, float(change.norm()))
        change, details = change * by, {**details, **far}
        vector = data.cast(torch.exp(change) if space == "log" else 1 + change, dtype, module)
        details |= {"feedforward": info.feedforward, "adapters": len(own), **merged.details}
        return Piece(vector.reshape(info.shape), info, details)
    by, far = _far(inputs, gram, factor, float(factored.sigma.norm()))
    if factor[1] == AUTO:
        root, bias = math.sqrt(abs(by)), None if bias is None else bias * by
        a, b, sigma = factored.a * root, factored.b * root, factored.sigma * abs(by)
        factored = replace(factored, a=a, b=b, sigma=sigma)
    update = Update(factored.a, factored.b, 1.0, bias).cast(dtype, module)
    kept = [float(factored.sigma[:, 0].max()), float(factored.sigma[:, -1].min())]
    details |= {**far, "rank": factored.rank, "error": factored.error, "adapters": len(own)}
    details |= {"singular_values_kept": kept, **said}
    return Piece(update, replace(info, rank=factored.rank, bias=bias is not None), details)


def _far(
    inputs: Sequence[str], gram: Tensor, factor: tuple[str, Any], merged: float
) -> tuple[float, dict[str, Any]]:
    """Return by what a merged change of norm `merged` is multiplied, and how far it goes then.

    `gram` are inner products of the `inputs`' changes; `factor` is what a user multiplies it by.
    Of changes of low rank, of which TSV-Merge cuts nothing, it goes no further than other methods.
    """
    norms, root = gram.diagonal().sqrt().tolist(), math.sqrt(max(0.0, float(gram.sum())))
    (name, value), by = factor, 1.0
    if value == AUTO:
        by = value = auto_factor(merged, norms, root, False)
    named = dict(zip(inputs, norms, strict=True))
    return by, distance(abs(by) * merged, named, {name: value})


def _bias(job: Job, drawn: Sequence[torch.Generator]) -> Tensor | None:
    if (changes := data.bias_changes(job.updates, job.device)) is None:
        return None
    call = replace(job.call, short_side=1, generators=drawn, on_iteration=None)
    return job.rule.apply(changes, call).tensor


def vector_changes(adapters: Sequence[Ia3Adapter], module: str, space: str) -> list[Tensor]:
    """Return the changes of a module that some adapter has, in float64, as stored."""
    shape = next(adapter.infos[module].shape for adapter in adapters if module in adapter.infos)
    vectors = (
        finite(a.load(module), module, a.name) if module in a.infos else torch.ones(shape)
        for a in adapters
    )
    wide = (vector.to(torch.float64) for vector in vectors)
    return [torch.log(vector) if space == "log" else vector - 1 for vector in wide]


def log_problems(adapters: Sequence[Ia3Adapter]) -> Iterator[Problem]:
    """Yield the vectors that have no logarithms, which reads all of them."""
    expected = "positive values, of which logarithms exist"
    for adapter in adapters:
        for module in adapter.infos:
            vector = adapter.load(module)
            if vector.numel() and (least := float(vector.min())) <= 0:
                where, found = f"{module} of adapter {adapter.name}", f"a value of {least:.6g}"
                yield Problem(where, found, expected, "Use `space: additive`.")
