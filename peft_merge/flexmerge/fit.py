"""Check that adapters fit a live base model, before PEFT changes the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mergekit_ext.errors import ConfigError, MergekitExtError, Problem, listing
from peft_merge.adapter import Adapter, ModuleInfo
from peft_merge.io.names import Targets, unwrapped
from peft_merge.matching import Shape, orientations

_SUBJECT = "loading these tasks"
_REMEDY = "Load the model that the adapters were trained on, with the class that they were."


def require_base(base_model: Any) -> None:
    """Raise for what is no model, and for a model that has adapters.

    Raises:
        TypeError, ConfigError: as said.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(base_model, nn.Module):
        raise TypeError(
            f"base_model: found {type(base_model).__name__}; expected the model itself, as "
            "from_pretrained of transformers loads it."
        )
    layers = (isinstance(module, BaseTunerLayer) for module in base_model.modules())
    if isinstance(base_model, PeftModel) or any(layers):
        found, remedy = "a model that has adapters already", "Pass the base model."
        raise ConfigError([Problem("base_model", found, "one without", remedy)], _SUBJECT)


def require_fit(adapters: Sequence[Adapter], base_model: nn.Module) -> None:
    """Compare names and shapes of all that the adapters change or replace with the model's.

    Raises:
        ConfigError: with what does not fit, by adapter.
    """
    modules = dict(base_model.named_modules())
    held = {name: tuple(value.shape) for name, value in _tensors(base_model)}
    problems: list[Problem] = []
    for adapter in adapters:
        where = f"adapter {adapter.name}"
        # Replicated and tied layers have names that only PEFT knows.
        config = adapter.config
        if not config.get("layer_replication") and not config.get("ensure_weight_tying"):
            problems += _adapted(adapter, modules, where)
            problems += _replaced(adapter, held, where)
    if problems:
        raise ConfigError(problems, _SUBJECT)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Undo what PEFT did to a model if it fails: a module that was wrapped is itself again.

    Raises:
        ConfigError: for an error that is not the project's own.
    """
    children = [(each, dict(each._modules), each.training) for each in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own = dict(vars(model))
    try:
        yield
    except BaseException as error:
        for module, before, training in children:
            module._modules.clear()
            module._modules.update(before)
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for name in vars(model).keys() - own.keys():
            del vars(model)[name]
        vars(model).update(own)
        if isinstance(error, MergekitExtError) or not isinstance(error, Exception):
            raise
        said = (str(error).splitlines() or [""])[0]
        found = f"a model that PEFT does not take ({type(error).__name__}: {said})"
        problem = Problem("base_model", found, "the base of these adapters", _REMEDY)
        raise ConfigError([problem], _SUBJECT) from error


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _adapted(adapter: Adapter, modules: Mapping[str, nn.Module], where: str) -> Iterator[Problem]:
    missing, others = [], []
    targets = Targets(adapter.config)
    for name, info in adapter.infos.items():
        module = modules.get(name, modules.get(unwrapped(name)))
        if module is None:
            missing.append(name)
            continue
        shapes = _shapes(adapter, targets, unwrapped(name), module)
        if shapes and not any(_fits(info, shape, module) for shape in shapes):
            shown = " or ".join(str(list(shape)) for shape in shapes)
            others.append(f"{name} (a change of {list(info.shape)}, a weight of {shown})")
    if missing:
        found = f"adapted modules that the model lacks: {listing(missing)}"
        yield Problem(where, found, "modules of the model", _REMEDY)
    if others:
        found = f"adapted modules of another shape: {listing(others, 2)}"
        yield Problem(where, found, "the shapes of the model", _REMEDY)


def _shapes(adapter: Adapter, targets: Targets, owner: str, module: nn.Module) -> list[Shape]:
    """Return the shapes that an adapted weight may have; none where packed weights hide them."""
    info = adapter.infos.get(owner)
    if isinstance(info, ModuleInfo) and info.layout == "convolution" and info.matrices > 1:
        return []  # of groups, in factors that are not
    leaves = targets.parameters(owner) or ["weight", "in_proj_weight"]
    weights = [getattr(module, leaf, None) for leaf in leaves]
    found = [
        tuple(weight.shape)
        for weight in weights
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() > 1
    ]
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if found or not all(isinstance(size, int) for size in sizes):
        return list(found)
    return [sizes]  # type: ignore[list-item]


def _fits(info: Any, shape: Shape, module: nn.Module) -> bool:
    ways = orientations(info, shape)
    return False in ways if isinstance(module, nn.Linear) else bool(ways)


def _replaced(adapter: Adapter, held: Mapping[str, Shape], where: str) -> Iterator[Problem]:
    """Yield what does not fit of whole tensors: heads, embeddings."""
    missing = [name for name in adapter.saved if name not in held]
    others = []
    for name in adapter.saved.keys() & held.keys():
        shape = tuple(adapter.saved[name]().shape)
        packed = len(shape) != len(held[name])
        if shape != held[name] and not packed:
            others.append(f"{name} ({list(shape)}, in the model {list(held[name])})")
    if missing:
        found = f"whole tensors that the model lacks: {listing(missing)}"
        yield Problem(where, found, "tensors of the model", _REMEDY)
    if others:
        found = f"whole tensors of another shape: {listing(sorted(others), 2)}"
        yield Problem(where, found, "the shapes of the model", _REMEDY)
