"""Nothing is lost: inputs and output hold what their transformers classes expect."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_ext.core.wording import listing, tensors_at
from mergekit_ext.host.blocks import is_task_head
from mergekit_ext.host.checks.locate import BY_FILES, FoundTensor
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.loading import Loading, loading


def loading_of(fact: ModelFacts) -> Loading | None:
    """Return what transformers does with the tensors of one input; None if that is not known."""
    if fact.config is None or fact.tensors is None:
        return None
    return loading(fact.config, {name: h.shape for name, h in fact.tensors.items()})


def check_inputs(facts: Mapping[Any, ModelFacts], findings: Findings) -> set[Any]:
    """Report models that transformers would complete with random numbers, and note what it ignores.

    Such are weights that ZeRO-3 saved empty, or a shard that is gone. A pooler or a head that no
    model of its class has is a warning: bodies are often saved without. Returns these models.
    """
    broken = set()
    loadings = {model: found for model, fact in facts.items() if (found := loading_of(fact))}
    for model, found in loadings.items():
        fact = facts[model]
        kind = fact.config.architectures[0]
        without = lacking(facts, kind) if found.missing else frozenset()
        if without:
            findings.warn(
                f"{kind} has {tensors_at(sorted(without))}, which no model has: transformers "
                "fills that with random numbers in the output, as in the inputs."
            )
        if wrong := _wrong(replace(found, missing=_besides(found.missing, without))):
            broken.add(model)
            findings.problem(
                fact.where,
                f"{wrong} in {model}, a {kind}: transformers would fill it with random numbers",
                f"every tensor of {kind}",
                "Give a whole checkpoint of that class; one that was saved in parts (DeepSpeed, "
                "FSDP) is consolidated first.",
            )
        if found.ignored:
            findings.note(
                f"{model}: {kind} does not have {listing(found.ignored)}; transformers does not "
                "load them either."
            )
    return broken


def lacking(facts: Mapping[Any, ModelFacts], kind: str) -> frozenset[str]:
    """Return the poolers and heads of a class that all models of that class lack alike."""
    missing = [
        found.missing
        for fact in facts.values()
        if (found := loading_of(fact)) and fact.config.architectures[0] == kind
    ]
    first, *others = missing or [()]
    return frozenset(
        name
        for name in first
        if ("pooler" in name or is_task_head(name)) and all(name in other for other in others)
    )


def _besides(names: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in known)


def check_output(
    located: Sequence[FoundTensor],
    config: Any,
    aligned: bool,
    unused: Sequence[str],
    facts: Mapping[Any, ModelFacts],
    findings: Findings,
) -> None:
    """Report tensors that the class of the output needs or has no place for.

    Args:
        located: the tensors of the output.
        config: the output's configuration.
        aligned: vocabularies are made equal, so that shapes of embeddings are not known yet.
        unused: stored tensors that the merge does not use.
        facts: the inputs: what their classes lack or do not have, the output may, too.
    """
    shapes = {
        tensor.planned.weight.name: tensor.headers[0].shape if tensor.headers else (0,)
        for tensor in located
    }
    found = loading(config, shapes)
    if found is None:
        return
    kind = config.architectures[0]
    ignored = {n for f in facts.values() if (own := loading_of(f)) for n in own.ignored}
    found = replace(found, missing=_besides(found.missing, lacking(facts, kind)))
    unknown = aligned or any(not tensor.headers for tensor in located)
    if unknown:  # what shapes would say is for the comparison of the inputs
        found = replace(found, misshapen=(), error="")
    if wrong := _wrong(replace(found, misshapen=())):
        findings.problem(
            "the output",
            f"{wrong}: mergekit's plan for {kind} leaves them out"
            + (f", and does not use {listing(unused)} in the files" if unused else ""),
            f"every tensor of {kind}, as transformers loads it",
            BY_FILES,
        )
    unfit = [*_besides(found.ignored, ignored), *found.misshapen]
    if unfit:
        findings.problem(
            "the output",
            f"{tensors_at(unfit)}, which {kind} does not have, or has in another shape, by the "
            "config.json that mergekit makes for it",
            f"the tensors of {kind}",
            "Take as many layers as that configuration has, and vocabularies of one size (or add "
            "`tokenizer:`, which aligns them).",
        )


def _wrong(found: Loading) -> str:
    """Say what keeps a class from being loaded whole; nothing if nothing does."""
    wrong = [
        *([f"{tensors_at(found.missing)} missing"] if found.missing else []),
        *([f"another shape in {tensors_at(found.misshapen)}"] if found.misshapen else []),
        *([f"what transformers cannot convert ({found.error})"] if found.error else []),
    ]
    return " and ".join(wrong)
