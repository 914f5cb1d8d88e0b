"""A merge that can start: everything is known of it but the tensors; and what a merge method is.

Rules make one adapter module by module. A whole-merge method decides over all modules together,
and may make several adapters (FlexMerge).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from mergekit_ext.core.parameters import Parameter
from mergekit_ext.errors import MergeWarning, Problem
from mergekit_ext.events import Dispatcher
from mergekit_ext.methods import Method
from peft_merge.adapter import Adapter
from peft_merge.algebra.truncated import Rank
from peft_merge.config.document import Request
from peft_merge.config.resolve import Resolver

Kind = Literal["lora", "ia3"]


class Result(Protocol):
    """What a merge gives: a report, and a way to write it."""

    @property
    def report(self) -> Mapping[str, Any]:
        """How it came about, as JSON values."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it into a folder that does not exist or is empty."""


@dataclass(frozen=True)
class WholeMethod:
    """A method with a way of its own through the modules.

    Attributes:
        name: in YAML.
        parameters: all of them, `WEIGHT` included where it has one, given the settings of the
            whole merge: some choose an algorithm with parameters of its own.
        check: yields what is wrong, before any factor is read.
        run: merges.
        check_inputs: yields what is wrong whatever the parameters are, which may be wrong, too.
    """

    name: str
    parameters: Callable[[Mapping[str, Any]], tuple[Parameter, ...]]
    check: Callable[[MergePlan], Iterable[Problem]]
    run: Callable[[MergePlan, Dispatcher], Result]
    check_inputs: Callable[[Request, Sequence[Adapter]], Iterable[Problem]] = (
        lambda request, adapters: ()
    )


AnyMethod = Method | WholeMethod


@dataclass(frozen=True)
class MergePlan:
    """A checked request.

    Attributes:
        request: what the user wrote.
        method: a merge rule or a whole-merge method.
        kind: of all adapters.
        adapters: in the user's order, their names differ.
        modules: of all adapters, in the order in which they come.
        resolve: the values of its parameters for each module.
        rank: of the output, None for the default of the method and for (IA)^3.
        patterns: whether ranks of a LoRA's modules may differ, see `peft_merge.io.merged_lora`.
        space: where it works.
        seed: of random rules.
        dtype: of the output.
        device: where is computed.
        saved: for each whole tensor of the output the positions of the adapters it is the mean of.
        notes: what a user may want to know before the merge.
        forewarnings: what the method says of its result before it is computed.
    """

    request: Request
    method: AnyMethod
    kind: Kind
    adapters: tuple[Adapter, ...]
    modules: tuple[str, ...]
    resolve: Resolver
    rank: Rank | None
    patterns: bool
    space: str
    seed: int
    dtype: torch.dtype
    device: torch.device
    saved: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    forewarnings: tuple[MergeWarning, ...] = ()

    def shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of the module's change."""
        return next(a.infos[module].shape for a in self.adapters if module in a.infos)

    def described(self) -> dict[str, Any]:
        """Return method, adapters and options as the report shows them."""
        return {
            "method": self.method.name,
            "kind": self.kind,
            "adapters": [
                {
                    "name": adapter.name,
                    "source": _source(item.source),
                    "modules": len(adapter.infos),
                }
                for adapter, item in zip(self.adapters, self.request.inputs, strict=True)
            ],
            "parameters": {
                "shared": dict(self.request.parameters),
                "each": [dict(item.parameters) for item in self.request.inputs],
            },
            "rank": self.rank if not isinstance(self.rank, Mapping) else dict(self.rank),
            "patterns": self.patterns,
            "space": self.space,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _source(source: Any) -> str | None:
    """Where an adapter was read; None for one in memory."""
    return None if hasattr(source, "infos") else str(source)
