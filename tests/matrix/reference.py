"""What each column of the matrix should give: torch alone, in float64, on models in memory.

The definitions are those of docs/methods.md. The tensors are those of the class, whose files may
have other names, or experts one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from tests.reference import emr, nan, pcb
from tests.reference import lore as thresholding

State = Mapping[str, Tensor]
Rule = Callable[[str, Tensor, Sequence[Tensor]], Tensor]


def inverse_norms(name: str, base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """NAN of two models over a base, whose factor is 1 in the paper."""
    return nan.merge([{name: w} for w in tuned], {name: base})[name]


def task_arithmetic(name: str, base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """FlexMerge's default F, of one group of all tasks."""
    return base + 1.5 / len(tuned) * sum(w - base for w in tuned)


def low_rank(mu: float, convolutions: Collection[str]) -> Rule:
    """LoRE over a base: each difference thresholded once, kernels flattened, stacks one by one."""

    return by_matrix(lambda deltas: sum(thresholding.svt(t, mu) for t in deltas), convolutions)


def by_matrix(merge: Callable[[Sequence[Tensor]], Tensor], convolutions: Collection[str]) -> Rule:
    """Merge each matrix by itself, kernels flattened; vectors are averaged."""

    def rule(name: str, base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        if base.ndim < 2:
            return sum(tuned) / len(tuned)
        shape = (1, len(base), -1) if name in convolutions else (-1, *base.shape[-2:])
        stacks = [(w - base).reshape(shape) for w in tuned]
        merged = torch.stack([merge(matrices) for matrices in zip(*stacks, strict=True)])
        return base + merged.reshape(base.shape)

    return rule


def competing(name: str, base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """PCB-Merging at its default density and clipping, tensor by tensor."""
    return base + pcb.merge([w - base for w in tuned], 0.1, 1e-4).reshape(base.shape)


def unified(name: str, base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """The unified vector of EMR-Merging."""
    return base + emr.unified([w - base for w in tuned])


def convolutions(model: nn.Module) -> set[str]:
    """The names of the tensors of convolutions."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    inside = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, kinds))
    return {name for name in model.state_dict() if name.startswith(inside)}


def merged(rule: Rule, base: State, tuned: Sequence[State]) -> dict[str, Tensor]:
    """Apply `rule` to every tensor that floats."""
    return {
        name: rule(name, weight.double(), [state[name].double() for state in tuned])
        for name, weight in base.items()
        if weight.is_floating_point()
    }
