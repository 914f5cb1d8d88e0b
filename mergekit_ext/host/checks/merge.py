"""The checks of one merge of whole models, in order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from mergekit_ext.core import memory
from mergekit_ext.errors import nearest, shown
from mergekit_ext.host.checks.classes import check_inputs, check_output, find_architecture
from mergekit_ext.host.checks.contract import check_contract
from mergekit_ext.host.checks.estimate import estimate
from mergekit_ext.host.checks.fields import check_fields
from mergekit_ext.host.checks.layout import groups_of, models_at
from mergekit_ext.host.checks.loaders import vocabulary
from mergekit_ext.host.checks.models import read_model
from mergekit_ext.host.checks.parameters import check_parameters
from mergekit_ext.host.checks.plan import FoundTensor, Inventory, left_out, locate, survey
from mergekit_ext.host.checks.report import CheckReport, Estimate, Findings, quiet
from mergekit_ext.host.checks.resolve import resolve
from mergekit_ext.host.checks.schema import unknown_keys
from mergekit_ext.host.checks.settings import (
    check_multi_gpu,
    check_settings,
    check_tokenizers,
)
from mergekit_ext.host.checks.tensors import check_tensors
from mergekit_ext.host.modules import check_modules

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


def check_merge(
    config: MergeConfiguration,
    options: MergeOptions,
    source: str | Mapping[str, Any] | None = None,
    *,
    pending: Collection[str] = (),
) -> CheckReport:
    """Check a merge before any weight is read: everything that is wrong, and what it will cost.

    Only configurations and headers are read; nothing large is downloaded. `config` is not changed.

    Args:
        config: what `run_merge` would get.
        options: what `run_merge` would get.
        source: the YAML text (or the parsed document) that `config` was made of. pydantic drops
            unknown keys, so that they can be found there only.
        pending: paths of models that other merges will have written by then.
    """
    from mergekit_ext.host.method import WholeModelMethod, ext_method

    method = ext_method(config.merge_method)
    if isinstance(method, WholeModelMethod):
        return method.prepare(config, options, source, pending)[0]
    return examine(config, options, source, pending=pending)[0]


def examine(
    config: MergeConfiguration,
    options: MergeOptions,
    source: str | Mapping[str, Any] | None = None,
    *,
    pending: Collection[str] = (),
) -> tuple[CheckReport, list[FoundTensor]]:
    """Check a merge that goes tensor by tensor; return the tensors that it would write, too."""
    findings = Findings()
    with quiet():
        if source is not None:
            findings.extend(unknown_keys(source))
        check_settings(config, options, findings)
        check_tokenizers(config, options, findings)
        check_multi_gpu(options, findings)
        method = find_method(config.merge_method, findings)
        inventory = _check_models(config, options, method, pending)
        # Parameters are reported before the models, but need the tensors' names.
        costs = check_costs(inventory, findings)
        check_modules(config, options, inventory.models, inventory.findings)
        if any(fact.pending for fact in inventory.models.values()):
            findings.note("Nothing is estimated: a model is the result of another document.")
        findings.merge(inventory.findings)
    return findings.report(costs), inventory.located


def models_of_stock(config: MergeConfiguration, options: MergeOptions) -> CheckReport:
    """Check what a merge by mergekit itself reads and would write, and none of its parameters."""
    findings = Findings()
    with quiet():
        method = find_method(config.merge_method, findings)
        findings.merge(_check_models(config, options, method, ()).findings)
    return findings.report()


def find_method(name: str, findings: Findings) -> Any:
    """Return the registered method, or None with a problem that names the nearest one."""
    from mergekit import merge_methods

    methods = {method.spec.name: method for method in merge_methods.registered_methods()}
    if name not in methods:
        close = nearest(name, methods)
        findings.problem(
            "merge_method",
            shown(name),
            f"one of {', '.join(sorted(methods))}",
            f"Write `{close}`." if close else "Choose one of them.",
        )
    return methods.get(name)


def check_costs(
    inventory: Inventory, findings: Findings, collects: bool = False
) -> Estimate | None:
    """Check the parameters, as written and as each tensor gets them, and add up the costs.

    What needs more than the cap on memory is a problem. `collects`: the output's tensors are
    collected for a shard, whatever its format.
    """
    config, options, method = inventory.config, inventory.options, inventory.method
    groups = groups_of(config)
    shared: list[Mapping[str, Any]] = []
    if method is not None:
        check_contract(method, groups, findings)
        absent = check_parameters(method, groups, findings)
        merged = [tensor.planned for tensor in inventory.located] or inventory.planned
        shared = resolve(method, groups, absent, merged, findings)
    if not inventory.complete:
        return None
    tokens = vocabulary(config, options)
    collects = collects or not options.safe_serialization
    costs = estimate(inventory.located, config, options, method, shared, tokens, collects)
    if costs is not None:
        findings.extend(memory.problems(costs.need))
    return costs


def _check_models(config: Any, options: Any, method: Any, pending: Collection[str]) -> Inventory:
    """Check the models with each other and with the output."""
    findings = Findings()
    models = {
        model: read_model(model, where, options, findings, pending)
        for model, where in models_at(config).items()
    }
    inventory = Inventory(config, options, method, findings, models)
    broken = check_inputs(models, findings)
    architecture, same = find_architecture(inventory)
    if architecture is not None:
        survey(inventory, architecture)
    locate(inventory)
    # Models of other architectures would only give the same problem again for every tensor.
    if same or options.allow_crimes:
        check_tensors(inventory, broken)
        donor = config.base_model or next(iter(models))
        check_fields(models, donor, findings, crimes=options.allow_crimes, heads=True)
        unused = left_out(inventory) if config.models else []
        if inventory.out_config is not None and inventory.located and not findings.count:
            check_output(inventory, unused)
    return inventory
