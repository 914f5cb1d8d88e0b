"""Target sizes: how they are written, and what they hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.core.memory import in_models
from mergekit_ext.flexmerge.storage import Size, Target
from mergekit_ext.host.flexmerge.parameters import OWN

SPEC = next(spec for spec in OWN if spec.name == "target_size")


@pytest.mark.parametrize(
    ("written", "models", "size"),
    [
        (1, 1.0, None),
        (2.25, 2.25, None),
        ("2.25", 2.25, None),
        (" 3 ", 3.0, None),
        (99_999, 99_999.0, None),
        (100_000, None, 100_000),
        (12_000_000_000, None, 12_000_000_000),
        ("900kB", None, 900_000),
        ("900KB", None, 900_000),
        ("900 kb", None, 900_000),
        ("1KiB", None, 1024),
        ("1.5MiB", None, 3 << 19),
        ("12GB", None, 12 * 10**9),
        ("2TiB", None, 2 << 40),
        ("77B", None, 77),
        ("1B", None, 1),
        # No binary fraction: 2.3 * 10**9 in floats is a byte less.
        ("2.3GB", None, 2_300_000_000),
        ("1.001kB", None, 1001),
        ("4.35GB", None, 4_350_000_000),
    ],
)
def test_ways_to_write_it(written, models, size):
    found = Target.parse(written)
    assert (found.models, found.bytes) == (models, size)


@pytest.mark.parametrize(
    "written",
    [
        *("abc", "", "GB", "2.5.1", "-1", "1e3", "5 parsecs", "3Gb/s", "0", "0.0", "0GB", "0.2B"),
        *(0, -1, -2.5, float("nan"), float("inf"), -float("inf"), True, False, None, {}, b"1"),
        *(10**400, "9" * 400, "9" * 400 + "GB"),
    ],
)
def test_what_is_refused(written):
    with pytest.raises(ValueError, match="number of models such as"):
        Target.parse(written)
    wanted, _ = SPEC.problem(written)
    assert "number of models such as 2.25" in wanted


def size(models: float, total: int = 1000) -> Size:
    return Size(total, total / models, 0)


def test_rounding_does_not_exclude_the_very_size():
    third = Target.parse(7 / 3)
    assert third.holds(size(7 / 3))
    assert third.holds(size(7 / 3 * (1 + 1e-12)))
    assert not third.holds(size(7 / 3 * (1 + 1e-6)))
    assert not third.exceeds(size(7 / 3 * (1 - 1e-12)))
    assert third.exceeds(size(7 / 3 * (1 - 1e-3)))


def test_a_budget_holds_private_tensors_too_and_may_be_too_large():
    budget = Target.parse("1MB")
    assert budget.holds(size(9.0, 1_000_000))
    assert not budget.holds(size(0.1, 1_000_001))
    assert not budget.exceeds(size(1.0, 10))


@given(st.floats(0.01, 99_999))
def test_what_is_written_down_is_what_was_asked(models):
    again = Target.parse(str(Target.parse(models)))
    assert again.models == pytest.approx(models, rel=1e-12)


@given(st.integers(1, 10**15))
def test_budgets_are_written_down_exactly(count):
    assert str(Target(bytes=count)) == f"{count} bytes"


@given(st.integers(10**6, 10**12), st.integers(10**6, 10**9), st.integers(0, 10**6))
def test_a_size_that_is_printed_holds_what_has_it_and_is_not_too_large(stored, unit, private):
    size = Size(stored + private, unit, private)
    target = Target(models=float(f"{in_models(size.models):.3f}"))
    assert target.holds(size) or size.models < 0.01
    assert not target.exceeds(size)
