"""Other names of modules: transformers' renamings of older checkpoints, and adapters under them.

transformers keeps one table for each model type and class, and applies those of the classes in a
model, each below the place of its submodule, and one for all models at last. PEFT renames adapters'
tensors by the same tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from peft_merge.adapter import Adapter
from peft_merge.io import names, whole
from peft_merge.io.targets import SELECTION, Targets

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
        for found, steps in [item for item in states.items() if len(item[1]) == depth]:
            for step in _steps(found, classes):
                result = tuple(_applied(step, name) for name in found)
                if result not in states:
                    states[result] = (*steps, step)
                    yield depth + 1, partial(_all, states[result])


def _steps(modules: Sequence[str], classes: Collection[str]) -> Iterator[_Step]:
    every = range(len(_tables()))
    own = [index for index in every if _tables()[index][0].intersection(classes)]
    yield from ((index, "") for index in own or every)
    parts = [name.split(".") for name in modules]
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
    changed, _ = rename_source_key(tensor, _tables()[index][1], [])
    return place + changed.removesuffix(".weight")


@lru_cache(1)
def _tables() -> tuple[tuple[frozenset[str], list[Any]], ...]:
    """The renamings of some model types and classes, with those of all models."""
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
    return tuple((frozenset(classes[key]), entries[key]) for key in entries)


@dataclass(frozen=True)
class BaseClass:
    """The class of the adapters' base: a model without memory for its weights.

    Attributes:
        name: of the class.
        places: names of its modules and parameters.
    """

    name: str
    places: frozenset[str]
    _model: Any

    @classmethod
    def of(cls, base: object) -> BaseClass | None:
        """Return the class of a base by its folder, or its name in the Hub's cache.

        None if its configuration is not there, or names no class of transformers that can be built.
        """
        if not isinstance(base, str) or not base:
            return None
        import torch
        import transformers
        from transformers.initialization import no_init_weights

        try:
            config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
            kind = getattr(transformers, config.architectures[0])
            with torch.device("meta"), no_init_weights():
                model = kind(config)
        except Exception:  # of any kind: classes raise what they like for values they cannot use
            return None
        places = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
        return cls(kind.__name__, frozenset(places), model)

    def renaming(self, modules: Iterable[str]) -> Rename:
        """Return the renaming of these modules that transformers applies to a checkpoint."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self._model)
        entries = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        prefix, state = self._model.base_model_prefix, self._model.state_dict()
        found = {}
        for name in modules:
            new, _ = rename_source_key(f"{name}.weight", entries, [], prefix, state)
            found[name] = new.removesuffix(".weight")
        return found.__getitem__

    def has(self, modules: Iterable[str], rename: Rename = str) -> bool:
        """Return whether all modules, under other names, are modules of the class."""
        return all(names.unwrapped(rename(name)) in self.places for name in modules)


def renamed(adapter: Adapter, rename: Rename) -> Adapter:
    """Return the adapter under other names, with a configuration that means them."""
    modules = {rename(name): name for name in adapter.infos}
    saved = {rename(name): name for name in adapter.saved}
    infos: dict[str, Any] = {new: adapter.infos[old] for new, old in modules.items()}
    load: Callable[[str], Any] = adapter.load
    changed: dict[str, Any] = {
        "config": _meant(adapter.config, infos, saved),
        "infos": infos,
        "load": lambda name: load(modules[name]),
        "saved": {new: adapter.saved[old] for new, old in saved.items()},
    }
    return replace(adapter, **changed)


def _meant(
    config: Mapping[str, Any], infos: Mapping[str, Any], saved: Mapping[str, str]
) -> dict[str, Any]:
    """A configuration that selects these modules and saves these tensors."""
    owners = sorted({names.owner(name, infos) for name in infos})
    targets, result = Targets(config), dict(config)
    linear = [owner for owner in owners if not targets.parameters(owner)]
    if not all(map(targets.adapt, linear)):
        result |= dict.fromkeys(SELECTION) | {"target_modules": linear}
    entries = [
        new.rpartition(".")[0]
        for new, old in saved.items()
        if whole.module_to_save(old, config) and not whole.module_to_save(new, config)
    ]
    if entries:
        result["modules_to_save"] = [*config["modules_to_save"], *dict.fromkeys(entries)]
    return result
