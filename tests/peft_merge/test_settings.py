"""Values that vary over modules: mergekit's gradients and filters."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergekit.config import ConditionalParameter, evaluate_setting

from mergekit_ext.core.parameters import (
    Count,
    Finite,
    NonNegative,
    Parameter,
    Share,
    Switch,
    choice,
)
from peft_merge.config.plan import UNSET, entries_of, evaluate, places

DENSITY = Parameter("density", Share, per_model=True)
FACTOR = Parameter("lambda", Finite, 1.0)
COUNT = Parameter("count", Count, 1)
FLAG = Parameter("flag", Switch, True)
CHOICE = Parameter("combine", choice("sum", "mean"), "sum")
OPTIONAL = Parameter("mu", NonNegative | None, None)


def messages(parameter, setting):
    found = []
    entries_of(parameter, setting, "p", found)
    return [str(problem) for problem in found]


def value_of(parameter, setting, module, place):
    found = []
    entries = entries_of(parameter, setting, "p", found)
    assert not found
    return evaluate(parameter, entries, module, place)


@pytest.mark.parametrize(
    ("parameter", "setting"),
    [
        (DENSITY, 0.5),
        (DENSITY, 1),
        (DENSITY, "1e-3"),
        (DENSITY, [0.1, 0.5]),
        (DENSITY, {"value": 0.5, "filter": "mlp"}),
        (DENSITY, [{"filter": "mlp", "value": [0.1, 0.2]}, {"value": 1.0}]),
        (FACTOR, -3),
        (COUNT, 3),
        (COUNT, 3.0),
        (FLAG, False),
        (CHOICE, "mean"),
        (OPTIONAL, None),
    ],
)
def test_right_settings(parameter, setting):
    assert messages(parameter, setting) == []


@pytest.mark.parametrize(
    ("parameter", "setting", "said"),
    [
        (DENSITY, 0, "p: found 0; expected greater than 0."),
        (DENSITY, 1.5, "less than or equal to 1"),
        (DENSITY, True, "found True"),
        (DENSITY, math.nan, "found nan"),
        (DENSITY, "inf", "found 'inf'"),
        (DENSITY, "half", "a valid number"),
        (DENSITY, None, "found None"),
        (FACTOR, 10**400, "a valid number"),
        (DENSITY, [], "an empty list"),
        (DENSITY, [0.1, [0.2]], "p[1]: found [0.2]"),
        (DENSITY, [0.1, {"value": 0.2}], "p[0]: found 0.1; expected a value, a list"),
        (DENSITY, {"values": 0.2}, "p: found {'values': 0.2}; expected a value"),
        (DENSITY, {"filter": "mlp"}, "p: found {'filter': 'mlp'}"),
        (DENSITY, {"value": [], "filter": "mlp"}, "p.value: found an empty list"),
        (DENSITY, {"value": 0.2, "filter": 3}, "p: found"),
        (DENSITY, [{"value": [0.5, 7]}], "p[0].value[1]: found 7"),
        (COUNT, 2.5, "a valid integer"),
        (COUNT, 0, "greater than or equal to 1"),
        (COUNT, True, "found True"),
        (FLAG, 1, "a valid boolean"),
        (CHOICE, "maen", "expected 'sum' or 'mean'. Write `mean`."),
        (CHOICE, 3, "'sum' or 'mean'"),
    ],
)
def test_wrong_settings(parameter, setting, said):
    assert any(said in message for message in messages(parameter, setting))


def test_every_problem_of_a_setting_is_reported():
    assert len(messages(DENSITY, [{"value": [2, 3]}, {"filter": 1, "value": 1}])) == 3


_numbers = st.floats(-10, 10)
_gradients = st.one_of(_numbers, st.lists(_numbers, min_size=1, max_size=4))
_filters = st.sampled_from([None, "*", "mlp", "attn", "nothing"])
_settings = st.one_of(
    _gradients,
    st.lists(st.tuples(_filters, _gradients), min_size=1, max_size=3).map(
        lambda entries: [{"filter": f, "value": v} for f, v in entries]
    ),
)


@given(_settings, st.sampled_from(["layers.0.mlp", "layers.1.attn"]), st.floats(0, 1))
def test_resolved_as_mergekit_does(setting, module, place):
    theirs = setting
    if isinstance(setting, list) and isinstance(setting[0], dict):
        theirs = [ConditionalParameter(**entry) for entry in setting]
    expected = evaluate_setting(module, theirs, place, validate=float)
    found = value_of(FACTOR, setting, module, place)
    if expected is None:
        assert found is UNSET
    else:
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("parameter", "gradient"), [(FLAG, [True, False]), (CHOICE, ["sum", "mean"]), (COUNT, [1, 5])]
)
def test_other_kinds_than_fractions_are_chosen_not_interpolated(parameter, gradient):
    assert [value_of(parameter, gradient, "m", place) for place in (0, 0.9, 1)] == [
        gradient[0],
        gradient[0],
        gradient[1],
    ]


def test_places_of_layers():
    assert places(
        [
            "model.layers.0.q",
            "model.layers.2.experts.7.w",
            "model.layers.4.q",
            "head",
            "visual.blocks.0.q",
            "encoder.block.1.layer.0.q",
            "encoder.block.3.layer.1.q",
        ]
    ) == {
        "model.layers.0.q": 0.0,
        "model.layers.2.experts.7.w": 0.5,
        "model.layers.4.q": 1.0,
        "head": 0.0,
        "visual.blocks.0.q": 1.0,  # a stack of one layer, as in mergekit
        "encoder.block.1.layer.0.q": pytest.approx(1 / 3),
        "encoder.block.3.layer.1.q": 1.0,
    }
