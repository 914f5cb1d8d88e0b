"""LoRE-Merging against Algorithm 1 in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_ext.kernels import lore as lore_module
from mergekit_ext.kernels import lore_span, svt_subspace
from mergekit_ext.kernels.lore import LoreResult, lore
from mergekit_ext.kernels.svt import MatmulShrinker
from tests.reference.lore import Reference, svt
from tests.reference.lore import lore as reference


def made(
    count: int,
    rows: int = 24,
    columns: int = 40,
    rank: int | None = 3,
    noise: float = 0.02,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, list[Tensor]]:
    """A base and models: low-rank updates with noise, or (rank None) full-rank ones."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    base = normal(rows, columns)
    models = []
    for _ in range(count):
        update = normal(rows, columns) * 0.1
        if rank is not None:
            update = normal(rows, rank) @ normal(rank, columns) * 0.1
            update += noise * normal(rows, columns)
        models.append((base + update).to(dtype))
    return base.to(dtype), models


def goal(found: Tensor, expected: Tensor, start: Tensor) -> None:
    """The accuracy that is promised: 1e-4 of what was changed, and 1e-6 of the whole."""
    found, expected = found.double().cpu(), expected.double()
    error = float(torch.linalg.norm(found - expected))
    allowed = 1e-4 * torch.linalg.norm(expected - start) + 1e-6 * torch.linalg.norm(expected)
    assert error <= float(allowed), (error, float(allowed))


def mean(models: Sequence[Tensor]) -> Tensor:
    return sum(m.double() for m in models) / len(models)


def agrees(found: LoreResult, expected: Reference, models: Sequence[Tensor]) -> None:
    goal(found.merged, expected.merged, mean(models))
    goal(found.base, expected.base, mean(models))
    assert found.converged
    assert found.objective == pytest.approx(expected.objective, rel=1e-5, abs=1e-9)


KINDS = {"low rank": {"rank": 3}, "full rank": {"rank": None}, "no noise": {"noise": 0.0}}
SHAPES = {"wide": (18, 60), "square": (20, 20), "tall": (56, 14), "nearly square": (22, 25)}
# One and two models need one step; more than three see nothing new in each kind of update.
CASES = [
    *itertools.product((3,), SHAPES, KINDS),
    *itertools.product((1, 2), SHAPES, ("low rank",)),
    *itertools.product((5,), SHAPES, ("full rank",)),
]


@cache
def solved(count: int, shape: str, kind: str, share: float, update: str) -> Reference:
    return reference(
        made(count, *SHAPES[shape], **KINDS[kind])[1], mu_relative=share, update=update
    )


@pytest.mark.parametrize("shrinker", ["of CPUs", "of GPUs"])
@pytest.mark.parametrize(("count", "shape", "kind"), CASES)
def test_equals_algorithm_1(
    count: int, shape: str, kind: str, shrinker: str, device, monkeypatch
) -> None:
    if shrinker == "of GPUs":
        monkeypatch.setattr(lore_module, "shrinker_for", lambda kind, shape: MatmulShrinker())
    _, models = made(count, *SHAPES[shape], **KINDS[kind])
    on_device = [m.to(device) for m in models]
    for share, update in ((0.2, "simultaneous"), (0.5, "simultaneous"), (0.5, "sequential")):
        found = lore(on_device, mu_relative=share, update=update)
        agrees(found, solved(count, shape, kind, share, update), models)
    assert found.merged.device.type == device.type


@pytest.mark.parametrize(("rank", "share"), [(4, 0.3), (7, 0.4), (None, 0.9)])
@pytest.mark.parametrize("shape", [(64, 80), (60, 200), (90, 60)])
def test_warm_subspaces_equal_algorithm_1(
    shape: tuple[int, int], rank: int | None, share: float, device, monkeypatch
) -> None:
    used: list[int] = []
    orthonormal = svt_subspace.orthonormal
    monkeypatch.setattr(
        svt_subspace, "orthonormal", lambda basis: used.append(1) or orthonormal(basis)
    )
    _, models = made(3, *shape, rank=rank)
    found = lore([m.to(device) for m in models], mu_relative=share)
    agrees(found, reference(models, mu_relative=share), models)
    assert used, "the subspaces were not used"
    ordered = lore([m.to(device) for m in models], mu_relative=share, update="sequential")
    agrees(ordered, reference(models, mu_relative=share, update="sequential"), models)


def decaying() -> list[Tensor]:
    """Three models whose singular values fall to a millionth."""
    g = torch.Generator().manual_seed(4)
    models = []
    for _ in range(3):
        u = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64)).Q
        v = torch.linalg.qr(torch.randn(60, 40, generator=g, dtype=torch.float64)).Q
        models.append(((u * torch.logspace(0, -6, 40)) @ v.T).float())
    return models


def spectral(power: float, count: int, side: int = 32) -> list[Tensor]:
    """Models whose updates have the singular values k^-power."""
    g = torch.Generator().manual_seed(1)

    def frame() -> Tensor:
        return torch.linalg.qr(torch.randn(side, side, generator=g, dtype=torch.float64)).Q

    base = 0.1 * torch.randn(side, side, generator=g, dtype=torch.float64)
    sigma = 0.5 * torch.arange(1, side + 1, dtype=torch.float64) ** -power
    return [(base + (frame() * sigma) @ frame().T).float() for _ in range(count)]


def twins() -> list[Tensor]:
    first, second = spectral(0.45, 2)
    return [first, second, second]


def with_their_mean() -> list[Tensor]:
    models = spectral(0.3, 3)
    return [*models, torch.stack(models).mean(0)]


# Spectra of real fine-tunes among them, and a share of mu.
SOLVED = {
    "k^-0.45": (lambda: spectral(0.45, 3), 0.1),
    "k^-0.45, few kept": (lambda: spectral(0.45, 3, 64), 0.5),
    "k^-0.3": (lambda: spectral(0.3, 3), 0.3),
    "k^-0.3, most kept": (lambda: spectral(0.3, 5), 0.1),
    "k^-0.45, eight models": (lambda: spectral(0.45, 8), 0.1),
    "low rank": (lambda: made(4, 64, 80, rank=2)[1], 0.3),
    "full rank": (lambda: made(5, 22, 25, rank=None)[1], 0.2),
    "twins": (twins, 0.1),
    "with their mean": (with_their_mean, 0.2),
    "long": (lambda: [torch.cat([m, 2 * m, m.flip(1)]) for m in spectral(0.45, 3)], 0.1),
    "long, of half the rank": (lambda: [torch.cat([m] * 5) for m in spectral(0.3, 3)], 0.3),
}


def deficient() -> list[Tensor]:
    """Three models 96 x 16 whose differences, taken together, have rank 9 of 32."""
    g = torch.Generator().manual_seed(3)
    models = torch.randn(1, 96, 16, generator=g).repeat(3, 1, 1)
    models[0, :, :6] += torch.randn(96, 6, generator=g)
    models[1:, :, :6] += torch.randn(96, 3, generator=g) @ torch.randn(3, 6, generator=g)
    return list(models)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e15])
@pytest.mark.parametrize("how", [{}, {"combine": "ties", "weights": [0.5, 1.5, 0.8]}, {"lam": 0.3}])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("based", [False, True])
def test_long_matrices_in_blocks_and_of_any_rank(
    based: bool, transposed: bool, how: dict, scale: float, monkeypatch
) -> None:
    monkeypatch.setattr(lore_span, "BLOCK", 500)
    monkeypatch.setattr(lore_span, "ROWS", 1)
    models = deficient()
    base = models[2].roll(1, 0) if based else None
    expected = reference(models, base=base, mu_relative=0.2, **how)
    given = [(m.T if transposed else m) * scale for m in (*models, *([base] if based else []))]
    theta_0 = given.pop() if based else None
    found = lore(given, base=theta_0, mu_relative=0.2, **how)
    turned = found.merged.T if transposed else found.merged
    goal(turned.double() / scale, expected.merged, mean(models) if base is None else base)
    assert found.merged.shape == given[0].shape and found.merged.is_contiguous()
    assert found.objective / scale**2 == pytest.approx(expected.objective, rel=1e-5)


def test_nothing_of_the_long_side_is_held(monkeypatch) -> None:
    """What is solved for has the short sides only."""
    sizes: list[int] = []
    solve = lore_module.UPDATES["simultaneous"]

    def watched(problem, *rest):
        sizes.extend(d.numel() for d in problem.differences)
        return solve(problem, *rest)

    monkeypatch.setitem(lore_module.UPDATES, "simultaneous", watched)
    models = [torch.cat([m] * 64) for m in spectral(0.45, 3)]
    lore(models, mu_relative=0.3)
    assert sizes == [32 * 64] * 3  # of 32 x 2048


def test_differences_that_overflow_are_no_numbers() -> None:
    large = torch.full((64, 4), 3e38)
    for base in (None, -large):
        with pytest.raises((OverflowError, torch.linalg.LinAlgError)):
            lore([large, -large, large], mu=1.0, base=base)


def minimum(models: list[Tensor], mu: float) -> tuple[Tensor, list[Tensor]]:
    """Return theta_0 and the delta_i; that they are the solution is checked by full SVDs."""
    centre = mean(models)
    base = lore([m.double() for m in models], mu=mu, tolerance=1e-9).base
    deltas = [svt(m.double() - base, mu) for m in models]
    left = torch.linalg.norm(centre - sum(deltas) / len(models) - base)
    assert left <= 1e-8 * torch.linalg.norm(base - centre)
    return base, deltas


@pytest.mark.parametrize("case", SOLVED)
def test_by_default_the_error_is_a_tenth_of_the_rounding(case: str, device) -> None:
    models, share = SOLVED[case][0](), SOLVED[case][1]
    given = [m.to(device) for m in models]
    exact = lore(given, mu_relative=share)
    assert exact.converged
    base, deltas = minimum(models, exact.mu)
    even, uneven = [1.0] * len(models), [0.2, 0.9, *[0.4] * (len(models) - 2)]
    for weights, calibrated in itertools.product((even, uneven), (False, True)):
        how = {"output": torch.bfloat16, "calibrated": calibrated}
        found = lore(given, mu=exact.mu, weights=weights, **how)
        vector = sum(w * d for w, d in zip(weights, deltas, strict=True))
        lengths = [torch.linalg.norm(model.double() - base) for model in models]
        factor = sum(lengths) / len(models) / torch.linalg.norm(vector) if calibrated else 1.0
        merged, start = base + factor * vector, found.base.double().cpu()
        rounding = torch.linalg.norm(merged.bfloat16().double() - merged)
        error = torch.linalg.norm(
            torch.lerp(start, found.merged.double().cpu(), float(factor)) - merged
        )
        assert found.converged
        assert error <= 0.1 * rounding, float(error / rounding)
        assert found.iterations <= exact.iterations


def test_what_cannot_be_estimated_is_not_converged() -> None:
    """Nearly all is kept, so that nearly every base is as good."""
    found = lore(spectral(0.3, 3), mu_relative=0.02, output=torch.bfloat16, max_iterations=60)
    assert (found.converged, found.iterations) == (False, 60)


@pytest.mark.parametrize("combine", ["sum", "mean", "ties"])
@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_combinations(count: int, with_base: bool, update: str, combine: str) -> None:
    base, models = made(count, 12, 18, seed=3)
    options = {
        "mu": 0.4,
        "lam": 0.7,
        "combine": combine,
        "update": update,
        "base": base if with_base else None,
        "weights": [0.5, 1.5, 0.8][:count],
    }
    found, expected = lore(models, **options), reference(models, **options)
    if combine != "ties":
        agrees(found, expected, models)
        return
    # the election is not continuous: entries near a tie may fall either way
    error = (found.merged.double() - expected.merged).abs()
    assert int((error > 1e-4).sum()) <= 2
    assert found.objective == pytest.approx(expected.objective, rel=1e-5)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.5, 1.0])
def test_rank_ratio(ratio: float, with_base: bool) -> None:
    base, models = made(3, 20, 30, dtype=torch.float64)
    options = {"rank_ratio": ratio, "base": base if with_base else None}
    expected = reference(models, **options, iterations=12, tolerance=0.0)
    found = lore(models, **options, max_iterations=12, tolerance=0.0)
    assert torch.allclose(found.merged, expected.merged, atol=1e-8)
    assert found.ranks == (round(ratio * 20),) * 3
    assert found.mu is None
    assert found.objective == pytest.approx(expected.objective, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
@pytest.mark.parametrize(
    "how", [{"mu": 0.2}, {"mu_relative": 0.05}, {"mu_relative": 0.6}, {"rank_ratio": 0.2}]
)
@pytest.mark.parametrize("rank", [3, None])
def test_the_objective_sinks(rank: int | None, how: dict, update: str) -> None:
    """Never rises, but for proximal steps, which end at its minimum."""
    proximal = update == "simultaneous" and "rank_ratio" not in how
    for dtype, slack in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        _, models = made(4, rank=rank, dtype=dtype)
        seen: list[tuple[int, float, float]] = []
        found = lore(
            models,
            update=update,
            max_iterations=60,
            on_iteration=lambda *values, seen=seen: seen.append(values),
            **how,
        )
        assert [n for n, _, _ in seen] == sorted({n for n, _, _ in seen})
        assert len(seen) > 2
        if proximal:
            assert min(value for _, value, _ in seen) >= found.objective * (1 - 10 * slack)
            expected = reference(models, **how).objective
            assert found.objective == pytest.approx(expected, rel=1e-6)
            continue
        for (_, before, _), (_, after, _) in itertools.pairwise(seen):
            assert after <= before * (1 + slack)
        assert found.objective <= seen[-1][1] * (1 + slack)


def test_objective_and_base_belong_to_the_same_deltas() -> None:
    """theta_0 = mean(theta_i - delta_i): with lam = 1/n the sum gives the average back."""
    _, models = made(3)
    for options in ({"mu": 0.3}, {"mu": 0.3, "update": "sequential"}, {"rank_ratio": 0.2}):
        found = lore(models, lam=1 / 3, max_iterations=3, tolerance=0.0, **options)
        torch.testing.assert_close(found.merged, mean(models).float(), atol=2e-6, rtol=0)
        one = lore(models, lam=1.0, combine="mean", max_iterations=3, tolerance=0.0, **options)
        torch.testing.assert_close(one.merged, mean(models).float(), atol=2e-6, rtol=0)


def test_lam_one_is_task_arithmetic_about_the_estimated_base() -> None:
    _, models = made(3)
    found = lore(models, mu=0.3, lam=1.0)
    expected = found.base.double() + sum(m.double() - found.base.double() for m in models)
    goal(found.merged, expected, mean(models))


def test_the_base_is_recovered() -> None:
    """Low-rank updates, eight models, a little noise: the average is far from the base."""
    base, models = made(8, 64, 96, rank=4, noise=2e-4, seed=1)
    scaled = [base + 0.3 * (m - base) for m in models]
    found = lore(scaled, mu=0.05)
    estimated = float(torch.linalg.norm(found.base - base))
    averaged = float(torch.linalg.norm(mean(scaled) - base))
    assert estimated < 0.2 * averaged, (estimated, averaged)


def test_two_models_give_the_mean_whatever_the_parameters() -> None:
    _, models = made(2)
    average = models[0] + (models[1] - models[0]) / 2
    for options in ({"mu": 0.1}, {"mu": 3.0, "lam": 5.0}, {"rank_ratio": 0.2, "combine": "mean"}):
        found = lore(models, **options)
        assert torch.equal(found.merged, average)
        assert (found.iterations, found.converged) == (1, True)
    assert not torch.equal(lore(models, mu=0.1, weights=[1.0, 2.0]).merged, average)
    ordered = lore(models, mu=0.1, update="sequential").merged
    assert float((ordered - average).abs().max()) > 1e-3


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
@pytest.mark.parametrize("how", [{"mu": 0.0}, {"mu": 0.3}, {"mu_relative": 0.1}, {"rank_ratio": 1}])
def test_identical_models_come_back_exactly(count: int, update: str, how: dict) -> None:
    base, models = made(1)
    found = lore([models[0]] * count, update=update, lam=0.7, **how)
    assert torch.equal(found.merged, models[0])
    assert torch.equal(found.base, models[0])
    assert found.converged
    assert found.ranks == (0,) * count
    same = lore([base] * count, base=base, update=update, **how)
    assert torch.equal(same.merged, base)


def test_zeros_scales_and_a_model_equal_to_the_base() -> None:
    zero = torch.zeros(5, 8)
    found = lore([zero] * 3, mu_relative=0.5)
    assert not found.merged.any()
    assert (found.mu, found.objective, found.change) == (0.0, 0.0, 0.0)
    base, models = made(2)
    one = lore([base, models[1]], base=base, mu=0.2)
    assert one.ranks[0] == 0
    assert torch.isfinite(one.merged).all()
    for scale in (1e15, 1e-20):
        _, models = made(3)
        big = lore([m * scale for m in models], mu=0.3 * scale)
        agrees_scaled = lore(models, mu=0.3)
        goal(big.merged.double() / scale, agrees_scaled.merged.double(), mean(models))
        assert big.converged
        assert big.objective == pytest.approx(agrees_scaled.objective * scale**2, rel=1e-4)


def test_a_threshold_above_everything_leaves_the_mean() -> None:
    _, models = made(3)
    found = lore(models, mu=1e3)
    torch.testing.assert_close(found.merged, mean(models).float())
    assert (found.iterations, found.ranks, found.converged) == (1, (0, 0, 0), True)


def test_reported_norms_choose_mu() -> None:
    base, models = made(3)
    for start in (None, base):
        centre = mean(models) if start is None else base.double()
        expected = [float(torch.linalg.matrix_norm(m.double() - centre, 2)) for m in models]
        found = lore(models, base=start, mu_relative=0.25)
        assert found.spectral_norms == pytest.approx(expected, rel=1e-5)
        assert found.mu == pytest.approx(0.25 * max(expected), rel=1e-5)


def test_half_precision_is_computed_in_float32(device) -> None:
    _, models = made(3, noise=0.05, dtype=torch.bfloat16)
    copies = [m.clone() for m in models]
    found = lore([m.to(device) for m in models], mu_relative=0.2)
    assert found.merged.dtype == torch.float32
    agrees(found, reference(models, mu_relative=0.2), models)
    assert all(torch.equal(m, c) for m, c in zip(models, copies, strict=True))


def test_decaying_spectra_keep_their_accuracy() -> None:
    models = decaying()
    for share in (0.02, 0.1):
        agrees(lore(models, mu_relative=share), reference(models, mu_relative=share), models)


def test_stacked_experts_are_solved_one_by_one() -> None:
    stacks = [torch.stack([made(3, seed=s)[1][i] for s in range(4)]) for i in range(3)]
    found = lore(stacks, mu_relative=0.3, layout="stacked")
    single = [lore([s[e] for s in stacks], mu_relative=0.3) for e in range(4)]
    assert torch.equal(found.merged, torch.stack([s.merged for s in single]))
    assert torch.equal(found.base, torch.stack([s.base for s in single]))
    assert found.iterations == max(s.iterations for s in single)
    assert found.objective == pytest.approx(sum(s.objective for s in single))
    assert found.ranks == tuple(max(r) for r in zip(*(s.ranks for s in single), strict=True))
    assert found.mu == max(s.mu for s in single)
    assert found.converged
    deep = lore([s.reshape(2, 2, 24, 40) for s in stacks], mu_relative=0.3, layout="stacked")
    assert torch.equal(deep.merged.reshape(4, 24, 40), found.merged)


def test_convolutions_are_flattened() -> None:
    _, models = made(3, 8, 36)
    found = lore([m.reshape(8, 4, 3, 3) for m in models], mu=0.2, layout="flattened")
    assert torch.equal(found.merged.reshape(8, 36), lore(models, mu=0.2).merged)


def test_vectors_and_scalars_are_averaged() -> None:
    models = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]), torch.tensor([5.0, 1.0])]
    found = lore(models, mu=1.0, weights=[1.0, 2.0, 1.0], base=torch.zeros(2))
    torch.testing.assert_close(found.merged, torch.tensor([3.0, 3.75]))
    assert (found.iterations, found.converged, found.ranks) == (0, True, (0, 0, 0))
    scalar = lore([torch.tensor(1.0).bfloat16(), torch.tensor(2.0).bfloat16()], rank_ratio=0.2)
    assert (scalar.merged.item(), scalar.merged.dtype) == (1.5, torch.float32)
    with pytest.raises(ValueError, match="weights: found a sum of 0"):
        lore(models[:2], mu=1.0, weights=[1.0, -1.0])


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (0, 3, 4), (2, 0, 4)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    found = lore([torch.empty(shape)] * 3, mu=0.5, layout="stacked" if len(shape) > 2 else "matrix")
    assert found.merged.shape == shape
    assert found.converged


def test_stopping_early_is_reported() -> None:
    _, models = made(3, rank=None)
    for options in (
        {"mu_relative": 0.05},
        {"rank_ratio": 0.2},
        {"mu": 0.1, "update": "sequential"},
    ):
        found = lore(models, max_iterations=3, **options)
        assert (found.converged, found.iterations) == (False, 3)
        assert found.change > 1e-5


def test_permuted_models_give_the_same_merge() -> None:
    _, models = made(4)
    first = lore(models, mu=0.3)
    for order in ((1, 0, 3, 2), (3, 2, 1, 0)):
        goal(lore([models[i] for i in order], mu=0.3).merged, first.merged.double(), mean(models))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 10),
    columns=st.integers(1, 10),
    count=st.integers(1, 4),
    share=st.floats(0.1, 1.1),
    exponent=st.integers(-12, 12),
    low_rank=st.booleans(),
    seed=st.integers(0, 50),
)
def test_scaling_transposition_and_the_reference(
    rows: int, columns: int, count: int, share: float, exponent: int, low_rank: bool, seed: int
) -> None:
    _, models = made(count, rows, columns, rank=1 if low_rank else None, seed=seed)
    centre = mean(models)
    largest = max(float(torch.linalg.matrix_norm(m.double() - centre, 2)) for m in models)
    mu = share * largest
    found = lore(models, mu=mu)
    agrees(found, reference(models, mu=mu), models)
    goal(lore([m.T for m in models], mu=mu).merged.T, found.merged.double(), centre)
    factor = 10.0**exponent
    scaled = lore([m * factor for m in models], mu=mu * factor)
    goal(scaled.merged.double() / factor, found.merged.double(), centre)


def test_wrong_tensors_and_weights_are_named() -> None:
    good = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"tensors\[1\]: found shape"):
        lore([good, torch.ones(3, 2)], mu=1.0)
    with pytest.raises(ValueError, match=r"base: found shape \(2, 2\); expected \(2, 3\)"):
        lore([good], base=torch.ones(2, 2), mu=1.0)
    with pytest.raises(ValueError, match="weights: found a sum of 0"):
        lore([good, good], mu=1.0, weights=[1.0, -1.0], combine="mean")
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = good.clone()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match=r"tensors\[1\]: found 1 non-finite values"):
            lore([good, broken], mu=1.0)
        with pytest.raises(ValueError, match="base: found 1 non-finite"):
            lore([good], base=broken, mu=1.0)
    large = torch.full((2, 3), 1e308, dtype=torch.float64)  # their sum overflows; they are finite
    assert torch.equal(lore([large, large], mu=1.0).merged, large)
