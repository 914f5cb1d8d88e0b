from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels import tsv
from mergekit_ext.kernels.tsv import tsv_merge
from tests.reference.lore import truncate
from tests.reference.tsv import merge as reference

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-11, torch.bfloat16: 2e-6}


def models(shape=(12, 9), count=3, dtype=torch.float32, device="cpu", seed=4):
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count))
    return [x.to(device, dtype) for x in drawn]


def close(found, wanted, tolerance):
    apart = (found.double().cpu() - wanted).norm()
    assert apart <= tolerance * wanted.norm() + 1e-300


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (40, 8), (8, 40), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_against_the_reference(dtype, shape, count, device):
    deltas = models(shape, count, dtype, device)
    found = tsv_merge(deltas)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and found.shape == shape
    close(found, reference([d.cpu() for d in deltas]), TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales(scale, dtype):
    deltas = [d * scale for d in models(dtype=dtype)]
    close(tsv_merge(deltas), reference(deltas), TOLERANCE[dtype])


def decaying(lowest, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    result = []
    for _ in range(count):
        u, _, vh = torch.linalg.svd(
            torch.randn(12, 10, generator=generator, dtype=torch.float64), full_matrices=False
        )
        sigma = torch.logspace(0, torch.log10(torch.tensor(lowest)).item(), 10).double()
        result.append(((u * sigma) @ vh).to(dtype))
    return result


@pytest.mark.parametrize("lowest", [1e-1, 1e-8, 1e-13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_spectra_that_decay(lowest, dtype):
    deltas = decaying(lowest, dtype=dtype)
    close(tsv_merge(deltas), reference(deltas), 1e-5 if dtype == torch.float32 else 1e-9)


def test_gram_matrices_and_full_decompositions_agree(monkeypatch):
    deltas = decaying(1e-3)
    by_gram = tsv_merge(deltas)
    monkeypatch.setattr(tsv, "_GRAM_RANGE", 1e9)  # nothing is ever safe
    torch.testing.assert_close(tsv_merge(deltas), by_gram, rtol=1e-6, atol=1e-7)


def low_rank(seed, rank=2, shape=(12, 9)):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_low_rank_task_vectors_bring_no_arbitrary_directions(dtype):
    # k is 3, the rank 2: the third triplet is rounding
    deltas = [low_rank(seed).to(dtype) for seed in range(3)]
    found = tsv_merge(deltas)
    close(found, reference(deltas), 1e-4 if dtype == torch.float32 else 1e-9)
    spanned = torch.linalg.svd(torch.cat(deltas, 1).double(), full_matrices=False).U[:, :6]
    outside = found.double() - spanned @ (spanned.T @ found.double())
    assert outside.norm() < 1e-5 * found.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_identical_tasks_return_their_best_approximation(dtype):
    delta = models(dtype=dtype)[0]
    close(tsv_merge([delta] * 3), truncate(delta.double(), 3), TOLERANCE[dtype])
    low = low_rank(0).to(dtype)
    close(tsv_merge([low] * 3), low.double(), TOLERANCE[dtype])


def test_one_task_returns_itself():
    (delta,) = models(count=1)
    torch.testing.assert_close(tsv_merge([delta]), delta, rtol=1e-5, atol=1e-6)


def test_tasks_that_do_not_interfere_are_added():
    delta = torch.zeros(6, 6, dtype=torch.float64)
    first, second = delta.clone(), delta.clone()
    first[:3, :3] = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())
    second[3:, 3:] = torch.diag(torch.tensor([5.0, 4.0, 0.5]).double())
    torch.testing.assert_close(tsv_merge([first, second]), first + second, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 50), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
def test_transposition_permutation_scale_and_sign(seed, count, rows, columns):
    deltas = models((rows, columns), count, torch.float64, seed=seed)
    found = tsv_merge(deltas)
    allowed = 1e-6 * (1.0 + found.abs().max())
    for other in (
        tsv_merge([d.T for d in deltas]).T,
        tsv_merge(deltas[::-1]),
        tsv_merge([4.0 * d for d in deltas]) / 4.0,
        -tsv_merge([-d for d in deltas]),
    ):
        assert torch.all((found - other).abs() <= allowed)


def test_zero_task_vectors():
    zero, (delta,) = torch.zeros(6, 6), models((6, 6), 1)
    assert not tsv_merge([zero, zero]).any()
    # it still counts in k
    close(tsv_merge([zero, delta]), truncate(delta.double(), 3), 2e-6)


@pytest.mark.parametrize("shape", [(7,), ()], ids=str)
def test_vectors_are_averaged(shape):
    deltas = models(shape)
    torch.testing.assert_close(tsv_merge(deltas), sum(deltas) / 3)


def test_layouts():
    experts = models((4, 6, 5), 2)
    found = tsv_merge(experts, "stacked")
    for index in range(4):
        assert torch.equal(found[index], tsv_merge([e[index] for e in experts]))
    kernels = models((6, 3, 2, 2), 2)
    found = tsv_merge(kernels, "flattened")
    assert torch.equal(found, tsv_merge([k.reshape(6, 12) for k in kernels]).reshape(6, 3, 2, 2))
    assert tsv_merge([torch.zeros(0, 3)] * 2).shape == (0, 3)


@pytest.mark.parametrize(
    ("second", "message"), [(torch.ones(2, 3), "shape"), (torch.full((2, 2), torch.inf), "finite")]
)
def test_what_is_refused(second, message):
    with pytest.raises(ValueError, match=rf"deltas\[1\]: .*{message}"):
        tsv_merge([torch.ones(2, 2), second])


def test_count_in_coordinates():
    """In an orthonormal basis of a larger space the k of that space is asked for."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(30, 9, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(20, 8, generator=generator, dtype=torch.float64)).Q
    small = models((9, 8), 3, torch.float64)
    large = [left @ core @ right.T for core in small]
    close(left @ tsv_merge(small, count=20 // 3) @ right.T, reference(large), 1e-10)
