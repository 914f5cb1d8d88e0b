"""The weights of a model's class that PEFT adapts exactly, from its modules on the meta device.

A LoRA acts where a module is called. So what overrides `forward` is none, nor is what the class's
code uses without calling it (the projection of torch's MultiheadAttention, relative positions of
DeBERTa, dt_proj of Mamba) or in ways that PEFT's layers lack (the stride of Whisper's
convolutions); nor are convolutions with groups, with dilation (PEFT's have none) or with other
padding than zeros.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from inspect import getsource, isfunction
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mergekit_ext.errors import join
from peft_merge.adapter import LayoutName, ModuleInfo, Shape

# By the end of a class's name. PEFT expects a classifier that is saved whole with other tasks.
_LANGUAGE = ("ForCausalLM", "LMHeadModel")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TIED = ["embedding", "linear"]
# Uses of a module beside calling it: what makes it no layer, and what is no use of a tensor.
_BESIDE = (
    "bias|stride|kernel_size|padding|padding_idx|dilation|num_embeddings|embedding_dim"
    "|in_channels|out_channels"
)
_ASKED = r"\b(?!\.(?:dtype|device|shape)\b| = )"


@dataclass(frozen=True)
class Layer:
    """How PEFT adapts one weight.

    Attributes:
        info: of a change of rank 1.
        transposed: whether the weight is stored as (columns, rows).
        bias: whether the module has a bias that `lora_B.bias` may change.
    """

    info: ModuleInfo
    transposed: bool = False
    bias: bool = False

    def matrices(self, weight: Tensor) -> Tensor:
        """Return a weight, or a difference of two, as stacked matrices: (n, rows, columns)."""
        count, rows, columns = self.info.shape
        if self.transposed:
            return weight.reshape(count, columns, rows).mT
        return weight.reshape(count, rows, columns)


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
    def weights(self) -> list[str]:
        return [*dict.fromkeys(name for name, _ in self.modules.values())]

    @property
    def tied(self) -> bool:
        """Whether it is an embedding and a head."""
        return len(self.weights) < len(self.modules)

    @property
    def layers(self) -> list[Layer]:
        return [layer for _, layer in self.modules.values()]

    @property
    def numbers(self) -> int:
        """Of all factors, for each rank."""
        return sum(layer.info.numbers for layer in self.layers)

    @property
    def largest_rank(self) -> int:
        return max(layer.info.largest_rank for layer in self.layers)


def owner_of(name: str) -> str:
    """Return the module of a parameter."""
    return name.rpartition(".")[0]


def units_of(model: Any) -> list[Unit]:
    """Return what PEFT adapts exactly in a model; of tied weights an embedding with one head."""
    layers, tied = layers_of(model), getattr(model, "all_tied_weights_keys", None) or {}
    units, experts = list[Unit](), dict[str, dict[str, Layer]]()
    for name, layer in layers.items():
        owner, heads = owner_of(name), [head for head, source in tied.items() if source == name]
        if layer.info.layout == "parameter":
            experts.setdefault(owner, {})[name] = layer
        elif not heads and name not in tied:
            units.append(Unit({owner: (name, layer)}, f"{owner}.bias" if layer.bias else None))
        elif [n in layers and layers[n].info.layout for n in (name, *heads)] == _TIED:
            (head,) = heads
            units.append(Unit({owner: (name, layer), owner_of(head): (name, layers[head])}))
    for owner, parameters in experts.items():
        # PEFT wraps a module once for each parameter, in the order in which it has them.
        wraps = reversed(range(len(parameters)))
        names = [owner + ".base_layer" * count for count in wraps]
        units.append(Unit(dict(zip(names, parameters.items(), strict=True))))
    return units


def layers_of(model: Any) -> dict[str, Layer]:
    """Return what PEFT adapts exactly in a model, by the names of its parameters."""
    modules = dict(model.named_modules())
    return {
        join(name, leaf): layer
        for name, module in modules.items()
        if _only_called(type(modules[owner_of(name)]), name.rpartition(".")[2])
        for leaf, layer in _of_module(module, name.rpartition(".")[2])
    }


def config_of(model: Any, units: Sequence[Unit], base: str, saved: Sequence[str]) -> dict[str, Any]:
    """Return the fields of adapter_config.json that modules and ranks do not decide.

    Of units of `model`, and of modules that are `saved` whole.
    """
    layers = dict(pair for unit in units for pair in unit.modules.values())
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith(_LANGUAGE) else None,
        "modules_to_save": [*saved] or None,
        "target_parameters": [n for n, of in layers.items() if of.info.layout == "parameter"],
        "fan_in_fan_out": any(
            layer.transposed and layer.info.layout == "linear" for layer in layers.values()
        ),
        "ensure_weight_tying": any(unit.tied for unit in units),
    }


def _of_module(module: nn.Module, name: str) -> Iterator[tuple[str, Layer]]:
    from transformers.pytorch_utils import Conv1D

    weight: Any = getattr(module, "weight", None)
    bias = getattr(module, "bias", None) is not None
    if "expert" in name:
        transposed = bool(getattr(module, "is_transposed", False))
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] > 1:
                yield leaf, _layer("parameter", tuple(parameter.shape), transposed)
    elif _calls(module, nn.Embedding) or (
        isinstance(module, nn.Embedding)
        and isinstance(getattr(module, "embed_scale", None), Tensor)
    ):
        if module.max_norm is None:
            yield "weight", _layer("embedding", (1, *weight.shape), True)
    elif _calls(module, nn.Linear, Conv1D):
        yield "weight", _layer("linear", (1, *weight.shape), isinstance(module, Conv1D), bias)
    elif _calls(module, *_CONVOLUTIONS):
        plain = module.groups == 1 and {*module.dilation} == {1}
        if plain and module.padding_mode == "zeros":
            rows, kernel = weight.shape[0], tuple(weight.shape[2:])
            shape = (1, rows, math.prod(weight.shape[1:]))
            yield "weight", _layer("convolution", shape, False, bias, kernel)


def _only_called(owner: type, name: str) -> bool:
    """Return whether the code of a class uses its module `name` as PEFT's layers can be used."""
    code, module = _code(owner), rf"\bself\.{name}"
    if re.search(rf"{module}\.(?:{_BESIDE}){_ASKED}", code):
        return False
    return f"self.{name}(" in code or not re.search(rf"{module}\.weight{_ASKED}", code)


@cache
def _code(kind: type) -> str:
    """Return the source of the methods of a class, but for those that make it."""
    found = list[str]()
    for owner in kind.__mro__:
        for name, function in vars(owner).items() if owner.__module__ == kind.__module__ else ():
            if isfunction(function) and "init" not in name:
                with suppress(OSError):
                    found.append(getsource(function))
    return "".join(found)


def _calls(module: nn.Module, *kinds: Any) -> bool:
    """Return whether a module computes what one of `kinds` does."""
    own = type(module)
    return own is not NonDynamicallyQuantizableLinear and any(
        isinstance(module, kind) and own.forward is kind.forward for kind in kinds
    )


def _layer(
    layout: LayoutName, stored: Shape, transposed: bool, bias: bool = False, kernel: Shape = ()
) -> Layer:
    count, rows, columns = stored
    if transposed:
        rows, columns = columns, rows
    return Layer(ModuleInfo(layout, count, rows, columns, 1, kernel), transposed, bias)
