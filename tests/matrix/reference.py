"""What each column of the matrix should give: torch alone, in float64, on models in memory.

The definitions are those of docs/methods.md. The tensors are those of the class, whose files may
have other names, or experts one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor, nn

from tests.reference import lore as thresholding
from tests.reference import nan

State = Mapping[str, Tensor]
Rule = Callable[[str, Tensor, Sequence[Tensor]], Tensor]


def inverse_norms(name: str, base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """NAN of two models over a base, whose `scale` is 1 by default."""
    return nan.merge([{name: w} for w in tuned], {name: base})[name]


def task_arithmetic(name: str, base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """FlexMerge's default F, of one group of all tasks."""
    return base + 1.5 / len(tuned) * sum(w - base for w in tuned)


def low_rank(mu: float, convolutions: Collection[str]) -> Rule:
    """LoRE over a base: each difference thresholded once, kernels flattened, stacks one by one."""

    def rule(name: str, base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        if base.ndim < 2:
            return sum(tuned) / len(tuned)
        shape = (1, len(base), -1) if name in convolutions else (-1, *base.shape[-2:])
        merged = base.clone()
        for w in tuned:
            for target, t in zip(merged.view(shape), (w - base).reshape(shape), strict=True):
                target += thresholding.svt(t, mu)
        return merged

    return rule


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
