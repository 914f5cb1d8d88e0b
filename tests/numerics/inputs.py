"""Inputs at the edges of what numbers can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAME = "w"
State = dict[str, Tensor]


def drawn(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(shape, generator=generator, dtype=torch.float64)


def tuned(
    shape: Sequence[int] = (6, 5),
    count: int = 3,
    size: float = 0.1,
    base: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[State, list[State]]:
    """A base of entries near `base`, and models whose task vectors have entries near `size`."""
    start = drawn(*shape, seed=0, size=base)
    models = [start + drawn(*shape, seed=1 + i, size=size) for i in range(count)]
    return {NAME: start.to(dtype)}, [{NAME: model.to(dtype)} for model in models]


def filled(value: float, count: int = 3, dtype: torch.dtype = torch.float32) -> list[State]:
    return [{NAME: torch.full((6, 5), value, dtype=dtype)} for _ in range(count)]


def with_zeros(state: State) -> State:
    """The same with zeros of both signs in it."""
    tensor = state[NAME].clone()
    tensor.reshape(-1)[:6] = torch.tensor([-0.0, -0.0, -0.0, 0.0, 0.0, 0.0])
    return {NAME: tensor}


def same_but_negative_zeros(found: Tensor, wanted: Tensor) -> bool:
    """Whether tensors are the same bit by bit, once -0.0 is 0.0 in `wanted`."""
    plain = torch.where(wanted == 0, torch.zeros_like(wanted), wanted)
    return torch.equal(found, plain) and torch.equal(found.signbit(), plain.signbit())


def spoilt(state: State, value: float) -> State:
    tensor = state[NAME].clone()
    tensor.reshape(-1)[3] = value
    return {NAME: tensor}


def factors(
    size: float = 1.0,
    rows: int = 6,
    columns: int = 5,
    count: int = 3,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor]]:
    """A and B of LoRAs of rank 2 or of as much as fits."""
    rank = max(1, min(2, rows, columns))
    return [
        (
            drawn(rank, columns, seed=2 * i, size=size).to(dtype),
            drawn(rows, rank, seed=2 * i + 1, size=size).to(dtype),
        )
        for i in range(count)
    ]


def vectors(
    size: float = 0.1, length: int = 7, dtype: torch.dtype = torch.float32, count: int = 3
) -> list[Tensor]:
    """(IA)^3 vectors: 1 and changes of entries near `size`."""
    return [(1 + drawn(1, length, seed=i, size=size)).to(dtype) for i in range(count)]
