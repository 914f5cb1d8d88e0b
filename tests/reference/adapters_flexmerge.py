"""FlexMerge over LoRAs as it is written: dense changes, a search over all pairs at every step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from peft_merge.adapter import LoraAdapter
from tests.reference import adapters as dense_reference

Group = tuple[int, ...]


def change(adapter: LoraAdapter, modules: Sequence[str], like: dict[str, tuple]) -> Tensor:
    """The block's change as one vector; zeros for what the adapter does not have."""
    parts = []
    for module in modules:
        shape = like[module]
        update = adapter.load(module) if module in adapter.infos else None
        parts.append(dense_reference.dense([update], shape)[0].flatten())
        bias = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
        if update is not None and update.bias is not None:
            bias = update.scale * update.bias.double()
        parts.append(bias)
    return torch.cat(parts)


def cosine(a: Tensor, b: Tensor) -> float:
    if not a.any() or not b.any():
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(a @ b / (a.norm() * b.norm()))


def stored(
    adapters: Sequence[LoraAdapter], group: Group, modules: Sequence[str], one_rank: bool = True
) -> int:
    """Bytes of float32 factors: of the largest rank of all, or of the largest in the group."""
    largest = max(info.rank for adapter in adapters for info in adapter.infos.values())
    total = 0
    for module in modules:
        infos = [adapters[i].infos[module] for i in group if module in adapters[i].infos]
        if infos:
            n, rows, columns = infos[0].shape
            rank = max(info.rank for info in infos)
            if one_rank:
                rank = largest
            elif len(group) > 1:
                rank = min(rank, rows, columns)
            total += 4 * n * rank * (rows + columns)
            total += 4 * n * rows if any(info.bias for info in infos) else 0
    return total


def groups_at(
    adapters: Sequence[LoraAdapter],
    blocks: Sequence[Sequence[str]],
    target: float,
    one_rank: bool = True,
) -> tuple[list[list[Group]], float]:
    """Groups of each block and the size in adapters: the first at most `target`."""
    like = {m: a.infos[m].shape for a in adapters for m in a.infos}
    vectors = [[change(a, modules, like) for a in adapters] for modules in blocks]
    groups: list[list[Group]] = [[(i,) for i in range(len(adapters))] for _ in blocks]

    def size() -> int:
        return sum(
            stored(adapters, group, modules, one_rank)
            for of_block, modules in zip(groups, blocks, strict=True)
            for group in of_block
        )

    unit = size() / len(adapters)
    while size() > target * unit * (1 + 1e-9):
        candidates = [
            (-min(cosine(vectors[b][i], vectors[b][j]) for i in one for j in other), b, one, other)
            for b, of_block in enumerate(groups)
            for one, other in itertools.combinations(sorted(of_block), 2)
        ]
        _, b, one, other = min(candidates)
        groups[b] = [g for g in groups[b] if g not in (one, other)] + [tuple(sorted(one + other))]
    return [sorted(of_block) for of_block in groups], size() / unit


def shared_change(
    adapters: Sequence[LoraAdapter],
    group: Group,
    module: str,
    one_rank: bool = True,
    factor: float = 1.5,
) -> Tensor:
    """The best approximation, of the rank that is stored, of `factor` times the mean."""
    infos = [adapters[i].infos[module] for i in group if module in adapters[i].infos]
    updates = [adapters[i].load(module) if module in adapters[i].infos else None for i in group]
    mean = sum(dense_reference.dense(updates, infos[0].shape)) / len(group)
    every = [info for adapter in adapters for info in adapter.infos.values()]
    rank = max(info.rank for info in (every if one_rank else infos))
    return torch.stack([dense_reference.best(factor * matrix, rank) for matrix in mean])
