"""`lore` as a mergekit method: parameters, layouts, warnings. The solver is tested in kernels."""

from __future__ import annotations

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from pydantic import ValidationError

import mergekit_ext
from mergekit_ext.declared import Inputs
from mergekit_ext.declared.method import layout_of
from mergekit_ext.errors import (
    NotConvergedWarning,
    TwoModelsWarning,
    UniformCoefficientsWarning,
)
from mergekit_ext.host.method import ext_method
from mergekit_ext.host.session import Session, active
from tests.reference.lore import lore as reference

mergekit_ext.register()


def models(count=3, shape=(12, 9), dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(shape, generator=generator)
    tuned = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]
    return [t.to(dtype) for t in (base, *tuned)]


def merge(inputs, *, parameters, base_index=None):
    return merge_tensors(
        inputs, "lore", base_index=base_index, parameters={"lambda": 1.0, **parameters}
    )


def problems(*, based=False, **shared):
    given = {"update": "simultaneous", **shared}
    return list(ext_method("lore").problems(given, Inputs(3, based)))


@pytest.mark.parametrize(
    ("parameters", "over_base"),
    [
        ({"mu": 0.2}, False),
        ({"mu_relative": 0.3, "lambda": 0.5, "combine": "mean"}, False),
        ({"mu_relative": 0.3, "combine": "ties"}, True),
        ({"rank_ratio": 0.3}, True),
        ({"mu": 0.1, "update": "sequential"}, False),
    ],
    ids=str,
)
def test_parameters_reach_the_solver(parameters, over_base):
    base, *tuned = models(dtype=torch.float64)
    inputs = [base, *tuned] if over_base else tuned
    found = merge(inputs, base_index=0 if over_base else None, parameters=parameters)
    named = {{"lambda": "lam"}.get(k, k): v for k, v in parameters.items()}
    wanted = reference(tuned, base=base if over_base else None, **named).merged
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_per_model_weights():
    base, *tuned = models(dtype=torch.float64)
    weights = [1.0, 0.0, -0.5]
    found = merge([base, *tuned], base_index=0, parameters={"mu": 0.2, "weight": weights})
    wanted = reference(tuned, base=base, mu=0.2, weights=weights).merged
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, "auto"])
def test_the_dtype_of_the_output_says_how_exact_it_is(factor):
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        with active(Session()) as session:
            merge(models(dtype=dtype)[1:], parameters={"mu_relative": 0.1, "lambda": factor})
        counts += [session.records[0].details["iterations"]]
    assert counts[1] < counts[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32_and_cast_once(dtype):
    base, *tuned = models(dtype=dtype)
    found = merge([base, *tuned], base_index=0, parameters={"mu": 0.05})
    wanted = reference(tuned, base=base, mu=0.05).merged
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert torch.all((found.double() - wanted).abs() <= 0.51 * eps * wanted.abs() + 1e-6)


@pytest.mark.parametrize(
    ("name", "axes", "layout"),
    [
        ("model.norm.weight", 1, "matrix"),
        ("model.layers.0.mlp.up_proj.weight", 2, "matrix"),
        ("model.layers.0.mlp.experts.gate_up_proj", 3, "stacked"),
        ("model.encoder.conv1.weight", 3, "flattened"),
        ("backbone.layers.0.mixer.conv1d.weight", 3, "flattened"),
        ("vit.embeddings.position_embeddings", 3, "stacked"),
        ("vit.embeddings.patch_embeddings.projection.weight", 4, "flattened"),
    ],
)
def test_layout_of(name, axes, layout):
    assert layout_of(name, axes) == layout


def test_one_dimensional_tensors_are_averaged():
    _, *tuned = models(shape=(7,))
    found = merge(tuned, parameters={"mu": 1.0, "lambda": 5.0})
    torch.testing.assert_close(found, sum(tuned) / 3)


def test_exactly_one_threshold():
    assert [p.found for p in problems()] == ["none of mu, mu_relative, rank_ratio"]
    assert [p.found for p in problems(mu=0.1, rank_ratio=0.2)] == ["mu and rank_ratio"]
    assert problems(mu=0.0) == []


def test_sequential_needs_something_to_solve():
    (problem,) = problems(mu=0.1, update="sequential", based=True)
    assert problem.where == "parameters.update"


@pytest.mark.parametrize(
    "parameters",
    [
        {"mu": -1.0},
        {"mu_relative": float("nan")},
        {"rank_ratio": 1.5},
        {"mu": 0.1, "combine": "median"},
        {"mu": 0.1, "update": "together"},
        {"mu": 0.1, "max_iterations": 0},
        {"mu": 0.1, "tolerance": 0.0},
    ],
    ids=str,
)
def test_bad_values_are_refused(parameters):
    _, *tuned = models()
    with pytest.raises(ValidationError):
        merge(tuned, parameters=parameters)


def test_two_models_without_a_base_are_reported():
    _, first, second = models(2)
    with pytest.warns(TwoModelsWarning, match="plain average"):
        found = merge([first, second], parameters={"mu": 0.1, "lambda": 9.0})
    torch.testing.assert_close(found, (first + second) / 2)


@pytest.mark.parametrize(
    ("inputs", "parameters", "base_index"),
    [
        (3, {"mu": 0.1}, 0),
        (2, {"mu": 0.1, "update": "sequential"}, None),
        (3, {"mu": 0.1}, None),
        (2, {"mu": 0.1, "weight": [1.0, 0.5]}, None),
    ],
    ids=["base", "sequential", "three", "weights"],
)
def test_where_parameters_act_nothing_is_reported(inputs, parameters, base_index):
    # MergeWarning is an error in this suite.
    tensors = models(3)[-inputs:]
    averaged = sum(tensors) / len(tensors)
    found = merge(tensors, base_index=base_index, parameters=parameters)
    assert not torch.allclose(found, averaged, atol=1e-4)


def test_not_converging_is_reported():
    _, *tuned = models()
    with pytest.warns(NotConvergedWarning, match=r"1 of 1 tensors .* in 2 iterations"):
        merge(tuned, parameters={"mu": 0.2, "max_iterations": 2})


def test_nan_lore_weighs_low_rank_task_vectors():
    base, *tuned = models(dtype=torch.float64)
    parameters = {"mu": 0.2, "scale": 2.0}
    found = merge_tensors([base, *tuned], "nan_lore", base_index=0, parameters=parameters)
    inverse = [1 / float((t - base).norm()) for t in tuned]
    weights = [value / sum(inverse) for value in inverse]
    plain = reference(tuned, base=base, mu=0.2, weights=weights).merged
    torch.testing.assert_close(found, base + 2 * (plain - base), rtol=1e-6, atol=1e-6)


def test_nan_lore_has_the_rules_of_both():
    method = ext_method("nan_lore")
    shared = {"norm_of": "task_vector", "update": "simultaneous"}
    found = list(method.problems(shared, Inputs(2, based=False)))
    assert {p.where for p in found} == {"parameters", "parameters.norm_of"}
    first, second = models(2)[1:]
    with (
        pytest.warns(TwoModelsWarning),
        pytest.warns(UniformCoefficientsWarning),
    ):
        merge_state_dicts(
            [{"w": first + 100}, {"w": second + 100}],
            "nan_lore",
            parameters={"mu": 0.1},
        )
