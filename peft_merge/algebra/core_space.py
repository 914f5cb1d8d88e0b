r"""The exact algebra of LoRAs in the span of their stacked factors.

With :math:`B = [B_1 \dots B_m]` (rows, R) and :math:`A = [A_1; \dots; A_m]` (R, columns),
R the sum of the ranks, and orthonormal bases :math:`B = Q_b R_b`, :math:`A^T = Q_a R_a`, each
change is :math:`D_i = s_i B_i A_i = Q_b C_i Q_a^T` with the small core
:math:`C_i = s_i R_{b,i} R_{a,i}^T`. Whatever commutes with rotations (sums, norms, inner products,
singular value thresholding, TSV) is done on the cores, exactly; the merged core's SVD gives the
best factors of any rank. (Panariello et al. 2025, "Accurate and Efficient Low-Rank Model Merging
in Core Space", define such cores, and merge elementwise in them.)

Cost: two thin products with the stacked factors' transposes (2 R^2 (rows + columns) operations),
decompositions of order R, and two products of R by the output's rank. Nothing of the size of the
weight is formed, and no basis (see `peft_merge.algebra.orthonormal`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.kernels.threads import by_one_thread
from peft_merge.adapter import Update
from peft_merge.algebra.orthonormal import Basis, orthonormal
from peft_merge.algebra.truncated import EPS, Factored, Rank, chosen, padded


@dataclass(frozen=True)
class CoreSpace:
    """The changes of one module in their common coordinates.

    Attributes:
        cores: one (n, p, q) float64 tensor for each adapter, ``p = min(rows, R)``,
            ``q = min(columns, R)``; zeros for an adapter that does not have the module.
        left: the basis of the outputs, (n, rows, p).
        right: the basis of the inputs, (n, columns, q).
    """

    cores: tuple[Tensor, ...]
    left: Basis
    right: Basis

    # One thread, like the modules that are merged side by side: the same bytes with any number.
    @classmethod
    @by_one_thread
    def of(
        cls,
        updates: Sequence[Update | None],
        shape: tuple[int, int, int],
        device: str | torch.device = "cpu",
    ) -> CoreSpace:
        """Make that of m adapters, None for one that does not have the module.

        Args:
            updates: factors of any floating dtype.
            shape: (n, rows, columns), that of each change.
            device: where to compute and to leave results.

        Raises:
            ValueError: no adapter has the module, or factors have another shape.
        """
        present = [update for update in updates if update is not None]
        if not present:
            raise ValueError("updates: found only None; expected at least one")
        for update in present:
            _check(update, shape)
        left = orthonormal(_wide([u.b for u in present], -1, device))
        right = orthonormal(_wide([u.a for u in present], -2, device).mT)
        parts = zip(
            present,
            left.coordinates.split([u.b.shape[-1] for u in present], dim=-1),
            right.coordinates.split([u.a.shape[-2] for u in present], dim=-1),
            strict=True,
        )
        found = iter([u.scale * (b @ a.mT) for u, b, a in parts])
        nothing = torch.zeros(
            (shape[0], left.coordinates.shape[-2], right.coordinates.shape[-2]),
            dtype=torch.float64,
            device=device,
        )
        return cls(
            tuple(nothing if update is None else next(found) for update in updates), left, right
        )

    @by_one_thread
    def gram(self) -> Tensor:
        r"""Return :math:`\langle D_i, D_j \rangle`, (m, m), float64."""
        flat = torch.stack([core.flatten() for core in self.cores])
        return flat @ flat.T

    @by_one_thread
    def factor(self, core: Tensor, rank: Rank) -> Factored:
        """Return the best factors of a merged core.

        Args:
            core: (n, p, q), float64, finite.
            rank: see `truncated.chosen`; one for all n matrices. A number above that of singular
                values is kept, and zeros fill the factors up to ``min(rows, columns)`` at most.
        """
        u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
        kept = chosen(sigma, rank, floor=max(core.shape[-2:]) * EPS)
        roots = sigma[:, None, :kept].sqrt()
        b = self.left.expand(u[..., :kept] * roots)
        a = self.right.expand(vh[:, :kept].mT * roots).mT
        width = kept
        if isinstance(rank, int):
            width = max(kept, min(rank, b.shape[-2], a.shape[-1]))
        whole = float(torch.linalg.vector_norm(sigma))
        dropped = float(torch.linalg.vector_norm(sigma[:, kept:]))
        return Factored(
            a=padded(a, width, -2).contiguous(),
            b=padded(b, width, -1).contiguous(),
            sigma=padded(sigma[:, :kept], width, -1),
            error=dropped / whole if whole else 0.0,
        )


def _wide(factors: Sequence[Tensor], dim: int, device: str | torch.device) -> Tensor:
    return torch.cat([f.to(device, torch.float64) for f in factors], dim=dim)


def _check(update: Update, shape: tuple[int, int, int]) -> None:
    n, rows, columns = shape
    rank = update.a.shape[-2]
    if update.a.shape != (n, rank, columns) or update.b.shape != (n, rows, rank):
        raise ValueError(
            f"updates: found factors of shapes {tuple(update.b.shape)} and "
            f"{tuple(update.a.shape)}; expected (n, rows, r) and (n, r, columns) of {shape}"
        )
