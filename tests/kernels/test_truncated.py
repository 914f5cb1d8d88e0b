from __future__ import annotations

import pytest
import torch

from mergekit_ext.kernels import truncated as module
from mergekit_ext.kernels.truncated import leading
from tests.reference.adapters import best


def gaussian(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def orthonormal(side, count, seed):
    return torch.linalg.qr(gaussian(side, count, seed=seed, dtype=torch.float64)).Q


def spectrum(sigma, rows=300, columns=340):
    count = len(sigma)
    u, v = orthonormal(rows, count, 1), orthonormal(columns, count, 2)
    return ((u * sigma) @ v.T).float()


def spike():
    return spectrum(torch.tensor([1e4, 1e4, 1e3]).double()) + 0.01 * gaussian(300, 340)


MATRICES = {
    "noise": lambda: gaussian(300, 340),
    "low rank and noise": lambda: (
        spectrum(torch.linspace(5, 1, 20).double()) + gaussian(300, 340) / 40
    ),
    "low rank": lambda: gaussian(300, 9) @ gaussian(9, 340, seed=1),
    "flat": lambda: spectrum(torch.ones(60).double()),
    "decay": lambda: spectrum(torch.logspace(0, -9, 60).double()),
    "spike": spike,
    "tall": lambda: gaussian(420, 300),
    "identity": lambda: torch.eye(320),
    "tiny": lambda: 1e-30 * gaussian(300, 340),
    "huge": lambda: 1e30 * gaussian(300, 340),
    "one entry": lambda: torch.zeros(300, 340).index_fill_(0, torch.tensor([7]), 1.0),
    "duplicate rows": lambda: gaussian(4, 340).repeat(75, 1),
}


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "lanczos"])
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [1, 12, 40])
def test_no_worse_than_the_best(name, rank, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(module, "DIRECT_SIDE", 0)
    x = MATRICES[name]()
    before = x.clone()
    found = leading(x, rank)
    assert torch.equal(x, before)
    product = (found.u.double() * found.sigma) @ found.v.double().T
    least = float((x.double() - best(x, rank)).norm())
    left = float((x.double() - product).norm())
    whole = float(x.double().norm())
    assert left <= least * (1 + 1e-6) + 1e-6 * whole
    assert found.rest == pytest.approx(left, abs=1e-6 * whole)
    gram = found.u.double().T @ found.u.double()
    assert float((gram - torch.eye(len(gram))).abs().max()) < 1e-5
    assert (found.sigma.diff() <= 1e-6 * found.sigma[0]).all()


def test_lanczos_is_what_finds_it(monkeypatch):
    monkeypatch.setattr(module, "DIRECT_SIDE", 0)
    monkeypatch.setattr(module, "_by_gram", None)
    x = MATRICES["low rank and noise"]()
    found = leading(x, 12)
    least = float((x.double() - best(x, 12)).norm())
    assert found.rest <= least * (1 + 1e-6)


def test_a_space_that_grows_too_large_is_left(monkeypatch):
    monkeypatch.setattr(module, "DIRECT_SIDE", 0)
    monkeypatch.setattr(module, "SETTLED", -1.0)
    monkeypatch.setattr(module, "INVISIBLE", -1.0)
    x = MATRICES["noise"]()
    least = float((x.double() - best(x, 12)).norm())
    assert leading(x, 12).rest <= least * (1 + 1e-6)


def test_everything():
    x = gaussian(30, 20, dtype=torch.float64)
    found = leading(x, None)
    assert len(found.sigma) == 20 and found.rest == 0.0
    assert torch.allclose((found.u * found.sigma) @ found.v.T, x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("direct", [True, False])
def test_zeros(direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(module, "DIRECT_SIDE", 0)
    found = leading(torch.zeros(100, 120), 5)
    assert found.rest == 0.0 and (found.sigma == 0).all() and found.u.shape == (100, 5)
    assert torch.isfinite(found.v).all()


SKETCHED = {
    **MATRICES,
    "wide": lambda: gaussian(300, 640),
    "power law": lambda: spectrum(torch.arange(1, 301).double() ** -0.45),
    "linear": lambda: spectrum(torch.linspace(1, 0.01, 300).double()),
    "step": lambda: spectrum(torch.cat([torch.full((30,), 1.1), torch.ones(270)]).double()),
}


@pytest.mark.parametrize("name", SKETCHED)
@pytest.mark.parametrize("rank", [1, 16, 40, 120])
def test_a_sketch_is_within_a_thousandth_of_the_best_at_every_rank(name, rank):
    x = SKETCHED[name]()
    before = x.clone()
    found = leading(x, rank, exact=False)
    assert torch.equal(x, before)
    whole = float(x.double().norm())
    sigma = torch.linalg.svdvals(x.double())
    u, v = found.u.double(), found.v.double()
    for count in sorted({1, rank // 2, rank} - {0}):
        product = (u[:, :count] * found.sigma[:count]) @ v[:, :count].T
        least = float(sigma[count:].norm())
        left = float((x.double() - product).norm())
        assert left <= least * (1 + 1e-3) + 1e-6 * whole, count
    assert found.rest == pytest.approx(left, rel=1e-3, abs=1e-6 * whole)
    assert float((u.T @ u - torch.eye(rank)).abs().max()) < 1e-4
    assert (found.sigma.diff() <= 1e-6 * found.sigma[0]).all()
