"""NAN through mergekit's in-memory functions, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from pydantic import ValidationError

import mergekit_ext
from mergekit_ext.errors import (
    HostVersionError,
    MergeError,
    NonFiniteError,
    UniformCoefficientsWarning,
)
from mergekit_ext.host.blocks import block_of
from mergekit_ext.host.method import ext_method
from tests.reference import nan as reference

mergekit_ext.register()

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.norm.weight",
)
SHAPES = ((12, 8), (8, 8), (8, 8), (16, 8), (8,))


def states(count=3, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(1)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = {n: draw(s) for n, s in zip(NAMES, SHAPES, strict=True)}
    models = [
        {n: w + 0.1 * (i + 1 + 0.3 * k) * draw(w.shape) for k, (n, w) in enumerate(base.items())}
        for i in range(count)
    ]
    return tuple({n: t.to(device, dtype) for n, t in state.items()} for state in (base, *models))


def merged(method, base, models, **parameters):
    inputs = ({"base": base} if base else {}) | {f"m{i}": m for i, m in enumerate(models)}
    if method.startswith("nan"):
        parameters = {**PAPER, **parameters}
    return merge_state_dicts(inputs, method, base="base" if base else None, parameters=parameters)


def check(found, wanted, tolerance=2e-6):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor.double().cpu(), wanted[name].double().cpu(), rtol=tolerance, atol=tolerance
        )


PAPER = {"scale": "paper"}
GROUPS = {"tensor": lambda name: name, "block": block_of, "model": lambda name: "all"}


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize(
    ("method", "over_base", "given", "combine"),
    [
        ("nan", True, {}, None),
        ("nan", False, {}, None),
        ("nan_ties", True, {"density": 0.4}, reference.ties(0.4)),
    ],
)
def test_coefficients_of_groups(granularity, method, over_base, given, combine, device):
    base, *models = states(device=device)
    with_base = base if over_base else None
    found = merged(method, with_base, models, granularity=granularity, **given)
    options = {"combine": combine} if combine else {}
    check(found, reference.merge(models, with_base, group_of=GROUPS[granularity], **options))


@pytest.mark.parametrize("over_base", [True, False], ids=["base", "no base"])
def test_norms_weights_and_scale_are_those_that_the_user_sets(over_base):
    base, *models = states()
    with_base, weights = base if over_base else None, [0.5, 2.0, 0.0 if over_base else 1.0]
    found = merged("nan", with_base, models, norm_of="weights")
    check(found, reference.merge(models, with_base, norm_of="weights"))
    found = merged("nan", with_base, models, weight=weights, scale=0.7)
    check(found, reference.merge(models, with_base, weights=weights, scale=0.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["nan", "nan_task_arithmetic"])
def test_computes_in_float32_at_least_and_casts_once(method, dtype):
    base, *models = states(dtype=dtype)
    found = merged(method, base, models)
    assert {t.dtype for t in found.values()} == {dtype}
    wanted = reference.merge(models, base)
    # One rounding, to the nearest: half a unit in the last place.
    for name, tensor in found.items():
        exact = wanted[name]
        assert torch.all(
            (tensor.double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-7
        )


@pytest.mark.parametrize("normalize", [True, False])
def test_scale_acts_although_ties_divides_by_its_weights(normalize):
    base, *models = states()
    one = merged("nan_ties", base, models, scale=1.0, normalize=normalize)
    two = merged("nan_ties", base, models, scale=2.0, normalize=normalize)
    for name, w in base.items():
        torch.testing.assert_close(two[name] - w, 2 * (one[name] - w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    ["nan", "nan_task_arithmetic", "nan_ties", "nan_dare_ties", "nan_della", "nan_breadcrumbs"],
)
def test_one_model_comes_back_as_itself(method):
    base, model = states(1)
    check(merged(method, base, [model]), model)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        *((name, {}) for name in ("nan", "nan_ties", "nan_linear", "nan_multislerp")),
        *((f"nan_{name}", {"density": 0.5}) for name in ("dare_ties", "dare_linear", "della")),
    ],
)
def test_wrapped_methods_get_the_coefficients_as_weights(method, given):
    """Random ones draw what they draw without NAN."""
    base, *models = states()
    inner = {"nan": "task_arithmetic"}.get(method, method.removeprefix("nan_"))
    with_base, index, name = inner != "linear", None, NAMES[3]
    norms = [reference.frobenius([m[name] - (base[name] if with_base else 0)]) for m in models]
    tensors = [m[name] for m in models]
    if with_base:
        tensors, index = [base[name], *tensors], 0

    def run(method, **own):
        torch.manual_seed(5)
        return merge_tensors(tensors, method, base_index=index, parameters={**given, **own})

    wanted = run(inner, weight=reference.coefficients(norms))
    torch.testing.assert_close(run(method, scale=1.0), wanted, rtol=1e-5, atol=1e-6)


def test_every_method_with_a_per_model_weight_has_its_nan():
    for method in merge_methods.registered_methods():
        weighted = any(p.name == "weight" and p.scope != "shared" for p in method.spec.parameters)
        if weighted and not method.spec.name.startswith("nan"):
            wrapped = ext_method(f"nan_{method.spec.name}")
            assert wrapped is not None
            names = {p.name for p in wrapped.spec.parameters}
            assert names >= {p.name for p in method.spec.parameters}
            assert names >= {"norm_of", "granularity", "scale"}
            weight = next(p for p in wrapped.spec.parameters if p.name == "weight")
            assert weight.default == 1.0


def test_a_model_equal_to_the_base_carries_nothing():
    base, model = states(1)
    found = merged("nan", base, [model, dict(base)], scale=1.0)
    check(found, model)


@pytest.mark.parametrize("granularity", GROUPS)
def test_all_models_equal_to_the_base_give_the_base(granularity):
    base, *_ = states(1)
    found = merged("nan_dare_ties", base, [dict(base), dict(base)], granularity=granularity)
    for name, tensor in found.items():
        assert torch.equal(tensor, base[name])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 2], ids=["base", "model"])
@pytest.mark.parametrize("norm_of", ["task_vector", "weights"])
@pytest.mark.parametrize("granularity", GROUPS)
def test_non_finite_inputs_stop_the_merge(bad, which, norm_of, granularity):
    base, *models = states()
    broken = (base, *models)[which]
    broken[NAMES[3]] = broken[NAMES[3]].clone()
    broken[NAMES[3]][2, 1] = bad
    owner = ("base", "m0", "m1")[which]
    with pytest.raises(NonFiniteError, match=rf"up_proj.*of model {owner}"):
        merged("nan", base, models, norm_of=norm_of, granularity=granularity)


@pytest.mark.parametrize(
    ("method", "over_base", "remedy"),
    [
        ("nan", False, "give `base_model`"),
        ("nan_linear", False, "such as `nan`"),
        ("nan", True, "larger `weight`"),
        ("nan_ties", True, "larger `weight`"),
    ],
)
def test_the_remedy_for_uniform_coefficients_is_not_what_is_done_already(method, over_base, remedy):
    base, model = states(1)
    with pytest.warns(UniformCoefficientsWarning) as seen:
        merged(method, base if over_base else None, [model, dict(model)])
    (warning,) = seen
    text = str(warning.message)
    assert "came out uniform" in text and remedy in text
    assert ("base_model" in text) != over_base


def test_weights_that_sum_to_zero_have_no_average():
    _, first = states(1)
    same = {n: first[n].clone() for n in first}
    for method in ("nan", "nan_linear", "nan_multislerp"):
        with pytest.raises(MergeError, match="sum to zero"):
            merged(method, None, [first, same], weight=[1.0, -1.0])


def test_the_base_comes_back_wherever_it_stands():
    zero, ones = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    for inputs in ({"x": zero, "y": dict(zero), "base": ones}, {"base": ones, "x": zero}):
        found = merge_state_dicts(inputs, "nan", base="base", parameters={"norm_of": "weights"})
        assert torch.equal(found["a"], ones["a"])


def test_a_base_alone_comes_back():
    base, *_ = states(0)
    found = merge_tensors(
        [base[NAMES[0]]], "nan_ties", base_index=0, parameters={"granularity": "model"}
    )
    assert torch.equal(found, base[NAMES[0]])


def test_norms_beyond_the_range_are_reported():
    huge = {"w": torch.full((4,), 1e200, dtype=torch.float64)}
    with pytest.raises(MergeError, match=r"w: the norms .* leave the range"):
        merged("nan", None, [huge, huge])


def test_an_explicit_dtype_is_computed_in():
    base, *models = states(dtype=torch.float32)
    inputs = {"base": base} | {str(i): m for i, m in enumerate(models)}
    found = merge_state_dicts(inputs, "nan", base="base", dtype=torch.float64, parameters=PAPER)
    wanted = reference.merge(models, base)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-13, atol=1e-13)


def test_parameters_that_train_record_no_graph():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    found = merge_tensors([torch.zeros(4, 4), weight], "nan", base_index=0)
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("nan", {"norm_of": "vectors"}),
        ("nan", {"granularity": "layer"}),
        ("nan", {"scale": math.inf}),
        ("nan", {"scale": 1e7}),
        ("nan", {"weight": math.nan}),
        *(
            (f"nan_{name}", {"density": value})
            for name in ("ties", "dare_linear", "breadcrumbs", "della", "pcb")
            for value in (-1, 0, 1.01, 5, math.nan)
        ),
        ("nan_breadcrumbs", {"gamma": -0.1, "density": 0.5}),
        ("nan_breadcrumbs_ties", {"gamma": 1.0, "density": 0.5}),
        ("nan_della", {"epsilon": 0.5, "density": 0.5}),
        ("nan_della_linear", {"epsilon": -0.1, "density": 0.5}),
    ],
)
def test_bad_values_are_refused(method, parameters):
    base, *models = states(2)
    with pytest.raises(ValidationError):
        merged(method, base, models, **parameters)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("nan_breadcrumbs", {"gamma": 0.0}),
        ("nan_breadcrumbs_ties", {"gamma": 0.9}),
        ("nan_della", {"epsilon": 0.3}),
        ("nan_della_linear", {"epsilon": 0.0}),
    ],
)
def test_ends_of_ranges_are_taken(method, parameters):
    base, *models = states(2)
    merged(method, base, models, density=0.5, **parameters)


def test_mergekits_own_method_keeps_its_parameters():
    base, *models = states(2)
    found = merged("ties", base, models, density=-1, weight=1.0)
    check(found, base)


def test_graph_without_statistics_fails_rather_than_measuring_one_tensor():
    base, *models = states()
    method = ext_method("nan")
    group = merge_methods.TensorGroup.from_tensors(
        [base[NAMES[0]], models[0][NAMES[0]]], base_index=0, name=NAMES[0]
    )
    bound = {"norm_of": None, "granularity": "model", "scale": 1.0, "weight": {1: 1.0}}
    with pytest.raises(HostVersionError, match="register"):
        method._execute_resolved([group], [bound])
