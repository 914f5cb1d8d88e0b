"""Merge rules on (IA)^3 vectors; each test is a row of docs/numerics.md."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_ext.errors import ConfigError, MergeError, NonFiniteError
from tests.numerics.inputs import vectors
from tests.numerics.merging import RULES, ia3
from tests.numerics.test_lora import NAMES

each = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("space", ["additive", "log"])


@each
@both
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity(name, space, value):
    given = vectors()
    given[1][0, 0] = value
    with pytest.raises(NonFiniteError, match="k of model a1"):
        ia3(RULES[name], given, space)


@each
@both
def test_ones_change_nothing(name, space):
    assert torch.equal(ia3(RULES[name], vectors(0.0), space), torch.ones(1, 7))


@each
def test_zeros(name):
    """In log space they have no logarithm."""
    given = [torch.zeros(1, 7)] * 3
    assert bool(torch.isfinite(ia3(RULES[name], given)).all())
    with pytest.raises(ConfigError, match="positive"):
        ia3(RULES[name], given, "log")


@each
@both
def test_denormals(name, space):
    """Beside 1 they are zeros; in log space they are numbers like others."""
    given = [1e-40 * vector.abs() for vector in vectors()]
    assert bool(torch.isfinite(ia3(RULES[name], given, space)).all())
    if space == "log" and name == "linear":
        assert 0 < float(ia3(RULES[name], given, space).max()) < 1e-39


@each
@both
def test_duplicates(name, space):
    """One rule's mean of equal vectors is the vector; the others stay on the same side of 1."""
    (vector, *_) = vectors()
    result = ia3(RULES[name], [vector] * 3, space)
    assert bool((((result - 1) * (vector - 1)) >= 0).all())
    if name == "linear":
        torch.testing.assert_close(result, vector)


@each
@both
def test_results_beyond_float16(name, space):
    """Never infinity: an error, or a value that fits."""
    given = [torch.full((1, 7), 60_000.0, dtype=torch.float16)] * 3
    try:
        result = ia3(RULES[name], given, space, **{"lambda": 3.0, "scale": 3.0})
    except MergeError as error:
        assert "range" in str(error)
    else:
        assert bool(torch.isfinite(result).all())


@each
@both
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_bfloat16_at_extreme_scales(name, space, size):
    given = [(size * vector.double()).to(torch.bfloat16) for vector in vectors()]
    try:
        result = ia3(RULES[name], given, space)
    except MergeError as error:
        assert "range" in str(error)
    else:
        assert bool(torch.isfinite(result).all())


@each
@both
@pytest.mark.parametrize("length", [0, 1])
def test_short_vectors(name, space, length):
    result = ia3(RULES[name], vectors(length=length), space)
    assert result.shape == (1, length)
    assert bool(torch.isfinite(result).all())
