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

from mergekit_ext import methods
from mergekit_ext.errors import MergeError
from mergekit_ext.flexmerge.algorithm import Algorithm
from mergekit_ext.flexmerge.analysis import analyse
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.flexmerge.parameters import names as algorithm_names
from mergekit_ext.host.flexmerge.parameters import read_parameters
from tests.flexmerge.inputs import SHAPES, family, reader
from tests.flexmerge.inputs import algorithm as algorithm_of
from tests.models import config
from tests.reference import flexmerge as naive
from tests.reference import lore as naive_lore
from tests.reference import nan as naive_nan

TASKS = 4
DENSE = ["average", "task_arithmetic", "ties", "pcb", "tsv_m", "channel_merging"]
MASKS = ["emr", "consensus"]
SHARED = {"lambda": 1.3, "density": 0.3, "threshold": 0.6}
WEIGHTS = [1.0, 0.5, 2.0, 1.5]
BLOCKS = {"attention": ["q", "k", "bias"], "mlp": ["up", "down"], "gate": ["scale"]}


def made(
    name: str, shared: Mapping[str, Any] = SHARED, scope: str = "block", **each: Sequence[Any]
) -> Algorithm:
    """An algorithm, as YAML would make it, with defaults for what is not given."""
    return algorithm_of(name, TASKS, shared, scope, **each)


def read(given: Mapping[str, Any], models: Sequence[Mapping[str, Any]] = ({},) * TASKS):
    """Return the algorithm that a configuration names, and its problems."""
    findings = Findings()
    content = config("flexmerge", map(str, range(len(models))), "base", {"target_size": 2, **given})
    for item, parameters in zip(content["models"], models, strict=True):
        item["parameters"] = dict(parameters)
    algorithm = read_parameters(MergeConfiguration.model_validate(content), 0, findings)
    return algorithm, findings.report().problems


def from_yaml(given: Mapping[str, Any], models: Sequence[Mapping[str, Any]] = ({},) * TASKS):
    algorithm, problems = read(given, models)
    assert algorithm is not None, [str(p) for p in problems]
    return algorithm


def block_of(base, models, name: str):
    found = reader(base, models)
    return found.read(next(b for b in found.layout.blocks if b.name == name))


def parts(state, names) -> list[Tensor]:
    return [state[name] for name in names]


def names_of(data: BlockData) -> list[str]:
    return [part.name for part in data.layout.parts]


def options(name: str, members: Sequence[int], scope: str, base, models, density: float = 0.3):
    cuts = [naive.least_kept(base, models[i], density) for i in members]
    return naive.Options(
        1.3 if name not in ("average", "consensus") else 1.0,
        [WEIGHTS[i] for i in members],
        [density] * len(members),
        scope,
        cuts,
    )


def close(found: Tensor, wanted: Sequence[Tensor], like: Tensor, tolerance: float = 2e-6) -> None:
    """Within a few roundings of the largest value."""
    vector = naive.laid_out(wanted)
    size = max(float(vector.abs().max()), float(like.abs().max())) if vector.numel() else 0.0
    assert torch.allclose(found.double(), vector, rtol=tolerance, atol=tolerance * size)


def cuts_for(base, models, algorithm):
    densities = algorithm.densities
    return (
        None
        if densities is None
        else analyse(reader(base, models), densities).cuts[tuple(densities)]
    )


@pytest.mark.parametrize("members", [(0, 1), (1, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("block", ["attention", "mlp", "gate", "conv"])
@pytest.mark.parametrize("name", DENSE)
def test_dense_algorithms(name, block, members):
    base, models = family(TASKS)
    algorithm = made(name, weight=WEIGHTS)
    data = block_of(base, models, block)
    found = algorithm.merge(data, members, torch.float32)
    names = names_of(data)
    wanted = naive.merged(
        name,
        parts(base, names),
        [parts(models[i], names) for i in members],
        options(name, members, "block", base, models),
    )
    assert found.dtype == torch.float32
    close(found, wanted, data.base, 2e-5 if name == "tsv_m" else 2e-6)


@pytest.mark.parametrize("scope", ["model", "block", "tensor"])
@pytest.mark.parametrize("name", ["ties", "pcb", "consensus"])
def test_trim_scopes(name, scope):
    base, models = family(TASKS, seed=3)
    algorithm = made(name, scope=scope, weight=WEIGHTS)
    cuts = cuts_for(base, models, algorithm)
    assert (cuts is None) == (scope != "model")
    for block in ("attention", "mlp", "conv"):
        data, members = block_of(base, models, block), (0, 2, 3)
        names = names_of(data)
        given_options = options(name, members, scope, base, models)
        inputs = parts(base, names), [parts(models[i], names) for i in members]
        if name != "consensus":
            found = algorithm.merge(data, members, torch.float32, cuts)
            close(found, naive.merged(name, *inputs, given_options), data.base)
            continue
        masked = algorithm.merge_masked(data, members, torch.float32, cuts)
        for member, wanted in zip(members, naive.masked(name, *inputs, given_options), strict=True):
            close(masked.vector(data.base, member), wanted, data.base)


def test_trim_scopes_differ():
    """Or else the test before this one shows nothing."""
    base, models = family(TASKS, seed=3)
    data = block_of(base, models, "attention")
    found = []
    for scope in ("model", "block", "tensor"):
        algorithm = made("ties", scope=scope)
        cuts = cuts_for(base, models, algorithm)
        found.append(algorithm.merge(data, (0, 1), torch.float32, cuts))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("density", [1e-9, 1.0])
@pytest.mark.parametrize("scope", ["model", "block", "tensor"])
def test_trimming_to_nothing_and_not_at_all(scope, density):
    base, models = family(TASKS)
    algorithm = made("ties", {"lambda": 1.0, "density": density}, scope)
    data = block_of(base, models, "attention")
    found = algorithm.merge(data, (0, 1), torch.float32, cuts_for(base, models, algorithm))
    names = names_of(data)
    cuts = [naive.least_kept(base, models[i], density) for i in (0, 1)]
    given_options = naive.Options(1.0, None, [density] * 2, scope, cuts)
    wanted = naive.merged(
        "ties", parts(base, names), [parts(models[i], names) for i in (0, 1)], given_options
    )
    close(found, wanted, data.base)


@pytest.mark.parametrize("block", list(BLOCKS))
@pytest.mark.parametrize("name", MASKS)
def test_mask_algorithms(name, block):
    base, models = family(TASKS)
    algorithm = made(name, weight=WEIGHTS)
    data, members = block_of(base, models, block), (0, 1, 3)
    names = names_of(data)
    masked = algorithm.merge_masked(data, members, torch.float32)
    given_options = options(name, members, "block", base, models)
    wanted = naive.masked(
        name, parts(base, names), [parts(models[i], names) for i in members], given_options
    )
    assert set(masked.masks) == set(masked.rescale) == set(members)
    for member, expected in zip(members, wanted, strict=True):
        assert masked.masks[member].numel() == -(-data.layout.size // 8)
        close(masked.vector(data.base, member), expected, data.base)


@pytest.mark.parametrize("name", [*DENSE, *MASKS])
def test_a_group_knows_nothing_of_the_others_and_inputs_stay_as_they_are(name):
    base, models = family(TASKS)
    algorithm = made(name)
    data = block_of(base, models, "mlp")
    before = [v.clone() for v in (data.base, *data.models.values())]
    found = algorithm.merge(data, (0, 2), torch.float32)
    for vector, kept in zip((data.base, *data.models.values()), before, strict=True):
        assert torch.equal(vector, kept)
    models[1] = {n: t * 100 for n, t in models[1].items()}
    again = algorithm.merge(block_of(base, models, "mlp"), (0, 2), torch.float32)
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", DENSE)
def test_results_are_rounded_once(name, dtype):
    base, models = family(TASKS)
    data = block_of(base, models, "attention")
    wide = made(name).merge(data, (0, 1, 2), torch.float32)
    assert torch.equal(made(name).merge(data, (0, 1, 2), dtype), wide.to(dtype))


@pytest.mark.parametrize("name", [*DENSE, *MASKS])
def test_half_precision_is_computed_in_float32(name):
    base, models = family(TASKS, dtype=lambda task: torch.bfloat16)
    data = block_of(base, models, "attention")
    up = [{n: t.float() for n, t in state.items()} for state in (base, *models)]
    wide = block_of(up[0], up[1:], "attention")
    one, other = (made(name).merge(d, (0, 1, 2), torch.bfloat16) for d in (data, wide))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["average", "ties", "pcb", "tsv_m", *MASKS])
def test_identical_models_come_back(name):
    base, models = family(1)
    data = block_of(base, models * TASKS, "attention")
    full = {**SHARED, "lambda": 1.0, "density": 1.0}
    algorithm = made(name, full)
    if name in MASKS:
        masked = algorithm.merge_masked(data, (0, 1, 2), torch.float32)
        for member in (0, 1, 2):
            close(masked.vector(data.base, member), [data.models[0].double()], data.base)
        return
    found = algorithm.merge(data, (0, 1, 2), torch.float32)
    if name == "tsv_m":  # keeps a third of the rank of each
        names = names_of(data)
        given_options = naive.Options(1.0, None, [1.0] * 3)
        same = [parts(models[0], names)] * 3
        close(found, naive.merged(name, parts(base, names), same, given_options), data.base, 2e-5)
    elif name == "pcb":  # keeps what is above the least score
        assert ((found - data.models[0]).abs() > 1e-5).sum() <= 2
    else:
        close(found, [data.models[0].double()], data.base)


@pytest.mark.parametrize("name", [*DENSE, *MASKS])
def test_models_that_did_not_move_give_the_base(name):
    base, _ = family(1)
    data = block_of(base, [base] * TASKS, "attention")
    algorithm = made(name)
    if name in MASKS:
        masked = algorithm.merge_masked(data, (0, 1, 2), torch.float32)
        found = masked.vector(data.base, 1)
    else:
        found = algorithm.merge(data, (0, 1, 2), torch.float32)
    assert torch.equal(found, data.base)


@pytest.mark.parametrize("scale", [1e-25, 1e12])
@pytest.mark.parametrize("name", [n for n in DENSE if n != "pcb"])
def test_scales(name, scale):
    """All but PCB, which has a tanh, scale with their inputs."""
    base, models = family(TASKS)
    states = [{n: t * scale for n, t in state.items()} for state in (base, *models)]
    data = block_of(states[0], states[1:], "attention")
    names, members = names_of(data), (0, 1, 2)
    given_options = naive.Options(1.0 if name == "average" else 1.3, None, [0.3] * 3)
    wanted = naive.merged(
        name, parts(states[0], names), [parts(states[i + 1], names) for i in members], given_options
    )
    found = made(name).merge(data, members, torch.float32)
    close(found, wanted, data.base, 2e-5)


@given(st.integers(0, 2**16), st.sampled_from(DENSE), st.permutations(range(TASKS)))
def test_the_order_of_members_does_not_matter(seed, name, order):
    base, models = family(TASKS, seed, {n: SHAPES[n] for n in ("mlp.up", "mlp.down")})
    data = block_of(base, models, "mlp")
    one = made(name, weight=WEIGHTS).merge(data, range(TASKS), torch.float64)
    other = made(name, weight=WEIGHTS).merge(data, order, torch.float64)
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_weights_that_cancel_have_no_average():
    base, models = family(TASKS)
    algorithm = made("average", weight=[1.0, -1.0, 1.0, 1.0])
    with pytest.raises(MergeError, match="sum to 0"):
        algorithm.merge(block_of(base, models, "mlp"), (0, 1), torch.float32)


# DARE in front


def thinned(base, models, names, density: float, seed: int, block: str):
    """What is dropped is a matter of chance; that what is kept is scaled is not."""
    dare = from_yaml({"algorithm": "average", "dare_density": density})
    data = block_of(base, models, block)
    found = []
    for member in range(len(models)):
        # The average of one model and itself is that model's thinned self.
        alone = BlockData(data.layout, data.base, {member: data.models[member]})
        found.append(dare.merge(alone, (member,), torch.float64).double() - data.base.double())
    return found


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties", "tsv_m", "linear"])
def test_dare(name):
    base, models = family(TASKS)
    data, members = block_of(base, models, "mlp"), (0, 2, 3)
    names = names_of(data)
    given = {"algorithm": name, "dare_density": 0.5}
    if name == "ties":
        given["trim_scope"] = "block"
    if name == "linear":
        given["weight"] = 1.0
    found = from_yaml(given).merge(data, members, torch.float32)
    pieces = thinned(base, models, names, 0.5, 0, "mlp")
    for member in members:
        whole = naive.laid_out([naive.delta(models[member][n], base[n]) for n in names])
        kept = pieces[member].abs() > 1e-5
        assert 0.3 < kept.double().mean() < 0.7
        assert torch.allclose(pieces[member][kept], whole[kept] * 2, rtol=1e-3, atol=1e-5)
    like = parts(base, names)
    moved = [naive.cut_apart(pieces[member], like) for member in members]
    given_options = naive.Options(1.5 if name == "task_arithmetic" else 1.0, None, [0.1] * 3)
    step = naive.F["average" if name == "linear" else name](moved, given_options)
    wanted = [b.double() + s for b, s in zip(like, step, strict=True)]
    close(found, wanted, data.base, 2e-5)


def test_dare_drops_the_same_in_every_group_and_something_else_in_every_block():
    base, models = family(TASKS, shapes={"a.x": (64,), "b.x": (64,)})
    base["b.x"] = base["a.x"]
    for model in models:
        model["b.x"] = model["a.x"]
    a = thinned(base, models, ["a.x"], 0.5, 0, "a")
    b = thinned(base, models, ["b.x"], 0.5, 0, "b")
    assert not torch.equal(a[0] == 0, b[0] == 0)
    assert not torch.equal(a[0] == 0, a[1] == 0)
    data = block_of(base, models, "a")
    pair = from_yaml({"algorithm": "average", "dare_density": 0.5})
    found = pair.merge(data, (1, 3), torch.float64).double() - data.base.double()
    assert torch.allclose(found, (a[1] + a[3]) / 2, atol=1e-6)


def test_dare_keeps_everything_at_density_one():
    base, models = family(TASKS)
    data = block_of(base, models, "mlp")
    plain = from_yaml({"algorithm": "average"}).merge(data, (0, 1), torch.float32)
    dare = from_yaml({"algorithm": "average", "dare_density": 1.0}).merge(
        data, (0, 1), torch.float32
    )
    assert torch.allclose(plain, dare, rtol=1e-6, atol=1e-7)


def test_dare_before_masks():
    base, models = family(TASKS)
    data = block_of(base, models, "mlp")
    algorithm = from_yaml({"algorithm": "emr", "dare_density": 0.5})
    assert algorithm.masks
    masked = algorithm.merge_masked(data, (0, 1, 2), torch.float32)
    names = names_of(data)
    like = parts(base, names)
    pieces = thinned(base, models, names, 0.5, 0, "mlp")
    moved = [
        [b.double() + d for b, d in zip(like, naive.cut_apart(p, like), strict=True)]
        for p in pieces[:3]
    ]
    for member, wanted in enumerate(naive.masked("emr", like, moved, naive.Options())):
        found = masked.vector(data.base, member).double()
        assert torch.allclose(found, naive.laid_out(wanted), atol=1e-4)


# Registered methods


@pytest.mark.parametrize("members", [(0, 1), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("name", ["nan", "nan_ties", "lore", "mergekit:ties", "linear"])
def test_registered_methods(name, members):
    base, models = family(TASKS)
    given: dict[str, Any] = {"algorithm": name, "weight": 1.0}
    if "ties" in name:
        given["density"] = 0.4
    if name == "lore":
        given |= {"mu_relative": 0.1, "lambda": 0.7}
    algorithm = from_yaml(given)
    data = block_of(base, models, "mlp")
    found = algorithm.merge(data, members, torch.float32)
    names = names_of(data)
    like, inputs = parts(base, names), [parts(models[i], names) for i in members]
    count = len(members)
    if name == "lore":
        wanted = [
            naive_lore.lore([m[j] for m in inputs], base=like[j], mu_relative=0.1, lam=0.7).merged
            for j in range(len(like))
        ]
    elif name == "nan_ties":
        deltas = [[naive.delta(w, b) for w, b in zip(m, like, strict=True)] for m in inputs]
        factors = naive_nan.coefficients([float(naive.laid_out(d).norm()) for d in deltas])
        given_options = naive.Options(1.0, factors, [0.4] * count, "tensor")
        scale = max(1.0, count / 2)
        wanted = [
            b.double() + scale * t
            for b, t in zip(like, naive.ties_merge(deltas, given_options), strict=True)
        ]
    else:
        plain = {"mergekit:ties": "ties", "linear": "average", "nan": "nan"}[name]
        given_options = naive.Options(1.0, None, [0.4] * count, "tensor")
        wanted = naive.merged(plain, like, inputs, given_options)
    close(found, wanted, data.base, 1e-4 if name == "lore" else 5e-6)


def test_nan_measures_the_whole_block_whatever_its_tensors_are_called():
    """Names of several layers: by NAN's own reckoning they would be several blocks."""
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (5, 4),
        "model.layers.1.self_attn.q_proj.weight": (4, 4),
        "model.norm.weight": (4,),
    }
    base, models = family(TASKS, shapes=shapes)
    for factor, model in enumerate(models):  # norms of the layers differ from task to task
        first = "model.layers.0.mlp.up_proj.weight"
        model[first] = base[first] + (factor + 1) ** 2 * (model[first] - base[first])
    data = block_of(base, models, "model")
    assert len(data.layout.parts) == 3
    found = from_yaml({"algorithm": "nan"}).merge(data, (0, 1, 3), torch.float32)
    names = names_of(data)
    inputs = parts(base, names), [parts(models[i], names) for i in (0, 1, 3)]
    close(found, naive.merged("nan", *inputs, naive.Options()), data.base)


def test_registered_methods_get_what_each_model_was_given():
    base, models = family(TASKS)
    each = [{"weight": w} for w in WEIGHTS]
    algorithm = from_yaml({"algorithm": "mergekit:task_arithmetic", "lambda": 0.5}, each)
    data, members = block_of(base, models, "mlp"), (1, 2)
    names = names_of(data)
    given_options = naive.Options(0.5 * 2, [WEIGHTS[i] for i in members])
    inputs = parts(base, names), [parts(models[i], names) for i in members]
    wanted = naive.merged("task_arithmetic", *inputs, given_options)
    close(algorithm.merge(data, members, torch.float32), wanted, data.base)


def test_dare_ties_is_mergekits():
    base, models = family(TASKS)
    algorithm = from_yaml({"algorithm": "dare_ties", "weight": 0.5, "density": 1.0})
    data = block_of(base, models, "mlp")
    found = algorithm.merge(data, (0, 1), torch.float32)
    names = names_of(data)
    deltas = [[naive.delta(models[i][n], base[n]) for n in names] for i in (0, 1)]
    # It sums what agrees, and does not divide by the weights.
    wanted = [
        b.double() + sum(0.5 * d[j] * (d[j] * (deltas[0][j] + deltas[1][j]) > 0) for d in deltas)
        for j, b in enumerate(parts(base, names))
    ]
    close(found, wanted, data.base)


def test_every_registered_method_is_taken_or_refused_with_a_reason():
    refused = "which does not merge 4 models over a base"
    for name in algorithm_names():
        for problem in read({"algorithm": name})[1]:
            assert problem.where != "parameters.algorithm" or refused in problem.found
    assert "mergekit:ties" in algorithm_names()
    assert "flexmerge" not in algorithm_names()
    known = {m.spec.name for m in merge_methods.registered_methods()}
    own = methods.methods(methods.BLOCKS).keys()
    assert {name.removeprefix("mergekit:") for name in algorithm_names()} - own <= known


@pytest.mark.parametrize("name", ["slerp", "arcee_fusion", "nearswap"])
def test_methods_of_two_models_are_refused_for_more(name):
    found, problems = read({"algorithm": name}, ({}, {}))
    assert found is None
    assert "parameters.algorithm" in [problem.where for problem in problems]


def test_what_a_method_refuses_of_the_weights_names_algorithm_block_and_tensor(monkeypatch):
    base, models = family(2)
    given = {"target_size": 1, "algorithm": "lore", "mu_relative": 0.1}
    algorithm = from_yaml(given, ({}, {}))
    source = reader(base, models)
    block = source.layout.blocks[1]

    def refuse(*arguments, **named):
        raise ValueError("no such matrix")

    monkeypatch.setattr(type(algorithm._method), "__call__", refuse)
    with pytest.raises(MergeError) as caught:
        algorithm.merge(source.read(block), (0, 1), torch.float32)
    for said in ("lore", "no such matrix", block.name, block.parts[0].name):
        assert said in str(caught.value)
