"""Whole tensors that adapters carry: which adapter's tensor goes into the merged one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_ext.errors import Problem
from peft_merge.adapter import Adapter
from peft_merge.config.wording import did_you_mean, listing, shown
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
    for without_them, tensors in lacking.items():
        remedy = f"Say which to take with `modules_to_save`, one of: {ways}."
        found = f"whole tensors that {without_them} lacks"
        yield Problem(listing(tensors), found, "them in all adapters, or a choice", remedy)


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
