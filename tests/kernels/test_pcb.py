from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels.pcb import pcb_merge
from tests.reference.pcb import merge as reference

SHAPES = [(17, 13), (1,), (0, 3), (2, 3, 4)]


def vectors_of(shape=(17, 13), device="cpu", dtype=torch.float32, count=4, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    drawn = (torch.randn(shape, generator=generator).double() for _ in range(count))
    return [(scale * delta).to(device, dtype) for delta in drawn]


def agree(found, deltas, density, clip, tolerance):
    wanted = reference([delta.flatten().cpu() for delta in deltas], density, clip)
    size = max((float(delta.abs().max()) for delta in deltas if delta.numel()), default=0.0)
    torch.testing.assert_close(
        found.flatten().double().cpu(), wanted, rtol=tolerance, atol=tolerance * size
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("density", "clip"), [(0.1, 1e-4), (0.35, 0.02), (1.0, 0.0)])
def test_against_the_reference(dtype, count, density, clip, device, chunk):
    for shape in SHAPES:
        deltas = vectors_of(shape, device, dtype, count)
        before = [delta.clone() for delta in deltas]
        found = pcb_merge(deltas, density, clip)
        assert (found.shape, found.dtype) == (shape, dtype)
        if found.numel():
            agree(found, deltas, density, clip, 1e-6 if dtype == torch.float32 else 1e-12)
        assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 30.0, 1e15])
def test_scales(scale):
    deltas = vectors_of(scale=scale)
    agree(pcb_merge(deltas, 0.3), deltas, 0.3, 1e-4, 1e-6)


@pytest.mark.parametrize(
    ("size", "clip", "least", "largest"),
    [(20, 0.05, 1, 18), (20, 1e-4, 0, 18), (10_000, 1e-4, 1, 9_998), (25_000, 1e-4, 2, 24_996)],
)
def test_what_the_authors_code_gives(size, clip, least, largest):
    """They take the magnitudes at ``int(d * clip)`` and ``int(d * (1 - clip) - 1)``."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, size, generator=generator, dtype=torch.float64)
    low, high = (rows.abs().sort(1).values[:, i, None] for i in (least, largest))
    magnitudes = rows.abs().clamp(low, high)
    intra = torch.exp(3 * ((magnitudes - low) / (high - low)) ** 2)
    score = intra * torch.tanh(rows * rows.sum(0))
    floor, peak = (score.sort(1).values[:, i, None] for i in (int(size * 0.7), size - 1))
    share = (score.clamp(floor, peak) - floor) / (peak - floor)
    merged = (rows.sign() * magnitudes * share).sum(0) / share.sum(0).clamp(min=1e-12)
    found = pcb_merge(list(rows), 0.3, clip)
    torch.testing.assert_close(found, merged, rtol=1e-12, atol=1e-12)


def test_at_most_the_density_of_one_task_is_kept():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    found = pcb_merge([x], 0.1, 0.0)
    assert 90 <= int((found != 0).sum()) <= 100
    # Alone, a task keeps its largest entries as they are.
    assert torch.equal(found[found != 0], x[found != 0])
    assert x[found != 0].abs().min() > x[found == 0].abs().max()


entries = st.one_of(
    st.floats(-100, 100, width=32, allow_subnormal=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30]),
)
vectors = st.integers(1, 12).flatmap(
    lambda size: st.lists(
        st.lists(entries, min_size=size, max_size=size), min_size=1, max_size=4
    ).map(lambda rows: [torch.tensor(row, dtype=torch.float64) for row in rows])
)
densities = st.sampled_from([0.05, 0.1, 0.5, 0.9, 1.0])


@given(vectors, densities)
def test_every_entry_is_between_those_of_the_tasks(rows, density):
    found = pcb_merge(list(rows), density, 0.0)
    assert torch.isfinite(found).all()
    stacked = torch.stack([*rows, torch.zeros_like(rows[0])])
    slack = 1e-9 * stacked.abs().max()
    assert torch.all(found <= stacked.max(0).values + slack)
    assert torch.all(found >= stacked.min(0).values - slack)


@given(vectors, densities)
def test_signs_mirror(rows, density):
    found = pcb_merge(list(rows), density)
    mirrored = pcb_merge([-row for row in rows], density)
    assert torch.equal(mirrored, -found)


def test_order_of_the_tasks_does_not_matter():
    deltas = vectors_of(dtype=torch.float64)
    found, other = (pcb_merge(d, 0.3) for d in (deltas, deltas[::-1]))
    torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-12)


def test_identical_tasks_return_themselves_where_they_are_kept():
    (delta,) = vectors_of(dtype=torch.float64, count=1)
    found = pcb_merge([delta] * 3, 0.5, 0.0)
    kept = found != 0
    assert 0.45 < kept.double().mean() <= 0.5
    torch.testing.assert_close(found[kept], delta[kept], rtol=1e-14, atol=0)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_constant_and_zero_vectors(clip):
    ones = torch.ones(10)
    zeros = 0 * ones
    for deltas, wanted in (
        ([ones], ones),
        ([ones, 3 * ones], 2 * ones),
        ([ones, -ones], zeros),
        ([zeros, zeros], zeros),
        ([ones, zeros], ones),  # a zero task dilutes nothing
    ):
        assert torch.equal(pcb_merge(deltas, 0.1, clip), wanted)


def test_single_entries():
    found = pcb_merge([torch.tensor(2.0), torch.tensor(-1.0)])
    assert found.shape == () and float(found) == 0.5


def test_more_equal_maxima_than_the_density_keeps():
    x = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, -0.1])
    assert torch.equal(pcb_merge([x], 0.2), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("position", [0, 3])
def test_nan_is_not_hidden(position):
    x = torch.arange(6.0)
    x[position] = torch.nan
    assert pcb_merge([torch.ones(6), x])[position].isnan()
