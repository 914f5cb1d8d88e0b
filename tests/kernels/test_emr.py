from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels import emr, numerics
from tests.reference import emr as reference

SHAPES = [(17, 13), (5,), (1,), (0, 3), (2, 3, 4)]


@pytest.fixture(params=[1 << 18, 50], ids=["one chunk", "many chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(numerics, "_CPU_CHUNK", request.param)
    monkeypatch.setattr(numerics, "_ACCELERATOR_CHUNK", request.param)


def block(device="cpu", dtype=torch.float32, count=4, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    return [
        [(scale * torch.randn(s, generator=generator).double()).to(device, dtype) for s in SHAPES]
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_against_the_reference(dtype, count, scale, device, chunk):
    deltas = block(device, dtype, count, scale)
    found = emr.unified(deltas)
    for index, part in enumerate(found):
        wanted = reference.unified([d[index].cpu() for d in deltas])
        assert part.dtype == dtype
        assert torch.equal(part.double().cpu(), wanted)
    for delta in deltas:
        for part, common in zip(delta, found, strict=True):
            assert torch.equal(emr.mask(part, common).cpu(), reference.mask(part, common).cpu())
        assert emr.rescale(delta, found) == pytest.approx(
            reference.rescale(delta, found), rel=1e-12
        )


entries = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5e-45, -1.5e-45, 3e38, -3e38]),
)
vectors = st.integers(1, 12).flatmap(
    lambda size: st.lists(
        st.lists(entries, min_size=size, max_size=size), min_size=1, max_size=5
    ).map(lambda rows: [torch.tensor(row, dtype=torch.float32) for row in rows])
)


@given(vectors)
def test_what_a_task_keeps_has_its_sign_and_is_no_smaller(rows):
    (common,) = emr.unified([[row] for row in rows])
    for row in rows:
        kept = emr.mask(row, common)
        assert torch.equal(kept, (row.sign() * common.sign()) > 0)
        assert torch.all(common.abs()[kept] >= row.abs()[kept])
    # every elected entry is an entry of one of the tasks
    stacked = torch.stack(rows)
    assert torch.all((common == 0) | (stacked == common).any(0))


@given(vectors)
def test_order_does_not_matter_for_two_and_signs_mirror(rows):
    (common,) = emr.unified([[row] for row in rows])
    (mirrored,) = emr.unified([[-row] for row in rows])
    assert torch.equal(mirrored, -common)
    pair = rows[:2]
    (one,), (other,) = (emr.unified([[r] for r in p]) for p in (pair, pair[::-1]))
    assert torch.equal(one, other)


@given(vectors)
def test_identical_tasks_come_back(rows):
    row = rows[0]
    (common,) = emr.unified([[row]] * 3)
    assert torch.equal(common, row)
    wanted = 1.0 if row.any() else 0.0
    assert emr.rescale([row], [common]) == wanted


def test_cancelling_tasks_elect_nothing():
    row = torch.tensor([1.0, -2.0])
    (common,) = emr.unified([[row], [-row]])
    assert torch.equal(common, torch.zeros(2))
    assert emr.rescale([row], [common]) == 1.0


def test_the_mask_does_not_underflow_or_overflow():
    tiny, huge = torch.tensor([1e-30, -1e-30]), torch.tensor([3e38, 3e38])
    assert emr.mask(tiny, tiny).tolist() == [True, True]
    assert emr.mask(tiny, huge).tolist() == [True, False]


def test_the_rescaler_is_over_the_block_and_in_float64():
    delta = [torch.full((1 << 20,), 1e-4), torch.tensor([3.0])]
    common = [2 * delta[0], torch.tensor([-1.0])]
    whole = 2**20 * float(delta[0][0]) + 3.0
    wanted = whole / (2**21 * float(delta[0][0]))
    assert emr.rescale(delta, common) == pytest.approx(wanted, rel=1e-12)


def test_nan_is_not_hidden():
    row = torch.tensor([1.0, torch.nan])
    for order in ([row, torch.ones(2)], [torch.ones(2), row]):
        (common,) = emr.unified([[r] for r in order])
        assert common[0] == 1.0 and common[1].isnan()
        assert math.isnan(emr.rescale([row], [common]))
