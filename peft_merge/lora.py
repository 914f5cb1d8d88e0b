"""Merging LoRAs, one module at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.kernels.seeds import generators
from mergekit_ext.kernels.threads import in_turn
from mergekit_ext.methods import Method, Settings
from peft_merge.adapter import (
    LoraAdapter,
    ModuleInfo,
    OnModule,
    OnModuleIteration,
    Update,
    finite_update,
    modules_of,
)
from peft_merge.algebra.spaces import SPACES, Job
from peft_merge.algebra.truncated import Rank

# Entries of a change that may be dense in every thread at once.
_SMALL = 1 << 20


def merge_lora(
    adapters: Sequence[LoraAdapter],
    rule: Method,
    resolve: Callable[[str], Settings],
    *,
    space: str = "delta",
    rank: Rank | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    on_module: OnModule | None = None,
    on_iteration: OnModuleIteration | None = None,
) -> tuple[dict[str, Update], dict[str, ModuleInfo], dict[str, dict[str, Any]]]:
    r"""Merge every module that some adapter has; where another has none, its change is zero.

    The bias of B (`lora_bias`) is a change of its own, :math:`s_i` times the bias, merged by the
    same rule with the same weights; zeros where an adapter has none.

    Args:
        adapters: m of them that agree (`peft_merge.io.compatible`), read one module at a time.
        rule: sees m changes of one matrix, or their coordinates, see `peft_merge.algebra.spaces`.
        resolve: a module's weights (NAN's coefficients multiplied in) and parameters.
        space: one of `SPACES`; for `factors` the ranks of a module must be equal.
        rank: a number (zeros fill up what is not needed; never above rows or columns),
            "lossless", or {"energy": share}. Default: lossless for rotation-invariant rules and
            in the small spaces; for elementwise rules the sum of the input ranks.
        dtype: of the results, cast to once; default: the factors' own, promoted where they differ.
        device: where to compute; results lie there.
        seed: of random rules.
        on_module: called after each module with its name and report, in order.
        on_iteration: called after each iteration of a solver with the module's name, iteration,
            objective and change; modules may be solved side by side in threads.

    Returns:
        The merged updates, of scale 1, balanced (the roots of the singular values on both sides);
        what they are; and for each module a report: `shape`, `rank`, `error` (relative Frobenius
        error of the truncation), `adapters` (how many have it), `singular_values_kept` (the
        largest and the smallest), and the rule's details.

    Raises:
        NonFiniteError: factors hold NaN or infinity; it names module, factor and adapter.
        MergeError: the merged change leaves the range of the arithmetic or of `dtype`.
    """
    modules = modules_of(adapters)

    def merge(module: str) -> tuple[Update, ModuleInfo, dict[str, Any]]:
        own = [adapter.infos[module] for adapter in adapters if module in adapter.infos]
        updates = [finite_update(a, module) if module in a.infos else None for a in adapters]
        shape = own[0].shape
        call = resolve(module).call(
            short_side=min(shape[1:]),
            generators=generators(seed, module, len(adapters)),
            on_iteration=None if on_iteration is None else partial(on_iteration, module),
        )
        job = Job(updates, shape, rule, call, rank, device)
        out = dtype or reduce(torch.promote_types, (info.dtype for info in own))
        try:
            factored, details = SPACES[space](job)
            bias = _bias(job, generators(seed, module, len(adapters), "bias"))
            update = Update(
                _cast(factored.a, out),
                _cast(factored.b, out),
                1.0,
                None if bias is None else _cast(bias, out),
            )
        except MergeError as error:
            raise MergeError(f"{module}: {error}") from error
        info = replace(own[0], rank=factored.rank, bias=bias is not None, dtype=out)
        sigma = factored.sigma
        entry = {
            "shape": list(shape),
            "rank": factored.rank,
            "error": factored.error,
            "adapters": len(own),
            "singular_values_kept": [float(sigma[:, 0].max()), float(sigma[:, -1].min())],
            **details,
        }
        return update, info, entry

    side_by_side = small(adapters, rule, resolve, space)
    results = in_turn(merge, modules, torch.device(device)) if side_by_side else map(merge, modules)
    merged: dict[str, Update] = {}
    infos: dict[str, ModuleInfo] = {}
    report: dict[str, dict[str, Any]] = {}
    for module, result in zip(modules, results, strict=True):
        merged[module], infos[module], report[module] = result
        if on_module is not None:
            on_module(module, report[module])
    return merged, infos, report


def small(
    adapters: Sequence[LoraAdapter], rule: Method, resolve: Callable[[str], Settings], space: str
) -> bool:
    """Return whether no module needs a large dense change.

    Small algebra does not fill the cores, so that modules are done side by side; large dense
    changes do, and only one of them should be in memory.
    """
    entries = {
        module: math.prod(info.shape)
        for adapter in adapters
        for module, info in adapter.infos.items()
    }
    return space != "delta" or all(
        rule.invariant(resolve(module).options) or size <= _SMALL
        for module, size in entries.items()
    )


def _bias(job: Job, generators: Sequence[torch.Generator]) -> Tensor | None:
    own = [None if update is None else update.bias for update in job.updates]
    known = next((bias for bias in own if bias is not None), None)
    if known is None:
        return None
    changes = [
        torch.zeros(known.shape, dtype=torch.float64, device=job.device)
        if update is None or update.bias is None
        else update.scale * update.bias.to(job.device, torch.float64)
        for update in job.updates
    ]
    call = replace(job.call, short_side=1, generators=generators, on_iteration=None)
    return job.rule.apply(changes, call).tensor


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise MergeError(
            f"the merged factors leave the range of {dtype}. Use smaller weights, or a wider dtype."
        )
    return cast
