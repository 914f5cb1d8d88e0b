"""NAN as mergekit methods: `nan`, and `nan_<method>` for every method with a per-model weight.

`ties` and `task_arithmetic` are computed from pieces of the inputs, without sorting them or copying
each to float32; any other method is called.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from mergekit.merge_methods import GeneralizedTaskArithmeticMerge
from mergekit.merge_methods import base as api
from mergekit.merge_methods.base import BasePolicy, MergeMethod, ParameterScope, TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_ext.core.memory import copies_of
from mergekit_ext.core.parameters import WEIGHT, Values
from mergekit_ext.declared import Inputs, Merged, nan
from mergekit_ext.declared.ties import DENSITY, EPSILON, GAMMA, spread_problems
from mergekit_ext.errors import HostVersionError, MergeError, MergeWarning, Problem
from mergekit_ext.host.blocks import block_of, kind_of, stacks_experts
from mergekit_ext.host.method import ExtMethod, raise_non_finite, spec_of
from mergekit_ext.host.session import TensorRecord
from mergekit_ext.kernels.numerics import all_finite, compute_dtype, squared_norms, weighted_sum
from mergekit_ext.kernels.threads import in_threads
from mergekit_ext.kernels.ties import TiesOptions, merge_ties
from mergekit_ext.report.card import coefficients_section

# Which tensors share one set of coefficients: from the name of a tensor to the name of its group.
GRANULARITIES: dict[str, Callable[[str], str]] = {
    "tensor": lambda name: name,
    "expert": lambda name: name,
    "block": block_of,
    "model": lambda name: "model",
}
# Those that need no other tensor. "expert" has coefficients for each expert of a stack.
ALONE = frozenset({"tensor", "expert"})
PARAMETERS = (nan.NORM_OF, nan.granularity(*GRANULARITIES), nan.SCALE)
_SHARED = tuple(map(spec_of, PARAMETERS))

# Of mergekit's sparsifying methods, which take any number.
RANGES = {p.name: p.kind for p in (DENSITY, GAMMA, EPSILON)}

# Bound parameters carry the norms of a group's block or model under this name, which no user can
# set: it is no ParameterSpec.
NORMS = "nan:norms"

_Weights = Mapping[Hashable, float]
# A merged task vector below this share of the dtype's range cannot take a base out of it.
_SAFE_RANGE = 1e-3
_RESERVED = frozenset(p.name for p in _SHARED)


def takes_nan(method: MergeMethod) -> bool:
    """Whether `nan_<method>` makes sense: a per-model `weight`, and no name that clashes."""
    names = {p.name: p for p in method.spec.parameters}
    return (
        not isinstance(method, NanMethod)
        and "weight" in names
        and names["weight"].scope != ParameterScope.SHARED
        and not _RESERVED & names.keys()
    )


def _with_ranges(method: MergeMethod) -> Iterator[api.ParameterSpec]:
    """Yield a method's parameters; `weight` gets a default, mergekit's sparsifiers `RANGES`."""
    ranges = RANGES if isinstance(method, GeneralizedTaskArithmeticMerge) else {}
    for spec in method.spec.parameters:
        if spec.name == "weight":
            yield spec_of(WEIGHT, spec.scope)
        elif spec.name == nan.LAMBDA.name and isinstance(method, ExtMethod):
            yield spec_of(nan.LAMBDA)
        else:
            yield replace(spec, value_type=ranges.get(spec.name, spec.value_type))


def _of_experts(details: Sequence[Values]) -> Values:
    """Return the report of a stack: means over its experts, and the coefficients of each."""
    first = details[0]
    if not first:  # the base alone
        return first
    each = [dict(found["coefficients"]) for found in details]
    means = {model: math.fsum(c[model] for c in each) / len(each) for model in each[0]}
    norms = {m: math.hypot(*(found["norms"][m] for found in details)) for m in each[0]}
    return {**first, "norms": norms, "coefficients": means, "experts": each}


class NanMethod(ExtMethod):
    r"""``W_0 + scale * F(a; t)`` with NAN's coefficients `a`, F any weighted merge method.

    :math:`a_i = (1/\|x_i\|_F) / \sum_j (1/\|x_j\|_F)`, x the task vectors (`norm_of:
    task_vector`, the default over a base) or the raw weights. A weight that the user gives
    multiplies the coefficient. See `mergekit_ext.declared.nan`.

    Args:
        wrapped: F; without it task arithmetic over a base, a weighted average without one.
    """

    def __init__(self, wrapped: MergeMethod | None = None):
        if wrapped is None:
            contract = api.InputContract(base=BasePolicy.OPTIONAL, min_non_base=1)
            own = (*_SHARED, spec_of(WEIGHT))
            self.spec = api.MergeMethodSpec("nan", own, contract, "NAN", nan.PAPER)
        else:
            inner = wrapped.spec
            self.spec = replace(
                inner,
                name=f"nan_{inner.name}",
                pretty_name=f"{inner.pretty_name or inner.name} with NAN coefficients",
                reference_url=nan.PAPER,
                parameters=(*_SHARED, *_with_ranges(wrapped)),
            )
        self._wrapped = wrapped
        if isinstance(wrapped, ExtMethod):
            self.declared = wrapped.declared

    def problems(self, options: Values, inputs: Inputs) -> Iterable[Problem]:
        """Return those of the wrapped method, and `norm_of: task_vector` without a base."""
        if options.get("norm_of") == "task_vector" and (self.ignores_base or not inputs.based):
            found = "task_vector without a base that is subtracted"
            remedy = "Leave `norm_of` out, or use `nan` or `nan_task_arithmetic` with a base."
            yield Problem(f"{inputs.where}.norm_of", found, "weights", remedy)
        yield from super().problems(options, inputs)

    def input_problems(self, values: Values) -> Iterable[Problem]:
        """Return those of the wrapped method.

        mergekit's `della` and `della_linear` stop in the middle of a merge if the shares that they
        keep, ``density - epsilon`` to ``density + epsilon``, are not within (0, 1).
        """
        sparsifies = getattr(self._wrapped, "sparsification_method", None)
        della = sparsifies == SparsificationMethod.della_magprune
        if della and values.keys() >= {"density", "epsilon"}:
            return spread_problems(values)
        return super().input_problems(values)

    def notes(self, options: Values, inputs: Inputs) -> Iterable[str]:
        """Return those of the wrapped method, and what norms of raw weights are worth."""
        yield from super().notes(options, inputs)
        if self._norm_of(options, inputs.based) == "weights" and inputs.count > 1:
            yield (
                f"{self.spec.name} measures raw weights: norms, and so coefficients, of fine-tunes "
                "of one base come out nearly equal. Those of task vectors differ: give a base."
            )

    def passes(self, shared: Values) -> int:
        """Return 2 where everything is measured before the first tensor is merged."""
        return 1 if shared.get("granularity", "tensor") in ALONE else 2

    def copies(self, models: int, square: float) -> float:
        """Return 0 where inputs are combined in pieces, else those of F, its result, the base."""
        return 0 if _in_pieces(self._wrapped) else copies_of(self._wrapped)(models, square) + 3

    def merge_one(self, group: TensorGroup, parameters: Values, out_dtype: torch.dtype) -> Merged:
        """Merge one group; report norms, coefficients and scale."""
        name, first = group.metadata.name or "", group.entries[0].tensor
        stacked = parameters["granularity"] == "expert" and stacks_experts(name, first.ndim)
        if not stacked or not first.numel():
            return self._merge(group, parameters, out_dtype)
        merged = torch.empty(first.shape, dtype=out_dtype, device=first.device)
        details: list[Values] = []
        for expert, place in enumerate(merged):
            own = [replace(entry, tensor=entry.tensor[expert]) for entry in group.entries]
            found = self._merge(replace(group, entries=tuple(own)), parameters, out_dtype)
            place.copy_(found.tensor)
            details.append(found.details)
        return Merged(merged, _of_experts(details))

    def _merge(self, group: TensorGroup, parameters: Values, out_dtype: torch.dtype) -> Merged:
        norm_of = self._norm_of(parameters, group.base is not None)
        models = self._models(group)
        if not models:
            return Merged(group.entries[0].tensor.to(out_dtype))
        if parameters["granularity"] in ALONE:
            norms = self.norms(group, parameters)
        elif (measured := parameters.get(NORMS)) is not None:
            norms = {entry.id: measured[entry.id] for entry in models}
        else:
            raise HostVersionError(
                f"{self.spec.name}: granularity {parameters['granularity']} needs norms that were "
                "not measured, because mergekit's own planner ran. Call mergekit_ext.register() "
                "before mergekit.merge is imported, or run `mergekit-ext merge`."
            )
        values = nan.inverse_norm_coefficients(list(norms.values()))
        coefficients = dict(zip(norms, values, strict=True))
        based = group.base is not None and not self.ignores_base
        scale = nan.scale_of(parameters["scale"], len(models), based)
        squares: list[float] = []
        if any(values):
            weights = {key: a * parameters["weight"][key] for key, a in coefficients.items()}
            given = scale, parameters, out_dtype
            merged = _weighted(self._wrapped, group, weights, *given, squares)
            # Looking costs as much as merging; norms that were measured anyway may show it is safe.
            longest = math.fsum(abs(scale * w) * norms[key] for key, w in weights.items())
            safe = (
                self._wrapped is None
                and norm_of == "task_vector"
                and longest < _SAFE_RANGE * torch.finfo(out_dtype).max
            )
            if not safe and not all_finite(merged):
                rounded = [float(f"{weight:.3g}") for weight in weights.values()]
                raise MergeError(
                    f"{group.metadata.name}: {self.spec.name} gives values that are not finite, "
                    f"with weights times coefficients {rounded} and scale {scale:g}; expected "
                    "finite ones from finite inputs. Weights that sum to zero have no average, and "
                    "large ones leave the range of the output's dtype: change `weight` or `scale`."
                )
        else:
            # Every task vector (or every tensor) is zero: the base, or zero, is the answer.
            merged = (group.base or group.entries[0]).tensor.to(out_dtype, copy=True)
        details = {
            "norm_of": norm_of,
            "group": GRANULARITIES[parameters["granularity"]](group.metadata.name or ""),
            "norms": {str(key): norm for key, norm in norms.items()},
            "coefficients": {str(key): value for key, value in coefficients.items()},
            "scale": scale,
        }
        own = parameters["granularity"] in ALONE and norm_of == "task_vector"
        length = math.sqrt(math.fsum(squares)) if squares else None
        return Merged(merged, details, None, list(norms.values()) if own else None, length)

    def norms(self, group: TensorGroup, parameters: Values) -> dict[Hashable, float]:
        """Return Frobenius norms of the task vectors or weights of the models in one group.

        Raises `NonFiniteError` if an input, the base included, holds NaN or infinity.
        """
        bases = [] if group.base is None else [group.base.tensor]
        over_base = self._norm_of(parameters, bool(bases)) == "task_vector"
        base, unseen = (bases[0], []) if bases and over_base else (None, bases)
        models = self._models(group)
        found = squared_norms([entry.tensor for entry in models], base)
        squares = {entry.id: square for entry, square in zip(models, found, strict=True)}
        if not all(map(math.isfinite, (*squares.values(), *squared_norms(unseen)))):
            raise_non_finite(group)
            raise MergeError(
                f"{group.metadata.name}: the norms {list(squares.values())} of finite weights "
                "leave the range of float64; expected weights below 1e150 that differ by less "
                "than 3e38 from the base. Check these checkpoints."
            )
        return {key: math.sqrt(square) for key, square in squares.items()}

    def _bind_parameters(
        self, groups: Sequence[TensorGroup], parameters: Values
    ) -> list[dict[str, Any]]:
        # Only calls with all groups in memory come here: graphs measure in `host.tasks`.
        bound = super()._bind_parameters(groups, parameters)
        shared = {}
        for index, (group, values) in enumerate(zip(groups, bound, strict=True)):
            if (granularity := values["granularity"]) != "tensor":
                name = group.metadata.name or str(index)
                shared[index] = granularity, GRANULARITIES[granularity](name)
        with torch.no_grad():
            own = [(key, self.norms(groups[i], bound[i])) for i, key in shared.items()]
        norms = nan.combine_norms(own)
        for index, key in shared.items():
            bound[index][NORMS] = norms.get(key, {})
        return bound

    def _models(self, group: TensorGroup) -> Sequence[Any]:
        return group.entries if self.ignores_base else group.non_base

    def _norm_of(self, parameters: Values, based: bool) -> str:
        default = "task_vector" if based and not self.ignores_base else "weights"
        return parameters.get("norm_of") or default

    def warnings(self, records: Sequence[TensorRecord]) -> Iterable[MergeWarning]:
        """Return those of the wrapped method, and one if the coefficients came out uniform."""
        yield from super().warnings(records)
        measured = [r for r in records if len(r.details.get("coefficients", ())) > 1]
        sized = [(r.size, list(r.details["coefficients"].values())) for r in measured]
        if all(r.details["norm_of"] != "weights" for r in measured):
            why = (
                "The task vectors have equal norms, as those of one fine-tune given twice: where "
                "one model should count for more, give it a larger `weight`."
            )
        else:
            why = (
                "Norms of raw weights agree for fine-tunes of one base, those of task vectors do "
                "not: use a method over a base, such as `nan`, give `base_model`, not `norm_of`."
            )
        if (warning := nan.uniform_warning(self.spec.name, sized, "parameters", why)) is not None:
            yield warning

    def summary(self, records: Sequence[TensorRecord]) -> str:
        """Return the coefficients, and what the wrapped method reports."""
        own = coefficients_section({r.name: r.details for r in records}, kind_of)
        return f"{own}\n\n{super().summary(records)}".strip()


def _weighted(
    method: MergeMethod | None,
    group: TensorGroup,
    weights: _Weights,
    scale: float,
    parameters: Values,
    dtype: torch.dtype,
    squares: list[float],
) -> Tensor:
    """Return ``W_0 + scale * F(weights; t)``, or without a base ``scale * F(weights; W)``.

    F is `method`, called with the group's bound `parameters`; None for weighted sums, of which
    `squares` gets the squared norms of the merged task vector's chunks.
    """
    if method is None:
        return _summed(group, weights, scale, dtype, squares)
    if _in_pieces(method):
        entries, trims = group.non_base, method.sparsification_method is not None
        elects, factor = method.consensus_method is not None, scale * parameters["lambda"]
        return merge_ties(
            group.base.tensor,
            [entry.tensor for entry in entries],
            [weights[entry.id] for entry in entries],
            [parameters["density"][entry.id] if trims else 1.0 for entry in entries],
            TiesOptions(elects, parameters["normalize"], parameters["rescale"], factor),
            dtype,
        )
    given = {p.name: parameters[p.name] for p in method.spec.parameters}
    merged = _called(method, group, {**given, "weight": dict(weights)})
    if scale != 1:
        # Not through the weights: TIES and others divide by their sum.
        if group.base is None:
            merged = merged * scale
        else:
            merged = torch.lerp(group.base.tensor.to(merged.dtype), merged, scale)
    return merged.to(dtype)


def _in_pieces(method: MergeMethod | None) -> bool:
    """Return whether inputs are combined in pieces: sums, mergekit's TIES and task arithmetic."""
    return method is None or (
        type(method) is GeneralizedTaskArithmeticMerge
        and method.consensus_method in (None, ConsensusMethod.sum)
        and method.sparsification_method in (None, SparsificationMethod.magnitude)
    )


def _summed(
    group: TensorGroup, weights: _Weights, scale: float, dtype: torch.dtype, squares: list[float]
) -> Tensor:
    """Return task arithmetic over a base, or else a weighted average."""
    tensors = [entry.tensor for entry in group.non_base]
    values = [weights[entry.id] for entry in group.non_base]
    if group.base is not None:
        scaled = [scale * value for value in values]
        return weighted_sum(tensors, scaled, dtype, group.base.tensor, squares)
    total = sum(values)
    if total == 0:
        raise MergeError(
            f"{group.metadata.name}: weights times coefficients sum to zero, so there is no "
            "average; expected a sum that is not zero. Change `weight`."
        )
    return weighted_sum(tensors, [scale * value / total for value in values], dtype)


def _called(method: MergeMethod, group: TensorGroup, parameters: Values) -> Tensor:
    """Call a method in float32 (float64), whatever the dtype of the files."""

    # In half precision it would round every task vector and sum, and elect other signs.
    def call(group: TensorGroup) -> Tensor:
        (found,) = method((group,), parameters=parameters, dtype=compute_dtype(group.tensors))
        return found

    if isinstance(method, ExtMethod):
        return call(group)
    # By one thread: torch's own split sums, whose rounding then depends on their number.
    (merged,) = in_threads(call, [group], group.entries[0].tensor.device)
    return merged
