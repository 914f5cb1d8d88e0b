"""What is checked of a FlexMerge's models, settings, and tensors that cannot be shared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_ext.errors import listing
from mergekit_ext.flexmerge.layout import Layout, Naming
from mergekit_ext.flexmerge.manifest import colliding_names, task_name_problem
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.io.headers import PACKED, TensorHeader

Headers = Mapping[str, TensorHeader]

# Keys of mergekit that are checked no further: they are refused.
NOT_TAKEN = ("tokenizer", "tokenizer_source", "chat_template")


def check_supported(config: Any, options: Any, findings: Findings) -> None:
    """What mergekit's configuration can say and FlexMerge cannot do."""
    if config.base_model is None:
        findings.problem(
            "base_model",
            "nothing",
            "the model that the others were fine-tuned from",
            "Add `base_model:`; FlexMerge compares and merges task vectors.",
        )
    for key in ("slices", "modules"):
        if getattr(config, key):
            findings.problem(
                key,
                f"`{key}:`",
                "`models:`, because `flexmerge` keeps whole models apart",
                "List the models under `models:`.",
            )
    for key in NOT_TAKEN:
        if getattr(config, key, None):
            findings.problem(
                key,
                f"`{key}:`",
                "none: each task keeps its own model's tokenizer and chat template",
                f"Remove `{key}:`.",
            )
    if options.multi_gpu:
        findings.note("--multi-gpu: `flexmerge` uses one device.")
    if not options.safe_serialization:
        findings.note("--no-safe-serialization: `flexmerge` writes safetensors always.")


def task_items(config: Any, findings: Findings) -> list[tuple[str, Any]]:
    """The entries of ``models:`` that are tasks, with their places."""
    tasks: list[tuple[str, Any]] = []
    repeated = 0
    seen: dict[Any, str] = {}
    for index, item in enumerate(config.models or ()):
        where = f"models[{index}]"
        if item.model in seen:
            findings.problem(
                f"{where}.model",
                f"{item.model}, which {seen[item.model]} already names",
                "each model once",
                "Remove one of the two.",
            )
            # No task: its name would be another problem with the same reason.
            repeated += item.model != config.base_model
            continue
        seen[item.model] = where
        if item.model != config.base_model:
            tasks.append((where, item))
        elif item.parameters:
            findings.problem(
                f"{where}.parameters",
                f"{', '.join(item.parameters)} for {item.model}, the base of the merge",
                "no parameters: the base is not a task",
                "Remove them.",
            )
    if len(tasks) + repeated < 2 and not (config.slices or config.modules):
        findings.problem(
            "models",
            f"{len(tasks)} model{'s' if len(tasks) != 1 else ''} besides the base",
            "at least 2",
            "Add models.",
        )
    return tasks


def task_names(items: Sequence[tuple[str, Any]], findings: Findings) -> list[str]:
    """The tasks' names, as given or from the models' paths."""
    names = []
    for where, item in items:
        given = (item.parameters or {}).get("task")
        if given is not None and not isinstance(given, str):
            names.append(where)  # a problem of the parameter's type
            continue
        part = item.model.lora or item.model.model
        name = given if given is not None else Path(part.path).name
        names.append(name)
        problem = task_name_problem(name)
        if problem is not None:
            findings.problem(
                f"{where}.parameters.task",
                repr(name),
                f"a name for the task's folder: {problem}",
                "Write another `task:`.",
            )
    for one, other in colliding_names(names):
        findings.problem(
            "models",
            f"two tasks called {one!r} and {other!r}",
            "a name of its own for each task (upper and lower case are the same)",
            "Give one of them another `task:` under its `parameters:`.",
        )
    return names


def check_family(
    facts: Mapping[Any, ModelFacts], base: Any, reported: Collection[Any], findings: Findings
) -> None:
    """All models must be of the base's type, and their tensors known.

    Why those of `reported` are not known has been said already.
    """
    kinds = {
        model: fact.config.model_type for model, fact in facts.items() if fact.config is not None
    }
    if base in kinds:
        for model, kind in kinds.items():
            if kind != kinds[base]:
                findings.problem(
                    facts[model].where,
                    f"a model of type {kind}",
                    f"{kinds[base]}, the type of the base model {base}",
                    "Merge fine-tunes of one base.",
                )
    for model, fact in facts.items():
        if model in reported:
            continue
        if fact.config is not None and fact.tensors is None and not fact.pending:
            findings.problem(
                fact.where,
                f"{fact.reference}, whose tensors are not known",
                "a folder with weights",
                "Download the model first.",
            )


def check_readable(
    models: Sequence[Headers], facts: Sequence[ModelFacts], findings: Findings
) -> None:
    """Report tensors that could be copied, but not loaded from the output."""
    for model, fact in zip(models, facts, strict=True):
        packed = [name for name, header in model.items() if header.dtype in PACKED]
        if packed:
            dtypes = sorted({model[name].dtype for name in packed})
            findings.problem(
                fact.where,
                f"{fact.reference} with {listing(packed)} in {', '.join(dtypes)}",
                "dtypes of 8 bits at least",
                "Give the model before quantisation.",
            )


def note_unshared(
    base: Headers,
    models: Sequence[Headers],
    layout: Layout,
    naming: Naming,
    findings: Findings,
) -> None:
    """Say of each tensor that is private, and no task's head, why, and how large it is."""
    merged = {part.name for block in layout.blocks for part in block.parts}
    reasons: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(name for model in models for name in model):
        if name in merged or naming.private(name):
            continue
        reason = _reason(name, base, models, layout.tasks)
        if reason is not None:
            size = sum(model[name].nbytes for model in models if name in model)
            reasons.setdefault(reason, {})[name] = size
    for reason, sizes in reasons.items():
        total = sum(sizes.values())
        findings.note(f"{listing(list(sizes))}: {reason} ({total:,} bytes in all).")


def _reason(
    name: str, base: Headers, models: Sequence[Headers], tasks: Sequence[str]
) -> str | None:
    if name not in base:
        return "not in the base: private to every task that has it"
    lacking = [task for task, model in zip(tasks, models, strict=True) if name not in model]
    if lacking:
        return f"missing in {listing(lacking)}: private to every task that has it"
    shape = base[name].shape
    other = {
        task: list(model[name].shape)
        for task, model in zip(tasks, models, strict=True)
        if model[name].shape != shape
    }
    if not other:
        return None
    shapes = listing([f"{task} ({found})" for task, found in other.items()])
    return f"differs in shape in {shapes} from the base ({list(shape)}): private to every task"
