"""FlexMerge's Algorithm 1 as it is written: at each step a search over all blocks and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

Step = tuple[int, tuple[int, ...], tuple[int, ...], float]


def gram(tensors: Sequence[Sequence[Tensor]], base: Sequence[Tensor] | None) -> Tensor:
    """Inner products of whole blocks; ``tensors[k]`` are the tensors of task k."""
    vectors = []
    for task in tensors:
        parts = [t.double() - (base[i].double() if base else 0.0) for i, t in enumerate(task)]
        vectors.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack([torch.stack([(a * b).sum() for b in vectors]) for a in vectors])


def similarity(cosines: Tensor, first: Sequence[int], second: Sequence[int], linkage: str) -> float:
    """Equation 1, and its variants, over all pairs; the mean is exact before it is rounded."""
    values = [float(cosines[i, j]) for i in first for j in second]
    if linkage == "average":
        return float(sum(map(Fraction, values)) / len(values))
    return {"min": min, "max": max}[linkage](values)


def merge_steps(blocks: Sequence[Tensor], linkage: str, order: str) -> list[Step]:
    """Every step of Algorithm 1: the block, the two groups and their similarity."""
    groups = [[(task,) for task in range(len(cosines))] for cosines in blocks]
    steps = []
    while any(len(of_block) > 1 for of_block in groups):
        open_blocks = [b for b, of_block in enumerate(groups) if len(of_block) > 1]
        if order == "left_to_right":
            open_blocks = open_blocks[:1]
        elif order == "right_to_left":
            open_blocks = open_blocks[-1:]
        candidates = []
        for block in open_blocks:
            for first in groups[block]:
                for second in groups[block]:
                    if min(first) < min(second):
                        value = similarity(blocks[block], first, second, linkage)
                        candidates.append((-value, block, min(first), min(second), first, second))
        negated, block, _, _, first, second = min(candidates)
        groups[block] = [g for g in groups[block] if g not in (first, second)]
        groups[block].append(tuple(sorted(first + second)))
        steps.append((block, first, second, -negated))
    return steps
