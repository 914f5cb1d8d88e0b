"""Which architecture mergekit will take the models for, and whether they agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ext.host.adapters import applies
from mergekit_ext.host.checks.locate import BY_FILES
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.io import paths


@dataclass(frozen=True)
class Architecture:
    """What mergekit takes the models for.

    Attributes:
        info: mergekit's `ModelArchitecture`; None when it has none, or none can be found.
        same: whether all models have it.
        inferred: whether it comes from the tensors' names, for want of a table.
    """

    info: Any
    same: bool
    inferred: bool = False


def find_architecture(
    config: Any, options: Any, facts: Mapping[Any, ModelFacts], findings: Findings
) -> Architecture:
    """The architecture that mergekit will use, and whether the models agree on it."""
    from mergekit.architecture import arch_info_for_config

    known = {model: fact for model, fact in facts.items() if fact.config is not None}
    if not known:
        return Architecture(None, same=False)
    names = {model: fact.config.architectures[0] for model, fact in known.items()}
    found = {model: arch_info_for_config(fact.config) for model, fact in known.items()}
    first = config.base_model if config.base_model in known else next(iter(known))
    if all(info is not None for info in found.values()):
        same = all(info == found[first] for info in found.values())
        if not same and not options.allow_crimes:
            _different(names, facts, findings)
        return Architecture(found[first], same)
    unknown = sorted({names[model] for model, info in found.items() if info is None})
    return Architecture(_inferred(config, options, facts, unknown, findings), True, inferred=True)


def _different(
    names: Mapping[Any, str], facts: Mapping[Any, ModelFacts], findings: Findings
) -> None:
    listed = ", ".join(f"{name} in {model}" for model, name in names.items())
    last = list(names)[-1]
    findings.problem(
        facts[last].where,
        f"different architectures: {listed}",
        "one architecture",
        "Take out the models that do not fit, or give --allow-crimes to merge what has one name.",
    )


def _inferred(
    config: Any,
    options: Any,
    facts: Mapping[Any, ModelFacts],
    unknown: list[str],
    findings: Findings,
) -> Any:
    named = ", ".join(unknown)
    findings.note(f"mergekit has no table for {named} and takes the tensors' names instead.")
    # mergekit's own way does not merge them for this.
    adapters = [
        fact
        for fact in facts.values()
        if fact.reference.lora is not None and not applies(fact.reference)
    ]
    for fact in adapters:
        findings.problem(
            fact.where,
            f"{fact.reference}, an adapter on an architecture that mergekit has no table for",
            "a whole model",
            "Merge the adapter into its base first (`merge_and_unload`) and give the result.",
        )
    from_hub = [fact for fact in facts.values() if fact.tensors is None or _remote(fact)]
    if adapters or from_hub:
        findings.note(f"Tensors are not compared: not all models with {named} are on this machine.")
        return None
    from mergekit.architecture.auto import infer_architecture_info

    try:
        # Not through mergekit's cache, which would remember files that are mended after a check.
        return infer_architecture_info.__wrapped__(tuple(facts), config.base_model, options)
    except Exception as error:  # mergekit and transformers; the message is kept
        reason = (str(error).splitlines() or [""])[0][:200]  # some hold a whole configuration
        findings.problem(
            "models",
            f"an architecture that mergekit cannot infer ({type(error).__name__}: {reason})",
            "an architecture of which mergekit has a table, or that it can infer",
            BY_FILES,
        )
        return None


def _remote(fact: ModelFacts) -> bool:
    return not paths.is_folder(fact.reference.model.path)
