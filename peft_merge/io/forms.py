"""One form of names for the modules of all adapters of a merge.

Every tensor of every adapter acts in the merge and in its result, or the merge is refused.
`io.parse` accounts for the tensors of each file; `one_form` brings the names of several adapters to
one form, the newest, so that one module has one name and PEFT loads all of the result. Two adapters
of one model that transformers has renamed in between meet in none of their modules.

transformers keeps one table of renamings for each model type and class, and applies those of the
classes in a model, each below the place of its submodule, and one for all models at last. PEFT
renames adapters' tensors by the same tables.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mergekit_ext.errors import Problem, printable
from mergekit_ext.io.class_model import class_names, empty_model
from peft_merge.adapter import Adapter
from peft_merge.io import names

Rename = Callable[[str], str]
# The number of a table, and the place in the model, such as "model.vision_tower.", that it is for.
_Step = tuple[int, str]
# Tables that are applied one after the other, and parts of a place.
_DEPTH = 2
_PLACES = 2
_SHOWN = 4
_REMEDY = (
    "Load the older adapter with PEFT on the model that both are meant for, and save it again."
)


def one_form(adapters: Sequence[Adapter]) -> tuple[list[Adapter], list[str], list[Problem]]:
    """Rename modules as transformers does where that makes two adapters name the same ones.

    Without a base its class is not known, so a renaming of transformers' is taken only if it leads
    from modules of one adapter to paths of another one, leaves that one's names as they are, keeps
    all names of an adapter apart, and no other renaming that does so gives other names. Adapters
    that have no place in common cannot be compared like that: there the base's class decides, if
    its config.json is at hand.

    Returns:
        the adapters, what was renamed, and what names leave open.
    """
    found = list(adapters)
    renamings: list[str] = []
    problems: list[Problem] = []
    for old, new in itertools.permutations(range(len(found)), 2):
        mine, others = _Paths(found[old]).parents, _Paths(found[new]).parents
        apart = mine - others and others - mine
        if not apart or not (ways := _ways(found[old], found[new])):
            continue
        if (unclear := _unclear(found[old], found[new], ways)) is not None:
            problems.append(unclear)
        else:
            renamings.append(_note(found[old], found[new].name, ways[0]))
            found[old] = _renamed(found[old], ways[0])
    places = [_Paths(adapter).parents for adapter in found]
    disjoint = any(left.isdisjoint(right) for left, right in itertools.combinations(places, 2))
    if disjoint and not problems:
        _of_class(found, renamings, problems)
    return found, renamings, problems


def _note(adapter: Adapter, model: str, rename: Rename) -> str:
    first = next(name for name in adapter.infos if rename(name) != name)
    return (
        f"{printable(adapter.name)}: modules are named as in {printable(model)}, "
        f"{printable(first)} as {printable(rename(first))}."
    )


def of_one_form(module: str, adapter: Adapter, found: str, expected: str) -> Problem:
    """Return the problem of a module whose name is of another form than another adapter's."""
    return Problem(f"{module} of adapter {adapter.name}", found, expected, _REMEDY)


# --- what the names of two adapters have in common


def _parent(name: str) -> str:
    """Return the module above, in any layer."""
    return re.sub(r"\d+", "0", name.rpartition(".")[0])


def _stem(name: str) -> str:
    """Return the list of layers that a module is in: its name up to the first number."""
    match = names.LAYER.search(name)
    return name[: match.start(1)] if match else name


class _Paths:
    """Where the modules of an adapter are."""

    def __init__(self, adapter: Adapter):
        self.modules = adapter.infos.keys()
        self.parents = set(map(_parent, adapter.infos))
        self.stems = set(map(_stem, adapter.infos))

    def near(self, before: str, after: str) -> int:
        """Return how near a renaming leads to these modules; 0 for a name that is one of theirs."""
        if _parent(before) in self.parents or before == after:
            return 0
        if after in self.modules:
            return 3
        if _parent(after) in self.parents:
            return 2
        return int(_stem(before) not in self.stems and _stem(after) in self.stems)


def _ways(old: Adapter, new: Adapter) -> list[Rename]:
    """Return renamings under which `old` comes nearest to `new`, one for each different result.

    One that leaves other modules farther does not count, nor one of more tables for the same, nor
    one whose result is part of another's: that one's table knows more of these modules.
    """
    paths, modules = _Paths(new), tuple(old.infos)
    found: dict[tuple[str, ...], tuple[frozenset[Any], int, Rename]] = {}
    tables = _renamings(modules, _classes(old) | _classes(new))
    for steps, rename in itertools.chain([(1, _into_body)], tables):
        result = tuple(map(rename, modules))
        pairs = zip(modules, result, strict=True)
        near = frozenset((a, i) for a, b in pairs for i in range(paths.near(a, b)))
        if near and result not in found and _fits(old, new, rename):
            found[result] = (near, steps, rename)
    best = {
        result: rename
        for result, (near, steps, rename) in found.items()
        if not any(
            near < other or (near == other and fewer < steps) for other, fewer, _ in found.values()
        )
    }

    def is_part(result: tuple[str, ...], other: tuple[str, ...]) -> bool:
        each = zip(modules, result, other, strict=True)
        return result != other and all(mine in (name, its) for name, mine, its in each)

    return [rename for result, rename in best.items() if not any(is_part(result, o) for o in best)]


def _into_body(name: str) -> str:
    """Of a class with a head the body is `model`."""
    return name if name.startswith("model.") else f"model.{name}"


def _fits(old: Adapter, new: Adapter, rename: Rename) -> bool:
    """Return whether a renaming leads from `old` to the form of `new`, and loses nothing."""
    if any(rename(name) != name for name in (*new.infos, *new.saved)):
        return False
    modules = {rename(name): name for name in old.infos}
    if len(modules) < len(old.infos) or len(set(map(rename, old.saved))) < len(old.saved):
        return False
    shared = modules.keys() & new.infos.keys()
    same = all(old.infos[modules[n]].shape == new.infos[n].shape for n in shared)
    return same and set(map(type, old.infos.values())) == set(map(type, new.infos.values()))


def _unclear(old: Adapter, new: Adapter, ways: Sequence[Rename]) -> Problem | None:
    """Return why names may mean several modules, or modules that the other adapter lacks."""
    way, paths = ways[0], _Paths(new)
    if len(ways) > 1:
        module = next(name for name in old.infos if len({way(name) for way in ways}) > 1)
        choices = " or ".join(sorted({way(module) for way in ways})[:_SHOWN])
        choices += f" beside the modules of {new.name}"
    else:
        # Which further names there are in a submodule, its own class decides.
        far = (name for name in old.infos if way(name) != name and not paths.near(name, way(name)))
        if (module := next(far, "")) == "":
            return None
        choices = f"{way(module)}, which {new.name} lacks"
    found = f"a name of an older form, that may mean {choices}"
    return of_one_form(module, old, found, "names of which one form is meant")


# --- transformers' tables


def _renamings(modules: Sequence[str], classes: Collection[str]) -> Iterator[tuple[int, Rename]]:
    """Yield each renaming that some model may apply to these modules: how many tables, and it.

    One table is for the whole model, that of `classes` if they have one, and one for a submodule.
    """
    start = tuple(dict.fromkeys(re.sub(r"\d+", "0", name) for name in modules))
    states: dict[tuple[str, ...], tuple[_Step, ...]] = {start: ()}
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
    """Return the renamings of some model types and classes, with those of all models."""
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


# --- the base's class, where its config.json is at hand


def _classes(adapter: Adapter) -> frozenset[str]:
    """Return names of the class and the type of an adapter's base, where they are at hand."""
    known = adapter.config.get("auto_mapping") or {}
    found = {known.get("base_model_class"), *str(known.get("parent_library")).split(".")[2:3]}
    base = adapter.config.get("base_model_name_or_path")
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads(Path(str(base), "config.json").read_text(encoding="utf-8"))
        found |= {config.get("model_type"), *(config.get("architectures") or ())}
    return frozenset(name for name in found if isinstance(name, str))


def _configuration(base: object) -> Any:
    """Return a base's configuration; None where it is not at hand."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(base, local_files_only=True)
    except Exception:  # of any kind: transformers raises many
        return None


def _as_checkpoint(config: Any, modules: Iterable[str]) -> Rename:
    """Return the renaming of these modules that transformers applies to a checkpoint."""
    stored = class_names((f"{name}.weight" for name in modules), config).of
    return lambda name: stored[f"{name}.weight"].removesuffix(".weight")


def _of_class(adapters: list[Adapter], renamings: list[str], problems: list[Problem]) -> None:
    """Bring the names of all adapters to those of the class in the base's config.json.

    It is theirs if all modules of an adapter are modules of it. PEFT would load none of what has no
    module in that class.
    """
    bases = dict.fromkeys(adapter.config.get("base_model_name_or_path") for adapter in adapters)
    configs = (_configuration(base) for base in bases if base)
    config = next((found for found in configs if empty_model(found) is not None), None)
    if config is None:
        return
    model = empty_model(config)
    places = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    belong = [{names.unwrapped(name) in places for name in adapter.infos} for adapter in adapters]
    if {True} not in belong:
        return
    name = type(model).__name__
    for index, (adapter, known) in enumerate(zip(adapters, belong, strict=True)):
        if False not in known:
            continue
        rename = _as_checkpoint(config, (*adapter.infos, *adapter.saved))
        if all(names.unwrapped(rename(module)) in places for module in adapter.infos):
            renamings.append(_note(adapter, name, rename))
            adapters[index] = _renamed(adapter, rename)
        # For a task PEFT takes another class, with a head that may be all that is adapted.
        elif not adapter.config.get("task_type") and True not in known:
            missing = f"no module of {name}, the class of the base, in this adapter"
            expected = "names of that class, of which other adapters have modules"
            problems.append(of_one_form(next(iter(adapter.infos)), adapter, missing, expected))


# --- an adapter under other names


def _renamed(adapter: Adapter, rename: Rename) -> Adapter:
    """Return the adapter under other names, with a configuration that means them."""
    modules = {rename(name): name for name in adapter.infos}
    saved = {rename(name): name for name in adapter.saved}
    infos: dict[str, Any] = {new: adapter.infos[old] for new, old in modules.items()}
    load: Callable[[str], Any] = adapter.load
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
    changed: dict[str, Any] = {
        "config": config,
        "infos": infos,
        "load": lambda name: load(modules[name]),
        "saved": {new: adapter.saved[old] for new, old in saved.items()},
    }
    return replace(adapter, **changed)
