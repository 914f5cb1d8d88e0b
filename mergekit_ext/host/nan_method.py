"""NAN as mergekit methods: `nan`, and `nan_<method>` for every method with a per-model weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from mergekit.merge_methods import GeneralizedTaskArithmeticMerge
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from mergekit.sparsify import SparsificationMethod

from mergekit_ext.core.memory import copies_of
from mergekit_ext.core.parameters import WEIGHT
from mergekit_ext.errors import (
    HostVersionError,
    MergeError,
    MergeWarning,
    Problem,
    UniformCoefficientsWarning,
)
from mergekit_ext.host.blocks import block_of
from mergekit_ext.host.declared import spec_of
from mergekit_ext.host.method import ExtMethod, raise_non_finite
from mergekit_ext.host.session import TensorRecord
from mergekit_ext.host.weighted import in_pieces, weighted_by
from mergekit_ext.kernels.numerics import all_finite, squared_norms
from mergekit_ext.methods import Inputs
from mergekit_ext.methods.nan import (
    NORM_OF,
    PAPER,
    SCALE,
    combine_norms,
    default_scale,
    granularity,
    inverse_norm_coefficients,
    uniform,
)
from mergekit_ext.methods.sparsify import DENSITY, EPSILON, GAMMA, spread_problems
from mergekit_ext.report.card import coefficients_section

# Which tensors share one set of coefficients: from the name of a tensor to the name of its group.
GRANULARITIES: dict[str, Callable[[str], str]] = {
    "tensor": lambda name: name,
    "block": block_of,
    "model": lambda name: "model",
}
_SHARED = tuple(map(spec_of, (NORM_OF, granularity(*GRANULARITIES), SCALE)))

# What these mean in mergekit's sparsifying methods, which take any number: at a density of 0 or
# less most of them drop the whole task vector, above 1 all keep it.
RANGES = {p.name: p.kind for p in (DENSITY, GAMMA, EPSILON)}

# Bound parameters carry the norms of a group's block or model under this name. It is no
# ParameterSpec, so a user cannot set it.
NORMS = "nan:norms"

# A merged task vector below this share of the dtype's range cannot take a base out of it.
_SAFE_RANGE = 1e-3
_RESERVED = frozenset(p.name for p in _SHARED)
_DELLA = SparsificationMethod.della_magprune
_SPREAD = {"density", "epsilon"}


def takes_nan(method: MergeMethod) -> bool:
    """Whether `nan_<method>` makes sense: a per-model `weight`, and no name that clashes."""
    names = {p.name: p for p in method.spec.parameters}
    return (
        not isinstance(method, NanMethod)
        and "weight" in names
        and names["weight"].scope != ParameterScope.SHARED
        and not _RESERVED & names.keys()
    )


def _with_ranges(method: MergeMethod) -> Iterator[ParameterSpec]:
    """Yield a method's parameters; `weight` gets a default, mergekit's sparsifiers `RANGES`."""
    ranges = RANGES if isinstance(method, GeneralizedTaskArithmeticMerge) else {}
    for spec in method.spec.parameters:
        if spec.name == "weight":
            yield spec_of(WEIGHT, spec.scope)
        else:
            yield replace(spec, value_type=ranges.get(spec.name, spec.value_type))


class NanMethod(ExtMethod):
    r"""``W_0 + scale * F(a; t)`` with NAN's coefficients `a`, F any weighted merge method.

    :math:`a_i = (1/\|x_i\|_F) / \sum_j (1/\|x_j\|_F)`, x the task vectors (`norm_of:
    task_vector`, the default over a base) or the raw weights. A weight that the user gives
    multiplies the coefficient. See `mergekit_ext.methods.nan`.

    Args:
        wrapped: F; without it task arithmetic over a base, a weighted average without one.
    """

    def __init__(self, wrapped: MergeMethod | None = None):
        inner = wrapped.spec if wrapped is not None else None
        parameters = [spec_of(WEIGHT)] if wrapped is None else _with_ranges(wrapped)
        optional = InputContract(base=BasePolicy.OPTIONAL, min_non_base=1)
        self.spec = MergeMethodSpec(
            name=f"nan_{inner.name}" if inner else "nan",
            pretty_name=f"{inner.pretty_name or inner.name} with NAN coefficients"
            if inner
            else "NAN",
            reference_url=PAPER,
            parameters=(*_SHARED, *parameters),
            contract=inner.contract if inner else optional,
            **(
                {
                    "optional_tensor_policy": inner.optional_tensor_policy,
                    "uses_accelerator": inner.uses_accelerator,
                }
                if inner
                else {}
            ),
        )
        self._wrapped = wrapped
        self._inner = wrapped if isinstance(wrapped, ExtMethod) else None
        self._weighted = weighted_by(wrapped)

    def problems(self, options: Mapping[str, Any], inputs: Inputs) -> Iterable[Problem]:
        """`norm_of: task_vector` where there is no base to subtract."""
        if options.get("norm_of") == "task_vector" and not self._has_base(inputs.based):
            remedy = (
                "Add `base_model:`, or leave `norm_of` out."
                if not self.ignores_base
                else f"{self.spec.name} averages weights; use `nan` or `nan_task_arithmetic`."
            )
            found = "task_vector without a base model"
            yield Problem(f"{inputs.where}.norm_of", found, "weights", remedy)
        if self._inner:
            yield from self._inner.problems(options, inputs)

    def input_problems(self, values: Mapping[str, Any]) -> Iterable[Problem]:
        """Those of the wrapped method.

        mergekit's `della` and `della_linear` stop in the middle of a merge if the shares that they
        keep, ``density - epsilon`` to ``density + epsilon``, are not within (0, 1).
        """
        if self._inner:
            return self._inner.input_problems(values)
        della = getattr(self._wrapped, "sparsification_method", None) == _DELLA
        return spread_problems(values) if della and values.keys() >= _SPREAD else ()

    def notes(self, options: Mapping[str, Any], inputs: Inputs) -> Iterable[str]:
        """Raw weights of fine-tunes of one base have nearly equal norms."""
        yield from super().notes(options, inputs)
        if self._norm_of(options, self._has_base(inputs.based)) == "weights" and inputs.count > 1:
            yield (
                f"{self.spec.name} measures raw weights: for fine-tunes of one base the norms, "
                "and so the coefficients, come out nearly equal. Norms of task vectors differ: "
                "give a base model."
            )

    def forewarnings(self, options: Mapping[str, Any], inputs: Inputs) -> Iterable[MergeWarning]:
        """Those of the wrapped method, which without a base gets nearly the same weights."""
        return self._inner.forewarnings(options, inputs) if self._inner else ()

    def passes(self, shared: Mapping[str, Any]) -> int:
        """`block` and `model` measure everything before the first tensor is merged."""
        return 1 if shared.get("granularity", "tensor") == "tensor" else 2

    def copies(self, models: int, square: float) -> float:
        """None where inputs are combined in pieces, else those of F, its result and the base."""
        return 0 if in_pieces(self._wrapped) else copies_of(self._wrapped)(models, square) + 3

    def merge_one(
        self,
        group: TensorGroup,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """Merge one group; report norms, coefficients and scale."""
        has_base = self._has_base(group.base is not None)
        models = self._models(group)
        if not models:
            return group.entries[0].tensor.to(out_dtype), {}
        if parameters["granularity"] == "tensor":
            norms = self.norms(group, parameters)
        elif (measured := parameters.get(NORMS)) is not None:
            norms = {entry.id: measured[entry.id] for entry in models}
        else:
            raise HostVersionError(
                f"{self.spec.name}: granularity {parameters['granularity']} needs norms that were "
                "not measured, because mergekit's own planner ran. Call mergekit_ext.register() "
                "before mergekit.merge is imported, or run `mergekit-ext merge`."
            )
        coefficients = dict(
            zip(norms, inverse_norm_coefficients(list(norms.values())), strict=True)
        )
        scale = parameters["scale"]
        if scale is None:
            scale = default_scale(len(models), has_base)
        merged = self._merge(group, norms, coefficients, scale, parameters, out_dtype)
        details = {
            "norm_of": self._norm_of(parameters, has_base),
            "group": GRANULARITIES[parameters["granularity"]](group.metadata.name or ""),
            "norms": {str(key): norm for key, norm in norms.items()},
            "coefficients": {str(key): value for key, value in coefficients.items()},
            "scale": scale,
        }
        return merged, details

    def _merge(
        self,
        group: TensorGroup,
        norms: Mapping[Hashable, float],
        coefficients: Mapping[Hashable, float],
        scale: float,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        if not any(coefficients.values()):
            # Every task vector (or every tensor) is zero: the base, or zero, is the answer.
            return (group.base or group.entries[0]).tensor.to(out_dtype, copy=True)
        weights = {key: value * parameters["weight"][key] for key, value in coefficients.items()}
        merged = self._weighted(group, weights, scale, parameters, out_dtype)
        # Looking costs as much as merging; norms that were measured anyway may show it is safe.
        longest = math.fsum(abs(scale * w) * norms[key] for key, w in weights.items())
        safe = (
            self._wrapped is None
            and self._norm_of(parameters, group.base is not None) == "task_vector"
            and longest < _SAFE_RANGE * torch.finfo(out_dtype).max
        )
        if not safe and not all_finite(merged):
            raise MergeError(
                f"{group.metadata.name}: {self.spec.name} gives values that are not finite, with "
                f"weights times coefficients {[float(f'{w:.3g}') for w in weights.values()]} and "
                f"scale {scale:g}; expected finite ones from finite inputs. Weights that sum to "
                "zero have no average, and large ones leave the range of the output's dtype: "
                "change `weight` or `scale`."
            )
        return merged

    def norms(self, group: TensorGroup, parameters: Mapping[str, Any]) -> dict[Hashable, float]:
        """Frobenius norms of the task vectors or weights of the models in one group.

        Raises:
            NonFiniteError: an input, the base included, holds NaN or infinity.
        """
        has_base = self._has_base(group.base is not None)
        over_base = self._norm_of(parameters, has_base) == "task_vector"
        base = group.base.tensor if group.base is not None and over_base else None
        models = self._models(group)
        found = squared_norms([entry.tensor for entry in models], base)
        squares = {entry.id: square for entry, square in zip(models, found, strict=True)}
        unseen = [] if base is not None or group.base is None else [group.base.tensor]
        if not all(map(math.isfinite, (*squares.values(), *squared_norms(unseen)))):
            raise_non_finite(group)
            raise MergeError(
                f"{group.metadata.name}: the norms {list(squares.values())} of finite weights "
                "leave the range of float64; expected weights below 1e150 that differ by less "
                "than 3e38 from the base. Check these checkpoints."
            )
        return {key: math.sqrt(square) for key, square in squares.items()}

    def _bind_parameters(
        self, groups: Sequence[TensorGroup], parameters: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        # Only calls with all groups in memory come here; the graph binds while planning and
        # measures in a graph of its own (host/tasks.py).
        bound = super()._bind_parameters(groups, parameters)
        keys = {
            i: (
                b["granularity"],
                GRANULARITIES[b["granularity"]](groups[i].metadata.name or str(i)),
            )
            for i, b in enumerate(bound)
            if b["granularity"] != "tensor"
        }
        with torch.no_grad():
            totals = combine_norms(
                (key, self.norms(groups[i], bound[i])) for i, key in keys.items()
            )
        for i, key in keys.items():
            bound[i][NORMS] = totals.get(key, {})
        return bound

    @property
    def ignores_base(self) -> bool:
        """Whether a base model is one more input, as for `linear`."""
        return self.spec.contract.base == BasePolicy.IGNORED

    def _models(self, group: TensorGroup) -> Sequence[Any]:
        return group.entries if self.ignores_base else group.non_base

    def _has_base(self, configured: bool) -> bool:
        return configured and not self.ignores_base

    @staticmethod
    def _norm_of(parameters: Mapping[str, Any], has_base: bool) -> str:
        chosen: str | None = parameters.get("norm_of")
        return chosen or ("task_vector" if has_base else "weights")

    def warnings(self, records: Sequence[TensorRecord]) -> Iterable[MergeWarning]:
        """One warning if the coefficients of (almost) all parameters came out uniform."""
        if self._inner:
            yield from self._inner.warnings(records)
        measured = [r for r in records if len(r.details.get("coefficients", ())) > 1]
        size = sum(r.size for r in measured)
        even = sum(r.size for r in measured if uniform(list(r.details["coefficients"].values())))
        if size and even >= 0.95 * size:
            over = {str(r.details["norm_of"]) for r in measured}
            yield UniformCoefficientsWarning(
                f"{self.spec.name}: the coefficients came out uniform (within 1%) for "
                f"{even / size:.0%} of the parameters, so that only `weight` and `scale` acted. "
                f"{self._why_uniform(over)}"
            )

    def _why_uniform(self, measured: set[str]) -> str:
        if "weights" not in measured:
            return (
                "The task vectors have equal norms, as those of one fine-tune given twice: where "
                "one model should count for more, give it a larger `weight`."
            )
        remedy = (
            "use `nan` or `nan_task_arithmetic` with `base_model`"
            if self.ignores_base
            else "give `base_model` and leave `norm_of` out"
        )
        return (
            "Norms of raw weights, which were measured, always agree for fine-tunes of one base; "
            f"norms of task vectors differ: {remedy}."
        )

    def summary(self, records: Sequence[TensorRecord]) -> str:
        """The coefficients, and what the wrapped method has to say."""
        own = coefficients_section({r.name: r.details for r in records})
        inner = self._inner.summary(records) if self._inner else ""
        return f"{own}\n\n{inner}".strip()
