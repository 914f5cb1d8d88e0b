"""The fields of the inputs' config.json, and the order of labels, compared with the output's."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_ext.errors import shown
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.io.fields import differences

# What is expected of fields that change what weights mean, and of labels, and what to do.
_ONE_MEANING = (
    "one value: weights of the same shape mean something else with another",
    "Take that model out, or give --allow-crimes to merge it nevertheless.",
)
_ONE_ORDER = (
    "the same labels in the same order: rows of the classifiers are merged by their number",
    "Use `merge_method: flexmerge`, which keeps heads apart, or give --allow-crimes.",
)
_LABELS = "id2label"
_DEFAULT_LABEL = re.compile(r"LABEL_\d+")


def check_fields(
    facts: Mapping[Any, ModelFacts],
    donor: Any,
    findings: Findings,
    *,
    crimes: bool,
    heads: bool,
    outcome: str = "the output has the latter",
) -> None:
    """Compare the configurations of the inputs with that of the `donor`, which the output gets.

    A field that changes what weights of one shape mean stops the merge unless `crimes` are allowed;
    any other that changes the function is a warning. Labels count where `heads` are merged.
    """
    given = facts[donor].config if donor in facts else None
    for model, fact in facts.items():
        if given is None or fact.config is None or fact.config.model_type != given.model_type:
            continue  # reported as other architectures
        labels = _labels(fact.config, given) if heads else ()
        for name, mine, other, stops in (*labels, *differences(fact.config, given)):
            values = f"{mine} in {model}, {other} in {donor}"
            if stops and not crimes:
                said = _ONE_ORDER if name == _LABELS else _ONE_MEANING
                findings.problem(f"{fact.where} (config.json: {name})", values, *said)
            else:
                findings.warn(f"config.json: {name} is {values}; {outcome}.")


def _labels(mine: Any, given: Any) -> Iterator[tuple[str, str, str, bool]]:
    """Compare the order of the labels, which decides what a row of a classifier means."""
    found = []
    for config in (mine, given):
        labels = getattr(config, "id2label", None) or {}
        found.append([str(labels[key]) for key in sorted(labels, key=int)])
    one, other = found
    named = all(not all(map(_DEFAULT_LABEL.fullmatch, labels)) for labels in found)
    if named and one != other and len(one) == len(other):  # else the head has another shape
        yield _LABELS, shown(one), shown(other), True
