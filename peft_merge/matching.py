"""The tensors of a base checkpoint that an adapter changes, from names and shapes alone.

An adapter names modules of the class that it was trained on (``bert.encoder.layer.0.output.dense``
of a classifier); a checkpoint names tensors, perhaps of a class without that outer part, or with
one more. Nothing here reads a weight of the base.

torch's Linear stores (out, in); Conv1D of GPT-2 and embeddings the transpose; a target parameter
of experts either. Shapes decide unless a weight is square. For square ones the class decides, as it
does in PEFT: `fan_in_fan_out` in an adapter's file is that of the layer that PEFT adapted last.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import methodcaller
from typing import Any

import torch

from mergekit_ext.errors import ConfigError, Problem, listing
from peft_merge.adapter import Adapter, LoraAdapter, ModuleInfo, VectorInfo
from peft_merge.io.names import Targets, one_expert, unwrapped
from peft_merge.weights import AdaptedWeights

Shape = Sequence[int]
Rename = Callable[[str], str]
# Of a tensor's name; None where it is not known.
Orientation = Callable[[str], bool | None]
# The tensors that each module may adapt.
Choices = Mapping[str, list[str]]

# Of a layer, and of torch's MultiheadAttention, whose input projection is a bare parameter.
_ATTENTION = "in_proj_weight"
_WEIGHT_NAMES = ("weight", _ATTENTION)
_SHOWN = 6
_TRAINED_ON = "Take the model that the adapter was trained on"
_BY_PEFT = "Merge this adapter into its base with the PEFT that trained it, and use that model."


def match(
    adapter: Adapter, shapes: Mapping[str, Shape], transposed: Orientation = lambda name: None
) -> AdaptedWeights:
    """Match modules and whole tensors of an adapter with the tensors of a base.

    Names are taken as they are; if some module then has no tensor, one outer prefix may be missing
    or too much, as long as all modules agree and only one prefix fits.

    Args:
        adapter: LoRA or (IA)^3.
        shapes: every tensor of the base and its shape.
        transposed: whether the base's class stores a square weight transposed, see
            `class_orientation`.

    Raises:
        ConfigError: modules without a tensor, ambiguous names or orientations, shapes that do not
            fit (a grown vocabulary), `lora_bias` without a bias, `layer_replication`.
    """
    matcher = _Matcher(_with_tied_once(adapter, shapes), shapes)
    found = matcher.match(transposed)
    if matcher.problems:
        raise ConfigError(matcher.problems, f"adapter {adapter.name} on this base")
    return found


class _Matcher:
    def __init__(self, adapter: Adapter, shapes: Mapping[str, Shape]):
        self.problems: list[Problem] = []
        self._adapter, self._shapes, self._infos = adapter, shapes, adapter.infos
        self._targets = Targets(adapter.config)

    def match(self, transposed: Orientation) -> AdaptedWeights:
        adapter = self._adapter
        rename, choices = self._named()
        modules = self._assigned(choices)
        if adapter.config.get("layer_replication"):
            expected = "an adapter of the base's own layers"
            remedy = "Write the replicated model first, or merge with PEFT."
            self._wrong("layer_replication", expected, remedy)
        biases = {}
        for module, tensor in modules.items():
            # PEFT 0.21 adds the change of out_proj twice (tuners/lora/layer.py, MultiheadAttention,
            # merge and forward). No file says whether an adapter was trained that way.
            if tensor.endswith(f".{_ATTENTION}"):
                what = "a LoRA of torch's MultiheadAttention, whose out_proj PEFT changes twice"
                expected = "a change that is the same in every version of PEFT"
                self._wrong(what, expected, _BY_PEFT, module)
            info, bias = self._infos[module], tensor.removesuffix("weight") + "bias"
            if not (info.bias if isinstance(info, ModuleInfo) else not info.feedforward):
                continue
            if bias in self._shapes:
                biases[bias] = module
            elif isinstance(info, ModuleInfo):
                expected = f"a bias in the base to add it to ({bias})"
                remedy = "Give the base model that bias (zeros), or train without lora_bias."
                self._wrong("a trained bias of B (lora_bias)", expected, remedy, module)
        saved, added, own = {}, {}, dict[str, Shape]()
        for stored, read in adapter.saved.items():
            plain = unwrapped(stored)
            name = rename(plain) if rename(plain) in self._shapes else plain
            if name not in self._shapes:
                added[name] = read
                continue
            saved[name], own[name] = stored, tuple(read().shape)
            if own[name] != (wanted := tuple(self._shapes[name])):
                what = f"the whole tensor in the shape {own[name]}, and {wanted} in the base"
                remedy = "Resize the base (its vocabulary, or its head) as it was when the adapter "
                self._wrong(what, "one shape", f"{remedy}was trained, and save it.", name)
        ways = self._oriented(modules, {**self._shapes, **own}, transposed)
        weights = {tensor: module for module, tensor in modules.items()}
        return AdaptedWeights(adapter, weights, biases, saved, added, ways)

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
        leaves = self._targets.parameters(owner) if self._is_parameter(module) else _WEIGHT_NAMES
        return [f"{owner}.{leaf}" for leaf in leaves]

    def _found(self, module: str, rename: Rename) -> list[str]:
        names = [name for name in map(rename, self._candidates(module)) if name in self._shapes]
        return names if self._is_parameter(module) else names[:1]

    def _choices(self, rename: Rename) -> Choices | None:
        """The tensors that each module may adapt; None where some has none, or two get one name."""
        owners = {unwrapped(module) for module in self._infos}
        if len(set(map(rename, owners))) < len(owners):
            return None
        found = {}
        for module in self._infos:
            found[module] = self._found(module, rename)
            if not found[module]:
                return None
        return found

    def _named(self) -> tuple[Rename, Choices]:
        """The change of prefix under which every module has a tensor, and those tensors."""
        fits: list[tuple[Rename, Choices]] = []
        for rename in self._renames():
            choices = self._choices(rename)
            if choices is not None and all(choices != other for _, other in fits):
                fits.append((rename, choices))
            if fits and rename is str:
                break
        if len(fits) == 1:
            return fits[0]
        remedy = (
            f"{_TRAINED_ON}, stored under the names of its modules. A tied head (lm_head) is not "
            "stored: untie and save the base first."
        )
        lost = [module for module in self._infos if not self._found(module, str)]
        expected = "tensors of these names in the base model (with or without one outer prefix)"
        what = f"{len(lost)} adapted modules without a tensor: {listing(lost, _SHOWN)}"
        stacks = (one_expert(m, self._shapes) for m in lost if self._is_parameter(m))
        if fits:
            ways = ", ".join(sorted(next(iter(found.values()))[0] for _, found in fits))
            what = f"several tensors that {next(iter(self._infos))} could be: {ways}"
        elif one := next(filter(None, stacks), None):
            what = f"target_parameters, which this base stores expert by expert ({one})"
            expected, remedy = "the experts of a module in one tensor", ""
        self._wrong(what, expected, remedy)
        return str, {}

    def _renames(self) -> Iterator[Rename]:
        yield str  # names as they are
        owners = [unwrapped(module).split(".") for module in self._infos]
        prefixes = (".".join(each[:end]) + "." for each in owners for end in range(1, len(each)))
        yield from (methodcaller("removeprefix", prefix) for prefix in dict.fromkeys(prefixes))
        endings = [f".{name}" for name in self._candidates(next(iter(self._infos)))]
        pairs = itertools.product(self._shapes, endings)
        added = {name.removesuffix(end) + "." for name, end in pairs if name.endswith(end)}
        yield from (prefix.__add__ for prefix in sorted(added))

    def _assigned(self, choices: Choices) -> dict[str, str]:
        """One tensor for each module, among those that it may adapt."""
        # PEFT's file does not name an owner's parameter that a wrapper adapts: shapes decide.
        owners: dict[str, list[str]] = {}
        for module in choices:
            owners.setdefault(unwrapped(module), []).append(module)
        found: dict[str, str] = {}
        for owner, modules in owners.items():
            options = [choices[module] for module in modules]
            named = ", ".join(dict.fromkeys(itertools.chain(*options)))
            if sum(map(len, options)) > 1:
                options = [
                    [n for n in choices[m] if orientations(self._infos[m], self._shapes[n])]
                    for m in modules
                ]
            ways = [way for way in itertools.product(*options) if len(set(way)) == len(way)]
            if len(ways) == 1:
                found.update(zip(modules, ways[0], strict=True))
                continue
            what = f"{len(ways)} ways to decide by shape which of {named} it adapts"
            expected = "one (PEFT does not store the parameter's name)"
            self._wrong(what, expected, _BY_PEFT, owner)
        return found

    def _oriented(
        self, modules: Mapping[str, str], shapes: Mapping[str, Shape], transposed: Orientation
    ) -> dict[str, bool]:
        """Which weights are stored transposed: by shape."""
        # Squares: by the base's class, or else as the weights beside it that are not square.
        settled: dict[str, bool] = {}
        square: list[str] = []
        known: dict[tuple[str, str], set[bool]] = {}
        for module, tensor in modules.items():
            info, shape = self._infos[module], tuple(shapes[tensor])
            ways = orientations(info, shape)
            if len(ways) == 1:
                (settled[module],) = ways
                known.setdefault(_alike(info, module), set()).update(ways)
            elif ways:
                square.append(module)
            else:
                what = f"a change of shape {tuple(info.shape)} for {tensor} of shape {shape}"
                remedy = f"{_TRAINED_ON}."
                if isinstance(info, ModuleInfo) and info.kernel and info.matrices > 1:
                    what = f"a LoRA of a convolution with {info.matrices} groups"
                    remedy = "Leave the adapter unmerged; PEFT cannot merge it either."
                self._wrong(what, "a change in the shape of the weight", remedy, module)
        for module in square:
            tensor = modules[module]
            stated = transposed(tensor)
            alike = _alike(self._infos[module], module)
            evidence = known.get(alike, set()) if stated is None else {stated}
            if len(evidence) == 1:
                (settled[module],) = evidence
                continue
            what = f"{tensor} of shape {tuple(shapes[tensor])}, which may be transposed or not"
            expected = "a weight whose orientation its shape or a class of transformers says"
            self._wrong(what, expected, _BY_PEFT, module)
        return settled


def _with_tied_once(adapter: Adapter, shapes: Iterable[str]) -> Adapter:
    """Without the factors of a head that the base stores as its embedding."""
    # With `ensure_weight_tying` PEFT gives both the same factors, and stores them twice.
    if not (isinstance(adapter, LoraAdapter) and adapter.config.get("ensure_weight_tying")):
        return adapter
    infos = adapter.infos
    stored = [f".{name.rpartition('.')[0]}" for name in shapes]
    embeddings = [adapter.load(name) for name in infos if infos[name].layout == "embedding"]

    def is_tied(module: str) -> bool:
        head = adapter.load(module)
        return any(
            torch.equal(head.a.mT, embedding.b)
            and torch.equal(head.b.mT, embedding.a)
            and head.scale == embedding.scale
            for embedding in embeddings
        )

    absent = (m for m in infos if not any(name.endswith(f".{unwrapped(m)}") for name in stored))
    tied = set(filter(is_tied, absent))
    start = tuple(f"{unwrapped(module)}." for module in tied)
    return replace(
        adapter,
        infos={name: info for name, info in infos.items() if name not in tied},
        saved={n: load for n, load in adapter.saved.items() if not unwrapped(n).startswith(start)},
    )


def orientations(info: ModuleInfo | VectorInfo, shape: Shape) -> frozenset[bool]:
    """Return how a weight of this shape can be what the module adapts; empty if it cannot.

    False in it: as the change is written, (rows, columns); True in it: transposed.
    """
    if isinstance(info, ModuleInfo):
        return frozenset(way for way in (False, True) if tuple(shape) in _stored(info, way))
    length = math.prod(info.shape)
    if len(shape) == 2:
        axis = 1 if info.feedforward else 0
        return frozenset(way for way in (False, True) if shape[axis ^ way] == length)
    fits = 2 < len(shape) == len(info.shape)
    if fits and info.feedforward:
        groups, rest = divmod(length, shape[1]) if shape[1] else (0, 1)
        fits = groups > 0 and rest == 0 and shape[0] % groups == 0
    elif fits:
        fits = shape[0] == length
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
    """Return whether the class of a model stores a weight transposed; None if it does not say."""
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
