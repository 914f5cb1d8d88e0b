from __future__ import annotations

import pytest

from mergekit_ext.errors import ConfigError, NonFiniteError, Problem, nearest


def test_config_error_lists_every_problem():
    problems = [
        Problem("parameters.mu", "'x'", "a number", "Write a number."),
        Problem("models[0]", "no folder", "a model"),
    ]
    error = ConfigError(problems, "merge.yml")
    assert error.problems == tuple(problems)
    assert str(error).splitlines() == [
        "2 problems with merge.yml; nothing was done:",
        "  1. parameters.mu: found 'x'; expected a number. Write a number.",
        "  2. models[0]: found no folder; expected a model.",
    ]


def test_config_error_needs_a_problem():
    with pytest.raises(ValueError, match="at least one"):
        ConfigError([])


def test_non_finite_error_names_tensor_and_model():
    error = NonFiniteError("a.weight", "org/model", 3, 10)
    assert "a.weight of model org/model: found 3 non-finite values among 10" in str(error)


def test_a_number_is_no_misspelling() -> None:
    assert nearest("float8", ["float16", "float64"]) is None
    assert nearest("flaot16", ["float16", "float64"]) == "float16"
    assert nearest("bfloat", ["bfloat16"]) == "bfloat16"
