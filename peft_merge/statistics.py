r"""NAN's coefficients: norms of changes, without the changes.

:math:`\|BA\|_F^2 = \langle B^T B,\, A A^T \rangle`: two r x r products for each module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.nan import combine_norms, inverse_norm_coefficients
from mergekit_ext.kernels.threads import by_one_thread, in_turn
from peft_merge.adapter import LoraAdapter, Update, finite_update, modules_of
from peft_merge.algebra.orthonormal import orthonormal

# Below this share of ||B||^2 ||A||^2 the products cancel, and take digits with them.
_CANCELLED = 1e-6

# Which modules share one set of coefficients.
GRANULARITIES: dict[str, Callable[[str], str]] = {
    "tensor": lambda module: module,
    "model": lambda module: "model",
}


@by_one_thread
def update_norm(update: Update) -> float:
    r""":math:`\sqrt{\|s B A\|_F^2 + \|s\,\mathrm{bias}\|^2}` of one module, in float64.

    The bias of B belongs to the change: a module may change nothing else.
    """
    a, b = update.a.to(torch.float64), update.b.to(torch.float64)
    inner, outer = b.mT @ b, a @ a.mT
    square = float((inner * outer).sum())
    largest = float((_traces(inner) * _traces(outer)).sum())
    if square < _CANCELLED * largest:
        square = float(_core(a, b).square().sum())
    bias = 0.0 if update.bias is None else float(update.bias.to(torch.float64).square().sum())
    return abs(update.scale) * math.sqrt(square + bias)


def _traces(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _core(a: Tensor, b: Tensor) -> Tensor:
    return orthonormal(b).coordinates @ orthonormal(a.mT).coordinates.mT


def lora_norms(
    adapters: Sequence[LoraAdapter], on_module: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """For each module of any adapter the norms of all adapters, 0 for those without it.

    Args:
        adapters: read one module at a time.
        on_module: called when a module is measured.

    Raises:
        NonFiniteError: factors hold NaN or infinity.
    """
    modules = modules_of(adapters)

    def measure(module: str) -> list[float]:
        return [
            update_norm(finite_update(adapter, module)) if module in adapter.infos else 0.0
            for adapter in adapters
        ]

    norms = {}
    for module, found in zip(modules, in_turn(measure, modules, torch.device("cpu")), strict=True):
        norms[module] = found
        if on_module is not None:
            on_module(module)
    return norms


def coefficients(
    norms: Mapping[str, Sequence[float]], granularity: str = "tensor"
) -> dict[str, list[float]]:
    r""":math:`a_i = (1/\|D_i\|_F) / \sum_j (1/\|D_j\|_F)` for each module (NAN, equation 10).

    Args:
        norms: for each module the norms of the m changes: `lora_norms`, or of (IA)^3's vectors.
        granularity: `tensor`, each module by itself; or `model`: one set for all, from the norms
            of whole adapters.

    Returns:
        for each module m numbers that sum to 1, or zeros where no adapter changes anything. An
        adapter whose change is zero gets 0 there.
    """
    key = GRANULARITIES[granularity]
    combined = combine_norms(
        (key(module), dict(enumerate(values))) for module, values in norms.items()
    )
    found = {
        name: inverse_norm_coefficients(list(values.values())) for name, values in combined.items()
    }
    return {module: found[key(module)] for module in norms}
