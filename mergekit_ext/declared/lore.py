r"""LoRE-Merging: an estimated base and low-rank task vectors.

Liu et al., "LoRE-Merging", section 3.2 and algorithm 1. See `kernels.lore`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.core.parameters import Count, NonNegative, Parameter, Positive, Share, choice
from mergekit_ext.declared.linear import CALIBRATED_LAMBDA
from mergekit_ext.declared.method import (
    ADAPTERS,
    MODELS,
    Call,
    Inputs,
    Merged,
    Method,
    cancelling,
    divisor,
    register,
)
from mergekit_ext.errors import MergeWarning, NotConvergedWarning, Problem, TwoModelsWarning
from mergekit_ext.kernels import lore as kernel

_THRESHOLDS = ("mu", "mu_relative", "rank_ratio")
_PASSED = ("combine", "update", "max_iterations", "tolerance")
_REPORTED = ("iterations", "change", "objective", "converged", "mu")
_RELATIVE = "threshold relative to the largest singular value of the differences"
_UPDATE = "when the estimated base is solved again: after all task vectors, or after each"
_STOPS = "iterations after which it stops"
_BASES = "known: the adapters have one base; estimated: their bases may differ"
_TOLERANCE = (
    "error left of the estimated base, relative to its distance from the mean; without it, the "
    "error of the result is a tenth of its rounding"
)
_PARAMETERS = (
    Parameter("mu", NonNegative | None, None, "threshold on singular values, absolute"),
    Parameter("mu_relative", NonNegative | None, None, _RELATIVE),
    Parameter("rank_ratio", Share | None, None, "rank kept, as a part of min(rows, columns)"),
    CALIBRATED_LAMBDA,
    Parameter("combine", choice("sum", "mean", "ties"), "sum", "how the task vectors are combined"),
    Parameter("update", choice("simultaneous", "sequential"), "simultaneous", _UPDATE),
    Parameter("max_iterations", Count, kernel.DEFAULT_MAX_ITERATIONS, _STOPS),
    Parameter("tolerance", Positive | None, None, _TOLERANCE),
)
_BASE = Parameter("base", choice("known", "estimated"), "known", _BASES)

# How each driver's users give a base.
_GIVE_BASE = {MODELS: "Give a base model", ADAPTERS: "Use `base: known` (the default)"}
# So many products of a matrix with its transpose take as long as merging it: measured with
# `mu_relative: 0.1`, in the middle of spectra like k^-0.45 and k^-0.3 (bench/README.md).
_OVER_BASE, _ESTIMATED = 12.0, 80.0
# Two weights that differ by less do not keep the task vectors from cancelling.
_SAME_WEIGHT = 1e-2


def over_base(
    base: Tensor | None, models: Sequence[Tensor], call: Call, dtype: torch.dtype
) -> Merged:
    r"""Return :math:`\theta_0 + \lambda\tau`, :math:`\theta_0` being `base` or estimated."""
    if base is None and call.solution is not None and models[0].ndim > 1:
        result = _kept(models, call, call.solution)
    else:
        result = _solved(models, base, call, call.weights, dtype)
    cancelled = base is None and models[0].ndim > 1 and _cancels(call.options, call.weights)
    details = {**_details(result), "averaged": cancelled}
    return Merged(result.merged.to(dtype), details, result.base if base is None else None)


def _kept(models: Sequence[Tensor], call: Call, kept: dict[str, Tensor]) -> kernel.LoreResult:
    """Threshold over the theta_0 that is kept; solve for it first, for any use, where none is."""
    if not kept:
        plain = replace(call, options={**call.options, "lambda": 1.0, "combine": "sum"}, final=None)
        found = _solved(models, None, plain, [1.0] * len(models))
        ended = found.iterations, found.converged, found.change
        kept["theta_0"] = found.base
        kept["mu"], kept["ended"] = (torch.tensor(v).double() for v in (found.thresholds, ended))
        del found  # its merged tensor
    options = {**call.options, "mu_relative": None, "mu": kept["mu"].tolist() or None}
    theta_0 = kept["theta_0"].to(models[0].device)
    result = _solved(models, theta_0, replace(call, options=options), call.weights)
    iterations, converged, change = kept["ended"].tolist()
    numbers: dict[str, Any] = {
        "iterations": int(iterations),
        "converged": bool(converged),
        "change": change,
    }
    return replace(result, **numbers)


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    r"""Return the merged change of adapters.

    `base: known`: all adapters change the same weight, which is :math:`\theta_0`, so that in terms
    of changes :math:`\theta_0 = 0` and :math:`\delta_i = \mathrm{SVT}(t_i; \mu)`, once. `base:
    estimated`: algorithm 1 on the :math:`t_i`, whose common part :math:`\theta_0` is estimated
    and kept.

    A vector is a 1 x n matrix, which is shrunk as a whole, ``max(0, 1 - mu/||d||) d``. `rank_ratio`
    counts singular values of the change itself, not of its coordinates in a smaller space.
    """
    shape, weights = tensors[0].shape, call.weights
    matrices = [tensor.reshape(math.prod(shape[:-1]), shape[-1]) for tensor in tensors]
    if call.options["combine"] == "mean" and cancelling(weights):
        if any(bool(tensor.any()) for tensor in tensors):
            divisor(weights, "combine: sum")
        weights = [1.0] * len(tensors)  # NAN gives changes of zero no weight; so is their mean
    known = call.options["base"] == "known"
    result = _solved(matrices, torch.zeros_like(matrices[0]) if known else None, call, weights)
    return Merged(result.merged.reshape(shape), _details(result))


def _solved(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    call: Call,
    weights: Sequence[float],
    output: torch.dtype | None = None,
) -> kernel.LoreResult:
    passed = {name: call.options[name] for name in (*_THRESHOLDS, *_PASSED)}
    in_coordinates = call.short_side is not None and tensors[0].numel()
    if in_coordinates and passed["rank_ratio"] is not None:
        short_side = min(tensors[0].shape)
        # 0.2 * 15 is 3.0000000000000004 and means 3
        kept = math.ceil(round(passed["rank_ratio"] * call.short_side, 9))
        passed["rank_ratio"] = min(kept, short_side) / short_side
    return kernel.lore(
        tensors,
        base=base,
        lam=call.options["lambda"],
        weights=weights,
        output=call.final or output,
        calibrated=call.final is not None,
        layout=call.layout,
        on_iteration=call.on_iteration,
        **passed,
    )


def _details(result: kernel.LoreResult) -> dict[str, Any]:
    found = {name: getattr(result, name) for name in _REPORTED}
    return {**found, "ranks": [*result.ranks], "singular_values": [*result.spectral_norms]}


def _based(options: Mapping[str, Any], inputs: Inputs) -> bool:
    return bool(options["base"] == "known") if "base" in options else inputs.based


def _problems(options: Mapping[str, Any], inputs: Inputs) -> Iterable[Problem]:
    given = [name for name in _THRESHOLDS if options.get(name) is not None]
    if len(given) != 1:
        known = ", ".join(_THRESHOLDS)
        remedy = "Keep one of them." if given else "Add `mu_relative: 0.1` to start with."
        found = " and ".join(given) or f"none of {known}"
        yield Problem(inputs.where, found, f"exactly one of {known}", remedy)
    if options.get("update") == "sequential" and _based(options, inputs):
        other = "leave `base_model` out" if inputs.driver == MODELS else "add `base: estimated`"
        found, remedy = "sequential with a known base", f"Leave `update` out, or {other}."
        expected = "simultaneous: with a known base, nothing is solved again"
        yield Problem(f"{inputs.where}.update", found, expected, remedy)


def _forewarn(options: Mapping[str, Any], inputs: Inputs) -> Iterable[MergeWarning]:
    if not _based(options, inputs) and _cancels(options, inputs.weights or [1.0] * inputs.count):
        yield _two_models([n for n in _THRESHOLDS if options.get(n) is not None], inputs.driver)


def _two_models(given: Sequence[str] = (), driver: str = MODELS) -> TwoModelsWarning:
    return TwoModelsWarning(
        "lore with two inputs of equal weight and no base returns their plain average, whatever "
        f"{' and '.join(given) or 'mu'} and lambda are: the two task vectors cancel. "
        f"{_GIVE_BASE[driver]}, or `update: sequential` (the order then counts), or use `linear`."
    )


def _cancels(options: Mapping[str, Any], weights: Sequence[float]) -> bool:
    if len(weights) != 2 or options.get("update") != "simultaneous":
        return False
    return abs(weights[0] - weights[1]) <= _SAME_WEIGHT * max(map(abs, weights))


def _after(name: str, records: Mapping[str, Mapping[str, Any]]) -> Iterable[MergeWarning]:
    late = {key: entry for key, entry in records.items() if not entry.get("converged", True)}
    if late:
        worst = max(late, key=lambda key: late[key]["change"])
        yield NotConvergedWarning(
            f"{name}: {len(late)} of {len(records)} tensors did not reach the tolerance in "
            f"{late[worst]['iterations']} iterations; the largest change left is "
            f"{late[worst]['change']:.1e}, in {worst}. Raise `max_iterations`, `tolerance` or mu."
        )
    if any(entry.get("averaged") for entry in records.values()):
        yield _two_models()


def _copies(models: int, square: float) -> float:
    """Differences, iterates and their history in the span of the differences; then two results."""
    span = min(1.0, (models - 1) * square)
    return max(3.0, (12 * models + 18) * span + (2 * models + 6) * square)


def _operations(models: int, based: bool, short: int, long: int) -> float:
    # Solved for in spans of the differences; long matrices are summed up and written besides.
    length = min(long, short if based else (models - 1) * short)
    solving = (_OVER_BASE if based else _ESTIMATED) * models * length
    passes = (2 * models if based else models * (models - 1)) * long if length < long else 0
    return 2.0 * short**2 * (solving + passes)


register(
    Method(
        "lore",
        "LoRE-Merging",
        "https://arxiv.org/abs/2502.10749",
        merge,
        parameters=_PARAMETERS,
        drivers=frozenset({MODELS, ADAPTERS}),
        variants={ADAPTERS: {"base": _BASE}},
        weighs=True,
        base=False,
        # With `ties`, signs are elected entry by entry.
        invariant=lambda options: options["combine"] != "ties",
        matrices=True,
        over_base=over_base,
        check=_problems,
        forewarn=_forewarn,
        after=_after,
        copies=_copies,
        operations=_operations,
        solves=frozenset({"lambda", "combine", "weight"}),
        divides=lambda options: options["combine"] == "mean",
        use="Three fine-tunes or more, by their main directions; the base need not be at hand.",
        example={"mu_relative": 0.1},
    )
)
