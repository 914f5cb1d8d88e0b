from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.declared.nan import inverse_norm_coefficients, scale_of, uniform
from tests.reference.nan import coefficients as reference

norms = st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=8)


@given(norms)
def test_agrees_with_equation_10(values):
    assert inverse_norm_coefficients(values) == pytest.approx(reference(values), rel=1e-12)


@given(norms)
def test_sums_to_one_and_smaller_norms_weigh_more(values):
    found = inverse_norm_coefficients(values)
    assert math.fsum(found) == pytest.approx(1, rel=1e-12)
    by_norm = [a for _, a in sorted(zip(values, found, strict=True))]
    assert by_norm == sorted(by_norm, reverse=True)


@given(norms, st.floats(1e-100, 1e100))
def test_depends_on_ratios_only(values, factor):
    scaled = [factor * value for value in values]
    assert inverse_norm_coefficients(scaled) == pytest.approx(
        inverse_norm_coefficients(values), rel=1e-9
    )


@given(norms, st.randoms())
def test_permutes_with_the_models(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    found = inverse_norm_coefficients(values)
    moved = inverse_norm_coefficients([values[i] for i in order])
    assert moved == pytest.approx([found[i] for i in order], rel=1e-12)


def test_smallest_numbers_do_not_overflow():
    assert inverse_norm_coefficients([5e-324, 5e-324]) == [0.5, 0.5]
    assert inverse_norm_coefficients([5e-324, 1e308])[0] == 1


def test_zero_norms_carry_nothing():
    assert inverse_norm_coefficients([0.0, 2.0, 1.0]) == pytest.approx([0, 1 / 3, 2 / 3])
    assert inverse_norm_coefficients([0.0, 0.0]) == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_refuses_what_is_no_norm(bad):
    with pytest.raises(ValueError, match=r"norms\[1\]"):
        inverse_norm_coefficients([1.0, bad])


def test_default_scale():
    assert [scale_of("paper", m) for m in (1, 2, 3, 8)] == [1, 1, 1.5, 4]
    assert scale_of("paper", 8, has_base=False) == 1
    assert scale_of(0, 8) == 0


def test_uniform():
    assert uniform([0.5, 0.501])
    assert not uniform([0.5, 0.51])
    assert not uniform([1.0])
    assert not uniform([0.0, 0.0])
