"""How transformers renames the modules of checkpoints that older versions saved.

transformers keeps one table for each model type and class, and applies those of the classes in a
model, each below the place of its submodule, and one for all models at last. PEFT renames adapters'
tensors by the same tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

Rename = Callable[[str], str]

# The number of a table, and the place in the model, such as "model.vision_tower.", that it is for.
_Step = tuple[int, str]
_DEPTH = 2
_PLACES = 2


def renamings(modules: Iterable[str], classes: Collection[str]) -> Iterator[tuple[int, Rename]]:
    """Yield each renaming that some model may apply to these modules: how many tables, and it.

    One table for the whole model and one for a submodule. Those that give the same names come once,
    those of fewer tables first.

    Args:
        modules: their names.
        classes: names of model types and classes that the model may have; where one of them has a
            table, that is the one for the whole model.
    """
    shapes = tuple(dict.fromkeys(re.sub(r"\d+", "0", name) for name in modules))
    states: dict[tuple[str, ...], tuple[_Step, ...]] = {shapes: ()}
    for depth in range(_DEPTH):
        for names, steps in [item for item in states.items() if len(item[1]) == depth]:
            for step in _steps(names, classes):
                result = tuple(_applied(step, name) for name in names)
                if result not in states:
                    states[result] = (*steps, step)
                    yield depth + 1, partial(_all, states[result])


def _steps(names: Sequence[str], classes: Collection[str]) -> Iterator[_Step]:
    every = range(len(_tables()))
    own = [index for index in every if _tables()[index].classes.intersection(classes)]
    yield from ((index, "") for index in own or every)
    parts = [name.split(".") for name in names]
    for end in range(1, _PLACES + 1):
        for place in dict.fromkeys(".".join(part[:end]) + "." for part in parts):
            yield from ((index, place) for index in every)


def _all(steps: Sequence[_Step], name: str) -> str:
    for step in steps:
        name = _applied(step, name)
    return name


@lru_cache(1 << 16)
def _applied(step: _Step, name: str) -> str:
    index, place = step
    if not name.startswith(place):
        return name
    from transformers.core_model_loading import rename_source_key

    tensor = f"{name.removeprefix(place)}.weight"
    renamed, _ = rename_source_key(tensor, _tables()[index].entries, [])
    return place + renamed.removesuffix(".weight")


@dataclass(frozen=True)
class _Table:
    """The renamings of some model types and classes, with those of all models."""

    classes: frozenset[str]
    entries: list[Any]


@lru_cache(1)
def _tables() -> tuple[_Table, ...]:
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    tables = conversion_mapping._build_checkpoint_conversion_mapping()
    classes: dict[tuple[int, ...], set[str]] = {}
    entries: dict[tuple[int, ...], list[Any]] = {}
    for name, table in tables.items():
        renaming = [entry for entry in table if isinstance(entry, WeightRenaming)]
        key = tuple(map(id, renaming))
        classes.setdefault(key, set()).add(name)
        entries[key] = [*renaming, *tables["legacy"]]
    return tuple(_Table(frozenset(classes[key]), entries[key]) for key in entries)
