"""Average, and task arithmetic as FlexMerge uses it: the mean task vector, times lambda."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.flexmerge.algorithms.base import Algorithm, Cuts, Option, Piece
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.kernels.task_arithmetic import add_task_vectors, nested_sums

Factor = Annotated[float, Field(ge=-1e6, le=1e6)]
# Entries of all groups' vectors that are made at once: 64 MB in float32.
_PIECE = 1 << 24

WEIGHT = Option("weight", Factor, 1.0, "multiplies the model's task vector", per_model=True)


class Linear(Algorithm):
    """Algorithms whose merged vector is W_0 + c sum_i w_i t_i, c depending on the group."""

    _room: Tensor | None = None

    @abstractmethod
    def scale(self, members: Sequence[int]) -> float:
        """The c of a group."""

    def copies(self, models: int, square: float) -> float:
        """See `Algorithm.copies`: models are added up in pieces."""
        return 0

    def merge(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Tensor:
        """See `Algorithm.merge`."""
        scale = self.scale(members)
        coefficients = [scale * weight for weight in self.parameters.each("weight", members)]
        models = [block.models[member] for member in members]
        return add_task_vectors(block.base, models, coefficients, dtype)

    def sequence(
        self, block: BlockData, groups: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> Iterator[Piece]:
        """See `Algorithm.sequence`: every group costs one addition, to the sum of its parts."""
        weights = dict(
            zip(block.models, self.parameters.each("weight", tuple(block.models)), strict=True)
        )
        scales = [self.scale(members) for members in groups]
        size, count = block.base.numel(), len(groups)
        step = min(size, max(1, _PIECE // max(1, count)))
        room = self._memory(count * step, dtype, block.base.device).view(count, step)
        for start in range(0, size, max(1, step)):
            part = slice(start, min(start + step, size))
            models = {member: vector[part] for member, vector in block.models.items()}
            rows = room[:, : part.stop - start]
            nested_sums(block.base[part], models, weights, groups, scales, rows)
            yield Piece(slice(0, count), part, rows)

    def _memory(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for pieces, kept: on many systems fresh pages cost more than sums."""
        room = self._room
        if room is None or (room.dtype, room.device) != (dtype, device) or room.numel() < size:
            self._room = room = torch.empty(size, dtype=dtype, device=device)
        return room[:size]


class Average(Linear):
    r"""The mean of the members, :math:`W_0 + \sum_i w_i t_i / \sum_i w_i`."""

    name = "average"
    options: ClassVar[tuple[Option, ...]] = (WEIGHT,)

    def scale(self, members: Sequence[int]) -> float:
        """1 / sum_i w_i."""
        weights = self.parameters.each("weight", members)
        total = math.fsum(weights)
        if total == 0:
            raise MergeError(
                f"average: the weights {weights} sum to zero; expected a sum that is not zero. "
                "Change `weight`."
            )
        return 1 / total


class TaskArithmetic(Linear):
    r"""Ilharco et al., "Editing Models with Task Arithmetic", scaled by the size of the group.

    :math:`W_0 + \frac{\lambda}{k} \sum_i w_i t_i` over the k members (FlexMerge, footnote 1;
    :math:`\lambda = 1.5` in section 4).
    """

    name = "task_arithmetic"
    options: ClassVar[tuple[Option, ...]] = (
        Option("lambda", Factor, 1.5, "scales the mean task vector"),
        WEIGHT,
    )

    def scale(self, members: Sequence[int]) -> float:
        """lambda / k."""
        factor: float = self.parameters.shared["lambda"]
        return factor / len(members)


class ChannelMerging(TaskArithmetic):
    """The baseline of FlexMerge, section 4.2: K-means in every block, then task arithmetic.

    Zhang et al. 2025, "Channel Merging", cluster the channels of a layer; here, as in FlexMerge's
    comparison, whole blocks. `target_size` is the number of clusters, an integer.
    """

    name = "channel_merging"
    kmeans = True
