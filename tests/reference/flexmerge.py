"""FlexMerge, slow and obvious, in float64: one group's F, and Algorithm 1 for whole models.

Task vectors are differences in float32 (float64 if an input is), as everywhere; from there on
everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference import consensus, emr, isotropic, nan, pcb, ties, tsv
from tests.reference.grouping import similarity

Parts = Sequence[Tensor]  # the tensors of a block
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Options:
    """An algorithm's options. `cuts`: with the scope "model", each member's least magnitude."""

    lam: float = 1.0
    weights: Sequence[float] | None = None
    densities: Sequence[float] | None = None
    scope: str = "block"
    cuts: Sequence[float] | None = None
    threshold: float = 0.6

    def weight(self, index: int) -> float:
        return self.weights[index] if self.weights else 1.0


Merge = Callable[[Sequence[Parts], Options], list[Tensor]]


def delta(weight: Tensor, base: Tensor) -> Tensor:
    wide = torch.float64 if torch.float64 in (weight.dtype, base.dtype) else torch.float32
    return (weight.to(wide) - base.to(wide)).double()


def laid_out(parts: Parts) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def cut_apart(vector: Tensor, like: Parts) -> list[Tensor]:
    pieces = vector.split([part.numel() for part in like])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, like, strict=True)]


def least_kept(base: State, model: State, density: float) -> float:
    """The k-th largest magnitude of a whole model's task vector."""
    magnitudes = laid_out([delta(model[name], base[name]) for name in base]).abs().sort().values
    return float(magnitudes[-max(1, int(density * len(magnitudes)))])


def trimmed(deltas: Sequence[Parts], options: Options) -> list[list[Tensor]]:
    found = []
    for index, parts in enumerate(deltas):
        density = options.densities[index]
        if density >= 1:
            found.append(list(parts))
        elif options.scope == "model":
            found.append([p * (p.abs() >= options.cuts[index]) for p in parts])
        elif options.scope == "block":
            found.append(cut_apart(ties.trim(laid_out(parts), density), parts))
        else:
            found.append([ties.trim(part, density) for part in parts])
    return found


def _weighted(deltas: Sequence[Parts], options: Options, total: float) -> list[Tensor]:
    return [
        sum(options.weight(i) * parts[j] for i, parts in enumerate(deltas)) * options.lam / total
        for j in range(len(deltas[0]))
    ]


def average(deltas: Sequence[Parts], options: Options) -> list[Tensor]:
    return _weighted(deltas, options, sum(options.weight(i) for i in range(len(deltas))))


def task_arithmetic(deltas: Sequence[Parts], options: Options) -> list[Tensor]:
    return _weighted(deltas, options, len(deltas))


def ties_merge(deltas: Sequence[Parts], options: Options) -> list[Tensor]:
    kept = trimmed(deltas, options)
    count = len(kept)
    weights = [options.weight(i) for i in range(count)]
    merged = []
    for j, part in enumerate(kept[0]):
        zero = torch.zeros_like(part)
        parts = [task[j] for task in kept]
        merged.append(ties.merge(zero, parts, weights, [1.0] * count, factor=options.lam))
    return merged


def pcb_merge(deltas: Sequence[Parts], options: Options) -> list[Tensor]:
    density = options.densities[0]
    if options.scope == "model":
        deltas, density = trimmed(deltas, options), 1.0
    deltas = [[options.weight(i) * part for part in parts] for i, parts in enumerate(deltas)]
    if options.scope == "tensor":
        found = [pcb.merge([d[j] for d in deltas], density, 1e-4) for j in range(len(deltas[0]))]
        vector = torch.cat(found)
    else:
        vector = pcb.merge([laid_out(parts) for parts in deltas], density, 1e-4)
    return [options.lam * piece for piece in cut_apart(vector, deltas[0])]


def by_matrix(merge: Callable[[Sequence[Tensor]], Tensor]) -> Merge:
    """Each matrix, stacked or flattened, by itself."""

    def merged(deltas: Sequence[Parts], options: Options) -> list[Tensor]:
        found = []
        for j in range(len(deltas[0])):
            # References take the resolution of their inputs' dtype: that of files is float32.
            scaled = [(options.weight(i) * parts[j]).float() for i, parts in enumerate(deltas)]
            if scaled[0].ndim == 3:  # stacked matrices
                piece = torch.stack([merge(slot) for slot in zip(*scaled, strict=True)])
            elif scaled[0].ndim > 3:  # a convolution
                piece = merge([each.flatten(1) for each in scaled])
            else:
                piece = merge(scaled)
            found.append(options.lam * piece.reshape(deltas[0][j].shape))
        return found

    return merged


def nan_merge(deltas: Sequence[Parts], options: Options) -> list[Tensor]:
    factors = nan.coefficients([float(laid_out(parts).norm()) for parts in deltas])
    scale = max(1.0, len(deltas) / 2)
    return [
        scale * sum(f * options.weight(i) * deltas[i][j] for i, f in enumerate(factors))
        for j in range(len(deltas[0]))
    ]


F: Mapping[str, Merge] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "channel_merging": task_arithmetic,
    "ties": ties_merge,
    "pcb": pcb_merge,
    "tsv_m": by_matrix(tsv.merge),
    "iso_c": by_matrix(isotropic.iso_c),
    "iso_cts": by_matrix(isotropic.iso_cts),
    "nan": nan_merge,
}


def merged(algorithm: str, base: Parts, models: Sequence[Parts], options: Options) -> list[Tensor]:
    """The weights of a group, in float64."""
    deltas = [[delta(w, b) for w, b in zip(model, base, strict=True)] for model in models]
    return [b.double() + d for b, d in zip(base, F[algorithm](deltas, options), strict=True)]


def masked(
    algorithm: str, base: Parts, models: Sequence[Parts], options: Options
) -> list[list[Tensor]]:
    """The weights of each member of a group of "emr" or "consensus", in float64."""
    deltas = [[delta(w, b) for w, b in zip(model, base, strict=True)] for model in models]
    if algorithm == "emr":
        common = [emr.unified([d[j] for d in deltas]) for j in range(len(base))]
    else:
        common = ties_merge(deltas, options)
    found = []
    for parts in deltas:
        if algorithm == "emr":
            factor = emr.rescale(parts, common)
            masks = [emr.mask(p, c) for p, c in zip(parts, common, strict=True)]
        else:
            factor = 1.0
            masks = [
                consensus.mask(p, c, options.threshold) for p, c in zip(parts, common, strict=True)
            ]
        found.append(
            [emr.reconstruct(b, c, m, factor) for b, c, m in zip(base, common, masks, strict=True)]
        )
    return found


def cosine_matrix(vectors: Sequence[Tensor]) -> Tensor:
    """Cosines pair by pair; two zero vectors are the same, a zero and another one are not alike."""
    count = len(vectors)
    found = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            a, b = vectors[i].double(), vectors[j].double()
            norms = float(a.norm()) * float(b.norm())
            both = not bool(a.any()) and not bool(b.any())
            found[i, j] = 1.0 if both or i == j else float(a @ b) / norms if norms else 0.0
    return found


@dataclass(frozen=True)
class Stored:
    """One block as bytes: elements, and bytes of an element for each task and for the base."""

    elements: int
    item: Sequence[int]
    base_item: int = 4

    def bytes(self, groups: Sequence[Sequence[int]], masks: bool) -> int:
        """What docs/flexmerge-format.md stores of a partition of the tasks."""
        total, base = 0, 0
        for group in groups:
            if masks and len(group) == 2:
                total += sum(self.elements * self.item[task] for task in group)
                continue
            total += self.elements * max(self.item[task] for task in group)
            if masks and len(group) > 2:
                base = self.elements * self.base_item
                total += len(group) * ((self.elements + 7) // 8)
        return total + base


Groups = list[list[tuple[int, ...]]]


def algorithm_1(
    cosines: Sequence[Tensor],
    blocks: Sequence[Stored],
    target: float,
    *,
    masks: bool = False,
    linkage: str = "min",
) -> tuple[Groups, list[int]]:
    """Merge the most similar pair of groups of any block until at most `target` bytes are stored.

    Returns the groups of each block and the sizes on the way. A target that cannot be reached runs
    to the end.
    """
    groups: Groups = [[(task,) for task in range(len(matrix))] for matrix in cosines]

    def size() -> int:
        return sum(b.bytes(g, masks) for b, g in zip(blocks, groups, strict=True))

    sizes = [size()]
    while sizes[-1] > target:
        best = None
        for index, (matrix, found) in enumerate(zip(cosines, groups, strict=True)):
            for first in found:
                for second in found:
                    if first[0] < second[0]:
                        value = similarity(matrix, first, second, linkage)
                        if best is None or value > best[0]:
                            best = (value, index, first, second)
        if best is None:
            break
        _, index, first, second = best
        left = [group for group in groups[index] if group not in (first, second)]
        groups[index] = sorted([*left, tuple(sorted(first + second))])
        sizes.append(size())
    return groups, sizes
