"""Merge rules on LoRAs; each test is a row of docs/numerics.md."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_ext.errors import MergeError, NonFiniteError
from peft_merge.io.compatible import compatible
from tests.numerics.inputs import factors
from tests.numerics.merging import RULES, lora
from tests.peft_merge import loras

# NAN's coefficients come before the rule, so that one rule with them stands for all.
NAMES = [name for name in RULES if not name.startswith("nan_") or name == "nan_ties"]
# They drop entries, by chance or by rank.
RANDOM = ("dare", "della", "breadcrumbs")
each = pytest.mark.parametrize("name", NAMES)


@each
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity(name, value):
    given = factors()
    given[1][0][0, 0] = value
    with pytest.raises(NonFiniteError, match="lora_A"):
        lora(RULES[name], given)


@each
def test_denormals(name):
    """Factors of 1e-21, whose products are below what float32 holds, do not vanish."""
    result = lora(RULES[name], factors(1e-21))
    assert 1e-43 < float(result.abs().max()) < 1e-41


@each
def test_zeros(name):
    assert not lora(RULES[name], factors(0.0)).any()


@each
def test_an_adapter_that_changes_nothing(name):
    given = factors()
    given[0] = (given[0][0], torch.zeros_like(given[0][1]))
    result = lora(RULES[name], given)
    assert result.any()
    assert bool(torch.isfinite(result).all())


@each
def test_duplicates(name):
    (a, b), *_ = factors()
    result, change = lora(RULES[name], [(a, b)] * 3), b.double() @ a.double()
    cosine = torch.cosine_similarity(result.reshape(-1), change.reshape(-1), dim=0)
    # Isotropic merging evens out what is one spectrum here.
    loose = name.startswith(RANDOM) or "pcb" in name or "iso" in name
    assert cosine > (0.3 if loose else 0.95)


@each
def test_products_beyond_float16(name):
    """Of factors whose product is beyond float16; the factors of the result are not."""
    result = lora(RULES[name], factors(500.0, dtype=torch.float16))
    assert float(result.abs().max()) > 65_504
    assert bool(torch.isfinite(result).all())


@each
def test_results_beyond_float16(name):
    with pytest.raises(MergeError, match="range"):
        lora(RULES[name], factors(1e9), torch.float16)


@each
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_bfloat16_at_extreme_scales(name, size):
    """The products are 1e-60 and 1e60, beyond float32."""
    result = lora(RULES[name], factors(size, dtype=torch.bfloat16))
    assert bool(torch.isfinite(result).all())
    assert 0.01 < float(result.abs().max()) / size**2 < 100


@each
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (6, 1)])
def test_thin_matrices(name, rows, columns):
    result = lora(RULES[name], factors(rows=rows, columns=columns))
    assert result.shape == (rows, columns)
    assert result.any()
    assert bool(torch.isfinite(result).all())


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (6, 0)])
def test_empty_modules(rows, columns):
    update = loras.update(1, 2, (1, rows, columns))
    (problem,) = compatible([loras.adapter("a", {"q": update})])
    assert problem.where == "q" and "entries" in problem.expected
