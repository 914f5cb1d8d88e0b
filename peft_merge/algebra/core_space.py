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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_ext.kernels.threads import by_one_thread
from peft_merge.adapter import Update

# Of the arithmetic in which singular values of cores are found.
EPS = torch.finfo(torch.float64).eps
# Q from a Gram matrix is orthonormal up to eps * ||R^-1||^2 (columns of norm 1): to about 1e-11
# here. Beyond that Householder reflections, which are orthonormal whatever X is.
LARGEST_INVERSE = 100.0

# So many leading directions, all that are not rounding, or as many as hold this share of the sum
# of squares: {"energy": 0.99}.
Rank = int | Literal["lossless"] | Mapping[str, float]


@dataclass(frozen=True)
class Factored:
    """Balanced factors of a merged module: ``B A`` with the roots of sigma on both sides."""

    a: Tensor  # (n, r, columns), float64
    b: Tensor  # (n, rows, r)
    sigma: Tensor  # (n, r) singular values that are kept, zeros where a matrix has fewer
    error: float  # relative Frobenius error of the truncation, over the whole module

    @property
    def rank(self) -> int:
        return int(self.sigma.shape[1])


def chosen(sigma: Tensor, rank: Rank, floor: float) -> int:
    r"""Return one rank for all matrices of a module: from 1, which PEFT needs, to k.

    Args:
        sigma: (n, k) singular values of each matrix, in descending order.
        rank: a number; "lossless", the largest numerical rank; or ``{"energy": e}``, the smallest
            r with :math:`\sum_{j \le r} \sigma_j^2 \ge e \sum_j \sigma_j^2` over all matrices.
        floor: share of a matrix's largest singular value up to which one is rounding.
    """
    numerical = int((sigma > floor * sigma[:, :1]).sum(dim=1).max())
    if rank == "lossless":
        return max(1, numerical)
    if isinstance(rank, Mapping):
        kept = sigma.square().sum(dim=0).cumsum(dim=0)
        enough = int((kept < rank["energy"] * kept[-1]).sum()) + 1
        return max(1, min(enough, numerical))
    return max(1, min(int(rank), sigma.shape[1]))


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis Q (n, side, p) of the columns of X (n, side, R), p = min(side, R)."""

    coordinates: Tensor  # Q^T X, (n, p, R)
    expand: Callable[[Tensor], Tensor]  # Q x, (n, side, k), of an (n, p, k) tensor


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
        return torch.ormqr(stored, factors, pad(x, (0, 0, 0, side - count)))

    return Basis(stored[..., :count, :].triu(), expand)


@dataclass(frozen=True)
class CoreSpace:
    """The changes of one module in their common coordinates.

    ``p = min(rows, R)``, ``q = min(columns, R)``.
    """

    cores: tuple[Tensor, ...]  # (n, p, q), float64
    left: Basis  # of the outputs, (n, rows, p)
    right: Basis  # of the inputs, (n, columns, q)

    # One thread, like the modules that are merged side by side: the same bytes with any number.
    @classmethod
    @by_one_thread
    def of(cls, updates: Sequence[Update], device: str | torch.device = "cpu") -> "CoreSpace":
        """Make that of m adapters on a device."""

        def joined(factors: Iterable[Tensor], dim: int) -> Tensor:
            return torch.cat([f.to(device, torch.float64) for f in factors], dim)

        left = orthonormal(joined((update.b for update in updates), -1))
        right = orthonormal(joined((update.a for update in updates), -2).mT)
        ranks = [update.a.shape[-2] for update in updates]
        parts = (basis.coordinates.split(ranks, dim=-1) for basis in (left, right))
        cores = (u.scale * (b @ a.mT) for u, b, a in zip(updates, *parts, strict=True))
        return cls(tuple(cores), left, right)

    @by_one_thread
    def gram(self) -> Tensor:
        r"""Return :math:`\langle D_i, D_j \rangle`, (m, m), float64."""
        flat = torch.stack([core.flatten() for core in self.cores])
        return flat @ flat.T

    @by_one_thread
    def factor(self, core: Tensor, rank: Rank) -> Factored:
        """Return the best factors of a merged core (n, p, q), finite; `rank`: see `chosen`.

        Zeros fill the factors up to a number, min(rows, columns) at most.
        """
        u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
        kept = chosen(sigma, rank, floor=max(core.shape[-2:]) * EPS)
        roots = sigma[:, None, :kept].sqrt()
        b = self.left.expand(u[..., :kept] * roots)
        a = self.right.expand(vh[:, :kept].mT * roots).mT
        side = min(b.shape[-2], a.shape[-1])
        missing = max(0, min(rank, side) - kept) if isinstance(rank, int) else 0
        whole = float(torch.linalg.vector_norm(sigma))
        error = float(torch.linalg.vector_norm(sigma[:, kept:])) / whole if whole else 0.0
        a, b = pad(a, (0, 0, 0, missing)).contiguous(), pad(b, (0, missing)).contiguous()
        return Factored(a, b, pad(sigma[:, :kept], (0, missing)), error)
