"""What FlexMerge needs to know of a kind of adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from mergekit_ext.methods import ADAPTERS, Method, Settings
from peft_merge.adapter import Adapter
from peft_merge.config.plan import MergePlan

V = TypeVar("V")
I = TypeVar("I")  # noqa: E741

Group = tuple[int, ...]


@dataclass(frozen=True)
class Piece(Generic[V, I]):
    """What is stored of one module for one group.

    Attributes:
        value: the update or the vector.
        info: what it is.
        details: of the merge, for the report; empty for one task's own.
    """

    value: V
    info: I
    details: Mapping[str, Any] = field(default_factory=dict)


class Family(Protocol):
    """One kind of adapter: its inner products, its bytes, its merge. Tasks go by their index.

    Inner products, merges and a task's own changes may be asked for by several threads.
    """

    @property
    def small(self) -> bool:
        """Whether blocks may be merged side by side, as none of them needs much memory."""

    def gram(self, module: str) -> Tensor:
        """Inner products of the m changes of a module: (m, m), float64, symmetric."""

    def bytes(self, modules: Sequence[str], group: Group) -> int:
        """Bytes of the tensors stored for a block that these tasks share."""

    def merge(self, modules: Sequence[str], group: Group) -> dict[str, Piece[Any, Any]]:
        """One change for two or more tasks, of each module that one of them has."""

    def own(self, modules: Sequence[str], task: int) -> dict[str, Piece[Any, Any]]:
        """A task's own changes of the modules that it has, in their stored values."""

    def adapter(
        self, task: int, pieces: Mapping[str, Piece[Any, Any]], shared: Collection[str]
    ) -> Adapter:
        """The task's adapter.

        Args:
            task: its index.
            pieces: of all modules of the adapter.
            shared: the modules whose pieces are merged ones.
        """


def settings_of(
    plan: MergePlan,
    rule: Method,
    module: str,
    group: Group,
    coefficients: Sequence[float] | None,
) -> Settings:
    """The rule's parameters for some of the adapters, NAN's coefficients multiplied in."""
    values = plan.resolve(module)
    shared = {p.name for p in rule.for_driver(ADAPTERS) if not p.per_model}
    weights = [values.weights[i] for i in group]
    if coefficients is not None:
        weights = [a * weight for a, weight in zip(coefficients, weights, strict=True)]
    return replace(
        values,
        weights=weights,
        options={name: value for name, value in values.options.items() if name in shared},
        each=[values.each[i] for i in group],
    )
