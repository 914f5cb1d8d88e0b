"""Graph tasks: one tensor measured, one tensor merged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_ext.errors import MergeError, NonFiniteError, printable
from mergekit_ext.events import TensorMeasured, TensorMerged
from mergekit_ext.host import session as sessions
from mergekit_ext.host.method import ext_method
from mergekit_ext.host.nan_method import NanMethod
from mergekit_ext.io.headers import is_counter
from mergekit_ext.kernels.numerics import count_non_finite
from mergekit_ext.kernels.seeds import derived, seeded


class MergeTensorTask(ExecuteMergeMethodTask):
    """mergekit's task, which also emits an event when a tensor is done.

    What is random in it depends on `seed` and the tensor's name alone: not on which tensors were
    merged before, in which process. Counters of training are those of the base, or else of the
    first model.
    """

    seed: int = 0

    def execute(
        self, tensors: dict[ModelReference, torch.Tensor], **_kwargs: Any
    ) -> torch.Tensor | None:
        """See mergekit's.

        Raises:
            MergeError: tensors without a mean, which are copied, differ.
        """
        started = time.perf_counter()
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        if is_counter(self.output_weight.name) and tensors:
            order = (self.base_model, *self.model_order)
            tensors = dict.fromkeys(tensors, next(tensors[m] for m in order if m in tensors))
        with seeded(derived(self.seed, self.output_weight.name), device):
            try:
                merged: torch.Tensor | None = super().execute(tensors)
            except ValueError:
                _require_same_copied(self.output_weight.name, tensors)
                raise
        session = sessions.current()
        if session is not None:
            name = self.output_weight.name
            shape = () if merged is None else tuple(merged.shape)
            seconds = time.perf_counter() - started
            session.emit(TensorMerged(name, shape, session.details(name), seconds))
        return merged


def _require_same_copied(name: str, tensors: Mapping[ModelReference, torch.Tensor]) -> None:
    """Refuse what mergekit stops at with an error of its own, without saying in which models."""
    (first, start), *others = tensors.items()
    if all(tensor.is_floating_point() for tensor in tensors.values()):
        return
    for model, tensor in tensors.items():
        if tensor.is_complex() and (count := count_non_finite(tensor)):
            raise NonFiniteError(name, str(model), count, tensor.numel())
    for model, tensor in others:
        if tensor.dtype != start.dtype or not torch.equal(tensor, start):
            raise MergeError(
                f"{printable(name)}: found different values of {start.dtype} in {first} and "
                f"{model}; expected the same ones, because they have no mean and are copied. Save "
                "the models with the same values, or take one out of the merge."
            )


class MeasureTensorTask(Task[dict[str, float]]):
    """The norms of one tensor's inputs, for `nan` with granularity block or model.

    The result is a mapping of plain numbers: the executor moves it nowhere, and a statistics
    graph has no task that joins tensors, so that several GPUs can share it.
    """

    method_name: str
    gather_tensors: Any
    model_order: tuple[ModelReference, ...]
    base_model: ModelReference | None
    tensor: str
    parameters: ImmutableMap[str, Any]

    def arguments(self) -> dict[str, Task]:
        return {"tensors": self.gather_tensors}

    def group_label(self) -> str | None:
        return self.gather_tensors.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, tensors: dict[ModelReference, torch.Tensor]) -> dict[str, float]:
        method = ext_method(self.method_name)
        present = [(m, tensors[m]) for m in self.model_order if tensors.get(m) is not None]
        norms: dict[str, float] = {}
        # Without the base's tensor there is no task vector: the merge passes such a tensor on.
        floating = all(tensor.is_floating_point() for _, tensor in present)
        based = self.base_model is None or tensors.get(self.base_model) is not None
        if isinstance(method, NanMethod) and floating and (based or method.ignores_base):
            entries = tuple(
                TensorEntry(id=model, tensor=tensor, is_base=model == self.base_model)
                for model, tensor in present
            )
            group = TensorGroup(entries=entries, metadata=TensorMetadata(name=self.tensor))
            group.validate_tensors()
            measured = method.norms(group, dict(self.parameters.items()))
            norms = {str(model): norm for model, norm in measured.items()}
        session = sessions.current()
        if session is not None:
            session.emit(TensorMeasured(self.tensor))
        return norms
