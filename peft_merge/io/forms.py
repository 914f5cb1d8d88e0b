"""One form of names for the modules of all adapters of a merge.

Every tensor of every adapter acts in the merge and in its result, or the merge is refused.
`io.parse` accounts for the tensors of each file; `one_form` brings the names of several adapters to
one form, the newest, so that one module has one name and PEFT loads all of the result. Two adapters
of one model that transformers has renamed in between meet in none of their modules.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mergekit_ext.errors import Problem, printable
from peft_merge.adapter import Adapter, ModuleInfo
from peft_merge.io import names
from peft_merge.io.renamings import BaseClass, Rename, renamed, renamings

_SHOWN = 4
_REMEDY = (
    "Load the older adapter with PEFT on the model that both are meant for, and save it again."
)


@dataclass(frozen=True)
class OneForm:
    """Adapters whose names are of one form, what was renamed, and what names leave open."""

    adapters: list[Adapter]
    notes: list[str]
    problems: list[Problem]


def one_form(adapters: Sequence[Adapter]) -> OneForm:
    """Rename modules as transformers does where that makes two adapters name the same ones.

    Without a base its class is not known, so a renaming of transformers' is taken only if it leads
    from modules of one adapter to paths of another one, leaves that one's names as they are, keeps
    all names of an adapter apart, and no other renaming that does so gives other names. Adapters
    that have no place in common cannot be compared like that: there the base's class decides, if
    its config.json is at hand.
    """
    found = list(adapters)
    notes: list[str] = []
    problems: list[Problem] = []
    for old, new in itertools.permutations(range(len(found)), 2):
        if not _apart(found[old], found[new]) or not (ways := _ways(found[old], found[new])):
            continue
        if (unclear := _unclear(found[old], found[new], ways)) is not None:
            problems.append(unclear)
        else:
            notes.append(_note(found[old], found[new].name, ways[0]))
            found[old] = renamed(found[old], ways[0])
    if not problems:
        for left, right in itertools.combinations(found, 2):
            problems += [*_nested(left, right), *_nested(right, left)]
            problems += [*_experts(left, right), *_experts(right, left)]
    places = [_Paths.of(adapter).parents for adapter in found]
    disjoint = any(not left & right for left, right in itertools.combinations(places, 2))
    if disjoint and not problems:
        _of_class(found, notes, problems)
    return OneForm(found, notes, problems)


def _note(adapter: Adapter, model: str, rename: Rename) -> str:
    first = next(name for name in adapter.infos if rename(name) != name)
    return (
        f"{printable(adapter.name)}: modules are named as in {printable(model)}, "
        f"{printable(first)} as {printable(rename(first))}."
    )


def _of_class(adapters: list[Adapter], notes: list[str], problems: list[Problem]) -> None:
    """Bring the names of all adapters to those of their class, where it is known.

    It is known if all modules of an adapter are modules of the class in the base's config.json.
    Names that are older are renamed as transformers does; PEFT would load none of what has no
    module in that class.
    """
    bases = dict.fromkeys(adapter.config.get("base_model_name_or_path") for adapter in adapters)
    kind = next((found for base in bases if (found := BaseClass.of(base))), None)
    if kind is None or not any(kind.has(adapter.infos) for adapter in adapters):
        return
    for index, adapter in enumerate(adapters):
        rename = kind.renaming((*adapter.infos, *adapter.saved))
        if kind.has(adapter.infos):
            continue
        if kind.has(adapter.infos, rename):
            notes.append(_note(adapter, kind.name, rename))
            adapters[index] = renamed(adapter, rename)
        # For a task PEFT takes another class, with a head that may be all that is adapted.
        elif not adapter.config.get("task_type") and not any(kind.has([n]) for n in adapter.infos):
            missing = f"no module of {kind.name}, the class of the base, in this adapter"
            expected = "names of that class, of which other adapters have modules"
            problems.append(_at(next(iter(adapter.infos)), adapter, missing, expected))


def _at(module: str, adapter: Adapter, found: str, expected: str) -> Problem:
    return Problem(f"{module} of adapter {adapter.name}", found, expected, _REMEDY)


def _parent(name: str) -> str:
    """The module above, in any layer."""
    return re.sub(r"\d+", "0", name.rpartition(".")[0])


def _stem(name: str) -> str:
    """Up to the first number: the list of layers that a module is in."""
    match = names.LAYER.search(name)
    return name[: match.start(1)] if match else name


@dataclass(frozen=True)
class _Paths:
    """Where the modules of an adapter are."""

    modules: frozenset[str]
    parents: frozenset[str]
    stems: frozenset[str]

    @classmethod
    def of(cls, adapter: Adapter) -> _Paths:
        return cls(*(frozenset(map(part, adapter.infos)) for part in (str, _parent, _stem)))

    def near(self, before: str, after: str) -> int:
        """Return how near a renaming leads to these modules; 0 for a name that is one of theirs."""
        if _parent(before) in self.parents or before == after:
            return 0
        if after in self.modules:
            return 3
        if _parent(after) in self.parents:
            return 2
        return int(_stem(before) not in self.stems and _stem(after) in self.stems)


def _apart(left: Adapter, right: Adapter) -> bool:
    """Whether either has modules in places where the other has none."""
    mine, others = _Paths.of(left).parents, _Paths.of(right).parents
    return bool(mine - others) and bool(others - mine)


def _ways(old: Adapter, new: Adapter) -> list[Rename]:
    """The renamings under which `old` comes nearest to `new`, one for each different result.

    One that leaves other modules farther does not count, nor one of more tables for the same.
    """
    paths = _Paths.of(new)
    tried: list[tuple[int, Rename]] = [(1, _into_body), (1, _out_of_parallel)]
    found: dict[tuple[str, ...], tuple[frozenset[tuple[str, int]], int, Rename]] = {}
    for steps, rename in (*tried, *renamings(old.infos, _classes(old) | _classes(new))):
        result = tuple(map(rename, old.infos))
        pairs = zip(old.infos, result, strict=True)
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
    return [
        rename
        for result, rename in best.items()
        if not any(_more(tuple(old.infos), result, other) for other in best if other != result)
    ]


def _into_body(name: str) -> str:
    """Of a class with a head the body is `model`."""
    return name if name.startswith("model.") else f"model.{name}"


def _out_of_parallel(name: str) -> str:
    """DistributedDataParallel is no part of a model."""
    return name.removeprefix("module.")


def _more(modules: tuple[str, ...], result: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether another result is the same but renames more: its table knows more of these."""
    each = zip(modules, result, other, strict=True)
    return all(mine in (name, its) for name, mine, its in each)


def _classes(adapter: Adapter) -> frozenset[str]:
    """Names of the class and the type of an adapter's base, where they are at hand."""
    known = adapter.config.get("auto_mapping") or {}
    found = {known.get("base_model_class"), *str(known.get("parent_library")).split(".")[2:3]}
    base = adapter.config.get("base_model_name_or_path")
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads(Path(str(base), "config.json").read_text(encoding="utf-8"))
        found |= {config.get("model_type"), *(config.get("architectures") or ())}
    return frozenset(name for name in found if isinstance(name, str))


def _fits(old: Adapter, new: Adapter, rename: Rename) -> bool:
    """Whether a renaming leads from `old` to the form of `new`, and loses nothing."""
    if any(rename(name) != name for name in (*new.infos, *new.saved)):
        return False
    modules = {rename(name): name for name in old.infos}
    if len(modules) < len(old.infos) or len(set(map(rename, old.saved))) < len(old.saved):
        return False
    shared = modules.keys() & new.infos.keys()
    same = all(old.infos[modules[n]].shape == new.infos[n].shape for n in shared)
    return same and set(map(type, old.infos.values())) == set(map(type, new.infos.values()))


def _unclear(old: Adapter, new: Adapter, ways: Sequence[Rename]) -> Problem | None:
    """Why names may mean several modules, or modules that the other adapter says nothing of."""
    way, paths = ways[0], _Paths.of(new)
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
    return _at(module, old, found, "names of which one form is meant")


def _nested(outer: Adapter, inner: Adapter) -> Iterator[Problem]:
    """Modules of `outer` that have the name of one of `inner` below a further prefix."""
    for name in outer.infos.keys() - inner.infos.keys():
        rest = name
        while "." in rest:
            rest = rest.partition(".")[2]
            if rest in inner.infos and rest not in outer.infos:
                found = f"{rest} in {inner.name}, which may be the same module of another class"
                expected = "names of one class: PEFT would load one of the two only"
                yield _at(name, outer, found, expected)
                return


def _experts(stacked: Adapter, single: Adapter) -> Iterator[Problem]:
    """Experts that one adapter changes as a stack and another one by one."""
    for module, info in stacked.infos.items():
        if not isinstance(info, ModuleInfo) or info.layout != "parameter":
            continue
        if (other := names.one_expert(module, single.infos)) is not None:
            found = f"all experts in one tensor there, and one by one in {single.name} ({other})"
            yield _at(module, stacked, found, "experts in one way in all adapters")
            return
