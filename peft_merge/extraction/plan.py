"""Two models as stored, and what becomes of each tensor of the fine-tune, from names and shapes.

Names are those of the fine-tune's class, which an adapter uses. Tensors are read one at a time.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_ext.errors import FileError, Problem, one_line, require, tensors_at
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.io.class_model import class_names, empty_model
from mergekit_ext.io.fields import differences
from mergekit_ext.io.headers import TensorHeader, is_counter, read_folder, same_bytes
from mergekit_ext.io.hub import folder_of
from mergekit_ext.io.quantised import dequantised, detach
from peft_merge.io.names import LAYER
from peft_merge.layers import Unit, layers_of, owner_of, units_of

_WANTED = ("config.json", "model*.safetensors", "model.safetensors.index.json")
_FITTING = "Give the base that it was fine-tuned from, with a vocabulary of the same size."


@dataclass(frozen=True)
class FullModel:
    """A model's stored tensors: headers by stored name, or by that of a class (`named`)."""

    name: str
    revision: str | None  # on the Hub
    config: Any  # of transformers
    headers: Mapping[str, TensorHeader]

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> "FullModel":
        """Find a folder, or a name on the Hub, and read configuration and headers.

        Raises:
            ConfigError: there is none, or its files cannot be used.
        """
        text, revision = os.fspath(source), ""
        if not os.path.exists(os.path.expanduser(text)):
            text, _, revision = text.partition("@")  # as mergekit writes a revision
        given = text if isinstance(source, str) else Path(text)
        folder = folder_of(given, revision or None, _WANTED)
        config = _configuration(folder)
        headers = dequantised(read_folder(folder), detach(config), folder)
        return cls(text, revision or None, config, headers)

    def named(self, config: Any) -> "FullModel":
        """Return the same with the names of the class of a configuration."""
        names = class_names(self.headers, config)
        headers = {names.of[stored]: header for stored, header in self.headers.items()}
        return FullModel(self.name, self.revision, self.config, headers)


def _configuration(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        found = f"architectures: {getattr(config, 'architectures', None)}"
    except Exception as error:  # of any kind: whatever a class says to values that it cannot use
        config, found = None, f"what transformers does not read ({one_line(error)})"
    if config is None or empty_model(config) is None:
        expected = "a class of transformers, which says what PEFT can adapt"
        raise FileError(str(folder / "config.json"), found, expected)
    return config


@dataclass
class Plan:
    """What an extraction does.

    Attributes:
        units: in the order of the class.
        small: further tensors that both have in one shape: vectors, and what PEFT cannot adapt.
        whole: modules that are saved whole, and their tensors.
        reshaped: tensors of these that have another shape in the base.
        notes: what the user is to do beside loading the adapter.
    """

    base: FullModel
    model: FullModel
    units: list[Unit] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    whole: dict[str, list[str]] = field(default_factory=dict)
    reshaped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def biases(self) -> dict[str, Unit]:
        return {unit.bias: unit for unit in self.units if unit.bias is not None}

    def keep(self, tensors: Iterable[str]) -> list[str]:
        """Save whole what has no matrices of layers beside one of these; return those of biases."""
        biases = {name: name in self.biases for name in tensors}
        for module in dict.fromkeys(owner_of(name) for name, own in biases.items() if not own):
            inside = [unit for unit in self.units if _is_in(unit.name, module)]
            heavy = {layer.info.layout for unit in inside for layer in unit.layers}
            saved = any(_is_in(module, other) for other in self.whole)
            if module and not saved and not heavy & {"linear", "parameter"}:
                self.save(module)
        return [name for name in biases if name in self.biases]

    def save(self, module: str) -> None:
        """Save a module whole, with all that is in it."""
        self.units = [unit for unit in self.units if not _is_in(unit.name, module)]
        self.small = [name for name in self.small if not _is_in(name, module)]
        self.whole = {m: names for m, names in self.whole.items() if not _is_in(m, module)}
        self.whole[module] = [name for name in self.model.headers if _is_in(name, module)]


def _is_in(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def planned(base: FullModel, model: FullModel) -> Plan:
    """Compare two models, and say what becomes of each tensor of the second.

    Raises:
        ConfigError: with everything that an adapter of the base cannot express.
    """
    found = Plan(base.named(model.config), model.named(model.config))
    require(_sorted(found), f"an adapter of {base.name} for {model.name}")
    return found


def _sorted(plan: Plan) -> Iterator[Problem]:
    """Fill the plan; yield what no adapter expresses."""
    base, model, kind = plan.base, plan.model, empty_model(plan.model.config)
    layers, tied = layers_of(kind), getattr(kind, "all_tied_weights_keys", None) or {}
    if tied and not getattr(base.config.get_text_config(), "tie_word_embeddings", True):
        found = "a head that is tied to its embedding, and an untied one in the base"
        yield Problem("tie_word_embeddings", found, "the same in both", _FITTING)
    alike, fields = base.config.model_type == model.config.model_type, list[str]()
    for name, ours, theirs, stops in differences(model.config, base.config) if alike else ():
        if stops:
            found = f"{ours}, and {theirs} in the base"
            yield Problem(f"config.json: {name}", found, "one value in both", _FITTING)
        else:
            fields.append(f"{name} {ours} in place of {theirs}")
    if fields:
        plan.notes += [f"Set in the base's config.json what no adapter holds: {'; '.join(fields)}."]
    units, both = units_of(kind), set[str]()
    alone = {weight for unit in units for weight in unit.weights}
    other, codes, shapes, absent = list[str](), list[str](), list[str](), dict[str, None]()
    for name, own in kind.state_dict().items():
        header, known, owner = model.headers.get(name), base.headers.get(name), owner_of(name)
        if name in tied:
            continue
        if header is None or header.shape != own.shape:
            other.append(name)
        elif is_counter(name):
            continue
        elif known is None or known.shape != header.shape:
            grown = known is None or known.shape[1:] == header.shape[1:]
            if LAYER.search(name) or not owner or not grown or name in tied.values():
                there = "none" if known is None else list(known.shape)
                shapes.append(f"{name} ({list(header.shape)}, {there} in the base)")
            elif known is not None:
                plan.reshaped.append(name)
            absent[owner] = None
        elif name not in layers:
            plan.small.append(name)
        elif {header.dtype, known.dtype} - FLOATING.keys():
            codes.append(name)
        elif name in alone:
            both.add(name)
        elif not same_bytes(known, header):
            heads = [head for head, source in tied.items() if source == name]
            found = f"a change of what the class ties to {', '.join(heads)}"
            expected = "an embedding that is tied to a head alone"
            remedy = "Save both models with untied embeddings, and give those."
            yield Problem(name, found, expected, remedy)
    plan.units = [unit for unit in units if both.issuperset(unit.weights)]
    plan.small = [name for name in plan.small if name not in plan.biases]
    for owner in absent:
        plan.save(owner)
    if other:
        found = "missing, in another shape, or in another form (experts one by one)"
        yield Problem(tensors_at(other), found, f"each as in {type(kind).__name__}")
    if shapes:
        yield Problem(tensors_at(shapes), "other shapes than in the base", "the same", _FITTING)
    if codes:
        remedy = "Give both models as they were before quantisation."
        yield Problem(tensors_at(codes), "what looks quantised", ", ".join(FLOATING), remedy)
    if not plan.units and not other:
        yield Problem(model.name, "no matrix that PEFT adapts in both", "some", _FITTING)
