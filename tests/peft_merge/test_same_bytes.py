"""Merges of adapters give the same bytes with any number of threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergekit_ext.kernels.seeds import generators
from mergekit_ext.kernels.truncated import leading
from peft_merge.algebra.core_space import CoreSpace
from peft_merge.algebra.spaces import SPACES, Job
from peft_merge.coefficients import update_norm
from peft_merge.modules import rules
from tests.kernels.threads import with_any_number_of_threads
from tests.peft_merge.loras import adapter, always, merge, settings, update

# More than torch does by one thread.
ROWS, COLUMNS = 131, 257
SPARSE = {"density": 0.4, "gamma": 0.1, "epsilon": 0.1}


def configured(rule, count=3):
    """Not the defaults where these drop nothing."""
    own = {p.name: SPARSE[p.name] for p in rule.parameters if p.name in SPARSE and p.per_model}
    shared = {"rescale": True, "mu_relative": 0.6, "max_iterations": 4, "tolerance": 1e-3}
    names = {p.name for p in rule.parameters if not p.per_model}
    chosen = {name: value for name, value in shared.items() if name in names}
    return settings(rule, count, weights=[1.0, 0.5, 0.8], each=[own] * count, **chosen)


PLAIN = sorted(name for name in rules() if not name.startswith("nan_"))


@pytest.mark.parametrize("name", PLAIN)
def test_rules_on_whole_changes(name):
    rule = rules()[name]
    changes = [
        torch.randn(
            (ROWS, COLUMNS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        for seed in range(3)
    ]

    def work():
        call = replace(configured(rule), short_side=ROWS, generators=generators(0, "m", 3))
        return rule.apply(changes, call).tensor

    with_any_number_of_threads(work)


@pytest.mark.parametrize("name", ("lore", "ties"))
def test_modules(name):
    rule = rules()[name]
    shapes = {"up": (1, ROWS, COLUMNS), "experts": (2, 70, 130)}
    loras = [
        adapter(
            str(seed),
            {module: update(seed, 5 + seed, shape) for module, shape in shapes.items()},
        )
        for seed in range(3)
    ]

    def work():
        merged, _, report = merge(loras, rule, always(configured(rule)))
        return {key: (found.a, found.b) for key, found in merged.items()}, report

    with_any_number_of_threads(work)


def test_dense_changes():
    rule, shape = rules()["ties"], (1, 530, 601)
    updates = [update(seed, 20, shape) for seed in range(3)]

    def work():
        call = replace(configured(rule), short_side=530, generators=generators(0, "m", 3))
        found, _ = SPACES["delta"](Job(updates, shape, rule, call, 9, "cpu"))
        return found.a, found.b, found.sigma, found.error

    with_any_number_of_threads(work)


def test_leading_triplets():
    x = torch.randn((701, 530), generator=torch.Generator().manual_seed(0))
    for rank, exact in ((20, True), (20, False), (300, True)):

        def work(rank=rank, exact=exact):
            found = leading(x, rank, exact)
            return found.u, found.sigma, found.v, found.rest, found.whole

        with_any_number_of_threads(work)


def test_the_core_and_norms():
    updates = [update(seed, 40, (1, 700, 801), bias=True) for seed in range(3)]
    twice = [*updates, updates[0]]

    def work():
        found = []
        for some in (updates, twice):
            space = CoreSpace.of(some)
            factored = space.factor(sum(space.cores), 100)
            found += [*space.cores, space.gram(), factored.a, factored.b, factored.error]
        return [*found, *map(update_norm, updates)]

    with_any_number_of_threads(work)
