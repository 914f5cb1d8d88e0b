from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_merge.adapter import Update
from peft_merge.algebra.core_space import CoreSpace, orthonormal
from tests.peft_merge.loras import update
from tests.reference.adapters import best, dense

SHAPE = (1, 24, 18)


def close(found, wanted, tolerance=1e-12):
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


def columns(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def nearly_dependent(gap):
    x = columns(1, 40, 6)
    x[..., 5] = x[..., 0] + gap * x[..., 5]
    return x


@pytest.mark.parametrize(
    "x",
    [
        columns(1, 40, 6),
        columns(3, 40, 6),
        columns(1, 40, 6) * torch.logspace(-12, 12, 6, dtype=torch.float64),
        columns(1, 6, 6),
        columns(2, 3, 6),
        nearly_dependent(1e-3),
        nearly_dependent(1e-9),
        nearly_dependent(0.0),
        torch.zeros(2, 40, 6, dtype=torch.float64),
        columns(1, 40, 1),
    ],
)
def test_bases_are_orthonormal_and_span_the_columns(x):
    basis = orthonormal(x)
    close(basis.expand(basis.coordinates), x, 1e-13)
    p = basis.coordinates.shape[-2]
    q = basis.expand(torch.eye(p, dtype=torch.float64).expand(len(x), p, p))
    assert float((q.mT @ q - torch.eye(p)).abs().max()) < 1e-10


# Of an adapter without the module.
ABSENT = Update(torch.empty(1, 0, 18), torch.empty(1, 24, 0), 1.0)
CASES = {
    "mixed ranks": [update(1, 4), update(2, 2), update(3, 1)],
    "missing": [ABSENT, update(2, 2), ABSENT],
    "duplicates": [update(1, 4), update(1, 4), update(2, 3)],
    "zeros": [Update(torch.zeros(1, 2, 18), torch.zeros(1, 24, 2), 1.0, None), update(1, 3)],
    "untrained": [Update(update(4, 2).a, torch.zeros(1, 24, 2), 1.0, None), update(1, 3)],
    "scales": [update(1, 3, scale=1e6), update(2, 3, scale=1e-6), update(3, 2, size=1e-10)],
    "negative": [update(1, 3, scale=-2.0)],
    "bfloat16": [update(1, 3, dtype=torch.bfloat16), update(2, 3, dtype=torch.float16)],
    "more than rows": [update(1, 16), update(2, 14)],
    "more than columns": [update(1, 10), update(2, 10)],
}


def expanded(space, core):
    """``Q_b C Q_a^T``: the change that a core stands for."""
    return space.right.expand(space.left.expand(core).mT).mT


@pytest.mark.parametrize("name", CASES)
def test_cores_are_the_changes(name):
    updates = CASES[name]
    space = CoreSpace.of(updates)
    changes = dense(updates, SHAPE)
    for core, change in zip(space.cores, changes, strict=True):
        assert core.dtype == torch.float64
        close(expanded(space, core), change)
    wanted = torch.stack([torch.stack([(a * b).sum() for b in changes]) for a in changes])
    sizes = torch.stack([change.norm() for change in changes])
    apart = (space.gram() - wanted).abs()
    assert bool((apart <= 1e-12 * torch.outer(sizes, sizes)).all())
    norms = space.gram().diagonal().sqrt()
    assert norms.tolist() == pytest.approx(sizes.tolist(), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("name", CASES)
def test_lossless_factors(name):
    updates = CASES[name]
    space = CoreSpace.of(updates)
    total = sum(dense(updates, SHAPE))
    found = space.factor(sum(space.cores), "lossless")
    close(found.b @ found.a, total)
    numerical = int(torch.linalg.matrix_rank(total[0], rtol=1e-14)) if name != "scales" else 6
    assert found.rank == max(1, numerical)
    assert found.error < 1e-13


@pytest.mark.parametrize("rank", [1, 3, 7, 12, 18, 30])
def test_rank_by_number(rank):
    updates = CASES["mixed ranks"]
    space = CoreSpace.of(updates)
    total = sum(dense(updates, SHAPE))[0]
    found = space.factor(sum(space.cores), rank)
    assert found.rank == min(rank, 18) == found.a.shape[1] == found.b.shape[2]
    close((found.b @ found.a)[0], best(total, rank))
    left = float((total - best(total, rank)).norm() / total.norm())
    assert found.error == pytest.approx(left, rel=1e-9, abs=1e-13)
    close(found.a[0].norm(dim=1), found.sigma[0].sqrt())
    close(found.b[0].norm(dim=0), found.sigma[0].sqrt())


@pytest.mark.parametrize("energy", [0.2, 0.5, 0.9, 0.99, 1.0])
def test_rank_by_energy(energy):
    space = CoreSpace.of(CASES["mixed ranks"])
    total = sum(dense(CASES["mixed ranks"], SHAPE))[0]
    squares = torch.linalg.svdvals(total).square()
    found = space.factor(sum(space.cores), {"energy": energy})
    share = lambda r: float(squares[:r].sum() / squares.sum())  # noqa: E731
    assert share(found.rank) >= energy - 1e-12
    assert found.rank == 1 or share(found.rank - 1) < energy


def test_one_rank_for_all_matrices_of_a_module():
    shape = (3, 24, 18)
    one = update(1, 4, shape)
    one.b[1] = 0
    one.b[2, :, 2:] = 0
    space = CoreSpace.of([one, Update(one.a[:, :0], one.b[..., :0], 1.0)])
    found = space.factor(space.cores[0], "lossless")
    assert found.rank == 4 and found.error < 1e-15
    close(found.b @ found.a, one.dense())
    assert (found.sigma[1] == 0).all()
    kept = space.factor(space.cores[0], {"energy": 0.6})
    whole = torch.linalg.svdvals(one.dense()).square().sum(0)
    assert float(whole[: kept.rank].sum()) >= 0.6 * float(whole.sum())
    assert kept.rank == 1 or float(whole[: kept.rank - 1].sum()) < 0.6 * float(whole.sum())


def test_nothing_has_rank_one():
    zero = Update(torch.zeros(1, 3, 18), torch.zeros(1, 24, 3), 1.0)
    space = CoreSpace.of([zero])
    found = space.factor(space.cores[0], "lossless")
    assert found.rank == 1 and found.error == 0.0 and not (found.b @ found.a).any()


def test_one_element():
    space = CoreSpace.of([update(1, 1, (1, 1, 1)), update(2, 3, (1, 1, 1))])
    found = space.factor(sum(space.cores), 5)
    assert found.rank == 1
    close(found.b @ found.a, update(1, 1, (1, 1, 1)).dense() + update(2, 3, (1, 1, 1)).dense())


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    rows=st.integers(1, 12),
    count=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_any_shapes(ranks, rows, count, seed):
    shape = (count, rows, 7)
    updates = [update(seed + i, rank, shape) for i, rank in enumerate(ranks)]
    space = CoreSpace.of(updates)
    for core, change in zip(space.cores, dense(updates, shape), strict=True):
        close(expanded(space, core), change, 1e-11)
