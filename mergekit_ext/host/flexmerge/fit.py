"""Whether parameters that are each valid fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_ext.core.wording import shown
from mergekit_ext.flexmerge.algorithms.base import Algorithm
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.flexmerge.registered import Registered


def check_fit(
    algorithm: Algorithm, full: Mapping[str, Any], given: Mapping[str, Any], findings: Findings
) -> None:
    """Report parameters that contradict each other, or that a registered method refuses."""
    if isinstance(algorithm, Registered):
        problems = algorithm.problems()
        findings.extend(problems)
        for note in () if problems else algorithm.notes():
            findings.note(note)
    where = "parameters.trim_scope"
    if not algorithm.trims:
        for name in ("trim_scope", "similarity_on"):
            if given.get(name) not in (None, "original"):
                findings.problem(
                    f"parameters.{name}",
                    shown(given[name]),
                    f"it with an algorithm that trims; `{full['algorithm']}` does not",
                    f"Remove `{name}:`.",
                )
    elif full["dare_density"] is not None and full["trim_scope"] in (None, "model"):
        findings.problem(
            where,
            "the scope `model` together with `dare_density`, which changes every magnitude",
            "`block` or `tensor`",
            "Write `trim_scope: block`.",
        )
