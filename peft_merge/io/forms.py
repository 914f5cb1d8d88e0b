"""One form of names for the modules of all adapters of a merge: that of the base's class.

Two adapters of one model that transformers has renamed in between meet in none of their modules.
transformers keeps one table of renamings for each model type and class, and applies those of the
classes in a model, each below the place of its submodule, and one for all models at last. PEFT
renames adapters' tensors by the same tables.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

from mergekit_ext.errors import Problem, printable
from mergekit_ext.io.class_model import class_names
from peft_merge.adapter import Adapter
from peft_merge.io import names
from peft_merge.io.diffusers_lora import is_of_diffusers

# The number of a table, and the place in the model, such as "model.vision_tower.", that it is for.
_Step = tuple[int, str]
_Forms = dict[tuple[str, ...], tuple[_Step, ...] | None]
# Tables that are applied one after the other, and parts of a place.
_DEPTH = 2
_PLACES = 2
_REMEDY = (
    "Have the base's config.json where base_model_name_or_path says, or in the Hub's cache; or "
    "load the older adapter with PEFT on the model that both are meant for, and save it again."
)


def one_form(adapters: Sequence[Adapter]) -> tuple[list[Adapter], list[str], list[Problem]]:
    """Return the adapters under names of one form, what was renamed, and what names leave open.

    The class decides that the base's config.json names, if it is at hand, or an adapter itself.
    Without one, names that may be older ones of another adapter's modules are refused, but for
    adapters of one base if a single renaming leads from all modules of one to those of the other.
    Adapters of several kinds, which no merge takes, stay as they are.
    """
    found, renamings = list(adapters), list[str]()
    several = len({(type(adapter), is_of_diffusers(adapter)) for adapter in adapters}) > 1
    if several or not any(_apart(*pair) for pair in itertools.combinations(adapters, 2)):
        return found, renamings, []
    for known in map(_Class, _configurations(adapters)):
        if not any(map(known.has, adapters)):
            continue
        if problems := [problem for adapter in adapters for problem in known.lacking(adapter)]:
            return found, renamings, problems
        for index, adapter in enumerate(adapters):
            changed = renamed(adapter, known.rename)
            if not known.has(adapter) and known.has(changed):
                renamings.append(_note(adapter, changed, known.name))
                found[index] = changed
        if all(map(known.has, found)):
            return found, renamings, []
        break
    for old, new in itertools.permutations(range(len(found)), 2):
        led = _led(found[old], found[new])
        if led is not found[old]:
            renamings.append(_note(found[old], led, found[new].name))
            found[old] = led
    pairs = itertools.permutations(found, 2)
    return found, renamings, [problem for pair in pairs for problem in _unclear(*pair)]


def _note(adapter: Adapter, changed: Adapter, model: str) -> str:
    both = zip(adapter.infos, changed.infos, strict=True)
    old, new = next((printable(old), printable(new)) for old, new in both if old != new)
    return f"{printable(adapter.name)}: modules are named as in {printable(model)}, {old} as {new}."


def of_one_form(module: str, adapter: Adapter, found: str, expected: str) -> Problem:
    """Return the problem of a module whose name is of another form than another adapter's."""
    return Problem(f"{module} of adapter {adapter.name}", found, expected, _REMEDY)


def renamed(adapter: Adapter, rename: Callable[[str], str]) -> Adapter:
    """Return the adapter under other names of tensors, with a configuration that means them.

    It is returned as it is if two of its names would become one.
    """
    modules = {rename(f"{name}.weight").removesuffix(".weight"): name for name in adapter.infos}
    saved = {rename(name): name for name in adapter.saved}
    if len(modules) < len(adapter.infos) or len(saved) < len(adapter.saved):
        return adapter
    infos: Any = {new: adapter.infos[old] for new, old in modules.items()}
    config = dict(adapter.config)
    owners = sorted({names.owner(name, infos) for name in infos})
    targets = names.Targets(config)
    linear = [owner for owner in owners if not targets.parameters(owner)]
    if not all(map(targets.adapt, linear)):
        config |= dict.fromkeys(names.SELECTION) | {"target_modules": linear}
    entries = [
        new.rpartition(".")[0]
        for new, old in saved.items()
        if names.module_to_save(old, config) and not names.module_to_save(new, config)
    ]
    if entries:
        config["modules_to_save"] = [*config["modules_to_save"], *dict.fromkeys(entries)]
    return replace(
        adapter,
        config=config,
        infos=infos,
        load=lambda name: adapter.load(modules[name]),
        saved={new: adapter.saved[old] for new, old in saved.items()},
    )


def _configurations(adapters: Sequence[Adapter]) -> Iterator[Any]:
    """Yield the configurations of bases that are at hand, then of classes that adapters name."""
    import transformers

    for adapter in adapters:
        base: Any = adapter.config.get("base_model_name_or_path")
        with suppress(Exception):  # of any kind: transformers raises many
            yield transformers.AutoConfig.from_pretrained(
                base, local_files_only=True, trust_remote_code=False
            )
    for adapter in adapters:
        with suppress(Exception):
            name = adapter.config["auto_mapping"]["base_model_class"]
            yield getattr(transformers, name).config_class(architectures=[name])


class _Class:
    """The names of a class of transformers, in any layer."""

    def __init__(self, config: Any):
        form = class_names((), config)
        self.rename, self.name = form.rename, type(form.model).__name__
        parts = () if form.model is None else form.model.named_modules()
        tensors = () if form.model is None else form.model.named_parameters()
        self._places = {_any_layer(name) for name, _ in itertools.chain(parts, tensors)}

    def _held(self, adapter: Adapter) -> set[bool]:
        return {_any_layer(names.unwrapped(name)) in self._places for name in adapter.infos}

    def has(self, adapter: Adapter) -> bool:
        return self._held(adapter) == {True}

    def lacking(self, adapter: Adapter) -> Iterator[Problem]:
        """Yield that an adapter has no module of the class, of which PEFT would load nothing."""
        # For a task PEFT takes another class, with a head that may be all that is adapted.
        held = self._held(adapter) | self._held(renamed(adapter, self.rename))
        if not adapter.config.get("task_type") and True not in held:
            found = f"no module of {self.name} in this adapter"
            expected = "names of that class, as in other adapters"
            yield of_one_form(next(iter(adapter.infos)), adapter, found, expected)


def _any_layer(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "0", name)


def _parent(name: str) -> str:
    return _any_layer(name.rpartition(".")[0])


def _stem(name: str) -> str:
    """Return the list of layers that a module is in: its name up to the first number."""
    match = names.LAYER.search(name)
    return name[: match.start(1)] if match else name


def _apart(one: Adapter, other: Adapter) -> bool:
    """Return whether each of two adapters has modules where the other has none."""
    mine, others = set(map(_parent, one.infos)), set(map(_parent, other.infos))
    return bool(mine - others and others - mine)


def _led(old: Adapter, new: Adapter) -> Adapter:
    base = old.config.get("base_model_name_or_path")
    if not base or base != new.config.get("base_model_name_or_path") or not _apart(old, new):
        return old
    kept = _forms(new)
    ways = [steps for form, steps in _renamings(_forms(old), kept).items() if {*form} <= {*kept}]
    if len(ways) != 1 or (steps := ways[0]) is None:
        return old

    def rename(tensor: str) -> str:
        name, _, leaf = tensor.rpartition(".")
        for step in steps:
            name = _applied(step, name)
        return f"{name}.{leaf}"

    return renamed(old, rename)


def _unclear(old: Adapter, new: Adapter) -> Iterator[Problem]:
    """Yield the first module that some renaming leads from places of its own to those of `new`."""
    if not _apart(old, new):
        return
    modules, kept = _forms(old), _forms(new)
    parents, stems = set(map(_parent, kept)), set(map(_stem, kept))
    forms = _renamings(modules, kept)
    for before, after in (pair for form in forms for pair in zip(modules, form, strict=True)):
        led = _stem(before) not in stems and _stem(after) in stems
        if _parent(before) not in parents and (led or _parent(after) in parents):
            found = f"a name of an older form, that may mean {after} beside those of {new.name}"
            yield of_one_form(before, old, found, "names of which one form is meant")
            return


def _forms(adapter: Adapter) -> tuple[str, ...]:
    return tuple(sorted(set(map(_any_layer, adapter.infos))))


@lru_cache(16)
def _renamings(modules: tuple[str, ...], kept: tuple[str, ...]) -> _Forms:
    """Return `modules` after each renaming that some model may apply to them, and its steps.

    Those that are `kept` stay. A class with a head has the body in `model`, which is no renaming.
    """
    forms: _Forms = {modules: ()}
    forms.setdefault(tuple(f"model.{name}" for name in modules), None)
    for _ in range(_DEPTH):
        for form, steps in list(forms.items()):
            for step in _steps(form):
                result = tuple(_applied(step, name) for name in form)
                if result not in forms and all(_applied(step, name) == name for name in kept):
                    forms[result] = None if steps is None else (*steps, step)
    return forms


def _steps(modules: Sequence[str]) -> Iterator[_Step]:
    parts = [name.split(".") for name in modules]
    places = (".".join([*part[:end], ""]) for end in range(_PLACES + 1) for part in parts)
    return itertools.product(range(len(_tables())), dict.fromkeys(places))


@lru_cache(1 << 16)
def _applied(step: _Step, name: str) -> str:
    index, place = step
    if not name.startswith(place):
        return name
    from transformers.core_model_loading import rename_source_key

    tensor = f"{name.removeprefix(place)}.weight"
    renamed, _ = rename_source_key(tensor, _tables()[index], [])
    return place + renamed.removesuffix(".weight")


@lru_cache(1)
def _tables() -> list[list[Any]]:
    """Return the different renamings of model types and classes, each with those of all models."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    tables = conversion_mapping._build_checkpoint_conversion_mapping()
    found = {}
    for table in tables.values():
        renaming = [entry for entry in table if isinstance(entry, WeightRenaming)]
        found[tuple(map(id, renaming))] = [*renaming, *tables["legacy"]]
    return list(found.values())
