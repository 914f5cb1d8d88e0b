"""Whether adapters can be merged with each other."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mergekit_ext.errors import MergeWarning, Problem, printable
from peft_merge.adapter import Adapter, LoraAdapter, ModuleInfo, VectorInfo, modules_of
from peft_merge.io import names
from peft_merge.io.diffusers_lora import is_of_diffusers
from peft_merge.io.forms import of_one_form
from peft_merge.io.merged import WITHOUT_BIAS

_LEAVE_OUT = "Leave one of these adapters out: PEFT cannot load what their merge gives."


class DifferentBasesWarning(MergeWarning):
    """Adapters name different base models; merging them only makes sense if it is one base."""


class FewSharedModulesWarning(MergeWarning):
    """Adapters share few of their modules, so that most of what is merged is the change of one."""


def compatible(adapters: Sequence[Adapter]) -> list[Problem]:
    """Return everything that keeps adapters from being merged: [] if nothing does.

    Names of bases may differ (paths do): that is for `different_bases`.
    """
    kinds = {a.name: "LoRA" if isinstance(a, LoraAdapter) else "(IA)^3" for a in adapters}
    kinds |= {a.name: "LoRA of diffusers" for a in adapters if is_of_diffusers(a)}
    remedy = "Merge those of each kind separately."
    if unlike := list(_agree("adapters", kinds, "adapters of one kind", remedy)):
        return unlike
    replicated = {a.name: a.config.get("layer_replication") or () for a in adapters}
    replication = {name: [list(pair) for pair in pairs] for name, pairs in replicated.items()}
    # A saved embedding either replaces the tied head as well or does not.
    tying = {
        a.name: bool(a.config.get("ensure_weight_tying"))
        for a in adapters
        for tensor in a.saved
        if names.is_tied(tensor) and names.module_to_save(tensor, a.config) is not None
    }
    # Files do not name target parameters, so only equal lists mean equal parameters.
    targets = {a.name: a.config.get("target_parameters") for a in adapters}
    parameters = {name: sorted(entries) for name, entries in targets.items() if entries}
    unlike = list(_agree("target_parameters", parameters, "the same in all that have some"))
    return [
        *_agree("layer_replication", replication),
        *_agree("ensure_weight_tying", tying, "one value in all that save an embedding"),
        *unlike,
        *_shapes(adapters, but_parameters=bool(unlike)),
        *_replaced(adapters),
        *_biases(adapters),
        *(p for pair in itertools.permutations(adapters, 2) for p in _other_form(*pair)),
    ]


def different_bases(adapters: Sequence[Adapter], given: Any = None) -> DifferentBasesWarning | None:
    """Return a warning of adapters whose bases have different names, or none that of `given`."""
    bases = {
        str(base).rstrip("/\\"): adapter.name
        for adapter in adapters
        if (base := adapter.config.get("base_model_name_or_path"))
    }
    if given and all(PurePath(base).name != PurePath(given).name for base in bases):
        bases[given] = "base_model"
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
    _, shared, smaller, one, other = min(few)
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
    adapted = {names.owner(module, a.infos): a.name for a in adapters for module in a.infos}
    for adapter in adapters:
        for entry in adapter.config.get("modules_to_save") or ():
            inside = re.compile(rf"(^|.*\.){re.escape(entry)}($|\..*)")
            for module in filter(inside.match, adapted):
                found = f"it adapted by {adapted[module]}, and saved whole by {adapter.name}"
                expected = "one of the two in all adapters"
                yield Problem(module, found, expected, _LEAVE_OUT)


def _biases(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Yield the first module that has no bias of its own beside adapters with `lora_bias`."""
    with_bias = [adapter.name for adapter in adapters if adapter.config.get("lora_bias")]
    without = (
        (module, info.layout, adapter.name)
        for adapter in adapters
        for module, info in adapter.infos.items()
        if isinstance(info, ModuleInfo) and info.layout in WITHOUT_BIAS
    )
    for module, layout, name in itertools.islice(without if with_bias else (), 1):
        found = f"{layout} factors in {name}, and lora_bias in {with_bias[0]}"
        expected = "no lora_bias beside adapted embeddings and target parameters"
        yield Problem(module, found, expected, _LEAVE_OUT)


def _other_form(one: Adapter, other: Adapter) -> Iterator[Problem]:
    """Yield modules of `one` that may be those of another name in `other`, the first of each kind.

    They have its name below a further prefix, or are a stack of experts that it changes one by one.
    """
    nested = (
        (name, f"{rest} in {other.name}, which may be the same module of another class")
        for name in one.infos.keys() - other.infos.keys()
        for rest in itertools.islice(names.ends(name), 1, None)
        if rest in other.infos and rest not in one.infos
    )
    stacks = (
        (name, f"all experts in one tensor there, and one by one in {other.name} ({single})")
        for name, info in one.infos.items()
        if isinstance(info, ModuleInfo) and info.layout == "parameter"
        if (single := names.one_expert(name, other.infos)) is not None
    )
    for name, found in (*itertools.islice(nested, 1), *itertools.islice(stacks, 1)):
        expected = "names of one class in all adapters: PEFT would load one of the two only"
        yield of_one_form(name, one, found, expected)
