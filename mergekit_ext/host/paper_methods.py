"""TSV-M, PCB-Merging and EMR's unified vector as the mergekit methods `tsv_m`, `pcb`, `emr`.

Tensor by tensor, into one model. FlexMerge uses the same kernels over blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import Field
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.host.lore_method import layout_of
from mergekit_ext.host.method import ExtMethod, raise_non_finite
from mergekit_ext.kernels import emr
from mergekit_ext.kernels.numerics import all_finite, chunks, compute_dtype
from mergekit_ext.kernels.pcb import DEFAULT_DENSITY, pcb_merge
from mergekit_ext.kernels.tsv import tsv_merge

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]

_LAMBDA = ParameterSpec(
    "lambda",
    Finite,
    ParameterScope.SHARED,
    default=1.0,
    description="factor of the merged task vector",
)
_WEIGHT = ParameterSpec("weight", Finite, ParameterScope.NON_BASE, default=1.0)


def _spec(name: str, title: str, paper: str, *parameters: ParameterSpec) -> MergeMethodSpec:
    return MergeMethodSpec(
        name=name,
        pretty_name=title,
        reference_url=paper,
        parameters=(*parameters, _LAMBDA, _WEIGHT),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )


class TaskVectorMethod(ExtMethod):
    r"""``W_0 + lambda * F(w_1 t_1, ..., w_m t_m)``, the :math:`t_i = W_i - W_0` of one tensor.

    Attributes:
        elementwise: whether each entry depends on the same entries of the inputs alone, so that
            task vectors are formed in pieces.
    """

    elementwise: ClassVar[bool] = False

    @abstractmethod
    def combine(self, deltas: Sequence[Tensor], name: str, parameters: Mapping[str, Any]) -> Tensor:
        """F: merge weighted task vectors, float32 or float64, into a new tensor."""

    def merge_one(
        self,
        group: TensorGroup,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Merge one tensor.

        Raises:
            NonFiniteError: an input holds NaN or infinity.
            MergeError: finite inputs leave the range of the dtype.
        """
        if group.base is None or not group.non_base:
            return group.entries[0].tensor.to(out_dtype), {}
        base, tensors = group.base.tensor, [entry.tensor for entry in group.non_base]
        if not self.elementwise:
            merged = self._merged(base, tensors, group, parameters).to(out_dtype)
            self._require_finite([merged], group)
            return merged, {}
        out = torch.empty(base.shape, dtype=out_dtype, device=base.device)
        flat_out, flat_base = out.view(-1), base.reshape(-1)
        flat = [tensor.reshape(-1) for tensor in tensors]
        for part in chunks(flat_base):
            pieces = [source[part] for source in flat]
            flat_out[part] = self._merged(flat_base[part], pieces, group, parameters)
        self._require_finite([out], group)
        return out, {}

    def _merged(
        self,
        base: Tensor,
        tensors: Sequence[Tensor],
        group: TensorGroup,
        parameters: Mapping[str, Any],
    ) -> Tensor:
        dtype = compute_dtype(group.tensors)
        start = base.to(dtype)
        weights = [parameters["weight"][entry.id] for entry in group.non_base]
        deltas = [
            (tensor.to(dtype) - start).mul_(weight)
            for tensor, weight in zip(tensors, weights, strict=True)
        ]
        self._require_finite(deltas, group)
        merged = self.combine(deltas, group.metadata.name or "", parameters)
        return merged.mul_(parameters["lambda"]).add_(start)

    def _require_finite(self, tensors: Sequence[Tensor], group: TensorGroup) -> None:
        if not all(map(all_finite, tensors)):
            raise_non_finite(group)
            raise MergeError(
                f"{group.metadata.name}: {self.spec.name} gives values that are not finite from "
                "finite inputs; expected values within the range of the output's dtype. Check "
                "`weight` and `lambda`, and that these models are fine-tunes of the base."
            )


class TsvMethod(TaskVectorMethod):
    """`tsv_m`: Gargiulo et al. 2025, see `mergekit_ext.kernels.tsv`."""

    spec = _spec("tsv_m", "TSV-Merge", "https://arxiv.org/abs/2412.00081")

    def copies(self, models: int, square: float) -> float:
        """Task vectors, and decompositions in float64, one for each thread."""
        at_once = min(models, torch.get_num_threads())
        return models + 10 + 12 * square + at_once * (6 + 12 * square)

    def combine(self, deltas: Sequence[Tensor], name: str, parameters: Mapping[str, Any]) -> Tensor:
        """Leading singular vectors of each task, decorrelated; vectors are averaged."""
        return tsv_merge(deltas, layout_of(name, deltas[0].ndim))


class PcbMethod(TaskVectorMethod):
    """`pcb`: Du et al. 2024, see `mergekit_ext.kernels.pcb`."""

    spec = _spec(
        "pcb",
        "PCB-Merging",
        "https://arxiv.org/abs/2410.02396",
        ParameterSpec(
            "density",
            Share,
            ParameterScope.SHARED,
            default=DEFAULT_DENSITY,
            description="share of each task vector's entries that is kept",
        ),
    )

    def copies(self, models: int, square: float) -> float:
        """Task vectors, their sum in float64, and scores in float64 that are ranked."""
        return models + 12

    def combine(self, deltas: Sequence[Tensor], name: str, parameters: Mapping[str, Any]) -> Tensor:
        """Weights from the competition of the task vectors within this tensor."""
        (merged,) = pcb_merge([[delta] for delta in deltas], parameters["density"])
        return merged


class EmrMethod(TaskVectorMethod):
    """`emr`: the unified vector of Huang et al. 2024, see `mergekit_ext.kernels.emr`."""

    spec = _spec("emr", "EMR-Merging (unified vector)", "https://arxiv.org/abs/2405.17461")
    elementwise = True

    def copies(self, models: int, square: float) -> float:
        """None: task vectors are formed in pieces."""
        return 0

    def combine(self, deltas: Sequence[Tensor], name: str, parameters: Mapping[str, Any]) -> Tensor:
        """Elected signs and largest magnitudes; one model has no masks."""
        (merged,) = emr.unified([[delta] for delta in deltas])
        return merged


PAPER_METHODS: tuple[type[TaskVectorMethod], ...] = (TsvMethod, PcbMethod, EmrMethod)
