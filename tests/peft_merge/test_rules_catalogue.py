from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergekit_ext.declared import ADAPTERS, Inputs, Merged, register
from mergekit_ext.errors import MergeError, TwoModelsWarning
from mergekit_ext.kernels.seeds import generators
from peft_merge.modules import rules
from tests.peft_merge.loras import defaults, settings

OPTIONS = {"lore": {"mu": 0.5}}


def tensors(shape, count=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)
    ]


def merge(name, of, weights=None, each=None, seed=0, **options):
    rule = rules()[name]
    options = {**OPTIONS.get(name.removeprefix("nan_"), {}), **options}
    values = settings(rule, len(of), weights=weights, each=each, **options)
    short = min(of[0].shape) if of[0].ndim == 2 else 1
    call = replace(values, short_side=short, generators=generators(seed, "m", len(of)))
    return rule.apply(of, call)


def test_every_method_of_the_project_is_there():
    wanted = [
        *("linear", "task_arithmetic", "lore", "tsv_m", "pcb", "emr", "magnitude_prune"),
        *("iso_c", "iso_cts"),
        *("ties", "dare_linear", "dare_ties", "della", "della_linear"),
        *("breadcrumbs", "breadcrumbs_ties"),
    ]
    assert {*wanted, "nan", *(f"nan_{name}" for name in wanted)} <= rules().keys()
    invariant = {
        name for name, rule in rules().items() if rule.invariant(defaults(rule, 2).options)
    }
    exact = {"linear", "task_arithmetic", "lore", "tsv_m", "iso_c", "iso_cts"}
    assert invariant == exact | {f"nan_{name}" for name in exact} | {"nan"}
    assert all(rule.nan == name.startswith("nan") for name, rule in rules().items())


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="linear: adapters have a merge method of this name"):
        register(replace(rules()["linear"]))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 1), (4,), (1,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(rules()))
def test_shapes_dtypes_and_inputs(name, shape, dtype):
    of = tensors(shape, dtype=dtype)
    before = [t.clone() for t in of]
    each = None
    if any(p.name == "density" and p.per_model for p in rules()[name].parameters):
        each = [{"density": 0.5}, {"density": 1.0}, {"density": 0.7}]
    found = merge(name, of, [0.5, -1.0, 2.0], each)
    assert isinstance(found, Merged) and found.tensor.shape == shape
    assert found.tensor.is_floating_point() and torch.isfinite(found.tensor).all()
    assert all(torch.equal(a, b) for a, b in zip(of, before, strict=True))


@pytest.mark.parametrize("name", sorted(n for n in rules() if rules()[n].blockwise))
def test_in_pieces_it_is_the_same(name):
    of = tensors((9, 6))
    rule = rules()[name]
    each = None
    if name not in ("emr", "nan_emr"):
        each = [{"density": 0.5}, {"density": 0.6}, {"density": 1.0}]
    values = settings(rule, 3, weights=[1.0, -0.5, 2.0], each=each)
    call = replace(values, short_side=6, generators=generators(3, "m", 3))
    whole = rule.apply(of, call).tensor
    call = replace(values, short_side=6, generators=generators(3, "m", 3))
    sources = [lambda t=t: (t[i : i + 2].clone() for i in range(0, 9, 2)) for t in of]
    pieces = list(rule.blockwise(sources, call))
    assert [len(piece) for piece in pieces] == [2, 2, 2, 2, 1]
    assert torch.allclose(torch.cat(pieces), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["linear", "ties", "della"])
def test_normalised_by_default(name):
    of = tensors((6, 5), 1) * 2
    assert torch.allclose(merge(name, of, [0.2, 0.6]).tensor, of[0])
    assert torch.allclose(merge(name, of, [0.2, 0.6], normalize=False).tensor, 0.8 * of[0])


@pytest.mark.parametrize(
    "name", ["task_arithmetic", "dare_linear", "dare_ties", "della_linear", "magnitude_prune"]
)
def test_not_normalised_by_default(name):
    of = tensors((6, 5), 1) * 2
    assert torch.allclose(merge(name, of, [0.2, 0.6]).tensor, 0.8 * of[0])
    assert torch.allclose(merge(name, of, [0.2, 0.6], normalize=True).tensor, of[0])


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "dare_linear", "magnitude_prune"])
def test_weights_that_cancel(name):
    a, b = tensors((4, 3), 2)
    with pytest.raises(MergeError, match="weights that sum to 0"):
        merge(name, [a, b], [1.0, -1.0], normalize=True)
    assert torch.allclose(merge(name, [a, b], [1.0, -1.0], normalize=False).tensor, a - b)
    # as NAN weighs them
    zeros = [torch.zeros_like(a)] * 2
    assert torch.equal(merge(name, zeros, [0.0, 0.0], normalize=True).tensor, zeros[0])


def test_elected_entries_whose_weights_cancel_are_finite():
    a, b = tensors((4, 3), 2)
    found = merge("ties", [a, b], [1.0, -1.0], normalize=True).tensor
    assert torch.isfinite(found).all()


def test_small_weights_have_a_mean():
    of = tensors((6, 5), 1) * 2
    assert torch.allclose(merge("linear", of, [1e-10, 1e-10]).tensor, of[0])


@pytest.mark.parametrize("name", sorted(n for n in rules() if not n.startswith("nan")))
def test_lambda_and_scale_multiply_the_result(name):
    of = tensors((6, 5))
    once = merge(name, of).tensor
    if any(p.name == "lambda" for p in rules()[name].parameters):
        assert torch.allclose(merge(name, of, lambda_=-0.3).tensor, -0.3 * once)
    # the default is m/2
    assert torch.allclose(merge(f"nan_{name}", of).tensor, 1.5 * once)
    assert torch.allclose(merge(f"nan_{name}", of, scale=0.2).tensor, 0.2 * once)


# --- what is dropped -------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.001, 0.25, 0.5, 0.99])
def test_magnitude_prune_keeps_the_largest(density):
    (of,) = tensors((8, 9), 1)
    found = merge("magnitude_prune", [of], each=[{"density": density}]).tensor
    count = max(1, int(density * 72))
    assert int((found != 0).sum()) == count
    assert torch.equal(found[found != 0], of[found != 0])
    assert of[found != 0].abs().min() > of[found == 0].abs().max()


def test_of_equal_magnitudes_the_first_are_kept():
    of = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.5, 2.0, 1.0, -1.0]], dtype=torch.float64)
    found = merge("magnitude_prune", [of], each=[{"density": 0.5}]).tensor
    wanted = [[1.0, -1.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0]]
    assert torch.equal(found, torch.tensor(wanted, dtype=torch.float64))


def test_rescaled_to_the_sum_of_magnitudes():
    (of,) = tensors((8, 9), 1)
    for name in ("magnitude_prune", "breadcrumbs"):
        found = merge(name, [of], each=[{"density": 0.4}], rescale=True).tensor
        assert float(found.abs().sum()) == pytest.approx(float(of.abs().sum()))


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [(0.5, 0.1, slice(1, 6)), (0.5, 0.9, slice(5, 10)), (0.9, 0.0, slice(0, 9)), (0.05, 0.5, None)],
)
def test_breadcrumbs_drop_the_largest_too(density, gamma, kept):
    of = torch.arange(10, 0, -1, dtype=torch.float64) * torch.tensor([1.0, -1.0] * 5).double()
    found = merge("breadcrumbs", [of], each=[{"density": density, "gamma": gamma}]).tensor
    wanted = torch.zeros_like(of)
    if kept is not None:
        wanted[kept] = of[kept]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("rescale", [True, False])
def test_dare(rescale):
    of = torch.ones(50, 40, dtype=torch.float64)
    found = merge("dare_linear", [of], each=[{"density": 0.25}], rescale=rescale).tensor
    value = 4.0 if rescale else 1.0
    assert set(found.unique().tolist()) == {0.0, value}
    assert 0.2 < float((found != 0).double().mean()) < 0.3
    other = merge("dare_linear", [of], each=[{"density": 0.25}], seed=1, rescale=rescale).tensor
    assert not torch.equal(found, other)


@pytest.mark.parametrize("rescale", [True, False])
def test_della_keeps_large_entries_more_often(rescale):
    of = torch.arange(1, 11, dtype=torch.float64).flip(0).repeat(4000, 1)
    own = [{"density": 0.5, "epsilon": 0.3}]
    found = merge("della_linear", [of], each=own, rescale=rescale).tensor
    chances = torch.linspace(0.2, 0.8, 10, dtype=torch.float64).flip(0)
    assert torch.allclose((found != 0).double().mean(0), chances, atol=0.04)
    wanted = of / chances if rescale else of
    assert torch.allclose(found[found != 0], wanted[found != 0])


def test_adapters_are_dropped_independently():
    of = [torch.ones(30, 30, dtype=torch.float64)] * 2
    found = merge("dare_linear", of, each=[{"density": 0.5}] * 2).tensor
    assert set(found.unique().tolist()) == {0.0, 2.0, 4.0}


# --- checks ----------------------------------------------------------------------------------


def problems(name, count=3, **options):
    rule = rules()[name]
    shared = settings(rule, count, **options).options
    return [str(problem) for problem in rule.check(shared, Inputs(count, driver=ADAPTERS))]


@pytest.mark.parametrize("name", ["lore", "nan_lore"])
def test_lore_needs_exactly_one_threshold(name):
    assert "found none of mu, mu_relative, rank_ratio" in problems(name)[0]
    assert "found mu and rank_ratio" in problems(name, mu=1.0, rank_ratio=0.1)[0]
    assert problems(name, mu=0.0) == []
    assert "sequential with a known base" in problems(name, mu=1.0, update="sequential")[0]
    assert problems(name, mu=1.0, update="sequential", base="estimated") == []


def test_two_adapters_around_an_estimated_base():
    rule = rules()["lore"]

    def warned(count, **options):
        options = settings(rule, count, mu=1.0, **options).options
        return list(rule.forewarn(options, Inputs(count, driver=ADAPTERS)))

    (warning,) = warned(2, base="estimated")
    assert isinstance(warning, TwoModelsWarning) and "base: known" in str(warning)
    a, b = tensors((6, 5), 2)
    found = merge("lore", [a, b], base="estimated").tensor
    assert torch.allclose(found, (a + b) / 2)
    assert warned(2) == warned(3, base="estimated") == []
    assert warned(2, base="estimated", update="sequential") == []


@pytest.mark.parametrize("name", ["della", "della_linear", "nan_della"])
def test_della_needs_probabilities(name):
    rule = rules()[name]

    def found(density, epsilon=0.15):
        return [str(p) for p in rule.check_each({"density": density, "epsilon": epsilon})]

    assert found(0.5) == found(1.0) == found(0.2) == []
    assert "less than 0.1" in found(0.1)[0] and "less than 0.1" in found(0.9)[0]


# --- vectors ---------------------------------------------------------------------------------


def test_lore_has_no_mean_of_weights_that_cancel():
    of = tensors((4, 3), 3)
    with pytest.raises(MergeError, match="weights that sum to 0"):
        merge("lore", of, [0.1, 0.2, -0.3], mu=0.0, combine="mean")


@pytest.mark.parametrize("base", ["known", "estimated"])
def test_the_mean_of_changes_of_zero_is_zero_where_nan_gives_them_no_weight(base):
    nothing = [torch.zeros(4, 3, dtype=torch.float64)] * 3
    options = {"mu": None, "mu_relative": 0.1, "combine": "mean", "base": base}
    merged = merge("nan_lore", nothing, [0.0] * 3, **options)
    assert not merged.tensor.any()


def test_lore_shrinks_vectors_as_groups():
    of = [torch.tensor([3.0, 4.0]).double(), torch.tensor([0.3, 0.4]).double()]
    found = merge("lore", of, mu=1.0).tensor
    assert torch.allclose(found, torch.tensor([2.4, 3.2]).double())
    relative = merge("lore", of, mu=None, mu_relative=0.5).tensor
    assert torch.allclose(relative, torch.tensor([1.5, 2.0]).double())


def test_tsv_averages_vectors():
    a, b = tensors((6,), 2)
    assert torch.allclose(merge("tsv_m", [a, b], [1.0, 3.0]).tensor, (a + 3 * b) / 2)
