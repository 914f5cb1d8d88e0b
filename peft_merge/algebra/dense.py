r"""Elementwise rules: on the dense changes of one matrix, some rows at a time, then low rank again.

A rule that reads rows in pieces (`Method.blockwise`) gets each :math:`D_i = s_i B_i A_i` in blocks
of rows, in float64, made from the factors whenever they are read. Only the merged change is held
whole. Other rules need all m changes at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.kernels.linear_algebra import matmul
from mergekit_ext.methods import Call, Method
from mergekit_ext.methods.method import Pieces
from peft_merge.adapter import Update
from peft_merge.algebra.truncated import Factored, Rank, chosen, leading

# Entries of a block of rows.
BLOCK = 1 << 16
# A merged change up to this size is held in float64, a larger one in float32.
SMALL = 1 << 20
# Singular values below this share of the largest are rounding of the merged change.
_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-13}


def merge(
    updates: Sequence[Update | None],
    shape: tuple[int, int, int],
    rule: Method,
    call: Call,
    rank: Rank,
    device: str | torch.device,
) -> tuple[Factored, dict[str, Any]]:
    """Apply `rule` to the dense changes of one module, each of its n matrices by itself.

    Args:
        updates: of m adapters, None for one that does not have the module: zeros.
        shape: (n, rows, columns).
        rank: of the result; see `truncated.chosen`.
        device: where to compute.

    Returns:
        the best factors of the rank (see `leading`), and the rule's details of the last matrix
        that has some.

    Raises:
        MergeError: the rule gives values that are not finite.
    """
    n, rows, columns = shape
    wanted = min(rank, rows, columns) if isinstance(rank, int) else None
    dtype = torch.float64 if rows * columns <= SMALL else torch.float32
    step = max(1, BLOCK // columns)
    starts = range(0, rows, step)
    details: dict[str, Any] = {}

    def source(update: Update | None, index: int) -> Pieces:
        if update is None:
            nothing = {"dtype": torch.float64, "device": device}
            return lambda: (
                torch.zeros((min(step, rows - start), columns), **nothing) for start in starts
            )
        b = update.b[index].to(device, torch.float64) * update.scale
        a = update.a[index].to(device, torch.float64)
        return lambda: (matmul(b[start : start + step], a) for start in starts)

    def whole(pieces: Iterable[Tensor]) -> Tensor:
        out = torch.empty((rows, columns), dtype=dtype, device=device)
        at = 0
        for piece in pieces:
            out[at : at + len(piece)] = piece
            at += len(piece)
        return require_finite(out)

    def merged(index: int) -> Tensor:
        sources = [source(update, index) for update in updates]
        if rule.blockwise is not None:
            return whole(rule.blockwise(sources, call))
        result = rule.apply([whole(each()) for each in sources], call)
        details.update(result.details)
        return whole([result.tensor])

    found = [leading(merged(index), wanted) for index in range(n)]
    sigma = torch.stack([part.sigma for part in found])
    kept = chosen(sigma, rank, _FLOOR[dtype])
    left = sum(part.rest**2 for part in found) + float(sigma[:, kept:].square().sum())
    total = sum(part.whole**2 for part in found)
    factored = Factored(
        a=torch.stack([_rooted(part.v, part.sigma, kept).mT for part in found]),
        b=torch.stack([_rooted(part.u, part.sigma, kept) for part in found]),
        sigma=sigma[:, :kept],
        error=(left / total) ** 0.5 if total else 0.0,
    )
    return factored, details


def _rooted(vectors: Tensor, sigma: Tensor, rank: int) -> Tensor:
    return vectors[:, :rank].to(torch.float64) * sigma[:rank].sqrt()


def require_finite(tensor: Tensor) -> Tensor:
    """Return `tensor`, which a rule has made of finite inputs.

    Raises:
        MergeError: it holds NaN or infinity.
    """
    # A sum is a cheap proof; a finite tensor's may still overflow.
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise MergeError(
            "the merge gives values that are not finite from finite inputs. Use smaller weights."
        )
    return tensor
