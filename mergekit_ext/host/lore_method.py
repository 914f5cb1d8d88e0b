"""LoRE-Merging as the mergekit method `lore`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import Field

from mergekit_ext.errors import (
    MergeError,
    MergeWarning,
    NotConvergedWarning,
    Problem,
    TwoModelsWarning,
)
from mergekit_ext.events import SolverIteration
from mergekit_ext.host import session as sessions
from mergekit_ext.host.method import ExtMethod, raise_non_finite
from mergekit_ext.host.session import TensorRecord
from mergekit_ext.kernels.lore import DEFAULT_MAX_ITERATIONS, DEFAULT_TOLERANCE, lore
from mergekit_ext.kernels.numerics import all_finite
from mergekit_ext.report.card import solver_section

PAPER = "https://arxiv.org/abs/2502.10749"

_THRESHOLDS = ("mu", "mu_relative", "rank_ratio")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _shared(name: str, value_type: Any, default: Any, description: str) -> ParameterSpec:
    return ParameterSpec(
        name, value_type, ParameterScope.SHARED, default=default, description=description
    )


_PARAMETERS = (
    _shared("mu", NonNegative | None, None, "threshold on singular values, absolute"),
    _shared(
        "mu_relative",
        NonNegative | None,
        None,
        "threshold relative to the largest singular value of the tensor's differences",
    ),
    _shared("rank_ratio", Ratio | None, None, "rank kept, as a part of min(rows, columns)"),
    _shared("lambda", Finite, 1.0, "factor of the combined task vector"),
    _shared("combine", Literal["sum", "mean", "ties"], "sum", "how the task vectors are combined"),
    _shared(
        "update",
        Literal["simultaneous", "sequential"],
        "simultaneous",
        "when the estimated base is solved again: after all task vectors, or after each",
    ),
    _shared(
        "max_iterations",
        Annotated[int, Field(ge=1)],
        DEFAULT_MAX_ITERATIONS,
        "iterations after which the solver stops",
    ),
    _shared("tolerance", Positive, DEFAULT_TOLERANCE, "relative change at which it has converged"),
    ParameterSpec("weight", Finite, ParameterScope.NON_BASE, default=1.0),
)

_TWO_MODELS = (
    "lore with two models of equal weight and no base returns their plain average, whatever "
    "{given} and lambda are: the two task vectors come out opposite and cancel. Give "
    "`base_model`, or `update: sequential` (the result then depends on the order of the models), "
    "or use `linear`."
)
# Two weights that differ by less do not keep the task vectors from cancelling.
_SAME_WEIGHT = 1e-2


class LoreMethod(ExtMethod):
    r"""``theta_0 + lambda * tau``: an estimated base and low-rank task vectors.

    Liu et al., "LoRE-Merging", algorithm 1. With `base_model`, theta_0 is the base and each task
    vector is thresholded once. See `mergekit_ext.kernels.lore`.
    """

    spec = MergeMethodSpec(
        name="lore",
        pretty_name="LoRE-Merging",
        reference_url=PAPER,
        parameters=_PARAMETERS,
        contract=InputContract(base=BasePolicy.OPTIONAL, min_non_base=1),
    )

    def problems(
        self, shared: Mapping[str, Any], *, has_base: bool, inputs: Sequence[str], where: str
    ) -> Iterable[Problem]:
        """Exactly one threshold; no sequential updates of a base that is given."""
        given = [name for name in _THRESHOLDS if shared.get(name) is not None]
        if len(given) != 1:
            yield Problem(
                where,
                " and ".join(given) if given else f"none of {', '.join(_THRESHOLDS)}",
                f"exactly one of {', '.join(_THRESHOLDS)}",
                "Keep one of them." if given else "Add `mu_relative: 0.1` to start with.",
            )
        if has_base and shared.get("update") == "sequential":
            yield Problem(
                f"{where}.update",
                "sequential with a base model",
                "simultaneous: with a base, nothing is solved again",
                "Leave `update` out, or leave `base_model` out.",
            )

    def forewarnings(
        self,
        shared: Mapping[str, Any],
        *,
        has_base: bool,
        inputs: Sequence[str],
        where: str,
        weights: Sequence[float] | None = None,
    ) -> Iterable[MergeWarning]:
        """Two models and no base: no parameter has an effect."""
        if not has_base and _cancels(shared, weights or [1.0] * len(inputs)):
            given = [name for name in _THRESHOLDS if shared.get(name) is not None]
            yield TwoModelsWarning(_TWO_MODELS.format(given=" and ".join(given) or "mu"))

    def copies(self, models: int, square: float) -> float:
        """Inputs, differences, task vectors, the solver's steps; Gram matrices in float64."""
        return 5 * models + 7 + (5 * models + 20) * square

    def merge_one(
        self,
        group: TensorGroup,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """Solve one tensor; report iterations, convergence, ranks and singular values."""
        entries = group.non_base
        if not entries:
            return group.entries[0].tensor.to(out_dtype), {}
        name = group.metadata.name or ""
        ids = [str(entry.id) for entry in entries]
        weights = [parameters["weight"][entry.id] for entry in entries]
        try:
            result = lore(
                [entry.tensor for entry in entries],
                base=group.base.tensor if group.base else None,
                weights=weights,
                lam=parameters["lambda"],
                layout=layout_of(name, entries[0].tensor.ndim),
                on_iteration=_reporter(name),
                **{
                    key: parameters[key]
                    for key in (*_THRESHOLDS, "combine", "update", "max_iterations", "tolerance")
                },
            )
        except ValueError:
            raise_non_finite(group)
            raise
        except (OverflowError, torch.linalg.LinAlgError):
            raise_non_finite(group)
            raise _out_of_range(name, "differences of the models") from None
        merged = result.merged.to(out_dtype)
        if not all_finite(merged):
            raise_non_finite(group)
            raise _out_of_range(name, "values")
        details = {
            "iterations": result.iterations,
            "change": result.change,
            "objective": result.objective,
            "converged": result.converged,
            "mu": result.mu,
            "ranks": dict(zip(ids, result.ranks, strict=False)),
            "singular_values": dict(zip(ids, result.spectral_norms, strict=False)),
            "averaged": (
                group.base is None and entries[0].tensor.ndim > 1 and _cancels(parameters, weights)
            ),
        }
        return merged, details

    def warnings(self, records: Sequence[TensorRecord]) -> Iterable[MergeWarning]:
        """Tensors that did not converge, and two-model merges that averaged."""
        late = [r for r in records if not r.details.get("converged", True)]
        if late:
            worst = max(late, key=lambda r: r.details["change"])
            yield NotConvergedWarning(
                f"lore: {len(late)} of {len(records)} tensors did not reach the tolerance in "
                f"{worst.details['iterations']} iterations; the largest change left is "
                f"{worst.details['change']:.1e}, in {worst.name}. Raise `max_iterations` or "
                "`tolerance`, or raise mu."
            )
        if any(r.details.get("averaged") for r in records):
            yield TwoModelsWarning(_TWO_MODELS.format(given="mu"))

    def summary(self, records: Sequence[TensorRecord]) -> str:
        """Convergence, ranks and singular values."""
        return solver_section({r.name: r.details for r in records})


def layout_of(name: str, axes: int) -> str:
    """How `kernels.lore` should see a tensor: matrix, stacked matrices, or flattened.

    Four axes and more are convolutions, (out, in, height, width). Three axes are matrices stacked
    along the first (experts, or a batch axis of one), unless the name says convolution: shapes
    alone do not tell a one-dimensional convolution from experts.
    """
    if axes <= 2:
        return "matrix"
    return "flattened" if axes > 3 or "conv" in name.lower() else "stacked"


def _out_of_range(name: str, what: str) -> MergeError:
    return MergeError(
        f"{name}: lore gives {what} that are not finite from finite inputs; expected ones within "
        "the range of the dtype. Check `weight` and `lambda`, and that these are fine-tunes of one "
        "model."
    )


def _reporter(name: str) -> Callable[[int, float, float], None] | None:
    session = sessions.current()
    if session is None:
        return None

    def report(iteration: int, objective: float, change: float) -> None:
        session.emit(SolverIteration(name, iteration, objective, change))

    return report


def _cancels(shared: Mapping[str, Any], weights: Sequence[float]) -> bool:
    """Whether the task vectors of these models cancel when there is no base."""
    if len(weights) != 2 or shared.get("update") != "simultaneous":
        return False
    return abs(weights[0] - weights[1]) <= _SAME_WEIGHT * max(map(abs, weights))
