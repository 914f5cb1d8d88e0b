"""What a FlexMerge will do, from configurations and headers: every problem, before any weight."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_ext.core import memory
from mergekit_ext.core.memory import in_models
from mergekit_ext.errors import ConfigError, Problem, listing, require
from mergekit_ext.flexmerge.manifest import colliding_names, task_name_problem
from mergekit_ext.flexmerge.plan import DEFAULT_ALGORITHM, clusters_problem
from mergekit_ext.flexmerge.residual import ADAPTERS, Residual, ResidualStorage
from mergekit_ext.flexmerge.storage import ANY_SIZE, Target
from mergekit_ext.host.adapters.fitted import applies
from mergekit_ext.host.blocks import is_task_head, tied_groups
from mergekit_ext.host.checks.copied import OTHERS, is_merged, selection_problems
from mergekit_ext.host.checks.fields import check_fields
from mergekit_ext.host.checks.layout import Source, groups_of, models_at
from mergekit_ext.host.checks.models import ModelFacts, read_model
from mergekit_ext.host.checks.report import CheckReport, Findings, quiet
from mergekit_ext.host.checks.schema import unknown_keys
from mergekit_ext.host.checks.settings import check_settings, compare_tokenizers, dtype_of
from mergekit_ext.host.checks.tensors import check_inputs
from mergekit_ext.host.commands import parsed, source_of
from mergekit_ext.host.flexmerge import FlexMergeMethod
from mergekit_ext.host.flexmerge.adapters import FOLDER, forms_of
from mergekit_ext.host.flexmerge.needs import estimate
from mergekit_ext.host.flexmerge.parameters import named, read_parameters, tasks_of, variant
from mergekit_ext.host.flexmerge.shared_tensors import Prepared, laid_out
from mergekit_ext.host.method import ext_method
from mergekit_ext.host.modules import check_copied_modules
from mergekit_ext.host.naming import Headers, is_tied, named_otherwise
from mergekit_ext.io.quantised import QuantisedHeader
from mergekit_ext.io.staging import place_problems

_NOTED_PRIVATE = 0.01
# What mergekit's configuration can say and FlexMerge cannot do, and what it does instead.
_REFUSED = {
    **dict.fromkeys(("slices", "modules"), "`models:`: `flexmerge` keeps whole models apart"),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_source", "chat_template"),
        "none: each task keeps its own model's tokenizer and chat template",
    ),
}


def prepare_tables(
    config: Any, folder: Path, options: Any, algorithms: Sequence[str] = ()
) -> dict[str, tuple[CheckReport, Prepared]]:
    """Check a configuration with each of several algorithms, at no target size.

    `algorithms` are names; none for that of the configuration. Tables will be written to `folder`.

    Raises:
        ConfigError: something is wrong with the configuration, its inputs or `folder`.
    """
    source = source_of(config)
    config = named(parsed(source))
    if not isinstance(ext_method(config.merge_method), FlexMergeMethod):
        other, remedy = repr(config.merge_method), "Use mergekit-yaml for other methods."
        raise ConfigError([Problem("merge_method", other, "'flexmerge' or 'decompose'", remedy)])
    chosen = algorithms or [str((config.parameters or {}).get("algorithm", DEFAULT_ALGORITHM))]
    found = {}
    for name in dict.fromkeys(chosen):
        report, prepared = check(variant(config, name, chosen), options, source)
        require(report.problems, f"this configuration and `{name}`")
        assert prepared is not None
        found[name] = report, prepared
    inputs = [model.model.path for model in config.referenced_models()]
    require(place_problems(folder, "OUT_PATH", inputs, without=["config.json"]))
    return found


def check(
    config: Any,
    options: Any,
    source: str | Mapping[str, Any] | None = None,
    pending: Collection[str] = (),
) -> tuple[CheckReport, Prepared | None]:
    """Check a FlexMerge; the second value is None if there are problems, or models to come."""
    findings, costs = Findings(), None
    with quiet():
        findings.extend(unknown_keys(source))
        prepared = _prepared(config, options, findings, pending)
        if prepared is not None and not findings.count:
            costs = estimate(prepared)
            findings.extend(memory.problems(costs.need))
    return findings.report(costs), None if findings.count else prepared


def _prepared(
    config: Any, options: Any, findings: Findings, pending: Collection[str]
) -> Prepared | None:
    taken = named(config).model_copy(update=dict.fromkeys(_REFUSED))
    check_settings(taken, options, findings)
    for key, instead in _REFUSED.items():
        if getattr(config, key, None):
            findings.problem(key, f"`{key}:`", instead, f"Remove `{key}:`.")
    if options.multi_gpu:
        findings.note("--multi-gpu: `flexmerge` uses one device.")
    if not options.safe_serialization:
        findings.note("--no-safe-serialization: `flexmerge` writes safetensors always.")
    algorithm = read_parameters(taken, options.random_seed or 0, findings)
    sources = tasks_of(taken)
    given = taken.parameters or {}
    for source in (source for group in groups_of(taken) for source in group.sources):
        if source.model == config.base_model and not source.implicit:
            findings.warn(f"{source.where}: {source.model} is `base_model`, and so is no task.")
    also = [FOLDER] if given.get("output") == ADAPTERS else []
    tasks = _task_names(sources, given.get("task"), also, findings)
    facts = _read_models(config, sources, options, findings, pending)
    compare_tokenizers(taken, findings, copied=False)
    if algorithm is not None:
        check_fields(
            facts,
            config.base_model,
            findings,
            crimes=options.allow_crimes,
            heads=algorithm.parameters.shared["heads"] == "merged",
            outcome="each task keeps its own",
        )
    names = {name for fact in facts.values() for name in fact.tensors or {}}
    findings.extend(selection_problems(taken, names, [OTHERS]))
    if findings.count or algorithm is None or any(fact.pending for fact in facts.values()):
        return None
    references = [config.base_model, *(source.model for source in sources)]
    stored = [(facts[model].tensors or {}, facts[model].config) for model in references]
    layout, headers, prefixes = laid_out(tasks, references, stored, algorithm.parameters.shared)
    if not any(block.size for block in layout.blocks):
        found = "no tensor that the base and all models have in one shape and a floating dtype"
        remedy = "Check that these are fine-tunes of that base."
        findings.problem("models", found, "fine-tunes of `base_model`", remedy)
        return None
    adapted = frozenset(  # or dequantised, which takes no more
        name
        for reference, tensors in zip(references, headers, strict=True)
        for name, header in tensors.items()
        if header.file is None and (applies(reference) or isinstance(header, QuantisedHeader))
    )
    forced = dtype_of(config.out_dtype or config.dtype)
    forms = None
    if isinstance(algorithm, Residual) and algorithm.parameters.shared["output"] == ADAPTERS:
        configs = [config for _, config in stored[1:]]
        models = list(zip(headers[1:], configs, strict=True))
        if (forms := forms_of(layout, models, algorithm, findings)) is None:
            return None
    prepared = Prepared(references, layout, algorithm, forced, options, adapted, forms)
    if prefixes is not None:
        old, new = prefixes
        findings.note(f"{references[0]}: the base's `{old}<name>` is read as `{new}<name>`.")
    if pairs := named_otherwise(stored[1:]):
        findings.warn(
            f"{len(pairs)} tensors have two names, such as {' and '.join(pairs[0])}, and are not "
            "merged with each other: save all models with one version of transformers."
        )
    _note_private(headers, prepared, findings)
    _note_blocks(prepared, is_tied([config for _, config in stored]), findings)
    _check_size(prepared, findings)
    return prepared


def _task_names(
    sources: Sequence[Source], shared: Any, taken: Sequence[str], findings: Findings
) -> list[str]:
    """Return the tasks' names, as given (one for all is `shared`) or from the models' paths.

    Other folders beside the tasks' have the names `taken`.
    """
    found = []
    for source in sources:
        part = source.model.lora or source.model.model
        name = source.parameters.get("task", shared or Path(part.path).name)
        if not isinstance(name, str):  # a problem of the parameter's type
            continue
        found.append(name)
        if problem := task_name_problem(name):
            where, expected = f"{source.where}.parameters.task", f"a folder's name: {problem}"
            findings.problem(where, repr(name), expected, "Write another `task:`.")
    for one, other in colliding_names([*taken, *found]):
        twice = f"two tasks called {one!r} and {other!r}"
        if one in taken:
            twice = f"a task called {other!r}, as the folder of the base is"
        expected = "a name of its own for each task (upper and lower case are the same)"
        remedy = "Give one of them another `task:` under its `parameters:`."
        findings.problem("models", twice, expected, remedy)
    return found


def _read_models(
    config: Any, tasks: Sequence[Source], options: Any, findings: Findings, pending: Collection[str]
) -> dict[Any, ModelFacts]:
    facts, reported = {}, set()
    for model, where in models_at(config).items():
        before = findings.count
        facts[model] = read_model(model, where, options, findings, pending)
        if findings.count > before:
            reported.add(model)
    reported |= check_inputs(facts, findings)
    base = facts.get(config.base_model)
    for model, fact in facts.items():
        if fact.config is None:
            continue
        kind = fact.config.model_type
        if base and base.config is not None and kind != base.config.model_type:
            found, remedy = f"a model of type {kind}", "Merge fine-tunes of one base."
            expected = f"{base.config.model_type}, the type of the base model {config.base_model}"
            findings.problem(fact.where, found, expected, remedy)
        if fact.tensors is None and not fact.pending and model not in reported:
            found, remedy = f"{model}, whose tensors are not known", "Download the model first."
            findings.problem(fact.where, found, "a folder with weights", remedy)
    check_copied_modules({task.model: facts[task.model] for task in tasks}, options, findings)
    return facts


def _note_private(headers: Sequence[Headers], prepared: Prepared, findings: Findings) -> None:
    """Note of each tensor that is not merged why, and how large it is in all tasks together."""
    base, *models = headers
    layout, shared = prepared.layout, prepared.algorithm.parameters.shared
    merged = {part.name for block in layout.blocks for part in block.parts}
    giver = prepared.references[layout.giver + 1]
    if given := [header.name for header in layout.given]:
        merged.update(given)
        findings.note(f"Every task has {giver}'s {listing(given)}, which is not merged.")
    reasons: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(name for model in models for name in model):
        if name in merged:
            continue
        owners = dict(zip(layout.tasks, (model.get(name) for model in models), strict=True))
        others = [
            f"{task} ({'missing' if header is None else list(header.shape)})"
            for task, header in owners.items()
            if name in base and (header is None or header.shape != base[name].shape)
        ]
        if shared["heads"] == "private" and is_task_head(name):
            reason = "a task's head"
        elif not is_merged(name, shared):
            reason = f"not merged, and not in {giver} in the shape that every task has"
        elif name not in base:
            reason = "not in the base"
        elif others:
            reason = f"differs in {listing(others)} from the base ({list(base[name].shape)})"
        else:
            reason = "no floating-point numbers in all models"
        size = sum(header.nbytes for header in owners.values() if header)
        reasons.setdefault(reason, {})[name] = size
    for reason, sizes in reasons.items():
        private = f"private to every task that has it ({sum(sizes.values()):,} bytes in all)"
        findings.note(f"{listing(list(sizes))}: {reason}, so {private}.")


def _note_blocks(prepared: Prepared, tied: bool, findings: Findings) -> None:
    layout = prepared.layout
    kinds = Counter(block.kind for block in layout.blocks)
    blocks = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    total = len(layout.blocks)
    findings.note(f"{total} block{'s' if total != 1 else ''}: {blocks}.")
    private = layout.private_bytes / max(1, prepared.storage.whole + layout.private_bytes)
    if private > _NOTED_PRIVATE:
        findings.note(
            f"{private:.0%} of all bytes are private and come on top of `target_size`: task "
            "heads, integers, and what the base or a model lacks or has in another shape."
        )
    for group in tied_groups((p.name for block in layout.blocks for p in block.parts), tied):
        findings.note(f"tied, and so in one block: {', '.join(sorted(group))}.")


def _check_size(prepared: Prepared, findings: Findings) -> None:
    storage, target = prepared.storage, prepared.target
    least, most = storage.least, storage.most
    if isinstance(storage, ResidualStorage):
        findings.extend(storage.rank_problems())
    if prepared.algorithm.kmeans:
        problem = clusters_problem(target, storage.tasks)
    else:
        ends = (f"{in_models(end.models):.10g} ({end.bytes:,} bytes)" for end in (least, most))
        findings.note(f"sizes from {' to '.join(ends)} can be reached.")
        problem = storage.problem(target)
    if problem is not None:
        findings.extend([problem])
    elif prepared.forms is None and target.holds(most) and target != Target.parse(ANY_SIZE):
        findings.note(f"target_size {target}: nothing is merged, as all models fit.")
