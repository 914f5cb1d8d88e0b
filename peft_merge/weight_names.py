"""Which tensors of a base checkpoint an adapter changes, from names and shapes alone.

An adapter names modules of the class that it was trained on (``bert.encoder.layer.0.output.dense``
of a classifier); a checkpoint names tensors, perhaps of a class without that outer part, or with
one more. Nothing here reads a weight.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from mergekit_ext.errors import Problem
from peft_merge.adapter import Adapter, LoraAdapter, ModuleInfo
from peft_merge.io.names import unwrapped
from peft_merge.weight_shapes import Shape, orientations

# Of a layer, and of torch's MultiheadAttention, whose input projection is a bare parameter.
_ATTENTION = "in_proj_weight"
_WEIGHT_NAMES = ("weight", _ATTENTION)
_SHOWN = 6

Rename = Callable[[str], str]


@dataclass(frozen=True)
class Located:
    """Where an adapter's changes go.

    Attributes:
        weights: the tensor that each module adapts.
        saved: base tensors that the adapter replaces -> their names in the adapter.
        added: tensors that the adapter brings and the base lacks -> their names in the adapter.
    """

    weights: Mapping[str, str]
    saved: Mapping[str, str]
    added: Mapping[str, str]


def bias_name(weight: str) -> str:
    """The bias beside a weight: ``a.weight`` -> ``a.bias``."""
    return weight.removesuffix("weight") + "bias"


def locate(adapter: Adapter, shapes: Mapping[str, Shape]) -> tuple[Located, list[Problem]]:
    """Match modules and saved tensors with the tensors of a base.

    Names are taken as they are; if some module then has no tensor, one outer prefix may be missing
    or too much, as long as all modules agree and only one prefix fits.
    """
    problems: list[Problem] = []
    rename, choices = _rename(adapter, shapes, problems)
    weights: dict[str, str] = {}
    for group in _by_owner(adapter).values():
        weights.update(_assign(adapter, group, choices, shapes, problems))
    problems += _attention(adapter, weights)
    saved: dict[str, str] = {}
    added: dict[str, str] = {}
    for stored in adapter.saved:
        plain = unwrapped(stored)
        name = rename(plain) if rename(plain) in shapes else plain
        (saved if name in shapes else added)[name] = stored
    return Located(weights, saved, added), problems


def _candidates(adapter: Adapter, module: str) -> list[str]:
    """Names that the module's weight may have in a base, the likeliest first."""
    owner = unwrapped(module)
    info = adapter.infos[module]
    names = []
    if not (isinstance(info, ModuleInfo) and info.layout == "parameter"):
        names += [f"{owner}.{part}" for part in _WEIGHT_NAMES]
    for target in _target_parameters(adapter):
        name = f"{owner}.{target.rpartition('.')[2]}"
        if name not in names and (name == target or name.endswith(f".{target}")):
            names.append(name)
    return names


def _target_parameters(adapter: Adapter) -> list[str]:
    return list(adapter.config.get("target_parameters") or ())


def _found(adapter: Adapter, module: str, shapes: Mapping[str, Shape], rename: Rename) -> list[str]:
    names = [rename(name) for name in _candidates(adapter, module)]
    names = [name for name in names if name in shapes]
    info = adapter.infos[module]
    if isinstance(info, ModuleInfo) and info.layout == "parameter":
        return names
    return names[:1]


def _rename(
    adapter: Adapter, shapes: Mapping[str, Shape], problems: list[Problem]
) -> tuple[Rename, dict[str, list[str]]]:
    """The change of prefix under which every module has a tensor, and those tensors."""

    owners = {unwrapped(module) for module in adapter.infos}

    def choices(rename: Rename) -> dict[str, list[str]] | None:
        found = {}
        if len({rename(owner) for owner in owners}) < len(owners):
            return None
        for module in adapter.infos:
            found[module] = _found(adapter, module, shapes, rename)
            if not found[module]:
                return None
        return found

    plain = choices(_same)
    if plain is not None:
        return _same, plain
    fits: list[tuple[Rename, dict[str, list[str]]]] = []
    for rename in _renames(adapter, shapes):
        found = choices(rename)
        if found is not None and all(found != other for _, other in fits):
            fits.append((rename, found))
    if len(fits) == 1:
        return fits[0]
    if fits:
        ways = ", ".join(sorted(next(iter(found.values()))[0] for _, found in fits))
        first = next(iter(adapter.infos))
        found_text, expected = f"several tensors that {first} could be: {ways}", "one"
    else:
        lost = [name for name in adapter.infos if not _found(adapter, name, shapes, _same)]
        if (reason := _apart(adapter, lost, shapes)) is not None:
            problems.append(reason)
            return _same, {}
        found_text = f"{len(lost)} adapted modules without a tensor: {_shorten(lost)}"
        expected = "tensors of these names in the base model (with or without one outer prefix)"
    problems.append(
        Problem(
            f"adapter {adapter.name}",
            found_text,
            expected,
            "Take the model that the adapter was trained on, stored under the names of its "
            "modules. A tied head (lm_head) is not stored: untie and save the base first.",
        )
    )
    return _same, {}


def _apart(adapter: Adapter, lost: list[str], shapes: Mapping[str, Shape]) -> Problem | None:
    """What to say of target parameters that a base stores expert by expert."""
    for module in lost:
        info = adapter.infos[module]
        if isinstance(info, ModuleInfo) and info.layout == "parameter":
            leaf = re.escape(unwrapped(module).rpartition(".")[2])
            each = re.compile(rf"(?:^|.*\.){leaf}\.\d+\..*")
            if (stored := next(filter(each.fullmatch, shapes), None)) is not None:
                return Problem(
                    f"adapter {adapter.name}",
                    f"target_parameters ({', '.join(_target_parameters(adapter))}) of "
                    f"{unwrapped(module)}, which this base stores expert by expert ({stored})",
                    "the experts of a module in one tensor, as target_parameters adapt them",
                )
    return None


def _same(name: str) -> str:
    return name


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _with(prefix: str, name: str) -> str:
    return prefix + name


def _renames(adapter: Adapter, shapes: Mapping[str, Shape]) -> Iterator[Rename]:
    prefixes: dict[str, None] = {}
    for module in adapter.infos:
        parts = unwrapped(module).split(".")
        prefixes.update((".".join(parts[:end]) + ".", None) for end in range(1, len(parts)))
    for prefix in prefixes:
        yield partial(_without, prefix)
    first = next(iter(adapter.infos), None)
    endings = tuple(f".{name}" for name in _candidates(adapter, first)) if first else ()
    added = {
        name.removesuffix(ending) + "."
        for name in shapes
        for ending in endings
        if name.endswith(ending)
    }
    for prefix in sorted(added):
        yield partial(_with, prefix)


def _by_owner(adapter: Adapter) -> dict[str, list[str]]:
    """Modules by the base module that owns their weights: target parameters may share one."""
    owners: dict[str, list[str]] = {}
    for module in adapter.infos:
        owners.setdefault(unwrapped(module), []).append(module)
    return owners


def _assign(
    adapter: Adapter,
    modules: list[str],
    choices: Mapping[str, list[str]],
    shapes: Mapping[str, Shape],
    problems: list[Problem],
) -> dict[str, str]:
    """One tensor for each of the modules, none twice.

    PEFT's file does not say which of an owner's parameters a wrapper adapts (that is the order in
    which the model's class made them), so shapes must.
    """
    options = [choices.get(module, []) for module in modules]
    if not all(options):
        return {}
    if len(modules) == 1 and len(options[0]) == 1:
        return {modules[0]: options[0][0]}
    fitting = [
        [name for name in names if orientations(adapter.infos[module], shapes[name])]
        for module, names in zip(modules, options, strict=True)
    ]
    ways = [way for way in itertools.product(*fitting) if len(set(way)) == len(way)]
    if len(ways) == 1:
        return dict(zip(modules, ways[0], strict=True))
    named = ", ".join(dict.fromkeys(itertools.chain(*options)))
    problems.append(
        Problem(
            f"{unwrapped(modules[0])} of adapter {adapter.name}",
            f"{len(ways)} ways to tell by shape which of {named} it adapts",
            "one (PEFT does not store the parameter's name)",
            "Merge this adapter into its base with PEFT and use the merged model.",
        )
    )
    return {}


def _attention(adapter: Adapter, weights: Mapping[str, str]) -> list[Problem]:
    # PEFT 0.21 adds the change of out_proj twice (tuners/lora/layer.py, MultiheadAttention.merge,
    # by which its forward works too). No file says whether an adapter was trained that way.
    return [
        Problem(
            f"{module} of adapter {adapter.name}",
            "a LoRA of torch's MultiheadAttention, whose out_proj PEFT changes twice",
            "a change that is the same in every version of PEFT",
            "Merge it into its base with the PEFT that trained it, and use the merged model.",
        )
        for module, tensor in weights.items()
        if tensor.endswith(f".{_ATTENTION}")
    ]


def _shorten(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def missing_biases(
    adapter: Adapter, weights: Mapping[str, str], shapes: Mapping[str, Shape]
) -> list[Problem]:
    """LoRAs with a bias of B where the base has none to add it to."""
    if not isinstance(adapter, LoraAdapter):
        return []
    return [
        Problem(
            f"{module} of adapter {adapter.name}",
            "a trained bias of B (lora_bias)",
            f"a bias in the base to add it to ({bias_name(weight)})",
            "Give the base model that bias (zeros), or train without lora_bias.",
        )
        for module, weight in weights.items()
        if adapter.infos[module].bias and bias_name(weight) not in shapes
    ]
