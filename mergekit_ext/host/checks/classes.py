"""The classes of the inputs and of the output: they agree, and nothing that they need is lost."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_ext.errors import listing, tensors_at
from mergekit_ext.host.adapters.fitted import applies
from mergekit_ext.host.blocks import is_task_head
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.plan import BY_FILES, Inventory
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.class_model import Loading, loading


def find_architecture(inventory: Inventory) -> tuple[Any, bool]:
    """Return what mergekit takes the models for, and whether all of them are that.

    The first is mergekit's `ModelArchitecture`; None when it has none, or none can be found.
    """
    from mergekit.architecture import arch_info_for_config

    known = {model: fact for model, fact in inventory.models.items() if fact.config is not None}
    if not known:
        return None, False
    base = inventory.config.base_model
    names = {model: fact.config.architectures[0] for model, fact in known.items()}
    found = {model: arch_info_for_config(fact.config) for model, fact in known.items()}
    if unknown := sorted({names[model] for model, info in found.items() if info is None}):
        return _inferred(inventory, ", ".join(unknown)), True
    first = found[base if base in known else next(iter(known))]
    same = all(info == first for info in found.values())
    if not same and not inventory.options.allow_crimes:
        listed = ", ".join(f"{name} in {model}" for model, name in names.items())
        inventory.findings.problem(
            known[list(names)[-1]].where,
            f"different architectures: {listed}",
            "one architecture",
            "Take out the models that do not fit, or give --allow-crimes to merge what has one "
            "name.",
        )
    return first, same


def _inferred(inventory: Inventory, named: str) -> Any:
    models, findings = inventory.models, inventory.findings
    findings.note(f"mergekit has no table for {named} and takes the tensors' names instead.")
    # mergekit's own way does not merge them for this.
    adapters = [
        fact
        for fact in models.values()
        if fact.reference.lora is not None and not applies(fact.reference)
    ]
    for fact in adapters:
        findings.problem(
            fact.where,
            f"{fact.reference}, an adapter on an architecture that mergekit has no table for",
            "a whole model",
            "Merge the adapter into its base first (`merge_and_unload`) and give the result.",
        )
    if adapters or any(
        fact.tensors is None or not os.path.isdir(fact.reference.model.path)
        for fact in models.values()
    ):
        findings.note(f"Tensors are not compared: not all models with {named} are on this machine.")
        return None
    from mergekit.architecture.auto import infer_architecture_info

    try:
        # Not through mergekit's cache, which would remember files that are mended after a check.
        return infer_architecture_info.__wrapped__(
            tuple(models), inventory.config.base_model, inventory.options
        )
    except Exception as error:  # mergekit and transformers; the message is kept
        reason = (str(error).splitlines() or [""])[0][:200]  # some hold a whole configuration
        findings.problem(
            "models",
            f"an architecture that mergekit cannot infer ({type(error).__name__}: {reason})",
            "an architecture of which mergekit has a table, or that it can infer",
            BY_FILES,
        )
        return None


def check_inputs(facts: Mapping[Any, ModelFacts], findings: Findings) -> set[Any]:
    """Report models that transformers would complete with random numbers, and note what it ignores.

    Such are weights that ZeRO-3 saved empty, or a shard that is gone. A pooler or a head that no
    model of its class has is a warning: bodies are often saved without. Returns these models.
    """
    broken = set()
    for model, fact in facts.items():
        found = _loading_of(fact)
        if found is None:
            continue
        kind = fact.config.architectures[0]
        without = _lacking(facts, kind) if found.missing else frozenset()
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


def check_output(inventory: Inventory, unused: Sequence[str]) -> None:
    """Report tensors that the class of the output needs or has no place for.

    What the inputs' classes lack or do not have, the output may, too. `unused` are stored tensors
    that the merge does not use.
    """
    located, config = inventory.located, inventory.out_config
    facts, findings = inventory.models, inventory.findings
    shapes = {t.name: t.headers[0].shape if t.headers else (0,) for t in located}
    found = loading(config, shapes)
    if found is None:
        return
    kind = config.architectures[0]
    ignored = {n for f in facts.values() if (own := _loading_of(f)) for n in own.ignored}
    found = replace(found, missing=_besides(found.missing, _lacking(facts, kind)))
    if inventory.aligned or not all(tensor.headers for tensor in located):
        # What shapes would say is for the comparison of the inputs.
        found = replace(found, misshapen=(), error="")
    if wrong := _wrong(replace(found, misshapen=())):
        also = f", and does not use {listing(unused)} in the files" if unused else ""
        findings.problem(
            "the output",
            f"{wrong}: mergekit's plan for {kind} leaves them out{also}",
            f"every tensor of {kind}, as transformers loads it",
            BY_FILES,
        )
    if unfit := [*_besides(found.ignored, ignored), *found.misshapen]:
        findings.problem(
            "the output",
            f"{tensors_at(unfit)}, which {kind} does not have, or has in another shape, by the "
            "config.json that mergekit makes for it",
            f"the tensors of {kind}",
            "Take as many layers as that configuration has, and vocabularies of one size (or add "
            "`tokenizer:`, which aligns them).",
        )


def _loading_of(fact: ModelFacts) -> Loading | None:
    """What transformers does with the tensors of one input; None if that is not known."""
    if fact.config is None or fact.tensors is None:
        return None
    return loading(fact.config, {name: h.shape for name, h in fact.tensors.items()})


def _lacking(facts: Mapping[Any, ModelFacts], kind: str) -> frozenset[str]:
    """The poolers and heads of a class that all models of that class lack alike."""
    missing = [
        set(found.missing)
        for fact in facts.values()
        if (found := _loading_of(fact)) and fact.config.architectures[0] == kind
    ]
    everywhere = set.intersection(*missing) if missing else set()
    return frozenset(name for name in everywhere if "pooler" in name or is_task_head(name))


def _besides(names: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in known)


def _wrong(found: Loading) -> str:
    """What keeps a class from being loaded whole; nothing if nothing does."""
    wrong = [
        *([f"{tensors_at(found.missing)} missing"] if found.missing else []),
        *([f"another shape in {tensors_at(found.misshapen)}"] if found.misshapen else []),
        *([f"what transformers cannot convert ({found.error})"] if found.error else []),
    ]
    return " and ".join(wrong)
