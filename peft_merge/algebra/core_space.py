r"""The exact algebra of LoRAs in the span of their stacked factors.

With :math:`B = [B_1 \dots B_m]` (rows, R) and :math:`A = [A_1; \dots; A_m]` (R, columns),
R the sum of the ranks, and orthonormal bases :math:`B = Q_b R_b`, :math:`A^T = Q_a R_a`, each
change is :math:`D_i = s_i B_i A_i = Q_b C_i Q_a^T` with the small core
:math:`C_i = s_i R_{b,i} R_{a,i}^T`. Whatever commutes with rotations (sums, norms, inner products,
singular value thresholding, TSV) is done on the cores, exactly; the merged core's SVD gives the
best factors of any rank. (Panariello et al. 2025, "Accurate and Efficient Low-Rank Model Merging
in Core Space", define such cores, and merge elementwise in them.)

Cost: two thin products with the stacked factors' transposes (2 R^2 (rows + columns) operations),
decompositions of order R, and two products of R by the output's rank. Neither the weight's change
nor a basis is formed: :math:`Qx = X R^{-1} x`, or a product of Householder reflections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.kernels.threads import by_one_thread
from peft_merge.adapter import Update
from peft_merge.algebra.truncated import EPS, Factored, Rank, chosen, padded

# Q from a Gram matrix is orthonormal up to eps * ||R^-1||^2 (columns of norm 1): to about 1e-11
# here. Beyond that Householder reflections, which are orthonormal whatever X is.
LARGEST_INVERSE = 100.0


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis Q (n, side, p) of the columns of X (n, side, R), p = min(side, R).

    Attributes:
        coordinates: ``Q^T X``, (n, p, R).
        expand: ``Q x`` of an (n, p, k) tensor: (n, side, k).
    """

    coordinates: Tensor
    expand: Callable[[Tensor], Tensor]


def orthonormal(columns: Tensor) -> Basis:
    """Return a basis of the columns of a float64 (n, side, R) tensor.

    The cheapest that is exact: the unit vectors where X has no more rows than columns; Cholesky QR
    (one product with the transpose; columns scaled to norm 1 first, so that adapters of very
    different sizes do no harm) where the condition allows; Householder QR otherwise, as for
    duplicate adapters and zero factors.
    """
    if columns.shape[-1] >= columns.shape[-2]:
        return Basis(columns, lambda x: x)
    return _by_cholesky(columns) or _by_reflections(columns)


def _by_cholesky(columns: Tensor) -> Basis | None:
    """``Q = X D^-1 R^-1``, D the columns' norms; None where it would not be orthonormal."""
    gram = columns.mT @ columns
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :]
    if not bool((norms > 0).all()):
        return None
    gram = gram / norms.mT / norms
    triangle, info = torch.linalg.cholesky_ex(gram, upper=True)
    if bool(info.any()):
        return None
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(triangle, unit, upper=True)
    if not float(torch.linalg.matrix_norm(inverse).max()) <= LARGEST_INVERSE:
        return None  # also where squares have left the range

    def expand(x: Tensor) -> Tensor:
        inner = torch.linalg.solve_triangular(triangle, x, upper=True)
        return columns @ (inner / norms.mT)

    return Basis(triangle * norms, expand)


def _by_reflections(columns: Tensor) -> Basis:
    stored, factors = torch.geqrf(columns)
    side, count = stored.shape[-2:]

    def expand(x: Tensor) -> Tensor:
        return torch.ormqr(stored, factors, padded(x, side, -2))

    return Basis(stored[..., :count, :].triu(), expand)


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
    def of(cls, updates: Sequence[Update | None], device: str | torch.device = "cpu") -> CoreSpace:
        """Make that of m adapters, None for one that does not have the module.

        Args:
            updates: factors of any floating dtype, of one shape; one at least is not None.
            device: where to compute and to leave results.
        """

        def joined(factors: Iterable[Tensor], dim: int) -> Tensor:
            return torch.cat([f.to(device, torch.float64) for f in factors], dim)

        present = [update for update in updates if update is not None]
        left = orthonormal(joined((update.b for update in present), -1))
        right = orthonormal(joined((update.a for update in present), -2).mT)
        ranks = [update.a.shape[-2] for update in present]
        parts = zip(
            present,
            left.coordinates.split(ranks, dim=-1),
            right.coordinates.split(ranks, dim=-1),
            strict=True,
        )
        found = [update.scale * (b @ a.mT) for update, b, a in parts]
        rest, nothing = iter(found), torch.zeros_like(found[0])
        return cls(
            tuple(nothing if update is None else next(rest) for update in updates), left, right
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
