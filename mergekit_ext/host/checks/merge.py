"""The checks of one merge of whole models, in order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from mergekit_ext import memory
from mergekit_ext.core.wording import nearest, shown
from mergekit_ext.host.checks.architecture import find_architecture
from mergekit_ext.host.checks.complete import check_inputs, check_output
from mergekit_ext.host.checks.contract import check_contract
from mergekit_ext.host.checks.estimate import estimate
from mergekit_ext.host.checks.fields import check_fields
from mergekit_ext.host.checks.keys import unknown_keys
from mergekit_ext.host.checks.layout import groups_of, references
from mergekit_ext.host.checks.locate import FoundTensor, left_out, locate
from mergekit_ext.host.checks.models import ModelFacts, read_model
from mergekit_ext.host.checks.modules import check_modules
from mergekit_ext.host.checks.parameters import check_parameters
from mergekit_ext.host.checks.report import CheckReport, Estimate, Findings, quiet
from mergekit_ext.host.checks.resolve import ParameterResolution
from mergekit_ext.host.checks.settings import check_multi_gpu, check_settings, wants_tokenizer
from mergekit_ext.host.checks.survey import PlannedTensor, survey
from mergekit_ext.host.checks.tensors import check_tensors
from mergekit_ext.host.checks.tokenizers import check_tokenizers
from mergekit_ext.host.checks.vocabulary import vocabulary

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
    from mergekit_ext.host.method import WholeModelMethod
    from mergekit_ext.host.methods import ext_method

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
    """`check_merge` of a method that goes tensor by tensor, and the tensors that it would write."""
    findings = Findings()
    with quiet():
        if source is not None:
            findings.extend(unknown_keys(source))
        costs, located = _check(config, options, findings, pending)
    return findings.report(costs), located


def find_method(name: str, findings: Findings) -> Any:
    """The registered method, or None with a problem that names the nearest one."""
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


def resolve_and_estimate(
    config: Any,
    options: Any,
    method: Any,
    planned: list[PlannedTensor],
    located: list[FoundTensor],
    complete: bool,
    findings: Findings,
    collects: bool = False,
) -> Estimate | None:
    """Check the parameters, as written and as each tensor gets them, and add up the costs.

    `collects` as for `estimate`. What needs more than the cap on memory is a problem.
    """
    groups = groups_of(config)
    shared: list[Mapping[str, Any]] = []
    if method is not None:
        check_contract(method, groups, findings)
        absent = check_parameters(method, groups, findings)
        merged = [tensor.planned for tensor in located] if located else planned
        shared = ParameterResolution(method, groups, absent, findings).run(merged)
    if not complete or not located:
        return None
    tokens = vocabulary(config, options)
    costs = estimate(located, config, options, method, shared, tokens, collects)
    if costs is not None:
        findings.extend(memory.problems(costs.need))
    return costs


def _check(
    config: Any, options: Any, findings: Findings, pending: Collection[str]
) -> tuple[Estimate | None, list[FoundTensor]]:
    check_settings(config, options, findings)
    check_tokenizers(config, options, findings)
    check_multi_gpu(options, findings)
    method = find_method(config.merge_method, findings)
    models = Findings()  # parameters are reported first, but need the tensors' names
    facts, planned, located = _check_models(config, options, method, models, pending)
    known = all(fact.config is not None and fact.tensors is not None for fact in facts.values())
    complete = known and not models.count
    collects = not options.safe_serialization
    costs = resolve_and_estimate(
        config, options, method, planned, located, complete, findings, collects
    )
    check_modules(config, options, facts, models)
    if any(fact.pending for fact in facts.values()):
        models.note("Nothing is estimated: a model is the result of another document.")
    findings.merge(models)
    return costs, located


def models_of_stock(config: MergeConfiguration, options: MergeOptions) -> CheckReport:
    """Check what a merge by mergekit itself reads and would write, and none of its parameters."""
    findings = Findings()
    with quiet():
        _check_models(config, options, find_method(config.merge_method, findings), findings, ())
    return findings.report()


def _check_models(
    config: Any, options: Any, method: Any, findings: Findings, pending: Collection[str]
) -> tuple[dict[Any, ModelFacts], list[PlannedTensor], list[FoundTensor]]:
    """Check the models with each other and with the output.

    Returns what is known of each model, the tensors that mergekit plans, and those that it finds.
    """
    facts = {
        model: read_model(model, where, options, findings, pending)
        for where, model in references(groups_of(config), config.base_model)
    }
    broken = check_inputs(facts, findings)
    architecture = find_architecture(config, options, facts, findings)
    planned: list[PlannedTensor] = []
    out_config = None
    if architecture.info is not None:
        planned, out_config = survey(config, architecture.info, options, facts, findings)
    located = locate(planned, facts)
    # Models of other architectures would only give the same problem again for every tensor.
    if architecture.same or options.allow_crimes:
        aligned = bool(wants_tokenizer(config) or options.unsafe_truncate_embeddings)
        sound = [tensor.without(broken) for tensor in located]
        check_tensors(sound, method, config, facts, aligned, findings)
        donor = config.base_model or next(iter(facts))
        check_fields(facts, donor, findings, crimes=options.allow_crimes, heads=True)
        unused = left_out(planned, located, facts, findings) if config.models else []
        if located and out_config is not None and not findings.count:
            check_output(located, out_config, aligned, unused, facts, findings)
    return facts, planned, located
