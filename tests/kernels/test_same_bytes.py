"""Kernels and rules give the same bytes with any number of threads.

Shapes are large enough that torch and its libraries use several, and no multiple of anything.
"""

from __future__ import annotations

import pytest
import torch

from mergekit_ext.kernels import masks
from mergekit_ext.kernels.lore import lore
from mergekit_ext.kernels.numerics import squared_norms, weighted_sum
from mergekit_ext.kernels.pcb import pcb_merge
from mergekit_ext.kernels.seeds import drop_and_rescale
from mergekit_ext.kernels.similarity import Gram, cosines
from mergekit_ext.kernels.ties import TiesOptions, merge_ties
from mergekit_ext.kernels.tsv import tsv_merge
from tests.kernels.threads import with_any_number_of_threads

FLOATS = (torch.float32, torch.float64)
LARGE, SMALLER = (301, 257), (201, 161)
# More than one of the pieces that kernels read.
PIECES = (3, 176_003)


def models(*shape, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count + sum(shape))
    base = torch.randn(shape, generator=generator, dtype=dtype)
    return [base + 0.1 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def found_by_lore(tensors, **options):
    result = lore(tensors, tolerance=1e-3, max_iterations=6, **options)
    return result.merged, result.base, result.objective, result.change, result.spectral_norms


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (LARGE, {"mu_relative": 0.6}),
        (SMALLER, {"mu_relative": 0.7, "update": "sequential", "combine": "ties"}),
        (SMALLER, {"rank_ratio": 0.2}),
        ((130, 701), {"mu_relative": 0.8}),  # in the differences' own span
        ((701, 130), {"mu": 0.9}),
        ((1, 70_001), {"mu_relative": 0.5}),
        ((70_001,), {"mu": 0.1}),
    ],
    ids=str,
)
def test_lore(shape, options):
    tensors = models(*shape)
    with_any_number_of_threads(lambda: found_by_lore(tensors, **options))


def test_lore_over_a_base():
    base, *tensors = models(*SMALLER, dtype=torch.float64)
    with_any_number_of_threads(lambda: found_by_lore(tensors, base=base, mu_relative=0.5))


def test_ties():
    base, *tensors = models(*PIECES, dtype=torch.float64)
    weights, densities = (1.0, 0.7), (0.3, 0.6)
    for options in (TiesOptions(rescale=True), TiesOptions(elect=False, rescale=True)):
        with_any_number_of_threads(
            lambda options=options: merge_ties(base, tensors, weights, densities, options)
        )


def test_elementwise_kernels():
    base, *tensors = models(*PIECES, dtype=torch.float64)
    deltas = [tensor - base for tensor in tensors]

    def work():
        seeded = torch.Generator().manual_seed(3)
        unified = masks.elected(deltas)
        kept = masks.sign_mask(deltas[0], unified)
        rescale = masks.rescaler(deltas[0], unified)
        return (
            unified,
            rescale,
            masks.reconstruct(base, unified, kept, rescale, torch.float32),
            masks.pack_bits(masks.tall_mask(deltas[0], unified)),
            drop_and_rescale(deltas[0], 0.4, seeded),
            pcb_merge(deltas, 0.2, 0.01),
        )

    with_any_number_of_threads(work)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_and_similarities(dtype):
    base, *tensors = models(*PIECES, count=4, dtype=dtype)

    def work():
        gram = Gram(len(tensors))
        gram.add(tensors, base)
        return (
            gram.value,
            cosines(gram.value),
            squared_norms(tensors, base),
            weighted_sum(tensors, (0.3, 0.7, 1.1), base=base),
            weighted_sum(tensors, (0.3, 0.7, 1.1)),
        )

    with_any_number_of_threads(work)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ((130, 201), (40_001,)))
def test_tsv(shape, dtype):
    tensors = models(*shape, dtype=dtype)
    with_any_number_of_threads(lambda: tsv_merge(tensors))
    with_any_number_of_threads(lambda: tsv_merge([tensors[0], tensors[0].clone()]))
