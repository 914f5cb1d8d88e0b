from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels import numerics
from mergekit_ext.kernels.masks import pack_bits, reconstruct, unpack_bits
from tests.reference.emr import reconstruct as reference


@pytest.fixture(params=[1 << 18, 48], ids=["one chunk", "many chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(numerics, "_CPU_CHUNK", request.param)
    monkeypatch.setattr(numerics, "_ACCELERATOR_CHUNK", request.param)


def test_the_layout_of_the_bits(device):
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1], dtype=torch.bool, device=device)
    assert pack_bits(mask).tolist() == [0b10000001, 0b00000110]


@pytest.mark.parametrize("value", range(256))
def test_every_byte(value):
    bits = torch.tensor([bool(value >> i & 1) for i in range(8)])
    assert pack_bits(bits).tolist() == [value]
    assert unpack_bits(torch.tensor([value], dtype=torch.uint8), 8).tolist() == bits.tolist()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 47, 48, 49, 1000])
def test_packing_and_back(count, device, chunk):
    mask = (torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5).to(device)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack_bits(packed, count), mask)


@given(st.lists(st.booleans(), max_size=70), st.integers(1, 3), st.integers(0, 5))
def test_views_of_other_tensors(bits, stride, offset):
    whole = torch.zeros(offset + stride * len(bits), dtype=torch.bool)
    view = whole[offset::stride][: len(bits)]
    view.copy_(torch.tensor(bits, dtype=torch.bool))
    assert unpack_bits(pack_bits(view), len(bits)).tolist() == bits


def test_matrices_are_packed_row_by_row():
    mask = torch.arange(24).reshape(4, 6) % 3 == 0
    assert torch.equal(unpack_bits(pack_bits(mask.T), 24), mask.T.flatten())


def test_padding_is_zero():
    assert pack_bits(torch.ones(3, dtype=torch.bool)).tolist() == [0b111]


def test_what_is_refused():
    with pytest.raises(TypeError, match="bool"):
        pack_bits(torch.ones(3))
    with pytest.raises(TypeError, match="uint8"):
        unpack_bits(torch.ones(1, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="2 bytes for 3 entries"):
        unpack_bits(torch.ones(2, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="mask: found 2 entries"):
        ones = torch.ones(3)
        reconstruct(ones, ones, torch.ones(2, dtype=torch.bool), 1.0, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.7, 0.0])
def test_reconstruct_against_the_reference(dtype, factor, device, chunk):
    generator = torch.Generator().manual_seed(1)
    base, unified = (torch.randn(13, 17, generator=generator).to(device, dtype) for _ in "bu")
    mask = (torch.rand(13, 17, generator=generator) < 0.5).to(device)
    found = reconstruct(base, unified, mask, factor, dtype)
    wanted = reference(base.cpu(), unified.cpu(), mask.cpu(), factor)
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
