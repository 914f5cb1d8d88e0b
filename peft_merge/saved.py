"""Whole tensors that adapters carry: `modules_to_save`, and trained biases of the base."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.declared.method import cancelling
from mergekit_ext.errors import MergeWarning, Problem, did_you_mean, listing, shown
from mergekit_ext.io.headers import is_counter
from mergekit_ext.kernels.numerics import finite
from peft_merge.adapter import Adapter, cast
from peft_merge.io.names import module_to_save

AVERAGE, DROP = "average", "drop"


def saved_names(adapters: Sequence[Adapter]) -> list[str]:
    """Return the names of the whole tensors of all adapters, in the order in which they come."""
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.saved))


def carriers(choice: str, adapters: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
    """Return for each whole tensor of the output the positions of the adapters that give it."""
    if choice == DROP:
        return {}
    if choice != AVERAGE:
        position = [adapter.name for adapter in adapters].index(choice)
        return dict.fromkeys(adapters[position].saved, (position,))
    numbered = [*enumerate(adapters)]
    return {n: tuple(i for i, a in numbered if n in a.saved) for n in saved_names(adapters)}


def problems_of(choice: Any, adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Yield what is wrong with `modules_to_save`, given (or None) for these adapters."""
    # Tensors are read for their shapes: an adapter in memory has no headers.
    names = [adapter.name for adapter in adapters]
    if choice is not None and choice not in (AVERAGE, DROP, *names):
        remedy = did_you_mean(choice, (AVERAGE, DROP, *names)) if isinstance(choice, str) else ""
        expected = "`average`, `drop`, or the name of an adapter"
        yield Problem("modules_to_save", shown(choice), expected, remedy)
        return
    if choice in (DROP, *names):
        return
    lacking: dict[str, list[str]] = {}
    for name in saved_names(adapters):
        without = [adapter.name for adapter in adapters if name not in adapter.saved]
        if without and choice is None:
            lacking.setdefault(listing(without), []).append(name)
            continue
        tensors = {a.name: a.saved[name]() for a in adapters if name in a.saved}
        remedy = f"Set `modules_to_save` to one of: drop, {', '.join(names)}."
        if len({tensor.shape for tensor in tensors.values()}) > 1:
            found = ", ".join(f"{tuple(t.shape)} in {owner}" for owner, t in tensors.items())
            yield Problem(name, f"whole tensors of shapes {found}", "one shape", remedy)
        elif not (_floating(tensors.values()) or is_counter(name) or _equal([*tensors.values()])):
            yield Problem(name, "whole numbers that differ", "the same ones: no mean", remedy)
    for without_them, missing in lacking.items():
        ways = ", ".join((AVERAGE, DROP, *names))
        remedy = f"Say which to take with `modules_to_save`, one of: {ways}."
        found = f"whole tensors that {without_them} lacks"
        yield Problem(listing(missing), found, "them in all adapters, or a choice", remedy)


def weights_problems(
    taken: Mapping[str, tuple[int, ...]], weights: Callable[[str], Sequence[float]]
) -> Iterator[Problem]:
    """Yield the means that would divide by a sum of weights that is 0."""
    for name, positions in taken.items():
        if len(positions) > 1 and cancelling([weights(name)[i] for i in positions]):
            found = "weights that sum to 0, which have no mean"
            remedy = "Set `modules_to_save` to `drop` or an adapter's name, or change `weight`."
            yield Problem(name, found, "a sum other than 0", remedy)


class AveragedHeadsWarning(MergeWarning):
    """Modules that adapters save whole differ, and their mean is taken without being asked for."""


def averaged(
    taken: Mapping[str, tuple[int, ...]], adapters: Sequence[Adapter]
) -> AveragedHeadsWarning | None:
    """Return a warning of means of `modules_to_save` that are not asked for."""
    differing = {
        name: positions
        for name, positions in taken.items()
        if module_to_save(name, adapters[positions[0]].config) is not None
        and not _equal([adapters[i].saved[name]() for i in positions])
    }
    if not differing:
        return None
    names = sorted({adapters[i].name for positions in differing.values() for i in positions})
    return AveragedHeadsWarning(
        f"{listing(sorted(differing))}: the result has the mean of what {', '.join(names)} save "
        "whole, which is no head of any of their tasks unless the tasks are the same. Set "
        "`modules_to_save` to the name of an adapter, to `drop`, or to `average` if that is meant."
    )


def merge_saved(
    name: str, adapters: Sequence[Adapter], weights: Sequence[float], dtype: torch.dtype | None
) -> Tensor:
    r"""Return :math:`\sum_i w_i T_i / \sum_i w_i`, in float64; of one adapter its own tensor.

    Every adapter has it, in one shape. Whole numbers are those of the first adapter. Without
    `dtype` it is the tensors' own, promoted where they differ.
    """
    tensors = [finite(a.saved[name]().cpu(), name, a.name) for a in adapters]
    if not _floating(tensors):
        return tensors[0]
    target = dtype or reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    mean = tensors[0]
    if len(tensors) > 1:
        total = math.fsum(weights)
        mean = torch.zeros(tensors[0].shape, dtype=torch.float64)
        for tensor, weight in zip(tensors, weights, strict=True):
            mean.add_(tensor.to(torch.float64), alpha=weight / total)
    return cast(mean, target, name)


def _floating(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.is_floating_point() for tensor in tensors)


def _equal(tensors: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensors[0], tensor) for tensor in tensors[1:])
