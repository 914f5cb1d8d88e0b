"""Tensors that cannot be shared because a model lacks them, or has them in another shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_ext.core.wording import listing
from mergekit_ext.dtypes import PACKED
from mergekit_ext.flexmerge.layout import Layout, Naming
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.io.headers import TensorHeader

Headers = Mapping[str, TensorHeader]


def check_readable(
    models: Sequence[Headers], facts: Sequence[ModelFacts], findings: Findings
) -> None:
    """Report tensors that could be copied, but that nobody could load from the output."""
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
