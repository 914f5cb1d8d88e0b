r"""Elementwise rules: on the dense changes of one matrix, some rows at a time, then low rank again.

A rule that reads rows in pieces (`Method.blockwise`) gets each :math:`D_i = s_i B_i A_i` in blocks
of rows, in float64, made from the factors whenever they are read. Only the merged change is held
whole. Other rules need all m changes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.kernels.linear_algebra import matmul
from mergekit_ext.methods import Call, Method
from mergekit_ext.methods.method import Pieces
from peft_merge.adapter import Update
from peft_merge.algebra.truncated import Factored, Leading, Rank, chosen, leading

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
    most = min(rows, columns)
    wanted = min(rank, most) if isinstance(rank, int) else None
    found, details = [], {}
    dtype = torch.float64 if rows * columns <= SMALL else torch.float32
    for index in range(n):
        sources = [_source(update, index, (rows, columns), device) for update in updates]
        merged, said = _merged(sources, rule, call, (rows, columns), dtype, device)
        details.update(said)
        found.append(leading(merged, wanted))
    return _factored(found, rank, _FLOOR[dtype]), details


def _source(
    update: Update | None, index: int, shape: tuple[int, int], device: str | torch.device
) -> Pieces:
    rows, columns = shape
    step = max(1, BLOCK // columns)
    starts = range(0, rows, step)
    if update is None:
        return lambda: (
            torch.zeros((min(step, rows - start), columns), dtype=torch.float64, device=device)
            for start in starts
        )
    b = update.b[index].to(device, torch.float64) * update.scale
    a = update.a[index].to(device, torch.float64)
    return lambda: (matmul(b[start : start + step], a) for start in starts)


def _merged(
    sources: Sequence[Pieces],
    rule: Method,
    call: Call,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str | torch.device,
) -> tuple[Tensor, dict[str, Any]]:
    if rule.blockwise is None:
        merged = rule.apply([_whole(source(), shape, dtype, device) for source in sources], call)
        return _whole(iter((merged.tensor,)), shape, dtype, device), dict(merged.details)
    return _whole(rule.blockwise(sources, call), shape, dtype, device), {}


def _whole(
    pieces: Iterator[Tensor], shape: tuple[int, int], dtype: torch.dtype, device: str | torch.device
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=device)
    at = 0
    for piece in pieces:
        out[at : at + len(piece)] = piece
        at += len(piece)
    return require_finite(out)


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


def _factored(found: Sequence[Leading], rank: Rank, floor: float) -> Factored:
    sigma = torch.stack([part.sigma for part in found])
    kept = chosen(sigma, rank, floor)
    left = sum(part.rest**2 for part in found) + float(sigma[:, kept:].square().sum())
    total = sum(part.whole**2 for part in found)
    factors = [_balanced(part, kept) for part in found]
    return Factored(
        a=torch.stack([a for _, a in factors]),
        b=torch.stack([b for b, _ in factors]),
        sigma=sigma[:, :kept],
        error=(left / total) ** 0.5 if total else 0.0,
    )


def _balanced(part: Leading, rank: int) -> tuple[Tensor, Tensor]:
    roots = part.sigma[:rank].sqrt()
    b = part.u[:, :rank].to(torch.float64) * roots
    a = part.v[:, :rank].to(torch.float64) * roots
    return b.contiguous(), a.mT.contiguous()
