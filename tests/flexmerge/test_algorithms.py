"""Every algorithm on groups of a block, against float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from torch import Tensor

from mergekit_ext import declared
from mergekit_ext.errors import MergeError
from mergekit_ext.flexmerge.analysis import analyse
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.flexmerge.parameters import algorithms, read_parameters
from tests.flexmerge.inputs import SHAPES, algorithm, family, reader
from tests.models import config
from tests.reference import flexmerge as naive
from tests.reference import lore as naive_lore
from tests.reference import nan as naive_nan

TASKS = 4
SPECTRAL = ("tsv_m", "iso_c", "iso_cts")
DENSE = ["average", "task_arithmetic", "ties", "pcb", *SPECTRAL, "channel_merging"]
MASKS = ["emr", "consensus"]
SHARED = {"lambda": 1.3, "density": 0.3, "threshold": 0.6}
WEIGHTS = [1.0, 0.5, 2.0, 1.5]


def made(name: str, shared: Mapping[str, Any] = SHARED, scope: str = "block", **each):
    """An algorithm, as YAML would make it, with defaults for what is not given."""
    return algorithm(name, TASKS, shared, scope, **each)


def read(given: Mapping[str, Any], models: Sequence[Mapping[str, Any]] = ({},) * TASKS):
    """Return the algorithm that a configuration names, and its problems."""
    findings = Findings()
    content = config("flexmerge", map(str, range(len(models))), "base", {"target_size": 2, **given})
    for item, parameters in zip(content["models"], models, strict=True):
        item["parameters"] = dict(parameters)
    found = read_parameters(MergeConfiguration.model_validate(content), 0, findings)
    return found, findings.report().problems


def from_yaml(models: Sequence[Mapping[str, Any]] = ({},) * TASKS, **given):
    found, problems = read(given, models)
    assert found is not None, [str(p) for p in problems]
    return found


class Block:
    """One block of a base and its models: as the engine reads it, and as the reference takes it."""

    def __init__(self, name="attention", states=None, granularity="component", **kind):
        self.base, self.models = states or family(TASKS, **kind)
        inputs = reader(self.base, self.models, granularity=granularity)
        self.data = inputs.read(next(b for b in inputs.layout.blocks if b.name == name))
        self.names = [part.name for part in self.data.layout.parts]
        self.parts = [self.base[n] for n in self.names]

    def of(self, members: Sequence[int]) -> list[list[Tensor]]:
        return [[self.models[i][n] for n in self.names] for i in members]

    def options(self, name, members, scope="block", density=0.3):
        return naive.Options(
            1.3 if name not in ("average", "consensus") else 1.0,
            [WEIGHTS[i] for i in members],
            [density] * len(members),
            scope,
            [naive.least_kept(self.base, self.models[i], density) for i in members],
        )

    def merge(self, algorithm, members=(0, 1, 2), dtype=torch.float32) -> Tensor:
        """What the engine makes, with the cuts of whole models where they are asked for."""
        self._measure(algorithm)
        return algorithm.merge(self.data, members, dtype)

    def vectors(self, algorithm, members=(0, 1, 2)) -> list[Tensor]:
        """What each member of a masked group gets back."""
        self._measure(algorithm)
        masked = algorithm.merge_masked(self.data, members, torch.float32)
        assert set(masked.masks) == set(masked.rescale) == set(members)
        assert {m.numel() for m in masked.masks.values()} == {-(-self.data.layout.size // 8)}
        return [masked.vector(self.data.base, member) for member in members]

    def check(self, found, name, members, options, tolerance=2e-6):
        """Compare with the reference's merge, within a few roundings of the largest value."""
        self.close(found, naive.merged(name, self.parts, self.of(members), options), tolerance)

    def check_masked(self, algorithm, members, options):
        wanted = naive.masked(algorithm.name, self.parts, self.of(members), options)
        for found, each in zip(self.vectors(algorithm, members), wanted, strict=True):
            self.close(found, each)

    def close(self, found: Tensor, wanted: Sequence[Tensor], tolerance: float = 2e-6):
        vector = naive.laid_out(wanted)
        size = max(float(vector.abs().max()), float(self.data.base.abs().max()))
        assert torch.allclose(found.double(), vector, rtol=tolerance, atol=tolerance * size)

    def _measure(self, algorithm):
        if (densities := algorithm.densities) is not None:
            found = analyse(reader(self.base, self.models), densities)
            algorithm.cuts = found.cuts[tuple(densities)]


@pytest.mark.parametrize("members", [(0, 1), (1, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense_algorithms(name, members):
    for block in map(Block, ("attention", "mlp", "gate", "grid")):
        found = block.merge(made(name, weight=WEIGHTS), members)
        assert found.dtype == torch.float32
        options = block.options(name, members)
        block.check(found, name, members, options, 2e-5 if name in SPECTRAL else 2e-6)


@pytest.mark.parametrize("scope", ["model", "block", "tensor"])
@pytest.mark.parametrize("name", ["ties", "pcb", "consensus"])
def test_trim_scopes(name, scope):
    trimming, members = made(name, scope=scope, weight=WEIGHTS), (0, 2, 3)
    assert (trimming.densities is None) == (scope != "model")
    for block in (Block(name, seed=3) for name in ("attention", "mlp", "grid")):
        options = block.options(name, members, scope)
        if name == "consensus":
            block.check_masked(trimming, members, options)
        else:
            block.check(block.merge(trimming, members), name, members, options)


def test_trim_scopes_differ():
    """Or else the test before this one shows nothing."""
    block = Block(seed=3)
    found = [block.merge(made("ties", scope=scope)) for scope in ("model", "block", "tensor")]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("density", [1e-9, 1.0])
@pytest.mark.parametrize("scope", ["model", "block", "tensor"])
def test_trimming_to_nothing_and_not_at_all(scope, density):
    block, members = Block(), (0, 1)
    ties = made("ties", {"lambda": 1.3, "density": density}, scope, weight=WEIGHTS)
    options = block.options("ties", members, scope, density)
    block.check(block.merge(ties, members), "ties", members, options)


@pytest.mark.parametrize("name", MASKS)
def test_mask_algorithms(name):
    members = (0, 1, 3)
    for block in map(Block, ("attention", "mlp", "gate")):
        block.check_masked(made(name, weight=WEIGHTS), members, block.options(name, members))


@pytest.mark.parametrize("name", [*DENSE, *MASKS])
def test_a_group_knows_nothing_of_the_others_and_inputs_stay_as_they_are(name):
    block = Block("mlp")
    vectors = (block.data.base, *block.data.models.values())
    before = [vector.clone() for vector in vectors]
    found = block.merge(made(name), (0, 2))
    assert all(map(torch.equal, vectors, before))
    block.models[1] = {n: t * 100 for n, t in block.models[1].items()}
    again = Block("mlp", (block.base, block.models)).merge(made(name), (0, 2))
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", DENSE)
def test_results_are_rounded_once(name, dtype):
    block = Block()
    wide = block.merge(made(name))
    assert torch.equal(block.merge(made(name), dtype=dtype), wide.to(dtype))


@pytest.mark.parametrize("name", [*DENSE, *MASKS])
def test_half_precision_is_computed_in_float32(name):
    half = Block(dtype=lambda task: torch.bfloat16)
    base, *models = (
        {n: t.float() for n, t in state.items()} for state in (half.base, *half.models)
    )
    one, other = (
        block.merge(made(name), dtype=torch.bfloat16)
        for block in (half, Block(states=(base, models)))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["average", "ties", "pcb", "tsv_m", *MASKS])
def test_identical_models_come_back(name):
    base, models = family(1)
    block, same = Block(states=(base, models * TASKS)), made(name, {"lambda": 1.0, "density": 1.0})
    one = block.data.models[0]
    if name in MASKS:
        for vector in block.vectors(same):
            block.close(vector, [one.double()])
        return
    found = block.merge(same)
    if name == "tsv_m":  # keeps a third of the rank of each
        block.check(found, name, (0, 1, 2), naive.Options(1.0, None, [1.0] * 3), 2e-5)
    elif name == "pcb":  # keeps what is above the least score
        assert ((found - one).abs() > 1e-5).sum() <= 2
    else:
        block.close(found, [one.double()])


@pytest.mark.parametrize("name", [*DENSE, *MASKS])
def test_models_that_did_not_move_give_the_base(name):
    base, _ = family(1)
    block, still = Block(states=(base, [base] * TASKS)), made(name)
    found = block.vectors(still)[1] if name in MASKS else block.merge(still)
    assert torch.equal(found, block.data.base)


@pytest.mark.parametrize("scale", [1e-25, 1e12])
@pytest.mark.parametrize("name", [n for n in DENSE if n != "pcb"])
def test_scales(name, scale):
    """All but PCB, which has a tanh, scale with their inputs."""
    base, models = family(TASKS)
    base, *models = ({n: t * scale for n, t in state.items()} for state in (base, *models))
    block = Block(states=(base, models))
    options = naive.Options(1.0 if name == "average" else 1.3, None, [0.3] * 3)
    block.check(block.merge(made(name)), name, (0, 1, 2), options, 2e-5)


@given(st.integers(0, 2**16), st.sampled_from(DENSE), st.permutations(range(TASKS)))
def test_the_order_of_members_does_not_matter(seed, name, order):
    block = Block("mlp", seed=seed, shapes={n: SHAPES[n] for n in ("mlp.up", "mlp.down")})
    weighted = made(name, weight=WEIGHTS)
    one, other = (block.merge(weighted, who, torch.float64) for who in (range(TASKS), order))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_weights_that_cancel_have_no_average():
    with pytest.raises(MergeError, match="sum to 0"):
        Block("mlp").merge(made("average", weight=[1.0, -1.0, 1.0, 1.0]), (0, 1))


# DARE in front


def thinned(block: Block, density: float = 0.5) -> list[Tensor]:
    """What is dropped is a matter of chance; that what is kept is scaled is not."""
    dare, base = from_yaml(algorithm="average", dare_density=density), block.data.base
    found = []
    for member in range(TASKS):
        # The average of one model and itself is that model's thinned self.
        alone = BlockData(block.data.layout, base, {member: block.data.models[member]})
        found.append(dare.merge(alone, (member,), torch.float64).double() - base.double())
    return found


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties", "tsv_m", "linear"])
def test_dare(name):
    block, members = Block("mlp"), (0, 2, 3)
    given = {"ties": {"trim_scope": "block"}, "linear": {"weight": 1.0}}.get(name, {})
    found = block.merge(from_yaml(algorithm=name, dare_density=0.5, **given), members)
    pieces = thinned(block)
    for member, tensors in zip(members, block.of(members), strict=True):
        whole = naive.laid_out(
            [naive.delta(w, b) for w, b in zip(tensors, block.parts, strict=True)]
        )
        kept = pieces[member].abs() > 1e-5
        assert 0.3 < kept.double().mean() < 0.7
        assert torch.allclose(pieces[member][kept], whole[kept] * 2, rtol=1e-3, atol=1e-5)
    moved = [naive.cut_apart(pieces[member], block.parts) for member in members]
    options = naive.Options(1.5 if name == "task_arithmetic" else 1.0, None, [0.1] * 3)
    step = naive.F["average" if name == "linear" else name](moved, options)
    block.close(found, [b.double() + s for b, s in zip(block.parts, step, strict=True)], 2e-5)


def test_dare_drops_the_same_in_every_group_and_something_else_in_every_block():
    base, models = family(TASKS, shapes={"a.x": (64,), "b.x": (64,)})
    for state in (base, *models):
        state["b.x"] = state["a.x"]
    block = Block("a", (base, models))
    a, b = thinned(block), thinned(Block("b", (base, models)))
    assert not torch.equal(a[0] == 0, b[0] == 0)
    assert not torch.equal(a[0] == 0, a[1] == 0)
    pair = block.merge(from_yaml(algorithm="average", dare_density=0.5), (1, 3), torch.float64)
    assert torch.allclose(pair.double() - block.data.base.double(), (a[1] + a[3]) / 2, atol=1e-6)


def test_dare_keeps_everything_at_density_one():
    block = Block("mlp")
    plain = block.merge(from_yaml(algorithm="average"))
    dare = block.merge(from_yaml(algorithm="average", dare_density=1.0))
    assert torch.allclose(plain, dare, rtol=1e-6, atol=1e-7)


def test_dare_before_masks():
    block = Block("mlp")
    moved = [
        [b.double() + d for b, d in zip(block.parts, pieces, strict=True)]
        for pieces in (naive.cut_apart(p, block.parts) for p in thinned(block)[:3])
    ]
    found = block.vectors(from_yaml(algorithm="emr", dare_density=0.5))
    wanted = naive.masked("emr", block.parts, moved, naive.Options())
    for vector, each in zip(found, wanted, strict=True):
        assert torch.allclose(vector.double(), naive.laid_out(each), atol=1e-4)


# Registered methods


@pytest.mark.parametrize("members", [(0, 1), (0, 2, 3)], ids=str)
@pytest.mark.parametrize(
    ("name", "given", "plain"),
    [
        ("nan", {"scale": "paper"}, "nan"),
        ("mergekit:ties", {"density": 0.4}, "ties"),
        ("linear", {}, "average"),
        ("nan_ties", {"density": 0.4, "scale": "paper"}, None),
        ("lore", {"mu_relative": 0.1, "lambda": 0.7}, None),
    ],
)
def test_registered_methods(name, given, plain, members):
    block, count = Block("mlp"), len(members)
    found = block.merge(from_yaml(algorithm=name, weight=1.0, **given), members)
    like, inputs = block.parts, block.of(members)
    if name == "lore":
        wanted = [
            naive_lore.lore([m[j] for m in inputs], base=like[j], mu_relative=0.1, lam=0.7).merged
            for j in range(len(like))
        ]
        block.close(found, wanted, 1e-4)
    elif name == "nan_ties":
        deltas = [[naive.delta(w, b) for w, b in zip(m, like, strict=True)] for m in inputs]
        factors = naive_nan.coefficients([float(naive.laid_out(d).norm()) for d in deltas])
        step = naive.ties_merge(deltas, naive.Options(1.0, factors, [0.4] * count, "tensor"))
        scale = max(1.0, count / 2)
        block.close(found, [b.double() + scale * t for b, t in zip(like, step, strict=True)], 5e-6)
    else:
        block.check(found, plain, members, naive.Options(1.0, None, [0.4] * count, "tensor"), 5e-6)


def test_nan_measures_the_whole_block_whatever_its_tensors_are_called():
    """Names of several layers: by NAN's own reckoning they would be several blocks."""
    first = "model.layers.0.mlp.up_proj.weight"
    shapes = {first: (5, 4), "model.layers.1.self_attn.q_proj.weight": (4, 4), "model.norm": (4,)}
    base, models = family(TASKS, shapes=shapes)
    for factor, model in enumerate(models):  # norms of the layers differ from task to task
        model[first] = base[first] + (factor + 1) ** 2 * (model[first] - base[first])
    block = Block("model", (base, models), granularity="model")
    assert len(block.names) == 3
    found = block.merge(from_yaml(algorithm="nan", scale="paper"), (0, 1, 3))
    block.check(found, "nan", (0, 1, 3), naive.Options())


def test_registered_methods_get_what_each_model_was_given():
    block, each = Block("mlp"), [{"weight": w} for w in WEIGHTS]
    found = block.merge(
        from_yaml(each, algorithm="mergekit:task_arithmetic", **{"lambda": 0.5}), (1, 2)
    )
    block.check(found, "task_arithmetic", (1, 2), naive.Options(0.5 * 2, WEIGHTS[1:3]))


def test_dare_ties_is_mergekits():
    block = Block("mlp")
    found = block.merge(from_yaml(algorithm="dare_ties", weight=0.5, density=1.0), (0, 1))
    deltas = [list(map(naive.delta, tensors, block.parts)) for tensors in block.of((0, 1))]
    # It sums what agrees, and does not divide by the weights.
    wanted = [
        b.double() + sum(0.5 * d[j] * (d[j] * (deltas[0][j] + deltas[1][j]) > 0) for d in deltas)
        for j, b in enumerate(block.parts)
    ]
    block.close(found, wanted)


def test_every_registered_method_is_taken_or_refused_with_a_reason():
    refused = "which does not merge 4 models over a base"
    for name in algorithms():
        for problem in read({"algorithm": name})[1]:
            assert problem.where != "parameters.algorithm" or refused in problem.found
    assert "mergekit:ties" in algorithms()
    assert "flexmerge" not in algorithms()
    known = {m.spec.name for m in merge_methods.registered_methods()}
    own = {*declared.methods(declared.BLOCKS), "residual"}
    assert {name.removeprefix("mergekit:") for name in algorithms()} - own <= known


@pytest.mark.parametrize("name", ["slerp", "arcee_fusion", "nearswap"])
def test_methods_of_two_models_are_refused_for_more(name):
    found, problems = read({"algorithm": name}, ({}, {}))
    assert found is None
    assert "parameters.algorithm" in [problem.where for problem in problems]


def test_what_a_method_refuses_of_the_weights_names_algorithm_block_and_tensor(monkeypatch):
    refused = from_yaml(({}, {}), target_size=1, algorithm="lore", mu_relative=0.1)
    block = Block("mlp", family(2))

    def refuse(*arguments, **named):
        raise ValueError("no such matrix")

    monkeypatch.setattr(type(refused._method), "__call__", refuse)
    with pytest.raises(MergeError) as caught:
        block.merge(refused, (0, 1))
    for said in ("lore", "no such matrix", "block mlp", block.names[0]):
        assert said in str(caught.value)
