"""Whole tensors that adapters carry: which adapter's tensor goes into the merged one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.core.wording import did_you_mean, listing, shown
from mergekit_ext.dtypes import is_counter
from mergekit_ext.errors import MergeWarning, Problem
from peft_merge.adapter import Adapter
from peft_merge.io import whole
from peft_merge.rules.base import cancelling

AVERAGE, DROP = "average", "drop"


def saved_names(adapters: Sequence[Adapter]) -> list[str]:
    """Of all adapters, in the order in which they come."""
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.saved))


def carriers(choice: str, adapters: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
    """For each whole tensor of the output the positions of the adapters whose mean it is."""
    if choice == DROP:
        return {}
    if choice != AVERAGE:
        position = [adapter.name for adapter in adapters].index(choice)
        return dict.fromkeys(adapters[position].saved, (position,))
    return {
        name: tuple(i for i, adapter in enumerate(adapters) if name in adapter.saved)
        for name in saved_names(adapters)
    }


def problems_of(choice: Any, adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """What is wrong with `modules_to_save`, given (or None) for these adapters.

    Shapes are those of the tensors, which are read for it: no header tells them of an adapter in
    memory.
    """
    names = [adapter.name for adapter in adapters]
    allowed = (AVERAGE, DROP, *names)
    if choice is not None and choice not in allowed:
        remedy = did_you_mean(choice, allowed) if isinstance(choice, str) else ""
        expected = "`average`, `drop`, or the name of an adapter"
        yield Problem("modules_to_save", shown(choice), expected, remedy)
        return
    if choice in (DROP, *names):
        return
    ways = f"average, drop, {', '.join(names)}"
    lacking: dict[str, list[str]] = {}
    for name in saved_names(adapters):
        without = [adapter.name for adapter in adapters if name not in adapter.saved]
        if without and choice is None:
            lacking.setdefault(listing(without), []).append(name)
            continue
        shapes = {a.name: tuple(a.saved[name]().shape) for a in adapters if name in a.saved}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{shape} in {owner}" for owner, shape in shapes.items())
            remedy = f"Set `modules_to_save` to one of: drop, {', '.join(names)}."
            yield Problem(name, f"whole tensors of shapes {found}", "one shape", remedy)
        elif not (_floating(name, adapters) or is_counter(name)):
            values = [adapter.saved[name]() for adapter in adapters if name in adapter.saved]
            if not _equal(values):
                remedy = f"Set `modules_to_save` to one of: drop, {', '.join(names)}."
                yield Problem(name, "whole numbers that differ", "the same ones: no mean", remedy)
    for without_them, tensors in lacking.items():
        remedy = f"Say which to take with `modules_to_save`, one of: {ways}."
        found = f"whole tensors that {without_them} lacks"
        yield Problem(listing(tensors), found, "them in all adapters, or a choice", remedy)


class AveragedHeadsWarning(MergeWarning):
    """Modules that adapters save whole differ, and their mean is taken without being asked for."""


def averaged(
    taken: Mapping[str, tuple[int, ...]], adapters: Sequence[Adapter]
) -> AveragedHeadsWarning | None:
    """What to say of means of `modules_to_save` that are not asked for."""
    differing = {
        name: positions
        for name, positions in taken.items()
        if whole.module_to_save(name, adapters[positions[0]].config) is not None
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


def _floating(name: str, adapters: Sequence[Adapter]) -> bool:
    return all(a.saved[name]().is_floating_point() for a in adapters if name in a.saved)


def _equal(tensors: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensors[0], tensor) for tensor in tensors[1:])


def weights_problem(
    name: str, weights: Sequence[float], positions: Sequence[int]
) -> Problem | None:
    """Means divide by the sum of the weights."""
    if not cancelling([weights[i] for i in positions]):
        return None
    found = "weights that sum to 0, which have no mean"
    remedy = "Set `modules_to_save` to `drop` or the name of an adapter, or change `weight`."
    return Problem(name, found, "a sum other than 0", remedy)


def summary(taken: Mapping[str, tuple[int, ...]], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """For the report: for each whole tensor the adapters that it comes from; [] when dropped."""
    return {name: [adapters[i].name for i in taken.get(name, ())] for name in saved_names(adapters)}
