"""A base and truncated residuals, by full decompositions in float64 and one sorted list."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def matrices(tensor: Tensor, stacked: bool) -> Tensor:
    if stacked:
        return tensor.reshape(-1, *tensor.shape[-2:])
    return tensor.reshape(1, tensor.shape[0], -1)


def ranks(
    models: Sequence[State],
    theta_0: State,
    names: Sequence[str],
    stacked: Callable[[str], bool],
    budget: float,
    itemsize: int = 4,
) -> dict[tuple[int, str], int]:
    """Triplets of all tasks and tensors in the order of sigma^2 over their bytes, until one does
    not fit; then the best that still fit.
    """
    offered = []
    for name in names:
        for task, model in enumerate(models):
            stack = matrices(model[name].double() - theta_0[name].double(), stacked(name))
            cost = len(stack) * sum(stack.shape[1:]) * itemsize
            squares = torch.linalg.svdvals(stack).square().sum(0).tolist()
            offered += [(square / cost, cost, task, name, k) for k, square in enumerate(squares)]
    found: dict[tuple[int, str], int] = {}
    offered.sort(key=lambda entry: -entry[0])
    for _, cost, task, name, k in offered:
        if cost <= budget and found.get((task, name), 0) == k:
            found[task, name] = k + 1
            budget -= cost
    return found


def restored(model: Tensor, theta_0: Tensor, rank: int, stacked: bool) -> Tensor:
    residual = model.double() - theta_0.double()
    u, sigma, vh = torch.linalg.svd(matrices(residual, stacked), full_matrices=False)
    cut = (u[..., :rank] * sigma[:, None, :rank]) @ vh[:, :rank]
    return theta_0.double() + cut.reshape(math.prod(theta_0.shape)).view(theta_0.shape)
