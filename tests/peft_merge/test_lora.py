from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mergekit_ext.declared import Merged, Method
from mergekit_ext.errors import MergeError
from peft_merge import modules
from peft_merge.adapter import Update
from peft_merge.coefficients import change_norms, coefficients
from peft_merge.modules import rules
from tests.peft_merge.loras import adapter, always, merge, settings, update
from tests.reference import adapters as reference
from tests.reference import isotropic

SHAPE = (1, 24, 18)
WEIGHTS = [0.5, 1.5, 1.0]
# of the rules that need some, and thresholds at 0
OPTIONS = {"lore": {"mu": 0.0}, "pcb": {"density": 1.0, "clip": 0.0}}


def options(name):
    return OPTIONS.get(name.removeprefix("nan_"), {})


def three():
    """Mixed ranks, scalings and dtypes; not all modules everywhere."""
    return [
        adapter("one", {"x": update(1, 4, scale=0.25), "y": update(2, 2)}),
        adapter("two", {"x": update(3, 2, scale=2.0, dtype=torch.bfloat16)}),
        adapter("three", {"z": update(4, 1), "x": update(5, 3)}),
    ]


def changes(adapters, module, shape=SHAPE):
    updates = [a.load(module) if module in a.infos else None for a in adapters]
    return [change[0] for change in reference.dense(updates, shape)]


def merged(adapters, name, weights=None, each=None, rank=None, space="delta", **given):
    rule = rules()[name]
    values = settings(rule, len(adapters), weights=weights, each=each, **given)
    return merge(adapters, rule, always(values), rank=rank, space=space, dtype=torch.float64)


def close(found, wanted, tolerance):
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


INVARIANT = {
    "linear": lambda d, w: reference.linear(d, w, normalize=True),
    "task_arithmetic": lambda d, w: 0.7 * reference.linear(d, w, normalize=False),
    "lore": lambda d, w: 0.7 * reference.lore_known(d, w, 2.0),
    "tsv_m": lambda d, w: 0.7 * reference.tsv_m(d, w),
    "iso_c": lambda d, w: 0.7 * isotropic.iso_c(reference.weighted(d, w)),
    "iso_cts": lambda d, w: 0.7 * isotropic.iso_cts(reference.weighted(d, w)),
}
GIVEN = {name: {} if name == "linear" else {"lambda_": 0.7} for name in INVARIANT}
GIVEN["lore"] = {"mu": 2.0, "lambda_": 0.7}


@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.parametrize("module", ["x", "y", "z"])
def test_invariant_rules_equal_the_dense_computation(name, module):
    adapters = three()
    wanted = INVARIANT[name](changes(adapters, module), WEIGHTS)
    updates, infos, report = merged(adapters, name, WEIGHTS, **GIVEN[name])
    close(updates[module].dense()[0], wanted, 1e-7 if name == "lore" else 1e-12)
    assert infos[module].rank == report[module]["rank"] == updates[module].a.shape[1]
    assert report[module]["rank"] == int(torch.linalg.matrix_rank(wanted, rtol=1e-10))
    assert report[module]["error"] < 1e-12
    cut, _, report = merged(adapters, name, WEIGHTS, rank=1, **GIVEN[name])
    if name.startswith("iso"):  # all directions count alike: a cut may take any of them
        assert report[module]["error"] ** 2 == pytest.approx(
            1 - 1 / int(torch.linalg.matrix_rank(wanted))
        )
    else:
        close(cut[module].dense()[0], reference.best(wanted, 1), 1e-6)
    left = float((wanted - reference.best(wanted, 1)).norm() / wanted.norm())
    assert report[module]["error"] == pytest.approx(left, abs=1e-7)


DENSITIES = [0.3, 0.8, 0.5]
EACH = [{"density": d} for d in DENSITIES]
ELEMENTWISE = {
    "ties": (lambda d, w: reference.ties_family(d, w, DENSITIES), EACH),
    "magnitude_prune": (
        lambda d, w: reference.ties_family(d, w, DENSITIES, elect=False, normalize=False),
        EACH,
    ),
    "breadcrumbs": (
        lambda d, w: sum(
            weight * reference.breadcrumbs(delta, density, 0.1)
            for weight, delta, density in zip(w, d, DENSITIES, strict=True)
        ),
        [{"density": d, "gamma": 0.1} for d in DENSITIES],
    ),
    "dare_ties": (
        lambda d, w: reference.ties_family(d, w, [1, 1, 1], normalize=False),
        [{"density": 1.0}] * 3,
    ),
    "emr": (reference.emr, None),
    "pcb": (lambda d, w: reference.pcb_merge(d, w, 0.1), None),
}


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_rules_equal_the_dense_computation(name, block, monkeypatch):
    monkeypatch.setattr("peft_merge.algebra.spaces.BLOCK", block)
    naive, each = ELEMENTWISE[name]
    adapters = three()
    wanted = naive(changes(adapters, "x"), WEIGHTS)
    updates, _, report = merged(adapters, name, WEIGHTS, each)
    assert report["x"]["rank"] == 9
    close(updates["x"].dense()[0], reference.best(wanted, 9), 1e-9)
    left = float((wanted - reference.best(wanted, 9)).norm() / wanted.norm())
    assert report["x"]["error"] == pytest.approx(left, rel=1e-6, abs=1e-9)
    whole, _, report = merged(adapters, name, WEIGHTS, each, rank="lossless")
    close(whole["x"].dense()[0], wanted, 1e-9)
    some, _, report = merged(adapters, name, WEIGHTS, each, rank={"energy": 0.9})
    left = float((some["x"].dense()[0] - wanted).norm() / wanted.norm())
    assert left**2 <= 0.1 + 1e-9 and report["x"]["error"] == pytest.approx(left, abs=1e-6)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_rules_depend_on_the_seed_alone(name, monkeypatch):
    adapters, each = three(), [{"density": 0.5}] * 3

    def run(of, seed):
        rule = rules()[name]
        values = always(settings(rule, 3, each=each))
        return merge(of, rule, values, seed=seed, dtype=torch.float64)[0]["x"].dense()

    first = run(adapters, 1)
    assert not torch.equal(first, run(adapters, 2))
    fewer = [adapter(a.name, {"x": a.load("x")}) for a in adapters]
    monkeypatch.setattr("peft_merge.algebra.spaces.BLOCK", 40)
    assert torch.allclose(first, run(fewer, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_random_rules_are_right_on_average(name):
    one = [adapter("one", {"x": update(1, 3)})]
    rule = rules()[name]
    spread = {"epsilon": 0.2} if name == "della_linear" else {}
    values = always(settings(rule, 1, each=[{"density": 0.6, **spread}]))
    total = sum(
        merge(one, rule, values, seed=seed, rank=18, dtype=torch.float64)[0]["x"].dense()
        for seed in range(400)
    )
    close(total / 400, one[0].load("x").dense(), 0.1)


@pytest.mark.parametrize("space", ["delta", "core", "knots", "factors"])
@pytest.mark.parametrize("name", sorted(rules()))
def test_one_adapter_comes_back(name, space):
    shape = (3, 9, 7)
    one = adapter("one", {"x": update(1, 4, scale=-0.3, bias=True), "e": update(2, 3, shape)})
    updates, infos, _ = merged([one], name, space=space, **options(name))
    for module, found in updates.items():
        own = one.load(module)
        close(found.dense(), own.dense(), 1e-9)
        assert found.scale == 1.0 and infos[module].shape == one.infos[module].shape
    close(updates["x"].bias, one.load("x").scale * one.load("x").bias.double(), 1e-9)
    assert updates["e"].bias is None and not infos["e"].bias


@pytest.mark.parametrize("name", sorted(rules()))
def test_adapters_that_change_nothing(name):
    zero = Update(torch.zeros(1, 2, 18), torch.zeros(1, 24, 2), 1.0, torch.zeros(24))
    adapters = [adapter("one", {"x": zero}), adapter("two", {"x": zero}), adapter("three", {})]
    updates, _, report = merged(adapters, name, **options(name))
    assert not updates["x"].dense().any() and not updates["x"].bias.any()
    assert report["x"]["error"] == 0.0


@pytest.mark.parametrize("name", ["nan", "nan_linear", "nan_ties", "nan_lore", "nan_emr"])
def test_nan(name):
    adapters = three()
    found = coefficients({m: change_norms(adapters, m, space="delta") for m in "xyz"})
    given = {"mu": 2.0} if name == "nan_lore" else {}
    rule = rules()[name]
    updates, _, _ = merge(
        adapters,
        rule,
        lambda module: settings(rule, 3, weights=found[module], **given),
        rank="lossless",
        dtype=torch.float64,
    )
    weights = reference.nan(changes(adapters, "x"))
    naive = {
        "nan": lambda d, w: reference.linear(d, w, normalize=False),
        "nan_linear": lambda d, w: reference.linear(d, w, normalize=True),
        "nan_ties": lambda d, w: reference.ties_family(d, w, [1, 1, 1]),
        "nan_lore": lambda d, w: reference.lore_known(d, w, 2.0),
        "nan_emr": reference.emr,
    }
    wanted = 1.5 * naive[name](changes(adapters, "x"), weights)
    close(updates["x"].dense()[0], wanted, 1e-7)


def test_the_bias_is_merged_by_the_same_rule():
    adapters = [
        adapter("one", {"x": update(1, 2, scale=2.0, bias=True)}),
        adapter("two", {"x": update(2, 2)}),
        adapter("three", {"x": update(3, 2, scale=0.5, bias=True)}),
    ]
    biases = [2.0 * update(1, 2, bias=True).bias.double(), torch.zeros(24).double()]
    biases.append(0.5 * update(3, 2, bias=True).bias.double())
    updates, infos, _ = merged(adapters, "linear", WEIGHTS)
    close(updates["x"].bias, reference.linear(biases, WEIGHTS, normalize=True), 1e-12)
    assert infos["x"].bias
    updates, _, _ = merged(adapters, "ties", WEIGHTS, EACH)
    close(updates["x"].bias, reference.ties_family(biases, WEIGHTS, DENSITIES), 1e-12)
    updates, _, _ = merged(adapters, "lore", WEIGHTS, mu=2.0)
    shrunk = [b * max(0.0, 1 - 2.0 / float(b.norm())) if b.any() else b for b in biases]
    close(updates["x"].bias, reference.linear(shrunk, WEIGHTS, normalize=False), 1e-9)


@pytest.mark.parametrize("name", ["linear", "lore", "tsv_m", "ties"])
def test_stacked_matrices_are_merged_each_by_itself(name):
    shape = (3, 9, 7)
    stacked = [adapter(f"{i}", {"x": update(i, 2 + i, shape)}) for i in range(3)]
    given = {"mu": 1.0} if name == "lore" else {}
    found, infos, _ = merged(stacked, name, WEIGHTS, rank="lossless", **given)
    assert infos["x"].matrices == 3
    for slot in range(3):
        parts = []
        for whole in stacked:
            own = whole.load("x")
            part = dataclasses.replace(own, a=own.a[slot, None], b=own.b[slot, None])
            parts.append(adapter(whole.name, {"x": part}))
        alone, _, _ = merged(parts, name, WEIGHTS, rank="lossless", **given)
        close(found["x"].dense()[slot], alone["x"].dense()[0], 1e-9)


def test_rank_ratio_counts_on_the_change_itself():
    one = [adapter("one", {"x": update(1, 8)})]
    wanted = reference.best(changes(one, "x")[0], 4)  # ceil(0.2 * 18)
    updates, _, _ = merged(one, "lore", rank_ratio=0.2)
    close(updates["x"].dense()[0], wanted, 1e-7)


def test_lore_around_an_estimated_base():
    adapters = three()
    updates, _, report = merged(
        adapters, "lore", mu=1.0, base="estimated", max_iterations=2000, tolerance=1e-9
    )
    assert report["x"]["converged"] and report["x"]["iterations"] > 1
    close(updates["x"].dense()[0], reference.lore_estimated(changes(adapters, "x"), 1.0), 1e-5)


def test_lore_that_elects_signs_is_not_done_on_cores():
    adapters = three()
    updates, _, report = merged(adapters, "lore", mu=1.0, combine="ties")
    kept = [reference.svt(change, 1.0) for change in changes(adapters, "x")]
    wanted = reference.ties_family(kept, [1.0, 1.0, 1.0], [1, 1, 1])
    assert report["x"]["error"] > 1e-3
    close(updates["x"].dense()[0], reference.best(wanted, 9), 1e-6)


# --- properties ------------------------------------------------------------------------------


def family(seed, count=3):
    return [adapter(f"{i}", {"x": update(seed + i, 1 + (seed + i) % 3)}) for i in range(count)]


PERMUTED = ("linear", "task_arithmetic", "lore", "tsv_m", "ties", "magnitude_prune", "emr", "nan")


@hypothesis_settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 50), order=st.permutations(range(3)))
@pytest.mark.parametrize("space", ["delta", "core"])
@pytest.mark.parametrize("name", PERMUTED)
def test_the_order_of_the_adapters_does_not_matter(name, space, seed, order):
    adapters = family(seed)
    given_ = {"mu": 1.0} if name == "lore" else {}
    first, _, _ = merged(adapters, name, WEIGHTS, rank=18, space=space, **given_)
    turned, _, _ = merged(
        [adapters[i] for i in order],
        name,
        [WEIGHTS[i] for i in order],
        rank=18,
        space=space,
        **given_,
    )
    close(turned["x"].dense(), first["x"].dense(), 1e-6)


@hypothesis_settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 50))
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "lore", "tsv_m", "nan"])
def test_invariant_rules_follow_rotations(name, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(18, 18, generator=generator, dtype=torch.float64)).Q
    adapters = family(seed)
    rotated = []
    for own in adapters:
        u = own.load("x")
        turned = Update(u.a.double() @ right.T, left @ u.b.double(), u.scale)
        rotated.append(adapter(own.name, {"x": turned}))
    given_ = {"mu": 1.0} if name == "lore" else {}
    first, _, _ = merged(adapters, name, WEIGHTS, **given_)
    second, _, _ = merged(rotated, name, WEIGHTS, **given_)
    close(second["x"].dense()[0], left @ first["x"].dense()[0] @ right.T, 1e-6)


# --- spaces ----------------------------------------------------------------------------------


def test_knots_merges_the_parts_of_the_common_decomposition():
    adapters = three()
    found = changes(adapters, "x")
    u, s, vh = torch.linalg.svd(torch.cat(found, dim=1), full_matrices=False)
    keep = int((s > 1e-10 * s[0]).sum())
    parts = [s[:keep, None] * part[:keep] for part in vh.split(18, dim=1)]
    wanted = u[:, :keep] @ reference.ties_family(parts, WEIGHTS, DENSITIES)
    updates, _, _ = merged(adapters, "ties", WEIGHTS, EACH, space="knots")
    close(updates["x"].dense()[0], wanted, 1e-9)


def test_core_merges_coordinates_along_principal_axes():
    adapters = three()
    loads = [own.load("x") for own in adapters]
    left = torch.cat([u.scale**0.5 * u.b[0].double() for u in loads], dim=1)
    right = torch.cat([u.scale**0.5 * u.a[0].double() for u in loads], dim=0)
    u = torch.linalg.svd(left, full_matrices=False).U
    v = torch.linalg.svd(right.T, full_matrices=False).U
    cores = [u.T @ change @ v for change in changes(adapters, "x")]
    wanted = u @ reference.ties_family(cores, WEIGHTS, DENSITIES) @ v.T
    updates, _, _ = merged(adapters, "ties", WEIGHTS, EACH, space="core")
    close(updates["x"].dense()[0], wanted, 1e-9)


def test_factors_are_merged_each_by_itself():
    adapters = [adapter(f"{i}", {"x": update(i, 3, scale=0.5 + i)}) for i in range(3)]
    loads = [own.load("x") for own in adapters]
    weights = [0.5, -1.5, 1.0]
    roots = [(abs(w) * u.scale) ** 0.5 for w, u in zip(weights, loads, strict=True)]
    signs = [1.0, -1.0, 1.0]
    a = sum(r * u.a[0].double() for r, u in zip(roots, loads, strict=True))
    b = sum(s * r * u.b[0].double() for s, r, u in zip(signs, roots, loads, strict=True))
    updates, _, report = merged(adapters, "task_arithmetic", weights, space="factors")
    close(updates["x"].dense()[0], b @ a, 1e-12)
    assert report["x"]["rank"] == 3


# --- results and errors ----------------------------------------------------------------------


def test_dtypes():
    rule = rules()["linear"]
    values = always(settings(rule, 3))
    updates, infos, _ = merge(three(), rule, values)
    assert updates["x"].a.dtype == updates["x"].b.dtype == infos["x"].dtype == torch.float32
    updates, infos, _ = merge(three(), rule, values, dtype=torch.bfloat16)
    assert updates["y"].a.dtype == updates["y"].b.dtype == infos["y"].dtype == torch.bfloat16


def test_modules_come_in_the_order_of_the_adapters():
    _, _, report = merged(three(), "linear")
    assert list(report) == ["x", "y", "z"]


def test_inputs_are_left_alone():
    adapters = three()
    before = {a.name: {m: a.load(m).a.clone() for m in a.infos} for a in adapters}
    for name in ("linear", "ties", "emr"):
        merged(adapters, name)
    assert all(torch.equal(a.load(m).a, before[a.name][m]) for a in adapters for m in a.infos)


@pytest.mark.parametrize("invariant", [True, False])
def test_a_rule_that_gives_infinity_is_an_error(invariant):
    one = [adapter("one", {"x": update(1, 2)})]
    broken = Method("broken", "", "", lambda t, call: Merged(t[0] * float("inf")))
    broken = dataclasses.replace(broken, invariant=lambda options: invariant)
    with pytest.raises(MergeError, match=r"x: the merge gives values that are not finite"):
        merge(one, broken, always(settings(broken, 1)))


# --- adversarial inputs ----------------------------------------------------------------------

HARD = {
    "duplicates": [update(1, 4), update(1, 4), update(2, 3)],
    "zero factors": [Update(torch.zeros(1, 2, 18), torch.zeros(1, 24, 2), 1.0), update(1, 3)],
    "untrained": [Update(update(4, 2).a, torch.zeros(1, 24, 2), 1.0), update(1, 3)],
    "scales": [update(1, 3, scale=1e6), update(2, 3, scale=1e-6)],
    "tiny": [update(1, 3, size=1e-18), update(2, 3, size=1e-18)],
    "negative": [update(1, 3, scale=-2.0), update(2, 3)],
    "bfloat16": [update(1, 3, dtype=torch.bfloat16), update(2, 3, dtype=torch.float16)],
    "more ranks than rows": [update(1, 16), update(2, 14)],
    "opposite": [update(1, 3), update(1, 3, scale=-0.5)],
}
NAIVE = {
    "linear": lambda d, w: reference.linear(d, w, normalize=True),
    "tsv_m": reference.tsv_m,
    "iso_c": lambda d, w: isotropic.iso_c(reference.weighted(d, w)),
    "iso_cts": lambda d, w: isotropic.iso_cts(reference.weighted(d, w)),
    "ties": lambda d, w: reference.ties_family(d, w, [0.5] * len(d)),
    "magnitude_prune": lambda d, w: reference.ties_family(
        d, w, [0.5] * len(d), elect=False, normalize=False
    ),
    "emr": reference.emr,
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", NAIVE)
def test_hard_inputs_equal_the_dense_computation(name, case):
    adapters = [adapter(f"{i}", {"x": own}) for i, own in enumerate(HARD[case])]
    count = len(adapters)
    each = [{"density": 0.5}] * count if name in ("ties", "magnitude_prune") else None
    found = changes(adapters, "x")
    wanted = NAIVE[name](found, [1.0] * count)
    updates, _, _ = merged(adapters, name, each=each, rank="lossless")
    largest = max(float(change.norm()) for change in found)
    assert float((updates["x"].dense()[0] - wanted).norm()) <= 1e-9 * largest


def test_one_element():
    shape = (1, 1, 1)
    adapters = [adapter(f"{i}", {"x": update(i, 1 + i, shape)}) for i in range(3)]
    for name in sorted(rules()):
        updates, infos, _ = merged(adapters, name, rank=4, **options(name))
        assert infos["x"].rank == 1 and torch.isfinite(updates["x"].dense()).all()


@pytest.mark.parametrize("name", ["linear", "lore", "tsv_m", "ties", "della", "emr", "pcb"])
def test_on_every_device(name, device):
    rule = rules()[name]
    each = [{"density": 0.5}] * 3 if name in ("ties", "della") else None
    values = always(settings(rule, 3, each=each, **({"mu": 1.0} if name == "lore" else {})))
    found, _, _ = merge(three(), rule, values, device=device, dtype=torch.float64)
    wanted, _, _ = merge(three(), rule, values, dtype=torch.float64)
    assert found["x"].a.device.type == found["x"].b.device.type == device.type
    close(found["x"].dense().cpu(), wanted["x"].dense(), 1e-6)


def test_large_dense_changes_come_one_at_a_time(monkeypatch):
    def small(name, space="delta", **given):
        rule = rules()[name]
        return modules.small(three(), rule, always(settings(rule, 3, **given)), space)

    assert small("ties")
    monkeypatch.setattr(modules, "SMALL", 0)
    assert not small("ties")
    assert not small("lore", mu=0.1, combine="ties")
    assert small("ties", "core")
    assert small("lore", mu=0.1)
