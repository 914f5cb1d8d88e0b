"""The checks of one merge, in order, and those of YAML text."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ext.core import memory
from mergekit_ext.errors import FileError, did_you_mean, shown
from mergekit_ext.host.blocks import is_task_head
from mergekit_ext.host.checks import schema, settings
from mergekit_ext.host.checks.copied import note_routers, settle_copies
from mergekit_ext.host.checks.estimate import estimate
from mergekit_ext.host.checks.fields import check_fields
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.models import read_model
from mergekit_ext.host.checks.parameters import check_parameters
from mergekit_ext.host.checks.plan import Inventory, plan_models
from mergekit_ext.host.checks.report import CheckReport, Findings, quiet
from mergekit_ext.host.checks.tensors import check_inputs, check_output, check_tensors
from mergekit_ext.host.flexmerge import FlexMergeMethod
from mergekit_ext.host.inputs import donor_of
from mergekit_ext.host.method import ext_method, registered
from mergekit_ext.host.modules import check_modules
from mergekit_ext.io.documents import read


def check_merge(
    config: MergeConfiguration,
    options: MergeOptions,
    source: str | Mapping[str, Any] | None = None,
    pending: Collection[str] = (),
) -> tuple[CheckReport, Any]:
    """Check a merge before any weight is read: everything that is wrong, and what it will cost.

    `source` is what `config` was made of, and `pending` are models that other merges will write.
    Returns also what will be written: the inventory; of a FlexMerge what is prepared.
    """
    own, findings = ext_method(config.merge_method), Findings()
    if isinstance(own, FlexMergeMethod):
        from mergekit_ext.host.flexmerge.prepare import check  # much, which others do not need

        return check(config, options, source, pending)
    with quiet():
        findings.extend(schema.unknown_keys(source))
        settings.check_settings(config, options, findings)
        if options.multi_gpu and not torch.accelerator.device_count():
            findings.problem("--multi-gpu", "no accelerator", "one at least", "Leave it out.")
        method = method_named(config.merge_method, "merge_method", findings)
        inventory = Inventory(config, options, method, findings)
        _check_models(inventory, pending)
        tokens = settings.check_tokenizers(config, options, findings)
        settings.compare_tokenizers(config, findings, copied=options.copy_tokenizer)
        planned, shared = inventory.located or inventory.planned, []
        if method is not None:
            shared = check_parameters(method, inventory.groups, planned, findings)
        costs = estimate(inventory, shared, tokens)
        if costs is not None:
            findings.extend(memory.problems(costs.need))
        check_modules(config, options, inventory.models, findings)
    return findings.report(costs), inventory


def check_stock(config: MergeConfiguration, options: MergeOptions) -> tuple[CheckReport, Inventory]:
    """Check what a merge by mergekit itself reads and would write, and none of its parameters."""
    with quiet():
        method = merge_methods.get(config.merge_method)
        inventory = Inventory(config, options, method, Findings())
        _check_models(inventory, ())
    return inventory.findings.report(), inventory


def method_named(name: Any, where: str, findings: Findings) -> Any:
    """Return the registered method, or None and a problem."""
    methods = registered()
    if name in methods:
        return methods[name]
    remedy = did_you_mean(name, methods, listed=True, otherwise="Choose one of them.")
    findings.problem(where, shown(name), f"one of {', '.join(sorted(methods))}", remedy)
    return None


def _check_models(inventory: Inventory, pending: Collection[str]) -> None:
    config, options, findings = inventory.config, inventory.options, inventory.findings
    for model, where in models_at(config).items():
        inventory.models[model] = read_model(model, where, options, findings, pending)
    broken = check_inputs(inventory.models, findings)
    # Models of other architectures would only give the same problem again for every tensor.
    if plan_models(inventory) or options.allow_crimes:
        settle_copies(inventory)
        note_routers(inventory)
        check_tensors(inventory, broken)
        check_fields(
            inventory.models,
            donor_of(config),
            findings,
            crimes=options.allow_crimes,
            heads=not any(t.copied and is_task_head(t.name) for t in inventory.located),
        )
        check_output(inventory)


def check_source(text: str, options: MergeOptions) -> list[tuple[str | None, CheckReport]]:
    """Check YAML text for mergekit-yaml or mergekit-multi.

    YAML and schema errors are problems like the others. Returns one report for each document,
    with its `name:`. In a text of several documents a model may be the name of another document.
    """
    try:
        documents, repeated = read(text)
    except FileError as error:
        return [(None, CheckReport((error.problem,)))]
    if not documents:
        return [(None, CheckReport((schema.NO_DOCUMENT,)))]
    names = [schema.name_of(document) for document in documents]
    between = schema.between_documents(documents)
    reports = []
    for i, (name, document) in enumerate(zip(names, documents, strict=True)):
        config, problems = schema.parse(document)
        if config is None:
            report = CheckReport(tuple(problems))
        else:
            pending = {other for other in names if other is not None and other != name}
            report, _ = check_merge(config, options, document, pending)
        # Keys that stand twice are located in the text, not in a document.
        problems = [*(repeated if i == 0 else ()), *between.get(i, ()), *report.problems]
        reports.append((name, replace(report, problems=tuple(problems))))
    return reports
