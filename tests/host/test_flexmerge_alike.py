"""The same bytes of a FlexMerge: whatever the number of threads, and what was drawn before."""

from __future__ import annotations

import hashlib

import pytest
import torch
from mergekit.merge_methods.base import ParameterScope

from mergekit_ext.declared import BLOCKS, methods
from mergekit_ext.flexmerge.algorithm import Parameters
from mergekit_ext.host.flexmerge.parameters import algorithms, make
from tests.flexmerge.inputs import algorithm, family, reader

# torch splits a sum over its threads from 32768 terms on, and products of matrices as it likes.
SHAPES = {"mlp.up": (200, 170), "mlp.bias": (33_000,), "attention.q": (260, 260)}
MATRIX = {"attention.q": (512, 512)}
STOCK = ("model_stock", "dare_ties", "della", "sce", "karcher")
METHODS = (*methods(BLOCKS), *STOCK)


@pytest.fixture(scope="module")
def inputs():
    return reader(*family(3, shapes=SHAPES))


def algorithm_for(name, seed=0):
    if name in methods(BLOCKS):
        return algorithm(name, 3, {"density": 0.3})
    specs = {spec.name: spec for spec in algorithms()[name].spec.parameters}
    usual = {"weight": 1.0, "density": 0.5}
    shared, each = (
        {
            spec.name: usual.get(spec.name, spec.default)
            for spec in specs.values()
            if (spec.scope == ParameterScope.SHARED) == is_shared
        }
        for is_shared in (True, False)
    )
    return make(algorithms()[name], Parameters(shared, [each] * 3, seed=seed))


def digest(name, inputs, members=(0, 1, 2), seed=0):
    algorithm, found = algorithm_for(name, seed), hashlib.sha256()
    for block in inputs.layout.blocks:
        data = inputs.read(block)
        found.update(algorithm.merge(data, members, torch.float32).numpy())
        if algorithm.masks:
            masked = algorithm.merge_masked(data, members, torch.float32)
            found.update(masked.unified.numpy())
            found.update(str((masked.rescale, masked.masks)).encode())
    return found.hexdigest()


@pytest.mark.parametrize("name", METHODS)
def test_threads_change_nothing(name, inputs):
    if name == "tsv_m":
        inputs = reader(*family(3, shapes=MATRIX))
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.add(digest(name, inputs))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("name", ["dare_ties", "della"])
def test_random_methods_draw_by_seed_block_and_members(name, inputs):
    found = digest(name, inputs)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert digest(name, inputs) == found
    assert torch.equal(torch.get_rng_state(), state)  # the user's own numbers go on as they were
    assert digest(name, inputs, seed=1) != found
    assert digest(name, inputs, members=(0, 1)) != found
