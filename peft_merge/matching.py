"""The tensors of a base checkpoint that an adapter changes, from names and shapes alone.

An adapter names modules of the class that it was trained on (``bert.encoder.layer.0.output.dense``
of a classifier); a checkpoint names tensors, perhaps of a class without that outer part, or with
one more. Nothing here reads a weight of the base.

torch's Linear stores (out, in); Conv1D of GPT-2 and embeddings the transpose; a target parameter
of experts either. Shapes decide unless a weight is square. For square ones the class decides, as it
does in PEFT: `fan_in_fan_out` in an adapter's file is that of the layer that PEFT adapted last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import methodcaller
from typing import Any

import torch

from mergekit_ext.errors import Problem, listing
from peft_merge.adapter import Adapter, LoraAdapter, ModuleInfo, VectorInfo
from peft_merge.io.names import one_expert, unwrapped

Shape = Sequence[int]
Rename = Callable[[str], str]
# Of a tensor's name; None where it is not known.
Orientation = Callable[[str], bool | None]

# Of a layer, and of torch's MultiheadAttention, whose input projection is a bare parameter.
_ATTENTION = "in_proj_weight"
_WEIGHT_NAMES = ("weight", _ATTENTION)
_SHOWN = 6
_BY_PEFT = "Merge this adapter into its base with PEFT and use the merged model."


@dataclass
class Match:
    """Where an adapter's changes go.

    Attributes:
        weights: tensors of the base -> the modules that adapt them.
        biases: biases of the base -> the modules that change them.
        saved: tensors of the base that the adapter replaces -> their names in the adapter.
        added: tensors that the adapter brings and the base lacks -> their names in the adapter.
        transposed: modules whose weight the base stores as (columns, rows).
    """

    weights: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    transposed: dict[str, bool] = field(default_factory=dict)


def unknown_orientation(name: str) -> None:
    """Leave open how a weight is stored."""


def match(
    adapter: Adapter, shapes: Mapping[str, Shape], transposed: Orientation = unknown_orientation
) -> tuple[Match, list[Problem]]:
    """Match modules and whole tensors of an adapter with the tensors of a base.

    Names are taken as they are; if some module then has no tensor, one outer prefix may be missing
    or too much, as long as all modules agree and only one prefix fits.

    Args:
        shapes: every tensor of the base and its shape.
        transposed: see `AdaptedWeights.touched`.
    """
    matcher = _Matcher(_with_tied_once(adapter, shapes), shapes)
    return matcher.match(transposed), matcher.problems


class _Matcher:
    """The rules by which `match` finds tensors for the modules of one adapter in one base."""

    def __init__(self, adapter: Adapter, shapes: Mapping[str, Shape]):
        self.problems: list[Problem] = []
        self._adapter, self._shapes, self._infos = adapter, shapes, adapter.infos
        self._targets = list(adapter.config.get("target_parameters") or ())

    def match(self, transposed: Orientation) -> Match:
        found = Match()
        rename, choices = self._rename()
        modules: dict[str, str] = {}  # -> the tensor that each adapts
        owners: dict[str, list[str]] = {}  # target parameters may share the module that owns them
        for module in self._infos:
            owners.setdefault(unwrapped(module), []).append(module)
        for group in owners.values():
            modules.update(self._assign(group, [choices.get(module, []) for module in group]))
        for stored in self._adapter.saved:
            plain = unwrapped(stored)
            name = rename(plain) if rename(plain) in self._shapes else plain
            (found.saved if name in self._shapes else found.added)[name] = stored
        if self._adapter.config.get("layer_replication"):
            expected = "an adapter of the base's own layers"
            remedy = "Write the replicated model first, or merge with PEFT."
            self._wrong("layer_replication", expected, remedy)
        for module, tensor in modules.items():
            # PEFT 0.21 adds the change of out_proj twice (tuners/lora/layer.py, MultiheadAttention,
            # merge and forward). No file says whether an adapter was trained that way.
            if tensor.endswith(f".{_ATTENTION}"):
                what = "a LoRA of torch's MultiheadAttention, whose out_proj PEFT changes twice"
                expected = "a change that is the same in every version of PEFT"
                remedy = "Merge it into its base with the PEFT that trained it, and use that model."
                self._wrong(what, expected, remedy, module)
            info, bias = self._infos[module], tensor.removesuffix("weight") + "bias"
            if bias in self._shapes:
                if info.bias if isinstance(info, ModuleInfo) else not info.feedforward:
                    found.biases[bias] = module
            elif isinstance(info, ModuleInfo) and info.bias:
                expected = f"a bias in the base to add it to ({bias})"
                remedy = "Give the base model that bias (zeros), or train without lora_bias."
                self._wrong("a trained bias of B (lora_bias)", expected, remedy, module)
        own = {name: tuple(self._adapter.saved[key]().shape) for name, key in found.saved.items()}
        for name, shape in own.items():
            if shape != (wanted := tuple(self._shapes[name])):
                what = f"the whole tensor in the shape {shape}, and {wanted} in the base"
                remedy = (
                    "Resize the base (its vocabulary, or its head) as it was when the adapter was "
                    "trained, and save it."
                )
                self._wrong(what, "one shape", remedy, name)
        found.transposed = self._orient(modules, {**self._shapes, **own}, transposed)
        found.weights = {tensor: module for module, tensor in modules.items()}
        return found

    def _wrong(self, found: str, expected: str, remedy: str, module: str = "") -> None:
        where = f"adapter {self._adapter.name}"
        where = f"{module} of {where}" if module else where
        self.problems.append(Problem(where, found, expected, remedy))

    def _is_parameter(self, module: str) -> bool:
        info = self._infos[module]
        return isinstance(info, ModuleInfo) and info.layout == "parameter"

    def _candidates(self, module: str) -> list[str]:
        """Names that the module's weight may have in a base, the likeliest first."""
        owner = unwrapped(module)
        names = []
        if not self._is_parameter(module):
            names += [f"{owner}.{part}" for part in _WEIGHT_NAMES]
        for target in self._targets:
            name = f"{owner}.{target.rpartition('.')[2]}"
            if name not in names and f".{name}".endswith(f".{target}"):
                names.append(name)
        return names

    def _found(self, module: str, rename: Rename) -> list[str]:
        names = [name for name in map(rename, self._candidates(module)) if name in self._shapes]
        return names if self._is_parameter(module) else names[:1]

    def _rename(self) -> tuple[Rename, dict[str, list[str]]]:
        """The change of prefix under which every module has a tensor, and those tensors."""
        owners = {unwrapped(module) for module in self._infos}
        fits: list[tuple[Rename, dict[str, list[str]]]] = []
        renames: list[Rename] = [str, *self._renames()]
        for rename in renames:
            if len(set(map(rename, owners))) < len(owners):
                continue
            found = {}
            for module in self._infos:
                found[module] = self._found(module, rename)
                if not found[module]:
                    break
            else:
                if rename is str:
                    return rename, found
                if all(found != other for _, other in fits):
                    fits.append((rename, found))
        if len(fits) == 1:
            return fits[0]
        remedy = (
            "Take the model that the adapter was trained on, stored under the names of its "
            "modules. A tied head (lm_head) is not stored: untie and save the base first."
        )
        if fits:
            ways = ", ".join(sorted(next(iter(found.values()))[0] for _, found in fits))
            first = next(iter(self._infos))
            self._wrong(f"several tensors that {first} could be: {ways}", "one", remedy)
            return str, {}
        lost = [name for name in self._infos if not self._found(name, str)]
        for module in filter(self._is_parameter, lost):
            if (stored := one_expert(module, self._shapes)) is not None:
                what = (
                    f"target_parameters ({', '.join(self._targets)}) of {unwrapped(module)}, which "
                    f"this base stores expert by expert ({stored})"
                )
                expected = "the experts of a module in one tensor, as target_parameters adapt them"
                self._wrong(what, expected, "")
                return str, {}
        what = f"{len(lost)} adapted modules without a tensor: {listing(lost, _SHOWN)}"
        expected = "tensors of these names in the base model (with or without one outer prefix)"
        self._wrong(what, expected, remedy)
        return str, {}

    def _renames(self) -> Iterator[Rename]:
        prefixes: dict[str, None] = {}
        for module in self._infos:
            parts = unwrapped(module).split(".")
            prefixes.update((".".join(parts[:end]) + ".", None) for end in range(1, len(parts)))
        for prefix in prefixes:
            yield methodcaller("removeprefix", prefix)
        first = next(iter(self._infos), None)
        endings = tuple(f".{name}" for name in self._candidates(first)) if first else ()
        added = {
            name.removesuffix(ending) + "."
            for name in self._shapes
            for ending in endings
            if name.endswith(ending)
        }
        yield from (prefix.__add__ for prefix in sorted(added))

    def _assign(self, modules: list[str], options: list[list[str]]) -> dict[str, str]:
        """One tensor for each of the modules, none twice, among the names that each may have.

        PEFT's file does not say which of an owner's parameters a wrapper adapts (that is the order
        in which the model's class made them), so shapes must.
        """
        if not all(options):
            return {}
        if len(modules) == 1 and len(options[0]) == 1:
            return {modules[0]: options[0][0]}
        fitting = [
            [name for name in names if orientations(self._infos[module], self._shapes[name])]
            for module, names in zip(modules, options, strict=True)
        ]
        ways = [way for way in itertools.product(*fitting) if len(set(way)) == len(way)]
        if len(ways) == 1:
            return dict(zip(modules, ways[0], strict=True))
        named = ", ".join(dict.fromkeys(itertools.chain(*options)))
        found = f"{len(ways)} ways to decide by shape which of {named} it adapts"
        expected = "one (PEFT does not store the parameter's name)"
        self._wrong(found, expected, _BY_PEFT, unwrapped(modules[0]))
        return {}

    def _orient(
        self, modules: Mapping[str, str], shapes: Mapping[str, Shape], transposed: Orientation
    ) -> dict[str, bool]:
        """Which weights are stored transposed: by shape, and squares by what is known besides.

        What is known: the class of the base, as in PEFT; or else the orientation of the adapter's
        weights beside it in the same module that are not square, if they agree.
        """
        settled: dict[str, bool] = {}
        square: list[str] = []
        known: dict[tuple[str, str], set[bool]] = {}
        for module, tensor in modules.items():
            info, shape = self._infos[module], tuple(shapes[tensor])
            ways = orientations(info, shape)
            if len(ways) == 1:
                settled.update(dict.fromkeys([module], *ways))
                known.setdefault(_alike(info, module), set()).update(ways)
            elif ways:
                square.append(module)
            else:
                self._misfit(info, module, tensor, shape)
        for module in square:
            tensor = modules[module]
            stated = transposed(tensor)
            alike = _alike(self._infos[module], module)
            evidence = known.get(alike, set()) if stated is None else {stated}
            if len(evidence) == 1:
                settled.update(dict.fromkeys([module], *evidence))
                continue
            shape = tuple(shapes[tensor])
            found = f"{tensor} of shape {shape}, which may be stored (out, in) or (in, out)"
            remedy = (
                "Put the config.json of the base beside its weights: the class in it decides, if "
                "it is one of transformers."
            )
            remedy = _BY_PEFT if self._is_parameter(module) else remedy
            self._wrong(found, "a weight whose orientation is known", remedy, module)
        return settled

    def _misfit(
        self, info: ModuleInfo | VectorInfo, module: str, tensor: str, shape: tuple[int, ...]
    ) -> None:
        if isinstance(info, ModuleInfo) and info.layout == "convolution" and info.matrices > 1:
            found = f"a LoRA of a convolution with {info.matrices} groups"
            expected = "a change that is a convolution of those groups (it mixes all inputs)"
            remedy = "Leave the adapter unmerged; PEFT cannot merge it either."
        else:
            found = f"a change of shape {tuple(info.shape)} for {tensor} of shape {shape}"
            expected = "shapes that fit"
            remedy = "Take the model that the adapter was trained on."
        self._wrong(found, expected, remedy, module)


def _with_tied_once(adapter: Adapter, shapes: Iterable[str]) -> Adapter:
    """Without the factors of a head that the base stores as its embedding.

    With `ensure_weight_tying` PEFT gives both the same factors, and stores them twice.
    """
    if not (isinstance(adapter, LoraAdapter) and adapter.config.get("ensure_weight_tying")):
        return adapter
    stored = {name.rpartition(".")[0] for name in shapes}
    tied = {
        module
        for module in adapter.infos
        if not any(f".{name}".endswith(f".{unwrapped(module)}") for name in stored)
        and _is_embedding_again(adapter, module)
    }
    start = tuple(f"{unwrapped(module)}." for module in tied)
    return replace(
        adapter,
        infos={name: info for name, info in adapter.infos.items() if name not in tied},
        saved={n: load for n, load in adapter.saved.items() if not unwrapped(n).startswith(start)},
    )


def _is_embedding_again(adapter: LoraAdapter, module: str) -> bool:
    head = adapter.load(module)
    embeddings = [name for name, info in adapter.infos.items() if info.layout == "embedding"]
    return any(
        torch.equal(head.a.mT, embedding.b)
        and torch.equal(head.b.mT, embedding.a)
        and head.scale == embedding.scale
        for embedding in map(adapter.load, embeddings)
    )


def orientations(info: ModuleInfo | VectorInfo, shape: Shape) -> frozenset[bool]:
    """Return how a weight of this shape can be what the module adapts.

    False in it: as the change is written, (rows, columns); True in it: transposed. Both for a
    square weight, empty for a shape that does not fit.
    """
    if isinstance(info, ModuleInfo):
        return frozenset(way for way in (False, True) if tuple(shape) in _stored(info, way))
    length = math.prod(info.shape)
    if len(shape) == 2:
        axis = 1 if info.feedforward else 0
        return frozenset(way for way in (False, True) if shape[axis ^ way] == length)
    if len(shape) != len(info.shape) or len(shape) < 3:
        return frozenset()
    if not info.feedforward:
        return frozenset({False} if shape[0] == length else ())
    groups, rest = divmod(length, shape[1]) if shape[1] else (0, 1)
    fits = groups > 0 and rest == 0 and shape[0] % groups == 0
    return frozenset({False} if fits else ())


def _stored(info: ModuleInfo, transposed: bool) -> list[tuple[int, ...]]:
    """Shapes in which the weight of a LoRA may be stored, the one way round or the other."""
    count, rows, columns = info.shape
    if info.layout == "convolution":
        # One with groups in its factors is no convolution: B mixes what A took from all inputs.
        plain = count == 1 and not transposed
        return [(rows, columns // math.prod(info.kernel), *info.kernel)] if plain else []
    if info.layout == "embedding":
        return [(columns, rows)] if transposed else []
    matrix = (columns, rows) if transposed else (rows, columns)
    if info.layout == "linear":
        return [matrix]
    # PEFT takes every two-dimensional parameter as (out, in).
    return [(count, *matrix), *([matrix] if count == 1 and not transposed else [])]


def class_orientation(model: Any, name: str) -> bool | None:
    """Return whether the class of a model stores a weight transposed; None if it does not say.

    Args:
        model: of transformers, perhaps on the meta device.
        name: of the weight in the model.
    """
    from transformers.pytorch_utils import Conv1D

    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    if isinstance(module, (torch.nn.Linear, Conv1D)):
        return isinstance(module, Conv1D)
    if getattr(getattr(module, leaf, None), "ndim", 0) == 3:  # stacked experts
        return bool(getattr(module, "is_transposed", False))
    return None


def _alike(info: ModuleInfo | VectorInfo, module: str) -> tuple[str, str]:
    """The same for modules that are stored the same way round."""
    name = unwrapped(module)
    if isinstance(info, ModuleInfo):
        layout = info.layout
    else:
        layout = "linear" if len(info.shape) == 2 else "convolution"
    return layout, name if layout == "parameter" else name.rpartition(".")[0]
