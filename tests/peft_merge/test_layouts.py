"""Stored factors and stacked ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_merge.adapter import ModuleInfo, described
from peft_merge.io.read import load_adapter
from tests.peft_merge.models import KINDS, adapted, saved

SIZES = st.integers(1, 4)


def _round_trip(name, a, b, r):
    info = described(name, tuple(a.shape), tuple(b.shape), r, False, a.dtype)
    assert isinstance(info, ModuleInfo)
    stacked = info.stack(a, b)
    assert stacked[0].shape == (info.matrices, info.rank, info.columns)
    assert stacked[1].shape == (info.matrices, info.rows, info.rank)
    stored = info.store(*stacked)
    assert torch.equal(stored[0], a) and torch.equal(stored[1], b)
    assert stored[0].is_contiguous() and stored[1].is_contiguous()
    assert info.configured_rank == r
    return info


@pytest.mark.parametrize("name", ["linear", "embedding"])
@given(r=SIZES, rows=SIZES, columns=SIZES)
def test_matrices_come_back(name, r, rows, columns):
    info = _round_trip(name, torch.randn(r, columns), torch.randn(rows, r), r)
    assert info.shape == (1, rows, columns)


@given(
    groups=SIZES,
    rank=SIZES,
    rows=SIZES,
    inputs=SIZES,
    kernel=st.lists(SIZES, min_size=1, max_size=3),
)
def test_convolutions_come_back(groups, rank, rows, inputs, kernel):
    a = torch.randn(groups * rank, inputs, *kernel)
    b = torch.randn(groups * rows, rank, *[1] * len(kernel))
    info = _round_trip("convolution", a, b, groups * rank)
    assert info.shape == (groups, rows, a[0].numel()) and info.kernel == tuple(kernel)


@given(experts=SIZES, r=SIZES, rows=SIZES, columns=SIZES)
def test_parameters_come_back_as_peft_multiplies_them(experts, r, rows, columns):
    a, b = torch.randn(r * experts, columns), torch.randn(rows, r * experts)
    info = _round_trip("parameter", a, b, r)
    assert info.shape == (experts, rows, columns)
    stacked_a, stacked_b = info.stack(a, b)
    expected = torch.einsum(
        "o r e, e r i -> e o i", b.reshape(rows, r, experts), a.reshape(experts, r, columns)
    )
    torch.testing.assert_close(stacked_b @ stacked_a, expected)


def test_a_grouped_convolution_is_its_blocks(tmp_path):
    # PEFT cannot compute the change of a grouped convolution, so outputs are compared.
    kind = KINDS["convolutions"]
    adapter = load_adapter(saved(kind, tmp_path / "one", seed=3))
    info, update = adapter.infos["grouped"], adapter.load("grouped")
    layer = adapted(kind, seed=3).base_model.model.grouped
    base = layer.get_base_layer()
    x = torch.randn(2, 6, 5, 5)
    assert info.shape == (2, 4, 6 * 9) and info.rank == 2
    kernel = update.dense().reshape(8, 6, 3, 3).float()
    change = nn.functional.conv2d(x, kernel, padding=1) + update.scale * update.bias[:, None, None]
    torch.testing.assert_close(base(x) + change, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "a", "b", "r"),
    [
        ("linear", (4, 6), (8, 3), 4),
        ("linear", (3, 6), (8, 3), 4),
        ("linear", (4,), (8, 4), 4),
        ("linear", (0, 6), (8, 0), 4),
        ("embedding", (4, 6, 1), (8, 4), 4),
        ("convolution", (4, 6, 3), (8, 3, 1), 4),
        ("convolution", (4, 6, 3), (8, 4, 2), 4),
        ("convolution", (4, 6, 3, 3), (8, 4, 1), 4),
        ("convolution", (4, 6, 3), (7, 2, 1), 4),
        ("parameter", (9, 6), (8, 9), 4),
        ("parameter", (8, 6), (8, 4), 4),
    ],
)
def test_what_is_no_pair_is_refused(name, a, b, r):
    assert described(name, a, b, r, False, torch.float32) is None
