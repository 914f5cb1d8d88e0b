"""Whether adapters can be merged with each other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mergekit_ext.errors import MergeWarning, Problem, printable
from peft_merge.adapter import Adapter, LoraAdapter, ModuleInfo, VectorInfo
from peft_merge.io import names, whole


class DifferentBasesWarning(MergeWarning):
    """Adapters name different base models; merging them only makes sense if it is one base."""


class FewSharedModulesWarning(MergeWarning):
    """Adapters share few of their modules, so that most of what is merged is the change of one."""


def compatible(adapters: Sequence[Adapter]) -> list[Problem]:
    """Everything that keeps adapters from being merged: [] if nothing does.

    They must be of one kind, change the base's structure in the same way, and agree in the shape
    and the kind of every module that they share. Names of bases may differ (paths do): that is for
    `different_bases` to tell.
    """
    if len({type(adapter) for adapter in adapters}) > 1:
        kinds = ", ".join(f"{a.name}: {a.config.get('peft_type')}" for a in adapters)
        return [
            Problem(
                "adapters",
                kinds,
                "adapters of one kind",
                "Merge the LoRAs and the (IA)^3s separately.",
            )
        ]
    return [
        *_same_fields(adapters),
        *_same_modules(adapters),
        *_replaced(adapters),
        *_tying(adapters),
        *_parameters(adapters),
        *_biases(adapters),
    ]


def different_bases(adapters: Sequence[Adapter]) -> DifferentBasesWarning | None:
    """What to say of adapters that name different bases."""
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
    """What to say of adapters that have less than half of the smaller one's modules in common."""
    pairs = {
        (left.name, right.name): (len(left.infos.keys() & right.infos), smaller)
        for left, right in itertools.combinations(adapters, 2)
        if (smaller := min(len(left.infos), len(right.infos)))
    }
    few = {pair: found for pair, found in pairs.items() if 2 * found[0] < found[1]}
    if not few:
        return None
    (left, right), (shared, smaller) = min(few.items(), key=lambda item: item[1][0] / item[1][1])
    more = f" ({len(few)} pairs of adapters share less than half)" if len(few) > 1 else ""
    return FewSharedModulesWarning(
        f"{printable(left)} and {printable(right)} share {shared} of the {smaller} modules that "
        f"the smaller one adapts{more}. Where only one adapter has a module, there is nothing that "
        "its change is merged with; check that all of them are adapters of one model."
    )


# Fields that say what the base is made of, in one form each.
_STRUCTURE: dict[str, Callable[[Any], Any]] = {
    "layer_replication": lambda value: [list(pair) for pair in value or ()],
}


def _same_fields(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    for field, normal in _STRUCTURE.items():
        values = {adapter.name: normal(adapter.config.get(field)) for adapter in adapters}
        if any(value != next(iter(values.values())) for value in values.values()):
            yield Problem(
                field, _listed(values), "one value in all", "Merge those that agree in it."
            )


def has_layers(adapter: Adapter) -> bool:
    """Whether it adapts linear layers, of which alone `fan_in_fan_out` says something."""
    if isinstance(adapter, LoraAdapter):
        return any(info.layout == "linear" for info in adapter.infos.values())
    return any(len(info.shape) == 2 for info in adapter.infos.values())


def _same_modules(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    unlike = any(_parameters(adapters))
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.infos):
        kinds = {a.name: _kind(a.infos[module]) for a in adapters if module in a.infos}
        if unlike and all(kind.startswith("parameter") for kind in kinds.values()):
            continue  # stacks of different parameters, which is said of the lists
        if len(set(kinds.values())) > 1:
            yield Problem(
                module,
                _listed(kinds),
                "one shape and kind in all adapters",
                "They were trained on different models; merge those that agree.",
            )


def _kind(info: ModuleInfo | VectorInfo) -> str:
    if isinstance(info, VectorInfo):
        kind = "feedforward" if info.feedforward else "not feedforward"
        return f"{kind} of shape {list(info.shape)}"
    kernel = f", kernel {list(info.kernel)}" if info.kernel else ""
    return f"{info.layout} of shape {list(info.shape)}{kernel}"


def _replaced(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Modules that one adapter changes and another one replaces as a whole."""
    adapted = {
        names.owner(module, adapter.infos): adapter.name
        for adapter in adapters
        for module in adapter.infos
    }
    for adapter in adapters:
        for entry in adapter.config.get("modules_to_save") or ():
            inside = re.compile(rf"(^|.*\.){re.escape(entry)}($|\..*)")
            for module, other in adapted.items():
                if inside.match(module):
                    yield Problem(
                        module,
                        f"it adapted by {other}, and saved whole by {adapter.name} "
                        f"(modules_to_save: {entry})",
                        "one of the two in all adapters",
                        "Leave one of these adapters out: PEFT cannot load both for one module.",
                    )


def _tying(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """A saved embedding either replaces the tied head as well or does not."""
    values = {
        adapter.name: bool(adapter.config.get("ensure_weight_tying"))
        for adapter in adapters
        for tensor in adapter.saved
        if tensor.endswith(tuple(f"{leaf}.weight" for leaf in whole.TIED))
        and whole.module_to_save(tensor, adapter.config) is not None
    }
    if len(set(values.values())) > 1:
        yield Problem(
            "ensure_weight_tying",
            _listed(values),
            "one value in all adapters that save an embedding",
            "Merge those that agree in it.",
        )


def _parameters(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Files do not name target parameters, so only equal lists mean equal parameters."""
    lists = {
        adapter.name: sorted(entries)
        for adapter in adapters
        if (entries := adapter.config.get("target_parameters"))
    }
    if any(entries != next(iter(lists.values())) for entries in lists.values()):
        yield Problem(
            "target_parameters",
            _listed(lists),
            "the same parameters in all adapters that have some",
            "Merge those that agree in it (PEFT cannot load them side by side either).",
        )


def _biases(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    loras = [adapter for adapter in adapters if isinstance(adapter, LoraAdapter)]
    with_bias = [adapter.name for adapter in loras if adapter.config.get("lora_bias")]
    for adapter in loras:
        for module, info in adapter.infos.items():
            if with_bias and info.layout in ("embedding", "parameter"):
                yield Problem(
                    module,
                    f"{info.layout} factors in {adapter.name}, and lora_bias in {with_bias[0]}",
                    "no lora_bias beside adapted embeddings and target parameters",
                    "Leave one of these adapters out: PEFT cannot load such a merged adapter.",
                )
                return


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())
