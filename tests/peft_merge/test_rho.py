"""How far merges of adapters went, and factors from norms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_merge
from mergekit_ext.errors import OvershootWarning
from peft_merge.modules import rules
from tests.peft_merge import loras

SHAPE = (1, 24, 18)


def three(bias=False):
    return [
        loras.adapter(
            name,
            {"a": loras.update(seed, 2, SHAPE, bias=bias)}
            | ({"b": loras.update(seed + 9, 3, SHAPE)} if name != "z" else {}),
        )
        for seed, name in enumerate("xyz")
    ]


def changes(adapter):
    return {m: adapter.load(m).dense().double() for m in adapter.infos}


def merged(method, rank="lossless", **parameters):
    found = peft_merge.merge_adapters(three(), method, parameters=parameters, rank=rank)
    return changes(found.adapter), found.report


def told(report, module):
    return report["rho"]["blocks"][module]["mean"]


def measured(own, module):
    inputs = [d[module] for d in map(changes, three()) if module in d]
    return inputs, float(own[module].norm()) / (sum(float(i.norm()) for i in inputs) / len(inputs))


@pytest.mark.parametrize("rank", ["lossless", 2])
@pytest.mark.parametrize("method", ["linear", "nan", "ties", "tsv_m"])
def test_rho_is_that_of_the_changes(method, rank):
    own, report = merged(method, rank)
    for module in "ab":
        assert told(report, module) == pytest.approx(measured(own, module)[1], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "factor"),
    [("nan", "scale"), ("task_arithmetic", "lambda"), ("ties", "lambda"), ("tsv_m", "lambda")],
)
def test_auto_gives_the_rho_that_norms_promise(method, factor):
    own, _ = merged(method, **{factor: "auto"})
    for module in "ab":
        inputs, rho = measured(own, module)
        mean = sum(float(i.norm()) for i in inputs) / len(inputs)
        common = float(sum(inputs).norm()) / len(inputs) / mean
        wanted = math.sqrt((1 + common**2) / 2)
        assert rho == pytest.approx(wanted, rel=1e-4)


@settings(deadline=None, max_examples=10)
@given(st.floats(0.1, 1.0))
def test_scaling_the_factor_scales_rho(factor):
    _, once = merged("task_arithmetic", **{"lambda": 0.5})
    _, more = merged("task_arithmetic", **{"lambda": 0.5 * factor})
    for module in "ab":
        assert told(more, module) == pytest.approx(told(once, module) * factor, rel=1e-6)


def test_a_bias_is_scaled_with_its_matrix():
    rule = rules()["task_arithmetic"]
    once, auto = (
        loras.merge(three(bias=True), rule, loras.always(loras.settings(rule, 3, lambda_=factor)))
        for factor in (1.0, "auto")
    )
    by = auto[2]["a"]["distance"]["factor"]["lambda"]
    torch.testing.assert_close(auto[0]["a"].bias, once[0]["a"].bias * by)
    torch.testing.assert_close(auto[0]["a"].dense(), once[0]["a"].dense() * by)


def test_a_rank_cut_that_matters_names_the_remedy():
    from peft_merge.report import sentences

    _, cut = merged("ties", rank=1)
    _, whole = merged("ties")
    assert any("`rank: lossless`" in line for line in sentences(cut))
    assert not any("`rank: lossless`" in line for line in sentences(whole))


def test_beyond_one_the_factor_is_named():
    with pytest.warns(OvershootWarning, match="`lambda: .*` in place of 3"):
        merged("task_arithmetic", **{"lambda": 3.0})
