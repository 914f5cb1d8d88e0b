r"""LoRE-Merging of adapters: changes of low rank, around a base that is known or not.

Liu et al., "LoRE-Merging", section 3.2 and algorithm 1; see `mergekit_ext.kernels.lore`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeWarning, Problem, TwoModelsWarning
from mergekit_ext.kernels.lore import (
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_TOLERANCE,
    LoreResult,
    lore,
)
from peft_merge.rules.base import Call, Merged, Parameter, Rule, cancelling, register
from peft_merge.rules.parameters import LAMBDA, divided_by

_THRESHOLDS = ("mu", "mu_relative", "rank_ratio")
_PASSED = ("combine", "update", "max_iterations", "tolerance")

_PARAMETERS = (
    Parameter("mu", float, None, low=0.0, help="threshold on singular values, absolute"),
    Parameter(
        "mu_relative",
        float,
        None,
        low=0.0,
        help="threshold relative to the largest singular value of the module's changes",
    ),
    Parameter(
        "rank_ratio",
        float,
        None,
        low=0.0,
        high=1.0,
        above=True,
        help="rank kept of each change, as a part of min(rows, columns)",
    ),
    LAMBDA,
    Parameter(
        "combine",
        str,
        "sum",
        choices=("sum", "mean", "ties"),
        help="how the thresholded changes are combined",
    ),
    Parameter(
        "base",
        str,
        "known",
        choices=("known", "estimated"),
        help="known: the adapters have one base; estimated: their bases may differ",
    ),
    Parameter(
        "update",
        str,
        "simultaneous",
        choices=("simultaneous", "sequential"),
        help="when the estimated base is solved again: after all changes, or after each",
    ),
    Parameter(
        "max_iterations",
        int,
        DEFAULT_MAX_ITERATIONS,
        low=1,
        help="iterations after which the solver stops",
    ),
    Parameter(
        "tolerance",
        float,
        DEFAULT_TOLERANCE,
        low=0.0,
        above=True,
        help="relative change at which the solver has converged",
    ),
)


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    r""":math:`\theta_0 + \lambda\tau` with :math:`\tau` from the low-rank :math:`\delta_i`.

    `base: known`: all adapters change the same weight, which is
    :math:`\theta_0`, so that in terms of changes :math:`\theta_0 = 0` and
    :math:`\delta_i = \mathrm{SVT}(D_i; \mu)`, once. `base: estimated`: algorithm 1 on the
    :math:`D_i`, whose common part :math:`\theta_0` is estimated and kept.

    A vector is a 1 x n matrix: its one singular value is its length, so that the whole vector is
    shrunk, ``max(0, 1 - mu/||d||) d``, or dropped (group shrinkage).

    `rank_ratio` counts singular values of the change itself (`Call.shape`), also when the tensors
    are its coordinates in a smaller space.
    """
    matrices = [
        tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]) for tensor in tensors
    ]
    weights = call.weights
    if call.options["combine"] == "mean" and cancelling(weights):
        if any(bool(tensor.any()) for tensor in tensors):
            divided_by(weights, "combine: sum")
        weights = [1.0] * len(tensors)  # NAN gives changes of zero no weight; so is their mean
    known = call.options["base"] == "known"
    result = lore(
        matrices,
        base=torch.zeros_like(matrices[0]) if known else None,
        lam=call.options["lambda"],
        weights=weights,
        on_iteration=call.on_iteration,
        **_threshold(call, min(matrices[0].shape)),
        **{name: call.options[name] for name in _PASSED},
    )
    return Merged(result.merged.reshape(tensors[0].shape), _details(result))


def _threshold(call: Call, short_side: int) -> dict[str, Any]:
    given = {name: call.options[name] for name in _THRESHOLDS if call.options[name] is not None}
    if "rank_ratio" in given and short_side:
        # 0.2 * 15 is 3.0000000000000004 and means 3
        kept = math.ceil(round(given["rank_ratio"] * min(call.shape), 9))
        given["rank_ratio"] = min(kept, short_side) / short_side
    return given


def _details(result: LoreResult) -> dict[str, Any]:
    return {
        "iterations": result.iterations,
        "change": result.change,
        "objective": result.objective,
        "converged": result.converged,
        "mu": result.mu,
        "ranks": list(result.ranks),
        "singular_values": list(result.spectral_norms),
    }


def _problems(count: int, options: Mapping[str, Any]) -> Iterable[Problem]:
    given = [name for name in _THRESHOLDS if options.get(name) is not None]
    if len(given) != 1:
        yield Problem(
            "parameters",
            " and ".join(given) if given else f"none of {', '.join(_THRESHOLDS)}",
            f"exactly one of {', '.join(_THRESHOLDS)}",
            "Keep one of them." if given else "Add `mu_relative: 0.1` to start with.",
        )
    if options.get("base") == "known" and options.get("update") == "sequential":
        yield Problem(
            "parameters.update",
            "sequential with a known base",
            "simultaneous: with a known base, nothing is solved again",
            "Leave `update` out, or add `base: estimated`.",
        )


def _forewarnings(count: int, options: Mapping[str, Any]) -> Iterable[MergeWarning]:
    if count != 2 or options["base"] == "known" or options["update"] == "sequential":
        return
    yield TwoModelsWarning(
        "lore with two adapters of equal weight and `base: estimated` returns their plain average, "
        "whatever the threshold and lambda are: the two low-rank changes come out opposite and "
        "cancel. Use `base: known` (the default), or `update: sequential` (the result then depends "
        "on the order of the adapters), or `linear`."
    )


register(
    Rule(
        "lore",
        merge,
        invariant=True,
        parameters=_PARAMETERS,
        check=_problems,
        forewarnings=_forewarnings,
        divides=lambda options: options["combine"] == "mean",
        # signs are elected entry by entry
        elementwise=lambda options: options["combine"] == "ties",
    )
)
