"""One form of names for the modules of all adapters of a merge.

The law: every tensor of every adapter acts in the merge and in its result, or the merge is refused.
`io.parse` accounts for the tensors of each file; `one_form` brings the names of several adapters to
one form, the newest, so that one module has one name and PEFT loads all of the result. Two adapters
of one model that transformers has renamed in between meet in none of their modules.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mergekit_ext.errors import Problem, printable
from peft_merge.adapter import Adapter, ModuleInfo
from peft_merge.io import names
from peft_merge.io.base_class import base_class
from peft_merge.io.renamed import renamed
from peft_merge.io.renamings import Rename, renamings

# Of a class with a head the body is `model`; DistributedDataParallel is no part of a model.
_OUTER: tuple[tuple[str, str], ...] = (("", "model."), ("module.", ""))
_SHOWN = 4
_REMEDY = (
    "Load the older adapter with PEFT on the model that both are meant for, and save it again."
)


@dataclass(frozen=True)
class OneForm:
    """Adapters whose names are of one form, what was renamed, and what cannot be told."""

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
        ways = _ways(found[old], found[new]) if _apart(found[old], found[new]) else []
        if len(ways) > 1:
            problems.append(_ambiguous(found[old], found[new], ways))
        elif ways and (far := _far(found[old], found[new], ways[0])):
            problems.append(
                _untold(found[old], far, f"{ways[0](far)}, which {found[new].name} lacks")
            )
        elif ways:
            notes.append(_note(found[old], found[new].name, ways[0]))
            found[old] = renamed(found[old], ways[0])
    if not problems:
        for left, right in itertools.combinations(found, 2):
            problems += [*_nested(left, right), *_nested(right, left)]
            problems += [*_experts(left, right), *_experts(right, left)]
    if not problems and _disjoint(found):
        _of_class(found, notes, problems)
    return OneForm(found, notes, problems)


def _note(adapter: Adapter, model: str, rename: Rename) -> str:
    first = next(name for name in adapter.infos if rename(name) != name)
    return (
        f"{printable(adapter.name)}: modules are named as in {printable(model)}, "
        f"{printable(first)} as {printable(rename(first))}."
    )


def _disjoint(adapters: Sequence[Adapter]) -> bool:
    """Whether two adapters have no place in common."""
    places = [_Paths.of(adapter).parents for adapter in adapters]
    return any(not left & right for left, right in itertools.combinations(places, 2))


def _of_class(adapters: list[Adapter], notes: list[str], problems: list[Problem]) -> None:
    """Bring the names of all adapters to those of their class, where it is known.

    It is known if all modules of an adapter are modules of the class in the base's config.json.
    Names that are older are renamed as transformers does; PEFT would load none of what has no
    module in that class.
    """
    bases = dict.fromkeys(adapter.config.get("base_model_name_or_path") for adapter in adapters)
    kind = next((found for base in bases if (found := base_class(base))), None)
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
        elif not adapter.config.get("task_type") and not any(
            kind.has([name]) for name in adapter.infos
        ):
            problems.append(
                Problem(
                    f"{next(iter(adapter.infos))} of adapter {adapter.name}",
                    f"no module of {kind.name}, the class of the base, in this adapter",
                    "names of that class, of which other adapters have modules",
                    _REMEDY,
                )
            )


def _stem(name: str) -> str:
    """Up to the first number: the list of layers that a module is in."""
    match = names.LAYER.search(name)
    return name[: match.start(1)] if match else name


def _parent(name: str) -> str:
    """The module above, in any layer."""
    return re.sub(r"\d+", "0", name.rpartition(".")[0])


@dataclass(frozen=True)
class _Paths:
    """Where the modules of an adapter are."""

    modules: frozenset[str]
    parents: frozenset[str]
    stems: frozenset[str]

    @classmethod
    def of(cls, adapter: Adapter) -> _Paths:
        parts = (map(part, adapter.infos) for part in (str, _parent, _stem))
        return cls(*map(frozenset, parts))

    def near(self, before: str, after: str) -> int:
        """How near a renaming leads to these modules, from none of their places; 0: not at all."""
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
    found: dict[tuple[str, ...], tuple[frozenset[tuple[str, int]], int, Rename]] = {}
    outer: list[Rename] = [partial(_outer, remove, add) for remove, add in _OUTER]
    tables = renamings(old.infos, _classes(old) | _classes(new))
    for steps, rename in (*((1, rename) for rename in outer), *tables):
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
    return [rename for result, rename in best.items() if not _less(result, best, old)]


def _classes(adapter: Adapter) -> frozenset[str]:
    """Names of the class and the type of an adapter's base, where they are at hand."""
    known = adapter.config.get("auto_mapping") or {}
    names = {known.get("base_model_class"), *str(known.get("parent_library")).split(".")[2:3]}
    base = adapter.config.get("base_model_name_or_path")
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads(Path(str(base), "config.json").read_text(encoding="utf-8"))
        names |= {config.get("model_type"), *(config.get("architectures") or ())}
    return frozenset(name for name in names if isinstance(name, str))


def _outer(remove: str, add: str, name: str) -> str:
    if not name.startswith(remove) or (add and name.startswith(add)):
        return name
    return add + name.removeprefix(remove)


def _less(result: tuple[str, ...], others: Iterable[tuple[str, ...]], old: Adapter) -> bool:
    """Whether another result is the same but renames more: it knows more of these modules."""
    return any(
        other != result
        and all(
            mine in (name, its) for name, mine, its in zip(old.infos, result, other, strict=True)
        )
        for other in others
    )


def _fits(old: Adapter, new: Adapter, rename: Rename) -> bool:
    """Whether a renaming leads from `old` to the form of `new`, and loses nothing."""
    if any(rename(name) != name for name in (*new.infos, *new.saved)):
        return False
    modules = {rename(name): name for name in old.infos}
    saved = {rename(name) for name in old.saved}
    if len(modules) < len(old.infos) or len(saved) < len(old.saved):
        return False
    shared = modules.keys() & new.infos.keys()
    same = all(old.infos[modules[n]].shape == new.infos[n].shape for n in shared)
    return same and set(map(type, old.infos.values())) == set(map(type, new.infos.values()))


def _far(old: Adapter, new: Adapter, rename: Rename) -> str | None:
    """A module that is renamed to a place where the other adapter has none to compare it with.

    Which further names there are in a submodule, its own class decides.
    """
    paths = _Paths.of(new)
    renamed = ((name, rename(name)) for name in old.infos)
    return next((name for name, now in renamed if name != now and not paths.near(name, now)), None)


def _ambiguous(old: Adapter, new: Adapter, ways: Sequence[Rename]) -> Problem:
    first = next(name for name in old.infos if len({way(name) for way in ways}) > 1)
    choices = " or ".join(sorted({way(first) for way in ways})[:_SHOWN])
    return _untold(old, first, f"{choices} beside the modules of {new.name}")


def _untold(adapter: Adapter, module: str, choices: str) -> Problem:
    return Problem(
        f"{module} of adapter {adapter.name}",
        f"a name of an older form, that may mean {choices}",
        "names of which one form is meant",
        _REMEDY,
    )


def _nested(outer: Adapter, inner: Adapter) -> Iterator[Problem]:
    """Modules of `outer` that have the name of one of `inner` below a further prefix."""
    for name in outer.infos.keys() - inner.infos.keys():
        rest = name
        while "." in rest:
            rest = rest.partition(".")[2]
            if rest in inner.infos and rest not in outer.infos:
                yield Problem(
                    f"{name} of adapter {outer.name}",
                    f"{rest} in {inner.name}, which may be the same module of another class",
                    "names of one class: PEFT would load one of the two only",
                    _REMEDY,
                )
                return


def _experts(stacked: Adapter, single: Adapter) -> Iterator[Problem]:
    """Experts that one adapter changes as a stack and another one by one."""
    for module, info in stacked.infos.items():
        if not isinstance(info, ModuleInfo) or info.layout != "parameter":
            continue
        leaf = names.unwrapped(module).rpartition(".")[2]
        each = re.compile(rf"(?:^|.*\.){re.escape(leaf)}\.\d+\..*")
        if (other := next(filter(each.fullmatch, single.infos), None)) is not None:
            yield Problem(
                f"{module} of adapter {stacked.name}",
                f"all experts in one tensor there, and one by one in {single.name} ({other})",
                "experts in one way in all adapters",
                _REMEDY,
            )
            return
