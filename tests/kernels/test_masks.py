from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels.masks import (
    elected,
    pack_bits,
    reconstruct,
    rescaler,
    sign_mask,
    tall_mask,
    unpack_bits,
)
from tests.reference import consensus, emr


def test_the_layout_of_the_bits(device):
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1], dtype=torch.bool, device=device)
    assert pack_bits(mask).tolist() == [0b10000001, 0b00000110]


def test_every_byte():
    bits = torch.tensor([bool(value >> i & 1) for value in range(256) for i in range(8)])
    packed = torch.arange(256).to(torch.uint8)
    assert torch.equal(pack_bits(bits), packed)
    assert torch.equal(unpack_bits(packed, 2048), bits)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_packing_and_back(count, device):
    mask = (torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5).to(device)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack_bits(packed, count), mask)


@given(st.lists(st.booleans(), max_size=70), st.integers(1, 3), st.integers(0, 5))
def test_views_are_packed_row_by_row(bits, stride, offset):
    whole = torch.zeros(offset + stride * len(bits), dtype=torch.bool)
    view = whole[offset::stride][: len(bits)]
    view.copy_(torch.tensor(bits, dtype=torch.bool))
    assert unpack_bits(pack_bits(view), len(bits)).tolist() == bits
    columns = torch.stack([view, ~view])
    assert torch.equal(unpack_bits(pack_bits(columns.T), 2 * len(bits)), columns.T.flatten())


def test_what_is_refused():
    for packed in (torch.ones(1, dtype=torch.int64), torch.ones(2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="for 3 entries; expected one byte for every eight"):
            unpack_bits(packed, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.7, 0.0])
def test_reconstruct_against_the_reference(dtype, factor, device, chunk):
    generator = torch.Generator().manual_seed(1)
    base, unified = (torch.randn(13, 17, generator=generator).to(device, dtype) for _ in "bu")
    mask = (torch.rand(13, 17, generator=generator) < 0.5).to(device)
    found = reconstruct(base, unified, mask, factor, dtype)
    wanted = emr.reconstruct(base.cpu(), unified.cpu(), mask.cpu(), factor)
    assert found.dtype == dtype and found.shape == base.shape
    # float32 at least inside: a half-precision result is the float64 one, rounded once
    eps = torch.finfo(dtype).eps
    assert torch.all((found.double().cpu() - wanted).abs() <= 0.51 * eps * wanted.abs() + 4e-7)


def test_an_unmasked_task_is_the_base_bit_by_bit():
    base = torch.tensor([1e-40, 3.0, -0.1])
    found = reconstruct(base, torch.ones(3), torch.zeros(3, dtype=torch.bool), 5.0, torch.float32)
    assert torch.equal(found, base)


def test_nan_is_seen_even_where_it_is_masked():
    nan = torch.tensor([torch.nan, 1.0])
    found = reconstruct(torch.zeros(2), nan, torch.zeros(2, dtype=torch.bool), 1.0, torch.float32)
    assert found[0].isnan() and found[1] == 0


# --- TALL masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.6, 1.0, 3.0])
def test_tall_masks_against_the_reference(dtype, threshold, device, chunk):
    generator = torch.Generator().manual_seed(1)
    delta, unified = (torch.randn(11, 17, generator=generator).to(device, dtype) for _ in "du")
    found = tall_mask(delta, unified, threshold)
    assert found.dtype == torch.bool and found.shape == delta.shape
    assert torch.equal(found.cpu(), consensus.mask(delta.cpu(), unified.cpu(), threshold))
    assert threshold == 0.0 or 0 < int(found.sum()) < found.numel()


numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1.0, -1.0, 3e38, -3e38, 1.5e-45]),
)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30))
def test_extremes_at_a_threshold_without_rounding(pairs):
    delta, unified = (torch.tensor(x, dtype=torch.float32) for x in zip(*pairs, strict=True))
    # Only differences of numbers far apart round in float64, and those are no near thing.
    assert torch.equal(tall_mask(delta, unified, 0.5), consensus.mask(delta, unified, 0.5))


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30))
def test_a_larger_threshold_keeps_less(pairs):
    delta, unified = (torch.tensor(x, dtype=torch.float32) for x in zip(*pairs, strict=True))
    assert torch.all(tall_mask(delta, unified, 0.4) >= tall_mask(delta, unified, 0.9))


def test_equality_is_kept_as_in_the_paper():
    one = torch.tensor([1.0, 1.0, 0.0])
    assert tall_mask(one, torch.tensor([2.0, 2.1, 0.0]), 1.0).tolist() == [True, False, True]


def test_a_task_equal_to_the_merged_vector_is_kept():
    delta = torch.tensor([0.0, 1e-30, -3e38])
    assert tall_mask(delta, delta).all()


def test_tall_masks_do_not_keep_nan():
    assert not tall_mask(torch.tensor([torch.nan]), torch.ones(1)).any()


# --- EMR ------------------------------------------------------------------------------------

SHAPES = [(17, 13), (1,), (0, 3), (2, 3, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_emr_against_the_reference(dtype, count, scale, device, chunk):
    generator = torch.Generator().manual_seed(5)
    for shape in SHAPES:
        drawn = (torch.randn(shape, generator=generator).double() for _ in range(count))
        deltas = [(scale * delta).to(device, dtype) for delta in drawn]
        found = elected(deltas)
        assert found.dtype == dtype
        assert torch.equal(found.double().cpu(), emr.unified([delta.cpu() for delta in deltas]))
        for delta in deltas:
            assert torch.equal(sign_mask(delta, found).cpu(), emr.mask(delta, found).cpu())
            wanted = emr.rescale([delta], [found])
            assert rescaler(delta, found) == pytest.approx(wanted, rel=1e-12)


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
    common = elected(rows)
    for row in rows:
        kept = sign_mask(row, common)
        assert torch.equal(kept, (row.sign() * common.sign()) > 0)
        assert torch.all(common.abs()[kept] >= row.abs()[kept])
    # every elected entry is an entry of one of the tasks
    stacked = torch.stack(rows)
    assert torch.all((common == 0) | (stacked == common).any(0))


@given(vectors)
def test_order_does_not_matter_for_two_and_signs_mirror(rows):
    common = elected(rows)
    mirrored = elected([-row for row in rows])
    assert torch.equal(mirrored, -common)
    pair = rows[:2]
    one, other = (elected(p) for p in (pair, pair[::-1]))
    assert torch.equal(one, other)


@given(vectors)
def test_identical_tasks_come_back(rows):
    row = rows[0]
    common = elected([row] * 3)
    assert torch.equal(common, row)
    wanted = 1.0 if row.any() else 0.0
    assert rescaler(row, common) == wanted


def test_cancelling_tasks_elect_nothing():
    row = torch.tensor([1.0, -2.0])
    common = elected([row, -row])
    assert torch.equal(common, torch.zeros(2))
    assert rescaler(row, common) == 1.0


def test_the_mask_does_not_underflow_or_overflow():
    tiny, huge = torch.tensor([1e-30, -1e-30]), torch.tensor([3e38, 3e38])
    assert sign_mask(tiny, tiny).tolist() == [True, True]
    assert sign_mask(tiny, huge).tolist() == [True, False]


def test_the_rescaler_is_in_float64():
    delta = torch.full(((1 << 20) + 1,), 1e-4)
    delta[-1] = 3.0
    common = 2 * delta
    common[-1] = -1.0
    whole = 2**20 * float(delta[0]) + 3.0
    wanted = whole / (2**21 * float(delta[0]))
    assert rescaler(delta, common) == pytest.approx(wanted, rel=1e-12)


def test_nan_is_not_hidden_by_an_election():
    row = torch.tensor([1.0, torch.nan])
    for order in ([row, torch.ones(2)], [torch.ones(2), row]):
        common = elected(order)
        assert common[0] == 1.0 and common[1].isnan()
        assert math.isnan(rescaler(row, common))
