"""Singular value thresholding against a full float64 SVD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_ext.kernels.svt import (
    Eigen,
    MatmulShrinker,
    Rule,
    Shrunk,
    gram_dtype,
    spectral_norm,
    threshold,
)
from mergekit_ext.kernels.svt_subspace import WarmShrinker
from tests.reference.lore import svt as reference_svt
from tests.reference.lore import truncate as reference_truncate


def svt(x: Tensor, mu: float) -> Shrunk:
    return Eigen.of(x, torch.float64).threshold(mu)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def with_spectrum(rows: int, columns: int, sigma: Tensor, seed: int = 0) -> Tensor:
    k = len(sigma)
    u = torch.linalg.qr(normal(rows, k, seed=seed, dtype=torch.float64)).Q
    v = torch.linalg.qr(normal(columns, k, seed=seed + 1, dtype=torch.float64)).Q
    return (u * sigma.double()) @ v.T


def close(found: Tensor, expected: Tensor, scale: Tensor, tolerance: float) -> None:
    error = torch.linalg.norm(found.double().cpu() - expected.double().cpu())
    assert float(error) <= tolerance * float(torch.linalg.norm(scale.double().cpu())), float(error)


MATRICES = {
    "square": normal(40, 40),
    "wide": normal(24, 60),
    "low rank": normal(40, 3) @ normal(3, 50, seed=1),
    "rank 1": normal(20, 1) @ normal(1, 30, seed=1),
    "row": normal(1, 17),
    "one": normal(1, 1),
    "repeated": with_spectrum(30, 40, torch.tensor([3.0] * 5 + [1.0] * 10 + [0.1] * 15)),
    "decaying": with_spectrum(48, 48, torch.logspace(0, -6, 48)),
    "orthogonal": torch.eye(20) * 2.0,
}
# How a matrix is thresholded, how far from the full SVD that may be, and how sharp the rank is.
WAYS = {
    "eigendecomposition": (svt, {torch.float32: 2e-6, torch.float64: 1e-9}, 1e-5),
    "products alone": (threshold, {torch.float32: 3e-5, torch.float64: 1e-9}, 1e-4),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1e-3, 0.05, 0.3, 0.7, 0.99, 1.01])
@pytest.mark.parametrize("name", MATRICES)
def test_thresholding_equals_the_full_svd(
    name: str, share: float, dtype: torch.dtype, way: str, device
) -> None:
    shrink, tolerance, sharp = WAYS[way]
    x = MATRICES[name].to(dtype)
    sigma = torch.linalg.svdvals(x.double())
    mu = share * float(sigma[0])
    found = shrink(x.to(device), mu)
    close(found.value, reference_svt(x.double(), mu), x, tolerance[dtype])
    assert found.value.dtype == dtype
    assert found.nuclear == pytest.approx(
        float((sigma - mu).clamp(min=0).sum()), rel=1e-4, abs=2e-4 * float(sigma[0])
    )
    if not bool(((sigma - mu).abs() < sharp * sigma[0]).any()):
        assert found.rank == int((sigma > mu).sum())


@pytest.mark.parametrize("scale", [1e15, 1e-20])
def test_scale_does_not_matter(scale: float, device) -> None:
    x = normal(30, 50) * scale
    found = svt(x.to(device), 3.0 * scale)
    close(found.value, reference_svt(x.double(), 3.0 * scale), x, 2e-6)


def test_small_singular_values_keep_their_digits() -> None:
    """A float32 Gram matrix would lose these: the spectrum decays to 1e-6, mu with it."""
    x = with_spectrum(32, 64, torch.logspace(0, -6, 32)).float()
    mu = 2e-5
    error = svt(x, mu).value.double() - reference_svt(x.double(), mu)
    assert float(torch.linalg.matrix_norm(error, 2)) < 2e-7


def test_gram_matrices_are_float64_where_squaring_costs_digits() -> None:
    assert gram_dtype(1.0, 0.5, torch.float32, 1e-5) == torch.float32
    assert gram_dtype(1.0, 0.02, torch.float32, 1e-5) == torch.float64
    assert gram_dtype(1.0, 0.0, torch.float32, 1e-5) == torch.float64
    assert gram_dtype(1.0, 0.5, torch.float64, 1e-5) == torch.float64
    x = with_spectrum(48, 60, torch.logspace(0, -4, 48)).float()
    shrinker = WarmShrinker()
    shrinker.start(x)
    found = shrinker.first(x, Rule(mu=2e-3)).value.double() - reference_svt(x.double(), 2e-3)
    assert float(torch.linalg.matrix_norm(found, 2)) < 2e-7


def test_edges(device) -> None:
    x = normal(12, 20).to(device)
    top = float(torch.linalg.svdvals(x.double())[0])
    assert torch.equal(svt(x, 0.0).value, x)
    assert svt(x, 0.0).rank == 12
    assert not svt(x, top * 1.001).value.any()
    assert svt(x, top * 1.001).rank == 0
    for mu in (0.0, 0.5):
        zeros = svt(torch.zeros(5, 7, device=device), mu)
        assert not zeros.value.any()
        assert (zeros.rank, zeros.nuclear) == (0, 0.0)


def test_threshold_on_a_singular_value() -> None:
    x = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    found = svt(x, 2.0)
    assert found.rank == 1
    torch.testing.assert_close(found.value, torch.diag(torch.tensor([2.0, 0.0, 0.0])))


@pytest.mark.parametrize("rank", [0, 1, 7, 23, 24, 30])
def test_truncation_is_the_best_approximation(rank: int, device) -> None:
    x = normal(24, 60)
    found = Eigen.of(x.to(device), torch.float64).truncate(rank)
    close(found.value, reference_truncate(x.double(), rank), x, 5e-6)
    assert found.rank == min(rank, 24)


def test_truncation_does_not_count_zeros() -> None:
    x = normal(20, 2) @ normal(2, 30, seed=1)
    assert Eigen.of(x, torch.float64).truncate(10).rank == 2


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    more=st.integers(0, 12),
    share=st.floats(0.0, 1.2),
    exponent=st.integers(-15, 15),
    seed=st.integers(0, 99),
)
def test_a_proximal_map_at_any_scale(
    rows: int, more: int, share: float, exponent: int, seed: int
) -> None:
    x = normal(rows, rows + more, seed=seed) * 10.0**exponent
    mu = share * float(torch.linalg.matrix_norm(x, 2))
    value = svt(x, mu).value
    close(value, reference_svt(x.double(), mu), x, 2e-6)
    # nothing grows, and what is taken away has spectral norm at most mu
    assert float(value.norm()) <= float(x.norm()) * (1 + 1e-5)
    assert float(torch.linalg.matrix_norm(x - value, 2)) <= mu + 1e-5 * float(x.norm())


# --- the subspace that is kept from call to call --------------------------------------------


def drifting(steps: int = 6) -> list[Tensor]:
    first = with_spectrum(96, 120, torch.cat([torch.linspace(4, 2, 8), torch.full((88,), 0.3)]))
    move = normal(96, 120, seed=5, dtype=torch.float64) * 0.01
    return [(first + step * move).float() for step in range(steps)]


@pytest.mark.parametrize("mu", [0.6, 1.5, 2.5])
def test_warm_start_follows_a_drifting_matrix(mu: float, device) -> None:
    shrinker = WarmShrinker()
    matrices = [m.to(device) for m in drifting()]
    shrinker.start(matrices[0])
    shrinker.first(matrices[0], Rule(mu=mu))
    assert shrinker._basis is not None
    for x in matrices[1:]:
        close(shrinker.shrink(x).value, reference_svt(x.double().cpu(), mu), x, 1e-3)
        settled = shrinker.settle(x, 1e-6 * float(x.norm()))
        close(settled.value, reference_svt(x.double().cpu(), mu), x, 1e-5)


def test_a_direction_that_appears_outside_the_subspace_is_found() -> None:
    """Orthogonal to all that was kept, on both sides: power iteration from the basis misses it."""
    before = torch.diag(torch.tensor([5.0] * 4 + [0.5] * 20 + [0.0] * 40))
    shrinker = WarmShrinker()
    shrinker.start(before)
    shrinker.first(before, Rule(mu=1.0))
    assert shrinker._basis is not None
    assert not shrinker._basis[60].any()
    after = before.clone()
    after[60, 60] = 3.0
    assert not torch.allclose(shrinker.shrink(after).value, svt(after, 1.0).value, atol=0.1)
    assert not shrinker.complete(after)
    close(shrinker.settle(after, 1e-5).value, svt(after, 1.0).value, after, 1e-6)


def test_guard_vectors_that_rise_above_the_threshold_rebuild_the_subspace() -> None:
    before = with_spectrum(64, 64, torch.tensor([5.0] * 4 + [0.5] * 60)).float()
    shrinker = WarmShrinker()
    shrinker.start(before)
    shrinker.first(before, Rule(mu=1.0))
    after = before * 4.0
    found = shrinker.shrink(after)
    assert found.rank == 64
    close(found.value, reference_svt(after.double(), 1.0), after, 5e-6)


# --- matrix products alone ------------------------------------------------------------------


def test_spectral_norm_by_squaring(device) -> None:
    for gap in (1.0, 0.99999, 0.999, 0.5):
        sigma = torch.cat([torch.tensor([1.0]), torch.full((39,), gap)])
        x = with_spectrum(40, 50, sigma).float().to(device)
        assert spectral_norm(x, 20) == pytest.approx(1.0, rel=2e-6)
        assert 1.0 - 1e-6 <= spectral_norm(x, 3) <= 1.2
    for scale in (1e15, 1e-20):
        assert spectral_norm(x * scale, 20) == pytest.approx(scale, rel=2e-6)
    assert spectral_norm(torch.zeros(3, 4, device=device), 3) == 0.0


def test_settling_is_precise(device) -> None:
    x = normal(40, 60).to(device)
    shrinker = MatmulShrinker()
    mu = 0.999 * shrinker.start(x)
    shrinker.first(x, Rule(mu=mu))
    assert shrinker.noise > 0.0
    close(shrinker.settle(x, 0.0).value, reference_svt(x.double().cpu(), mu), x, 1e-7)
    assert shrinker.noise == 0.0
    assert not torch.backends.cuda.matmul.allow_tf32
