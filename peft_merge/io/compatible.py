"""Whether adapters can be merged with each other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_ext.errors import MergeWarning, Problem, printable
from peft_merge.adapter import Adapter, LoraAdapter, ModuleInfo, VectorInfo, modules_of
from peft_merge.io import names
from peft_merge.io.forms import of_one_form


class DifferentBasesWarning(MergeWarning):
    """Adapters name different base models; merging them only makes sense if it is one base."""


class FewSharedModulesWarning(MergeWarning):
    """Adapters share few of their modules, so that most of what is merged is the change of one."""


def compatible(adapters: Sequence[Adapter]) -> list[Problem]:
    """Return everything that keeps adapters from being merged: [] if nothing does.

    They must be of one kind, change the base's structure in the same way, and agree in the shape
    and the kind of every module that they share. Names of bases may differ (paths do): that is for
    `different_bases`.
    """
    if len({type(adapter) for adapter in adapters}) > 1:
        kinds = {a.name: a.config.get("peft_type") for a in adapters}
        remedy = "Merge the LoRAs and the (IA)^3s separately."
        return list(_agree("adapters", kinds, "adapters of one kind", remedy))
    # Files do not name target parameters, so only equal lists mean equal parameters.
    parameters = {
        a.name: sorted(entries) for a in adapters if (entries := a.config.get("target_parameters"))
    }
    remedy = "Merge those that agree in it (PEFT cannot load them side by side either)."
    expected = "the same parameters in all adapters that have some"
    unlike = list(_agree("target_parameters", parameters, expected, remedy))
    return [
        *_structure(adapters),
        *unlike,
        *_shapes(adapters, but_parameters=bool(unlike)),
        *_replaced(adapters),
        *_biases(adapters),
        *(p for pair in itertools.permutations(adapters, 2) for p in _other_form(*pair)),
    ]


def different_bases(adapters: Sequence[Adapter]) -> DifferentBasesWarning | None:
    """Return a warning of adapters that name different bases."""
    bases = {
        str(base).rstrip("/\\"): adapter.name
        for adapter in adapters
        if (base := adapter.config.get("base_model_name_or_path"))
    }
    if len(bases) <= 1:
        return None
    named = ", ".join(f"{printable(base)} ({printable(name)})" for base, name in bases.items())
    return DifferentBasesWarning(
        f"The adapters name different base models: {named}. Their merge only makes sense if these "
        "are copies of one model."
    )


def few_shared(adapters: Sequence[Adapter]) -> FewSharedModulesWarning | None:
    """Return a warning of adapters that share less than half of the smaller one's modules."""
    few = []
    for left, right in itertools.combinations(adapters, 2):
        shared = len(left.infos.keys() & right.infos)
        smaller = min(len(left.infos), len(right.infos))
        if 2 * shared < smaller:
            few.append((shared / smaller, shared, smaller, left.name, right.name))
    if not few:
        return None
    _, shared, smaller, one, other = min(few, key=lambda item: item[0])
    more = f" ({len(few)} pairs of adapters share less than half)" if len(few) > 1 else ""
    return FewSharedModulesWarning(
        f"{printable(one)} and {printable(other)} share {shared} of the {smaller} modules that "
        f"the smaller one adapts{more}. Where only one adapter has a module, there is nothing that "
        "its change is merged with; check that all of them are adapters of one model."
    )


def _agree(
    where: str,
    values: Mapping[str, Any],
    expected: str = "one value in all",
    remedy: str = "Merge those that agree in it.",
) -> Iterator[Problem]:
    """Yield a problem if the values, by the name of the adapter, differ."""
    if any(value != next(iter(values.values())) for value in values.values()):
        listed = ", ".join(f"{name}: {value}" for name, value in values.items())
        yield Problem(where, listed, expected, remedy)


def _structure(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    replication = {
        adapter.name: [list(pair) for pair in adapter.config.get("layer_replication") or ()]
        for adapter in adapters
    }
    yield from _agree("layer_replication", replication)
    # A saved embedding either replaces the tied head as well or does not.
    tying = {
        adapter.name: bool(adapter.config.get("ensure_weight_tying"))
        for adapter in adapters
        for tensor in adapter.saved
        if names.is_tied(tensor) and names.module_to_save(tensor, adapter.config) is not None
    }
    expected = "one value in all adapters that save an embedding"
    yield from _agree("ensure_weight_tying", tying, expected)


def _shapes(adapters: Sequence[Adapter], *, but_parameters: bool) -> Iterator[Problem]:
    for module in modules_of(adapters):
        kinds = {a.name: _kind(a.infos[module]) for a in adapters if module in a.infos}
        if but_parameters and all(kind.startswith("parameter") for kind in kinds.values()):
            continue  # stacks of different parameters, which is said of the lists
        remedy = "They were trained on different models; merge those that agree."
        yield from _agree(module, kinds, "one shape and kind in all adapters", remedy)
        if any(0 in a.infos[module].shape for a in adapters if module in a.infos):
            yield Problem(module, "a change of an empty weight", "entries that can be merged")


def _kind(info: ModuleInfo | VectorInfo) -> str:
    if isinstance(info, VectorInfo):
        kind = "feedforward" if info.feedforward else "not feedforward"
        return f"{kind} of shape {list(info.shape)}"
    kernel = f", kernel {list(info.kernel)}" if info.kernel else ""
    return f"{info.layout} of shape {list(info.shape)}{kernel}"


def _replaced(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Yield modules that one adapter changes and another one replaces as a whole."""
    adapted = {
        names.owner(module, adapter.infos): adapter.name
        for adapter in adapters
        for module in adapter.infos
    }
    for adapter in adapters:
        for entry in adapter.config.get("modules_to_save") or ():
            inside = re.compile(rf"(^|.*\.){re.escape(entry)}($|\..*)")
            for module in filter(inside.match, adapted):
                yield Problem(
                    module,
                    f"it adapted by {adapted[module]}, and saved whole by {adapter.name} "
                    f"(modules_to_save: {entry})",
                    "one of the two in all adapters",
                    "Leave one of these adapters out: PEFT cannot load both for one module.",
                )


def _biases(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    loras = [adapter for adapter in adapters if isinstance(adapter, LoraAdapter)]
    with_bias = [adapter.name for adapter in loras if adapter.config.get("lora_bias")]
    for adapter in loras if with_bias else ():
        for module, info in adapter.infos.items():
            if info.layout in ("embedding", "parameter"):
                found = f"{info.layout} factors in {adapter.name}, and lora_bias in {with_bias[0]}"
                expected = "no lora_bias beside adapted embeddings and target parameters"
                remedy = "Leave one of these adapters out: PEFT cannot load such a merged adapter."
                yield Problem(module, found, expected, remedy)
                return


def _other_form(one: Adapter, other: Adapter) -> Iterator[Problem]:
    """Yield modules of `one` that may be those of another name in `other`, the first of each kind.

    They have its name below a further prefix, or are a stack of experts that it changes one by one.
    """
    nested = (
        (name, rest)
        for name in one.infos.keys() - other.infos.keys()
        for rest in itertools.islice(names.ends(name), 1, None)
        if rest in other.infos and rest not in one.infos
    )
    for name, rest in itertools.islice(nested, 1):
        found = f"{rest} in {other.name}, which may be the same module of another class"
        expected = "names of one class: PEFT would load one of the two only"
        yield of_one_form(name, one, found, expected)
    stacks = (
        (module, single)
        for module, info in one.infos.items()
        if isinstance(info, ModuleInfo) and info.layout == "parameter"
        if (single := names.one_expert(module, other.infos)) is not None
    )
    for module, single in itertools.islice(stacks, 1):
        found = f"all experts in one tensor there, and one by one in {other.name} ({single})"
        yield of_one_form(module, one, found, "experts in one way in all adapters")
