"""What a FlexMerge will do, from configurations and headers: every problem, before any weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from mergekit_ext.core import memory
from mergekit_ext.errors import ConfigError, listing
from mergekit_ext.flexmerge.analysis import passes
from mergekit_ext.flexmerge.layout import Naming
from mergekit_ext.flexmerge.plan import whole_models
from mergekit_ext.flexmerge.target import ANY_SIZE, Target
from mergekit_ext.host.adapters.fitted import applies
from mergekit_ext.host.blocks import blocks_of, depth_of, is_task_head, kind_of, tied_groups
from mergekit_ext.host.checks.fields import check_fields
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.models import ModelFacts, read_model
from mergekit_ext.host.checks.report import CheckReport, Estimate, Findings, quiet
from mergekit_ext.host.checks.schema import unknown_keys
from mergekit_ext.host.checks.settings import check_settings, dtype_of
from mergekit_ext.host.checks.tensors import check_inputs
from mergekit_ext.host.flexmerge.checks import (
    NOT_TAKEN,
    check_family,
    check_readable,
    check_supported,
    note_unshared,
    task_items,
    task_names,
)
from mergekit_ext.host.flexmerge.needs import need_of
from mergekit_ext.host.flexmerge.parameters import Written, read_parameters
from mergekit_ext.host.flexmerge.sources import (
    DEFAULT_SEED,
    Prepared,
    laid_out,
    named_otherwise,
)
from mergekit_ext.host.modules import check_copied_modules
from mergekit_ext.methods.method import layout_of

_NOTED_PRIVATE = 0.01


def check(
    config: Any,
    options: Any,
    source: str | Mapping[str, Any] | None = None,
    pending: Collection[str] = (),
) -> tuple[CheckReport, Prepared | None]:
    """Check a FlexMerge; the second value is None if there are problems, or models to come."""
    findings = Findings()
    with quiet():
        if source is not None:
            findings.extend(unknown_keys(source))
        prepared = _prepare(config, options, findings, pending)
    costs = None
    if prepared and not findings.count:
        costs = _estimate(prepared, options)
        findings.extend(memory.problems(costs.need))
    report = findings.report(costs)
    return report, None if report.problems else prepared


def _prepare(
    config: Any, options: Any, findings: Findings, pending: Collection[str]
) -> Prepared | None:
    taken = config.model_copy(update=dict.fromkeys(NOT_TAKEN))
    check_settings(taken, options, findings)
    check_supported(config, options, findings)
    items = task_items(config, findings)
    seed = DEFAULT_SEED if options.random_seed is None else options.random_seed
    written = read_parameters(
        config.parameters or {},
        [(f"{where}.parameters", item.parameters or {}) for where, item in items],
        seed,
        findings,
    )
    tasks = task_names(items, findings)
    facts = _read_models(config, options, written, items, findings, pending)
    if findings.count or written is None or config.base_model is None:
        return None
    if any(fact.pending for fact in facts.values()):
        findings.note("Nothing is estimated: a model is the result of another document.")
        return None
    references = [config.base_model, *(item.model for _, item in items)]
    forced = dtype_of(config.out_dtype or config.dtype)
    prepared = _with_layout(references, facts, tasks, written, forced, findings)
    if prepared is not None:
        _note_sizes(prepared, findings)
        _note_blocks(prepared, findings)
        _check_reachable(prepared, findings)
    return prepared


def _read_models(
    config: Any,
    options: Any,
    written: Written | None,
    items: Sequence[tuple[str, Any]],
    findings: Findings,
    pending: Collection[str],
) -> dict[Any, ModelFacts]:
    """Read configurations and headers of all models, and compare them."""
    facts, reported = {}, set()
    for model, where in models_at(config).items():
        before = findings.count
        facts[model] = read_model(model, where, options, findings, pending)
        if findings.count > before:
            reported.add(model)
    reported |= check_inputs(facts, findings)
    check_family(facts, config.base_model, reported, findings)
    if written is not None:
        check_fields(
            facts,
            config.base_model,
            findings,
            crimes=options.allow_crimes,
            heads=written.shared["heads"] == "merged",
            outcome="each task keeps its own",
        )
    check_copied_modules({item.model: facts[item.model] for _, item in items}, options, findings)
    return facts


def _with_layout(
    references: Sequence[Any],
    facts: Mapping[Any, ModelFacts],
    tasks: Sequence[str],
    written: Written,
    forced: torch.dtype | None,
    findings: Findings,
) -> Prepared | None:
    """Lay out the base, which comes first, and the models; None if they share nothing."""
    ordered = [facts[reference] for reference in references]
    naming = naming_for([fact.config for fact in ordered], written.shared)
    stored = [(fact.tensors or {}, fact.config) for fact in ordered]
    layout, (first, *others), renaming = laid_out(tasks, stored, naming)
    if renaming is not None:
        findings.note(f"{renaming} ({references[0]}).")
    if pairs := named_otherwise(stored[1:]):
        findings.warn(
            f"{len(pairs)} tensors have two names, such as {' and '.join(pairs[0])}, and are not "
            "merged with each other: save all models with one version of transformers."
        )
    check_readable(others, ordered[1:], findings)
    if not any(block.size for block in layout.blocks):
        findings.problem(
            "models",
            "no tensor that the base and all models have in one shape and a floating dtype",
            "fine-tunes of `base_model`",
            "Check that these are fine-tunes of that base.",
        )
        return None
    note_unshared(first, others, layout, naming, findings)
    adapted = frozenset(
        name
        for reference, tensors in zip(references[1:], others, strict=True)
        if applies(reference)
        for name, header in tensors.items()
        if header.file is None
    )
    base, *models = references
    return Prepared(base, models, naming, layout, written, forced, adapted)


def naming_for(configs: Sequence[Any], shared: Mapping[str, Any]) -> Naming:
    """How the names of these models become blocks."""
    tied = all(getattr(config, "tie_word_embeddings", False) for config in configs)
    granularity = shared["granularity"]
    merges_heads = shared["heads"] == "merged"
    return Naming(
        blocks=lambda names: blocks_of(names, granularity, tied),
        kind=lambda name: _kind(name, granularity),
        depth=depth_of,
        private=lambda name: not merges_heads and is_task_head(name),
        matrices=layout_of,
        ties=lambda names: tied_groups(names, tied),
    )


def _kind(name: str, granularity: str) -> str:
    """The kind of block that a name belongs to: of whole layers and models, that they are such."""
    if granularity == "model" or (granularity == "layer" and depth_of(name) is not None):
        return granularity
    return kind_of(name)


def _note_sizes(prepared: Prepared, findings: Findings) -> None:
    if prepared.written.algorithm.kmeans:
        return
    low, high = prepared.storage.least, prepared.storage.size(prepared.storage.whole)
    findings.note(
        f"sizes from {low.models:.4g} ({low.bytes:,} bytes) to {high.models:.4g} "
        f"({high.bytes:,} bytes) can be reached."
    )


def _note_blocks(prepared: Prepared, findings: Findings) -> None:
    layout = prepared.layout
    kinds = Counter(block.kind for block in layout.blocks)
    blocks = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    total = len(layout.blocks)
    findings.note(f"{total} block{'s' if total != 1 else ''}: {blocks}.")
    for task, headers in zip(layout.tasks, layout.private, strict=True):
        if headers:
            size = sum(header.nbytes for header in headers)
            share = f", {size} bytes" if size else ""
            names = listing([header.name for header in headers])
            findings.note(f"private to {task}{share}: {names}.")
    private = layout.private_bytes / max(1, prepared.storage.whole + layout.private_bytes)
    if private > _NOTED_PRIVATE:
        findings.note(
            f"{private:.0%} of all bytes are private and come on top of `target_size`: task "
            "heads, integers, and what the base or a model lacks or has in another shape."
        )
    for group in prepared.naming.ties([p.name for block in layout.blocks for p in block.parts]):
        if len(group) > 1:
            findings.note(f"tied, and so in one block: {', '.join(sorted(group))}.")


def _check_reachable(prepared: Prepared, findings: Findings) -> None:
    storage = prepared.storage
    try:
        if prepared.written.algorithm.kmeans:
            whole_models(prepared.target, len(prepared.layout.tasks))
        else:
            storage.require_reachable(prepared.target, storage.least)
    except ConfigError as error:
        findings.extend(error.problems)
        return
    if prepared.target == Target.parse(ANY_SIZE):
        return
    if prepared.target.holds(storage.size(storage.whole)):
        findings.note(f"target_size {prepared.target}: nothing is merged, as all models fit.")


def _estimate(prepared: Prepared, options: Any) -> Estimate:
    layout, written = prepared.layout, prepared.written
    storage = prepared.storage
    parts = [part for block in layout.blocks for part in block.parts]
    private = [header for headers in layout.private for header in headers]
    whole = storage.whole
    # The analysis, similarities of trimmed vectors, and the merge.
    reads = passes(layout, written.algorithm.densities) + 1
    reads += written.shared["similarity_on"] == "trimmed"
    base = sum(block.base_bytes for block in layout.blocks)
    target = prepared.target
    stored = (
        min(target.bytes, whole + layout.private_bytes)
        if target.bytes is not None
        else int((target.models or 1) * whole / len(layout.tasks)) + layout.private_bytes
    )
    # Which tensors are shared is known after the analysis; a model's worth of bytes is one model.
    models = max(0, stored - layout.private_bytes) * len(layout.tasks) / whole
    need = need_of(prepared, options)
    return Estimate(
        bytes_read=reads * (whole + base) + layout.private_bytes,
        bytes_written=stored,
        bytes_held=need.bytes,
        tensors=round(models * len(parts)) + len(private),
        parameters=round(models * sum(block.size for block in layout.blocks))
        + sum(math.prod(header.shape) for header in private),
        need=need,
    )
