"""Models of a few tensors, in memory, for the parts of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.declared import BLOCKS, methods
from mergekit_ext.flexmerge.algorithm import Declared, Parameters
from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.source import BlockReader, Source
from mergekit_ext.host.flexmerge.shared_tensors import laid_out
from mergekit_ext.io.headers import TensorHeader, dtype_name

State = Mapping[str, Tensor]


def algorithm(
    name: str,
    count: int,
    shared: Mapping[str, Any] | None = None,
    scope: str = "block",
    **each: Sequence[Any],
) -> Declared:
    """An algorithm for `count` tasks, with defaults for what is not given."""
    method = methods(BLOCKS)[name]
    full = {p.name: (shared or {}).get(p.name, p.default) for p in method.for_driver(BLOCKS)}
    models = [{k: each[k][i] if k in each else full[k] for k in full} for i in range(count)]
    return Declared(method, Parameters(full, models, scope))


def headers(state: State) -> dict[str, TensorHeader]:
    return {
        name: TensorHeader(name, dtype_name(t.dtype), tuple(t.shape), t.numel() * t.element_size())
        for name, t in state.items()
    }


def layout(base: State, models: Sequence[State], granularity: str = "component") -> Layout:
    """Blocks are modules: "mlp.up" is in block "mlp"."""
    tasks = [f"task{index}" for index in range(len(models))]
    return layout_of(tasks, list(map(headers, (base, *models))), granularity=granularity)


def layout_of(
    tasks: Sequence[str], owners: Sequence[Mapping[str, TensorHeader]], **given: Any
) -> Layout:
    """The layout of a base, which comes first, and the models of `tasks`."""
    parameters = {"heads": "private", "granularity": "component", **given}
    stored = [(tensors, None) for tensors in owners]
    return laid_out(tasks, ["base", *tasks], stored, parameters)[0]


def reader(
    base: State, models: Sequence[State], device: str = "cpu", granularity: str = "component"
) -> BlockReader:
    sources = [source(f"model{index}", model) for index, model in enumerate(models)]
    return BlockReader(layout(base, models, granularity), source("base", base), sources, device)


def source(name: str, state: State) -> Source:
    return Source(name, headers(state), state.__getitem__)


SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (11, 6),
    "attention.q": (6, 6),
    "attention.k": (4, 6),
    "attention.bias": (6,),
    "mlp.up": (9, 6),
    "mlp.down": (6, 9),
    "norm.weight": (6,),
    "gate.scale": (),
    "grid.weight": (4, 2, 3, 1),
    "grid.experts": (2, 4, 3),
}


def family(
    count: int,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: Callable[[int], torch.dtype] = lambda task: torch.float32,
    scale: float = 0.1,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base, and models that move from it together and apart. Task -1 of `dtype` is the base."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: Sequence[int]) -> Tensor:
        return torch.randn(math.prod(shape), generator=generator).reshape(tuple(shape))

    base = {name: drawn(shape) for name, shape in shapes.items()}
    common = {name: drawn(shape) for name, shape in shapes.items()}
    models = []
    for task in range(count):
        own = {n: b + scale * (common[n] + drawn(b.shape)) for n, b in base.items()}
        models.append({n: t.to(dtype(task)) for n, t in own.items()})
    return {n: t.to(dtype(-1)) for n, t in base.items()}, models
