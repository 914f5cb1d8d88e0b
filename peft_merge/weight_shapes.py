"""Which way round a base weight is stored, from its shape and from its module's class.

torch's Linear stores (out, in); Conv1D of GPT-2 and embeddings the transpose; a target parameter
of experts either. Shapes tell unless a weight is square. For square ones the class decides, as it
does in PEFT: `fan_in_fan_out` in an adapter's file is that of the layer that PEFT adapted last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch

from peft_merge.adapter import ModuleInfo, VectorInfo

Shape = Sequence[int]


@singledispatch
def orientations(info: ModuleInfo | VectorInfo, shape: Shape) -> frozenset[bool]:
    """How a weight of this shape can be what the module adapts.

    Returns:
        False in it: as the change is written, (rows, columns); True in it: transposed. Both for
        a square weight, empty for a shape that does not fit.
    """
    raise TypeError(type(info).__name__)


@orientations.register
def _lora(info: ModuleInfo, shape: Shape) -> frozenset[bool]:
    plain, transposed = _stored(info)
    size = tuple(shape)
    return frozenset(way for way, those in ((False, plain), (True, transposed)) if size in those)


@orientations.register
def _ia3(info: VectorInfo, shape: Shape) -> frozenset[bool]:
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


def _stored(info: ModuleInfo) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes in which the weight of a LoRA may be stored: plain ones, transposed ones."""
    count, rows, columns = info.shape
    if info.layout == "convolution":
        area = math.prod(info.kernel)
        # One with groups in its factors is no convolution: B mixes what A took from all inputs.
        return ([(rows, columns // area, *info.kernel)] if count == 1 else []), []
    if info.layout == "embedding":
        return [], [(columns, rows)]
    if info.layout == "linear":
        return [(rows, columns)], [(columns, rows)]
    plain: list[tuple[int, ...]] = [(count, rows, columns)]
    if count == 1:
        # PEFT takes every two-dimensional parameter as (out, in).
        plain.append((rows, columns))
    return plain, [(count, columns, rows)]
