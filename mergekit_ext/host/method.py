"""What the project's merge methods have in common, beyond mergekit's `MergeMethod`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mergekit import merge_methods
from mergekit.merge_methods.base import BatchOptions, MergeMethod, TensorGroup
from mergekit.merge_methods.dtype import align_dtype, promoted_dtype

from mergekit_ext.errors import MergeWarning, NonFiniteError, Problem
from mergekit_ext.host import session as sessions
from mergekit_ext.host.session import Session, TensorRecord
from mergekit_ext.kernels.numerics import count_non_finite
from mergekit_ext.methods import Inputs, Merged, Method
from mergekit_ext.report.card import solver_section

if TYPE_CHECKING:
    from mergekit_ext.host.checks.report import CheckReport

# Declares no check, no warning and no memory.
_PLAIN = Method("", "", "", lambda tensors, call: Merged(tensors[0]))


class ExtMethod(MergeMethod):
    """A merge method that merges one group at a time, and reports on it.

    Subclasses implement `merge_one`; checks, warnings and memory are those of `declared`.
    `problems` and `notes` are asked before any weight is read, `warnings` after the last tensor.
    Results carry no gradient.
    """

    declared: Method = _PLAIN

    @abstractmethod
    def merge_one(
        self,
        group: TensorGroup,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """Merge one group; return the tensor in `out_dtype`, and what to report about it."""

    def problems(self, options: Mapping[str, Any], inputs: Inputs) -> Iterable[Problem]:
        """Return what is wrong with the shared parameters that a tensor gets, taken together."""
        return self.declared.check(options, inputs)

    def input_problems(self, values: Mapping[str, Any]) -> Iterable[Problem]:
        """Return what is wrong with parameters of one model, sound by themselves, together.

        A problem's `where` is the name of one.
        """
        return self.declared.check_each(values)

    def forewarnings(self, options: Mapping[str, Any], inputs: Inputs) -> Iterable[MergeWarning]:
        """Return what is worth a warning before the merge starts."""
        return self.declared.forewarn(options, inputs)

    def notes(self, options: Mapping[str, Any], inputs: Inputs) -> Iterable[str]:
        """Return what `mergekit-ext check` reports of a merge that can be done."""
        return map(str, self.forewarnings(options, inputs))

    def passes(self, shared: Mapping[str, Any]) -> int:
        """Return how many times the merge reads each input tensor."""
        return 1

    def copies(self, models: int, square: float) -> float:
        """Return how many copies of a tensor `merge_one` holds; arguments as `memory.working`."""
        return self.declared.copies(models, square)

    def warnings(self, records: Sequence[TensorRecord]) -> Iterable[MergeWarning]:
        """Return what a user should know about a finished merge."""
        return self.declared.after(self.spec.name, {r.name: r.details for r in records})

    def summary(self, records: Sequence[TensorRecord]) -> str:
        """Return Markdown for the model card about a finished merge; empty if there is nothing."""
        return solver_section({r.name: r.details for r in records})

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        running = sessions.current()
        session = running or Session()
        results = []
        bound = zip(groups, parameters, input_dtypes, strict=True)
        for index, (group, values, dtype) in enumerate(bound):
            if dtype is None:
                raise ValueError(f"{self.spec.name}: group {index} has no tensors to merge")
            if dtype != promoted_dtype(group):
                group = align_dtype(group, dtype)
            device = group.entries[0].tensor.device.type
            with torch.no_grad(), torch.autocast(device, enabled=False):
                merged, details = self.merge_one(group, values, out_dtype or dtype)
            name = group.metadata.name or f"group {index}"
            session.record(TensorRecord(name, merged.numel(), details))
            results.append(merged)
        if running is None:
            session.warn(self.warnings(session.records))
        return tuple(results)


class WholeModelMethod(ExtMethod):
    """A merge method that does not go tensor by tensor through mergekit's planner and executor."""

    @abstractmethod
    def prepare(
        self,
        config: Any,
        options: Any,
        source: str | Mapping[str, Any] | None = None,
        pending: Collection[str] = (),
    ) -> tuple[CheckReport, Any]:
        """Do what `checks.merge.check_merge` does for other methods; arguments as there.

        Returns the report, and what `write` needs; None if it cannot start.
        """

    @abstractmethod
    def write(self, prepared: Any, config: Any, folder: Path, options: Any, source: str) -> None:
        """Merge into `folder`, which becomes the output, with its model card; inside of a session.

        `prepared` is from `prepare`, `source` the configuration's text. The folder is empty, or as
        an earlier merge of the same inputs has left it, perhaps under another configuration: what
        the session's journal has as finished is continued.
        """


def raise_non_finite(group: TensorGroup) -> None:
    """Name the input that holds NaN or infinity; return if none does."""
    name = group.metadata.name or "a tensor"
    for entry in group.entries:
        if count := count_non_finite(entry.tensor):
            raise NonFiniteError(name, str(entry.id), count, entry.tensor.numel())


def is_stock(name: str) -> bool:
    """Return whether mergekit itself, or another plug-in, has registered a method called `name`."""
    return ext_method(name) is None and any(
        known.spec.name == name for known in merge_methods.registered_methods()
    )


def ext_method(name: str) -> ExtMethod | None:
    """Return the project's method called `name`; None for mergekit's own and for unknown names."""
    for method in merge_methods.registered_methods():
        if method.spec.name == name and isinstance(method, ExtMethod):
            return method
    return None
