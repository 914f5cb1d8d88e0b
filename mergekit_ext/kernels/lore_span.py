"""The span in which the LoRE iteration lives.

Thresholding multiplies from the left by a function of ``X X^T``, so that with
``X_i = D_i + S`` and S a sum of such, every iterate is ``sum_j C_j D_j``: its rows never leave the
span of the rows of the differences D_i. The n differences from the mean sum to zero, so n - 1 of
them span it. For ``(n - 1) a < b`` one QR factorisation replaces the long side b by (n - 1) a,
an isometry that changes no singular value, norm or inner product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import matmul, qr

# The factorisation costs a few products; below this gain it is not worth it.
WORTHWHILE = 0.8


@dataclass(frozen=True)
class Span:
    """Coordinates of the differences in their common row space.

    Attributes:
        coordinates: one ``(a, r)`` matrix per model (``r <= b``).
        frame: ``(b, r)`` with orthonormal columns, or None for the identity.
    """

    coordinates: list[Tensor]
    frame: Tensor | None

    @classmethod
    def of(cls, differences: Sequence[Tensor]) -> Span:
        """`differences` from their mean, each ``(a, b)`` with ``a <= b``."""
        rows, columns = differences[0].shape
        independent = len(differences) - 1
        if independent == 0 or independent * rows > WORTHWHILE * columns:
            return cls(list(differences), None)
        frame, corner = qr(torch.cat(list(differences[:-1])).T)
        blocks = [block.T.contiguous() for block in corner.split(rows, dim=1)]
        blocks.append(-torch.stack(blocks).sum(0))
        return cls(blocks, frame)

    def expand(self, coordinates: Tensor) -> Tensor:
        """Back to ``(a, b)``."""
        return coordinates if self.frame is None else matmul(coordinates, self.frame.T)
