"""One pass over the inputs: similarities, and what trimming keeps of whole models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.errors import MergeError, NonFiniteError
from mergekit_ext.flexmerge.analysis import analyse, passes, trimmed_grams
from mergekit_ext.kernels.selection import Keeper
from mergekit_ext.kernels.similarity import cosines
from tests.flexmerge.inputs import algorithm, family, reader
from tests.flexmerge.test_algorithms import SHARED
from tests.reference import flexmerge as naive

KINDS = {
    "float32": lambda task: torch.float32,
    "bfloat16": lambda task: torch.bfloat16,
    "mixed": lambda task: [torch.float32, torch.bfloat16, torch.float16, torch.float32][task],
    "double": lambda task: torch.float64 if task == 1 else torch.float32,
}


def deltas_of(base, models, names):
    return [naive.laid_out([naive.delta(m[n], base[n]) for n in names]) for m in models]


@pytest.mark.parametrize("kind", list(KINDS))
def test_similarities_are_those_of_whole_blocks(kind):
    base, models = family(3, dtype=KINDS[kind])
    found = reader(base, models)
    analysis = analyse(found)
    assert analysis.cuts == {}
    for block in found.layout.blocks:
        vectors = deltas_of(base, models, [p.name for p in block.parts])
        wanted = naive.cosine_matrix(vectors)
        assert torch.allclose(cosines(analysis.grams[block.name]), wanted, atol=1e-7)
        norms = [float(v.norm()) for v in vectors]
        found_norms = analysis.grams[block.name].diagonal().sqrt().tolist()
        assert found_norms == pytest.approx(norms, rel=1e-7)


def test_zero_and_identical_task_vectors():
    base, (model,) = family(1)
    analysis = analyse(reader(base, [base, model, base, model]))
    wanted = [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    for name in ("attention", "gate"):
        assert cosines(analysis.grams[name]).tolist() == wanted


def magnitudes(base, model):
    return deltas_of(base, [model], list(base))[0].abs()


def kept_by(cut, base, model, dtype) -> int:
    delta = deltas_of(base, [model], list(base))[0].to(dtype)
    return int(Keeper(cut).drop(delta.clone()).count_nonzero())


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.999])
def test_cuts_are_those_of_a_sort_over_the_whole_model(kind, density):
    base, models = family(3, dtype=KINDS[kind])
    densities = (density, 1.0, density)
    cuts = analyse(reader(base, models), densities).cuts[densities]
    wide = torch.float64 if kind == "double" else torch.float32
    if kind == "double":  # one double makes all differences double
        base, *models = ({n: t.double() for n, t in state.items()} for state in (base, *models))
    for task, share in enumerate(densities):
        least = naive.least_kept(base, models[task], share)
        every = magnitudes(base, models[task])
        # All entries at the edge: which come first depends on the order of the blocks.
        wanted = int(((every >= least) & (every > 0)).sum())
        assert kept_by(cuts[task], base, models[task], wide) == wanted


@given(st.integers(0, 10**6), st.floats(1e-3, 1.0), st.integers(-30, 30))
def test_cuts_of_few_values(seed, density, exponent):
    """Many ties, and magnitudes far from 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.x": (7,), "b.y": (3, 4)}
    base = {n: torch.zeros(s) for n, s in shapes.items()}
    models = [
        {
            n: torch.randint(-2, 3, s, generator=generator).float() * 2.0**exponent
            for n, s in shapes.items()
        }
        for _ in range(2)
    ]
    densities = (density, density)
    cuts = analyse(reader(base, models), densities).cuts[densities]
    for cut, model in zip(cuts, models, strict=True):
        least = naive.least_kept(base, model, density)
        every = magnitudes(base, model)
        wanted = int(((every >= least) & (every > 0)).sum())
        assert kept_by(cut, base, model, torch.float32) == wanted


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [-1, 0, 2])
def test_values_that_are_not_finite_are_named(place, value):
    base, models = family(3)
    owner = base if place < 0 else models[place]
    owner["mlp.down"][2, 3] = value
    with pytest.raises(NonFiniteError) as caught:
        analyse(reader(base, models), (0.1,) * 3)
    assert caught.value.tensor == "mlp.down"
    assert caught.value.model == ("the base model" if place < 0 else f"task{place}")
    assert caught.value.count == 1


def test_differences_that_leave_the_range():
    base, models = family(2)
    base["mlp.up"][0, 0], models[1]["mlp.up"][0, 0] = -3e38, 3e38
    with pytest.raises(MergeError, match="mlp: differences"):
        analyse(reader(base, models))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18])
def test_scales(scale):
    base, models = family(3)
    states = [{n: t * scale for n, t in state.items()} for state in (base, *models)]
    analysis = analyse(reader(states[0], states[1:]))
    for block, names in (("mlp", ["mlp.up", "mlp.down"]), ("embed", ["embed.weight"])):
        wanted = naive.cosine_matrix(deltas_of(states[0], states[1:], names))
        assert torch.allclose(cosines(analysis.grams[block]), wanted, atol=1e-6)


@pytest.mark.parametrize("scope", ["model", "block", "tensor"])
def test_similarities_of_trimmed_task_vectors(scope):
    base, models = family(3)
    found = reader(base, models)
    ties = algorithm("ties", 3, SHARED, scope)
    if scope == "model":
        densities = (0.3,) * 3
        ties.cuts = analyse(found, densities).cuts[densities]
    grams = trimmed_grams(found, ties)
    least = [naive.least_kept(base, m, 0.3) for m in models]
    given_options = naive.Options(1.0, None, [0.3] * 3, scope, least)
    for block in found.layout.blocks:
        names = [p.name for p in block.parts]
        deltas = [[naive.delta(m[n], base[n]) for n in names] for m in models]
        vectors = [naive.laid_out(parts) for parts in naive.trimmed(deltas, given_options)]
        wanted = torch.tensor([[float(a @ b) for b in vectors] for a in vectors])
        assert torch.allclose(grams[block.name].float(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("densities", "kind", "times"),
    [
        (None, "float32", 1),
        ((1.0, 1.0), "float32", 1),
        ((0.1, 1.0), "float32", 2),
        ((0.1, 0.2), "double", 4),
    ],
)
def test_how_often_the_inputs_are_read(densities, kind, times):
    base, models = family(2, dtype=KINDS[kind])
    found = reader(base, models)
    seen: list[str] = []
    analyse(found, densities, seen.append)
    assert seen == [b.name for b in found.layout.blocks] * times
    assert passes(found.layout, densities) == times


def test_devices(device):
    base, models = family(3)
    here, there = (analyse(reader(base, models, d), (0.2,) * 3) for d in ("cpu", str(device)))
    assert here.cuts == there.cuts
    for name, gram in here.grams.items():
        assert torch.allclose(gram, there.grams[name], rtol=1e-9)
