"""What becomes of each tensor of a fine-tune, from names and shapes.

Names are those of the fine-tune's class, which an adapter uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_ext.errors import ConfigError, Problem, tensors_at
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.io.class_model import empty_model
from mergekit_ext.io.headers import TensorHeader, is_counter, same_bytes
from peft_merge.extraction.inputs import FullModel
from peft_merge.io.names import LAYER
from peft_merge.layers import Layer, configuration, layers_of

_FITTING = "Give the base that it was fine-tuned from, with a vocabulary of the same size."


@dataclass(frozen=True)
class Unit:
    """Weights that PEFT adapts with one rank.

    A matrix; an embedding and the head tied to it; or all parameters of a module of experts.

    Attributes:
        modules: by the names of PEFT's file, the weight of each and how it is adapted.
        bias: the tensor that `lora_B.bias` changes.
    """

    modules: Mapping[str, tuple[str, Layer]]
    bias: str | None = None

    @property
    def name(self) -> str:
        return next(iter(self.modules))

    @property
    def tied(self) -> bool:
        """Whether it is an embedding and a head."""
        return len({name for name, _ in self.modules.values()}) < len(self.modules)

    @property
    def layers(self) -> dict[str, Layer]:
        return {module: layer for module, (_, layer) in self.modules.items()}

    @property
    def numbers(self) -> int:
        """Of all factors, for each rank."""
        return sum(layer.numbers for layer in self.layers.values())

    @property
    def largest_rank(self) -> int:
        return max(layer.largest_rank for layer in self.layers.values())


@dataclass
class Plan:
    """What an extraction does.

    Attributes:
        units: in the order of the class.
        small: further tensors that both have in one shape: vectors, and what PEFT cannot adapt.
        whole: modules that are saved whole, and their tensors.
        reshaped: tensors of these that have another shape in the base.
    """

    base: FullModel
    model: FullModel
    units: list[Unit] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    whole: dict[str, list[str]] = field(default_factory=dict)
    reshaped: list[str] = field(default_factory=list)

    @property
    def biases(self) -> dict[str, Unit]:
        return {unit.bias: unit for unit in self.units if unit.bias is not None}

    @property
    def configuration(self) -> dict[str, Any]:
        """Fields of adapter_config.json that ranks do not decide."""
        layers = {name: layer for unit in self.units for name, layer in unit.modules.values()}
        model, base = empty_model(self.model.config), self.base
        return {**configuration(model, layers, base.name, [*self.whole]), "revision": base.revision}

    def may_save(self, module: str) -> bool:
        """Return whether a module can be saved whole without matrices of layers in it."""
        inside = [unit for unit in self.units if _is_in(unit.name, module)]
        heavy = {layer.info.layout for unit in inside for layer in unit.layers.values()}
        saved = any(_is_in(module, other) for other in self.whole)
        return bool(module) and not saved and not heavy & {"linear", "parameter"}

    def save(self, module: str) -> None:
        """Save a module whole, with all that is in it."""
        self.units = [unit for unit in self.units if not _is_in(unit.name, module)]
        self.small = [name for name in self.small if not _is_in(name, module)]
        self.whole = {m: names for m, names in self.whole.items() if not _is_in(m, module)}
        self.whole[module] = [name for name in self.model.headers if _is_in(name, module)]


def _is_in(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def tied_names(config: Any) -> Mapping[str, str]:
    """Return the tensors of a class that are others, which are stored."""
    return getattr(empty_model(config), "all_tied_weights_keys", None) or {}


def planned(base: FullModel, model: FullModel) -> Plan:
    """Compare two models, and say what becomes of each tensor of the second.

    Raises:
        ConfigError: with everything that an adapter of the base cannot express.
    """
    found = Plan(base.named(model.config), model.named(model.config))
    if problems := [*_unfit(found.model)] or [*_sorted(found)]:
        raise ConfigError(problems, f"an adapter of {base.name} for {model.name}")
    return found


def _unfit(model: FullModel) -> Iterator[Problem]:
    """Yield why a model is not what its own class loads tensor by tensor."""
    kind, tied = empty_model(model.config), tied_names(model.config)
    shapes = {name: header.shape for name, header in model.headers.items()}
    other = [n for n, t in kind.state_dict().items() if n not in tied and shapes.get(n) != t.shape]
    if other:
        found = "missing, in another shape, or in another form (experts one by one)"
        yield Problem(tensors_at(other), found, f"each as in {type(kind).__name__}")


def _sorted(plan: Plan) -> Iterator[Problem]:
    """Fill the plan; yield what no adapter expresses."""
    base, model = plan.base, plan.model
    tied = tied_names(model.config)
    if tied and not getattr(base.config.get_text_config(), "tie_word_embeddings", True):
        found = "a head that is tied to its embedding, and an untied one in the base"
        yield Problem("tie_word_embeddings", found, "the same in both", _FITTING)
    class_model = empty_model(model.config)
    layers = layers_of(class_model)
    heads: dict[str, list[str]] = {}
    for name, source in tied.items():
        heads.setdefault(source, []).append(name)
    experts: dict[str, dict[str, Layer]] = {}
    codes, shapes, absent = list[str](), list[str](), dict[str, None]()
    for name in class_model.state_dict():
        header, owner = model.headers.get(name), name.rpartition(".")[0]
        if header is None or name in tied or is_counter(name):
            continue
        known = base.headers.get(name)
        if known is None or known.shape != header.shape:
            grown = known is None or known.shape[1:] == header.shape[1:]
            if LAYER.search(name) or not owner or not grown or name in heads:
                shapes.append(f"{name} ({list(header.shape)}, {_shape(known)} in the base)")
            elif known is not None:
                plan.reshaped.append(name)
            absent[owner] = None
        elif not (layer := layers.get(name)):
            plan.small.append(name)
        elif {header.dtype, known.dtype} - FLOATING.keys():
            codes.append(name)
        elif layer.info.layout == "parameter":
            experts.setdefault(owner, {})[name] = layer
        elif name in heads:
            yield from _tie(plan, name, layer, heads[name], layers)
        else:
            bias = f"{owner}.bias" if layer.bias else None
            plan.units.append(Unit({owner: (name, layer)}, bias))
    for owner, parameters in experts.items():
        # PEFT wraps a module once for each parameter, in the order in which it has them.
        wrapped = owner + ".base_layer" * len(parameters)
        modules = {}
        for name in parameters:
            wrapped = wrapped.removesuffix(".base_layer")
            modules[wrapped] = (name, parameters[name])
        plan.units.append(Unit(modules))
    plan.small = [name for name in plan.small if name not in plan.biases]
    for owner in absent:
        plan.save(owner)
    if shapes:
        yield Problem(tensors_at(shapes), "other shapes than in the base", "the same", _FITTING)
    if codes:
        remedy = "Give both models as they were before quantisation."
        yield Problem(tensors_at(codes), "what looks quantised", ", ".join(FLOATING), remedy)
    if not plan.units:
        yield Problem(model.name, "no matrix that PEFT adapts in both", "some", _FITTING)


def _tie(
    plan: Plan, name: str, layer: Layer, heads: Sequence[str], layers: Mapping[str, Layer]
) -> Iterator[Problem]:
    """Add an embedding that is other layers, too: one head is adapted with it."""
    head = layers.get(heads[0])
    embedding = (name.rpartition(".")[0], (name, layer))
    if layer.info.layout == "embedding" and len(heads) == 1 and head is not None:
        plan.units.append(Unit(dict([embedding, (heads[0].rpartition(".")[0], (name, head))])))
    elif not same_bytes(plan.base.headers[name], plan.model.headers[name]):
        yield Problem(
            name,
            f"a change of what the class ties to {', '.join(heads)}",
            "an embedding that is tied to a head alone, which PEFT adapts with it",
            "Save both models with untied embeddings, and give those.",
        )


def _shape(header: TensorHeader | None) -> str:
    return "none" if header is None else str(list(header.shape))
