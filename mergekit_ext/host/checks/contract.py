"""How many inputs a method takes, and whether it needs a base: all violations, with remedies."""

from __future__ import annotations

from typing import Any

from mergekit_ext.host.checks.layout import Group
from mergekit_ext.host.checks.report import Findings


def check_contract(method: Any, groups: list[Group], findings: Findings) -> None:
    """Compare each group of inputs with the method's `InputContract`."""
    from mergekit.merge_methods.base import BasePolicy

    contract, name = method.spec.contract, method.spec.name
    for group in groups:
        _duplicates(group, findings)
        # A method that ignores the base sees the base as one more ordinary input.
        base = None if contract.base == BasePolicy.IGNORED else group.base
        if base is not None and not group.has_base:
            findings.problem(
                f"{group.where}.sources",
                f"no source of the base model {base}",
                "the base among the sources of the slice",
                "Add a source with that model and the same number of layers.",
            )
        elif contract.base == BasePolicy.REQUIRED and base is None:
            findings.problem(
                "base_model",
                "nothing",
                f"a base model, which `{name}` needs",
                "Add `base_model:`, for most methods the model that the others were fine-tuned "
                "from.",
            )
        elif contract.base == BasePolicy.FORBIDDEN and base is not None:
            findings.problem(
                "base_model",
                str(base),
                f"no base model: `{name}` does not take one",
                "Remove `base_model:`.",
            )
        _counts(name, contract, group, base, findings)


def _duplicates(group: Group, findings: Findings) -> None:
    seen: dict[Any, str] = {}
    for source in group.sources:
        if source.model in seen:
            findings.problem(
                f"{source.where}.model",
                f"{source.model}, which {seen[source.model]} already names",
                "each model once in a group of inputs",
                "Remove one of the two, and give the other the weight of both.",
            )
        seen.setdefault(source.model, source.where)


def _counts(name: str, contract: Any, group: Group, base: Any, findings: Findings) -> None:
    models = {source.model for source in group.sources}
    has_base = base is not None and base in models
    limits = [("models", "", contract.min_inputs, contract.max_inputs, len(models))]
    if has_base:
        limits[0] = ("models", " (the base is one of them)", *limits[0][2:])
    if contract.min_non_base is not None or contract.max_non_base is not None:
        others = len(models) - int(has_base)
        limits.append(
            ("models besides the base", "", contract.min_non_base, contract.max_non_base, others)
        )
    for what, aside, least, most, count in limits:
        least = least or 0
        if least <= count and (most is None or count <= most):
            continue
        limit = least if count < least else most
        bound = "exactly" if least == most else "at least" if count < least else "at most"
        findings.problem(
            group.where,
            f"{count} {_counted(what, count)}{aside}",
            f"{bound} {limit} {_counted(what, limit)} for `{name}`",
            "Add models." if count < least else "Take out models.",
        )


def _counted(what: str, count: int) -> str:
    return what.replace("models", "model") if count == 1 else what
