"""How transformers renames the modules of checkpoints that older versions saved.

transformers keeps one table for each model type and class, and applies those of the classes in a
model, each below the place of its submodule, and one for all models at last. PEFT renames adapters'
tensors by the same tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

Rename = Callable[[str], str]

# A step is a table and the place in the model, such as "model.vision_tower.", where it is applied.
_Step = tuple[int, str]
_DEPTH = 2
_PLACES = 2


def renamings(modules: Iterable[str]) -> Iterator[Rename]:
    """Yield each renaming that some model may apply to these modules, shortest first.

    One table for the whole and one for a submodule. Those that give the same names come once.
    """
    shapes = tuple(dict.fromkeys(re.sub(r"\d+", "0", name) for name in modules))
    states: dict[tuple[str, ...], tuple[_Step, ...]] = {shapes: ()}
    for depth in range(_DEPTH):
        for names, steps in [item for item in states.items() if len(item[1]) == depth]:
            for step in _steps(names):
                result = tuple(_applied(step, name) for name in names)
                if result not in states:
                    states[result] = (*steps, step)
                    yield partial(_all, states[result])


def _steps(names: Sequence[str]) -> Iterator[_Step]:
    parts = [name.split(".") for name in names]
    places = {"": None} | {
        ".".join(part[:end]) + ".": None for end in range(1, _PLACES + 1) for part in parts
    }
    return ((table, place) for place in places for table in range(len(_tables())))


def _all(steps: Sequence[_Step], name: str) -> str:
    for step in steps:
        name = _applied(step, name)
    return name


@lru_cache(1 << 16)
def _applied(step: _Step, name: str) -> str:
    table, place = step
    if not name.startswith(place):
        return name
    from transformers.core_model_loading import rename_source_key

    inner, _ = rename_source_key(f"{name.removeprefix(place)}.weight", _tables()[table], [])
    return place + inner.removesuffix(".weight")


@lru_cache(1)
def _tables() -> tuple[list[Any], ...]:
    """Each table with what is applied to all models."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    tables = conversion_mapping._build_checkpoint_conversion_mapping()
    distinct: dict[tuple[int, ...], list[Any]] = {}
    for table in tables.values():
        chosen = [entry for entry in table if isinstance(entry, WeightRenaming)]
        distinct.setdefault(tuple(map(id, chosen)), [*chosen, *tables["legacy"]])
    return tuple(distinct.values())
