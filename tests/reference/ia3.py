"""(IA)^3 by its definition: vectors that multiply activations, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def combine(
    vectors: Sequence[Mapping[str, Sequence[float]]], weights: Sequence[float], space: str
) -> dict[str, list[float]]:
    """The weighted sum around one, or the weighted geometric mean: absent vectors are ones."""
    merged = {}
    for name in {name for adapter in vectors for name in adapter}:
        length = next(len(adapter[name]) for adapter in vectors if name in adapter)
        columns = [adapter.get(name, [1.0] * length) for adapter in vectors]
        if space == "additive":
            merged[name] = [
                1 + sum(w * (x - 1) for w, x in zip(weights, entries, strict=True))
                for entries in zip(*columns, strict=True)
            ]
        else:
            merged[name] = [
                math.prod(x**w for w, x in zip(weights, entries, strict=True))
                for entries in zip(*columns, strict=True)
            ]
    return merged


@contextmanager
def multiplied(model: nn.Module, vectors: Mapping[str, Tensor], feedforward: set[str]) -> Any:
    """A base model (without PEFT) whose activations are multiplied while the context lasts."""
    with ExitStack() as stack:
        for name, vector in vectors.items():
            module = model.get_submodule(name)
            shape = (1, -1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)
            factor = vector.flatten().reshape(shape)
            if name in feedforward:
                hook = module.register_forward_pre_hook(
                    lambda _, args, factor=factor: (args[0] * factor.to(args[0]), *args[1:])
                )
            else:
                hook = module.register_forward_hook(
                    lambda _, args, out, factor=factor: out * factor.to(out)
                )
            stack.callback(hook.remove)
        yield


def vectors_of(model: Any, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """An adapter's vectors in a PeftModel by the base's module names; which are feedforward."""
    found, feedforward = {}, set()
    for path, module in model.base_model.model.named_modules():
        if name in getattr(module, "ia3_l", {}):
            found[path] = torch.clone(module.ia3_l[name].detach())
            feedforward |= {path} if module.is_feedforward else set()
    return found, feedforward
