"""Merging LoRAs, one module at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, MergeError, Problem
from mergekit_ext.kernels.threads import in_turn
from peft_merge.adapter import LoraAdapter, ModuleInfo, Update, finite_update
from peft_merge.algebra.spaces import SPACES, Job
from peft_merge.algebra.truncated import Factored, Rank
from peft_merge.rules.base import OnModule, OnModuleIteration, Rule, Settings
from peft_merge.rules.seeds import generators

# Entries of a change that may be dense in every thread at once.
_SMALL = 1 << 20


def merge_lora(
    adapters: Sequence[LoraAdapter],
    rule: Rule,
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
        adapters: m of them, read one module at a time.
        rule: sees m changes of one matrix, or their coordinates, see `peft_merge.algebra.spaces`.
        resolve: a module's weights (NAN's coefficients multiplied in) and parameters.
        space: one of `SPACES`.
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
        ConfigError: an unknown space, modules whose shapes differ, ranks that differ for
            `factors`. Before anything is read, all of them together.
        NonFiniteError: factors hold NaN or infinity; it names module, factor and adapter.
        MergeError: the merged change leaves the range of the arithmetic or of `dtype`.
    """
    problems = [*_space_problems(space), *_module_problems(adapters, space)]
    if problems:
        raise ConfigError(problems, "this merge of LoRAs")
    modules = _modules(adapters)
    merge = _Merger(adapters, rule, resolve, space, rank, dtype, device, seed, on_iteration).merge
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
    adapters: Sequence[LoraAdapter], rule: Rule, resolve: Callable[[str], Settings], space: str
) -> bool:
    """Whether no module needs a large dense change.

    Small algebra does not fill the cores, so that modules are done side by side; large dense
    changes do, and only one of them should be in memory.
    """
    return all(
        space != "delta"
        or rule.invariant_with(resolve(name).options)
        or math.prod(next(iter(_own(adapters, name).values())).shape) <= _SMALL
        for name in _modules(adapters)
    )


@dataclass(frozen=True)
class _Merger:
    """`merge_lora` of one module; the attributes are its arguments."""

    adapters: Sequence[LoraAdapter]
    rule: Rule
    resolve: Callable[[str], Settings]
    space: str
    rank: Rank | None
    dtype: torch.dtype | None
    device: str | torch.device
    seed: int
    on_iteration: OnModuleIteration | None

    def merge(self, module: str) -> tuple[Update, ModuleInfo, dict[str, Any]]:
        """The update, what it is, and the report."""
        own = _own(self.adapters, module)
        like = next(iter(own.values()))
        updates = [
            finite_update(adapter, module) if module in adapter.infos else None
            for adapter in self.adapters
        ]
        call = self.resolve(module).call(
            like.shape[1:],
            self._generators(module),
            None if self.on_iteration is None else partial(self.on_iteration, module),
        )
        job = Job(updates, like.shape, self.rule, call, self.rank, self.device)
        out = self.dtype or reduce(torch.promote_types, (info.dtype for info in own.values()))
        try:
            factored, details = SPACES[self.space](job)
            bias = _bias(job, self._generators(module, "bias"))
            update = _update(factored, bias, out)
        except MergeError as error:
            raise MergeError(f"{module}: {error}") from error
        info = dataclasses.replace(like, rank=factored.rank, bias=bias is not None, dtype=out)
        return (
            update,
            info,
            {
                "shape": list(like.shape),
                "rank": factored.rank,
                "error": factored.error,
                "adapters": len(own),
                "singular_values_kept": _ends(factored.sigma),
                **details,
            },
        )

    def _generators(self, module: str, *parts: str) -> Sequence[torch.Generator]:
        return generators(self.seed, module, len(self.adapters), *parts)


def _modules(adapters: Sequence[LoraAdapter]) -> list[str]:
    """All modules, in the order in which they first occur."""
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.infos))


def _own(adapters: Sequence[LoraAdapter], module: str) -> dict[str, ModuleInfo]:
    return {a.name: a.infos[module] for a in adapters if module in a.infos}


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
    call = dataclasses.replace(
        job.call, shape=(1, known.numel()), generators=generators, on_iteration=None
    )
    return job.rule.merge(changes, call).tensor


def _update(factored: Factored, bias: Tensor | None, dtype: torch.dtype) -> Update:
    update = Update(
        factored.a.to(dtype),
        factored.b.to(dtype),
        1.0,
        None if bias is None else bias.to(dtype),
    )
    for tensor in (update.a, update.b, update.bias):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise MergeError(
                f"the merged factors leave the range of {dtype}. Use smaller weights, or a wider "
                "dtype."
            )
    return update


def _ends(sigma: Tensor) -> list[float]:
    """The largest and the smallest singular value that is kept, over all matrices."""
    return [float(sigma[:, 0].max()), float(sigma[:, -1].min())]


def _space_problems(space: str) -> Iterator[Problem]:
    if space not in SPACES:
        yield Problem("space", repr(space), f"one of {', '.join(SPACES)}")


def _module_problems(adapters: Sequence[LoraAdapter], space: str) -> Iterator[Problem]:
    for module in _modules(adapters):
        own = _own(adapters, module)
        if len({(info.layout, info.kernel, info.shape) for info in own.values()}) > 1:
            shapes = ", ".join(f"{i.layout} {i.shape} in {name}" for name, i in own.items())
            yield Problem(module, shapes, "one shape", "Merge adapters of one base model.")
        elif 0 in (shape := next(iter(own.values())).shape):
            yield Problem(module, f"a change of shape {shape}", "entries that can be merged")
        elif space == "factors" and len({info.rank for info in own.values()}) > 1:
            ranks = ", ".join(f"{info.rank} in {name}" for name, info in own.items())
            yield Problem(
                module,
                f"ranks {ranks}",
                "one rank, as for every merge of factors",
                "Use `space: delta`, which is exact for all ranks.",
            )
