r"""Merging (IA)^3 adapters: multiplicative vectors, whose identity is 1.

(IA)^3 (Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning", arXiv:2205.05638, section 3.3) multiplies a module's output, or the input of
a feedforward module, with a vector :math:`\ell`. The paper says nothing on merging. Here a vector
is a change of the vector of ones, and a merge rule F sees the changes:

- additive: :math:`\ell = 1 + F(\ell_1 - 1, \dots, \ell_m - 1)`;
- log: :math:`\ell = \exp F(\log \ell_1, \dots, \log \ell_m)`, so that a linear rule gives the
  weighted geometric mean: the function of adapters applied one after the other.

An adapter without a module counts as :math:`\ell_i = 1` there, which is a change of zero in both.
So no weights, whatever their sum, scale a module that no adapter has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, MergeError, Problem
from mergekit_ext.kernels.seeds import generators
from mergekit_ext.methods import Method, Settings
from peft_merge.adapter import (
    Ia3Adapter,
    OnModule,
    OnModuleIteration,
    VectorInfo,
    finite,
    modules_of,
)

Space = Literal["additive", "log"]


def merge_ia3(
    adapters: Sequence[Ia3Adapter],
    rule: Method,
    resolve: Callable[[str], Settings],
    *,
    space: Space = "additive",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    on_module: OnModule | None = None,
    on_iteration: OnModuleIteration | None = None,
) -> tuple[dict[str, Tensor], dict[str, VectorInfo], dict[str, dict[str, Any]]]:
    """Merge the vectors of every module that some adapter has.

    Args:
        adapters: m of them that agree (`peft_merge.io.compatible`); their modules are united.
        rule: sees m float64 vectors of shape (length,).
        resolve: a module's weights (NAN's coefficients multiplied in) and parameters.
        space: `additive` or `log`, see above.
        dtype: of the results, cast to once; default: the vectors' own, promoted where they differ.
        device: where the rule runs; results lie there.
        seed: of random rules.
        on_module: called after each module with its name and report.
        on_iteration: called after each iteration of a solver, as in `merge_lora`.

    Returns:
        The merged vectors in their stored shapes, what they are, and for each module a report:
        `shape`, `feedforward`, `adapters` (how many have it) and the rule's details.

    Raises:
        ConfigError: in log space values that are not positive. Before anything is merged.
        NonFiniteError: a vector holds NaN or infinity.
        MergeError: a merged vector overflows `dtype`.
    """
    check(adapters, space)
    vectors: dict[str, Tensor] = {}
    infos: dict[str, VectorInfo] = {}
    report: dict[str, dict[str, Any]] = {}
    for module in modules_of(adapters):
        own = [adapter.infos[module] for adapter in adapters if module in adapter.infos]
        info = replace(own[0], dtype=dtype or reduce(torch.promote_types, (i.dtype for i in own)))
        before = changes(adapters, module, space=space, device=device)
        call = resolve(module).call(
            short_side=1,
            generators=generators(seed, module, len(adapters)),
            on_iteration=None if on_iteration is None else partial(on_iteration, module),
        )
        merged = rule.apply(before, call)
        change = merged.tensor.to(torch.float64)
        vector = (torch.exp(change) if space == "log" else 1 + change).to(info.dtype)
        if not bool(torch.isfinite(vector).all()):
            raise MergeError(
                f"{module}: the merged vector leaves the range of {info.dtype}. Use smaller "
                "weights, or a wider dtype."
            )
        vectors[module], infos[module] = vector.reshape(info.shape), info
        report[module] = {
            "shape": list(info.shape),
            "feedforward": info.feedforward,
            "adapters": len(own),
            **merged.details,
        }
        if on_module is not None:
            on_module(module, report[module])
    return vectors, infos, report


def changes(
    adapters: Sequence[Ia3Adapter],
    module: str,
    *,
    space: Space = "additive",
    device: str | torch.device = "cpu",
) -> list[Tensor]:
    """Return what a rule sees of a module that one of the adapters has: m float64 vectors.

    Raises:
        NonFiniteError: a vector holds NaN or infinity.
    """
    shape = next(adapter.infos[module].shape for adapter in adapters if module in adapter.infos)
    found = []
    for adapter in adapters:
        if module in adapter.infos:
            vector = _read(adapter, module)
            change = torch.log(vector) if space == "log" else vector - 1
        else:
            change = torch.zeros(shape, dtype=torch.float64)
        found.append(change.to(device).flatten())
    return found


def check(adapters: Sequence[Ia3Adapter], space: str) -> None:
    """Check that the vectors can be merged in a space, which reads them for log space.

    Raises:
        ConfigError, NonFiniteError: as `merge_ia3`.
    """
    if space != "log":
        return
    problems = []
    for adapter in adapters:
        for module in adapter.infos:
            vector = _read(adapter, module)
            smallest = float(vector.min()) if vector.numel() else 1.0
            if smallest <= 0:
                where = f"{module} of adapter {adapter.name}"
                expected = "positive values, of which logarithms exist"
                remedy = "Use `space: additive`."
                problems.append(
                    Problem(where, f"a smallest value of {smallest:.6g}", expected, remedy)
                )
    if problems:
        raise ConfigError(problems, "this merge of (IA)^3 adapters")


def _read(adapter: Ia3Adapter, module: str) -> Tensor:
    return finite(adapter.load(module), module, adapter.name).to(torch.float64)
