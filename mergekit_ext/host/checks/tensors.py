"""The tensors that a merge reads, compared with each other: presence, shapes, dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ext.core.wording import tensors_at
from mergekit_ext.dtypes import NARROW, PACKED, WHOLE, is_counter
from mergekit_ext.host.checks.locate import BY_FILES, FoundTensor
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.stored_bytes import same_bytes

# The largest tensor whose values are compared before the merge.
_LARGEST_READ = 1 << 20


def check_tensors(
    located: Sequence[FoundTensor],
    method: Any,
    config: Any,
    facts: Mapping[Any, ModelFacts],
    aligned: bool,
    findings: Findings,
) -> None:
    """Report missing tensors, shapes, dtypes and whole numbers that do not fit.

    `aligned`: vocabularies are made equal before the merge (a tokenizer, or truncation).
    """
    _missing(located, method, facts, findings)
    shapes: dict[tuple[bool, str], list[str]] = {}
    for tensor in located:
        known = {str(m): h for m, h in tensor.found.items() if h is not None}
        axis = tensor.planned.weight.vocabulary_axis
        if len({_comparable(h.shape, axis if aligned else None) for h in known.values()}) > 1:
            listed = ", ".join(f"{list(h.shape)} in {model}" for model, h in known.items())
            resizable = axis is not None and (
                len({_comparable(h.shape, axis) for h in known.values()}) == 1
            )
            shapes.setdefault((resizable, listed), []).append(tensor.planned.weight.name)
    _report_shapes(shapes, findings)
    _check_packed(located, findings)
    _check_whole_numbers(located, findings)
    if config.dtype is None:  # otherwise everything else is converted on loading
        _check_dtypes(located, findings)


def _check_packed(located: Sequence[FoundTensor], findings: Findings) -> None:
    packed: dict[str, list[str]] = {}
    for tensor in located:
        for dtype in sorted({h.dtype for h in tensor.found.values() if h is not None} & PACKED):
            packed.setdefault(dtype, []).append(tensor.planned.weight.name)
    for dtype, names in packed.items():
        findings.problem(
            tensors_at(names),
            f"{dtype}, which cannot be converted",
            "a dtype of 8 bits at least",
            "Give the models before quantisation.",
        )


def _check_whole_numbers(located: Sequence[FoundTensor], findings: Findings) -> None:
    """Refuse whole numbers that differ: they have no mean. Larger tensors are not read here."""
    differing: dict[str, list[str]] = {}
    for tensor in located:
        known = [(model, h) for model, h in tensor.found.items() if h is not None and h.file]
        name = tensor.planned.weight.name
        if is_counter(name) or len({(h.dtype, h.shape) for _, h in known}) != 1:
            continue
        (first, one), *others = known
        if one.dtype in WHOLE and one.nbytes <= _LARGEST_READ:
            for model, other in others:
                if not same_bytes(one, other):
                    differing.setdefault(f"{first} and {model}", []).append(name)
                    break
    for models, names in differing.items():
        findings.problem(
            tensors_at(names),
            f"whole numbers that differ between {models}",
            "the same ones, because they have no mean and are copied",
            "Save the models with the same values, or take one out of the merge.",
        )


def _check_dtypes(located: Sequence[FoundTensor], findings: Findings) -> None:
    integers: dict[str, list[str]] = {}
    eights: dict[str, list[str]] = {}
    mixed: set[str] = set()
    for tensor in located:
        known = {str(m): h for m, h in tensor.found.items() if h is not None}
        name, dtypes = tensor.planned.weight.name, {h.dtype for h in known.values()}
        if len(dtypes) > 1 and not all(h.floating for h in known.values()):
            listed = ", ".join(f"{h.dtype} in {model}" for model, h in known.items())
            integers.setdefault(listed, []).append(name)
        elif len(dtypes) > 1:
            mixed |= dtypes
        for dtype in sorted(dtypes & (NARROW - PACKED)):
            eights.setdefault(dtype, []).append(name)
    for listed, names in integers.items():
        findings.problem(
            tensors_at(names),
            listed,
            "one dtype: whole numbers are copied, not merged",
            "Save the models with the same dtype for it.",
        )
    for dtype, names in eights.items():
        findings.problem(
            tensors_at(names),
            f"{dtype}, in which there is no arithmetic",
            "a dtype to merge in",
            "Add `dtype: bfloat16`, or give the models before quantisation.",
        )
    if mixed and not mixed & NARROW:
        findings.note(
            f"The inputs have different dtypes ({', '.join(sorted(mixed))}) and are merged in the "
            "widest; `dtype:` fixes it."
        )


def _comparable(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def _missing(
    located: Sequence[FoundTensor],
    method: Any,
    facts: Mapping[Any, ModelFacts],
    findings: Findings,
) -> None:
    required: dict[tuple[Any, ...], list[str]] = {}
    partly: dict[tuple[Any, ...], list[str]] = {}
    nowhere: list[str] = []
    for tensor in located:
        weight = tensor.planned.weight
        if not tensor.missing:
            continue
        if not weight.optional and not tensor.found:
            nowhere.append(weight.name)
        elif not weight.optional:
            required.setdefault(tensor.missing, []).append(weight.name)
        elif method is not None and (reason := _refusal(tensor, method)):
            partly.setdefault((reason, tensor.missing), []).append(weight.name)
    if nowhere:
        findings.problem(
            tensors_at(nowhere),
            f"{'it' if len(nowhere) == 1 else 'them'} in no model",
            "the tensors that mergekit's table lists for this architecture",
            BY_FILES,
        )
    for models, names in required.items():
        places = ", ".join(f"{model} ({facts[model].where})" for model in models)
        findings.problem(
            tensors_at(names),
            f"{'it' if len(names) == 1 else 'them'} missing in {places}",
            "the same tensors in every model",
            "Take the model out, or give the checkpoint that has them.",
        )
    for (reason, models), names in partly.items():
        findings.problem(
            tensors_at(names),
            f"an optional tensor missing in {', '.join(map(str, models))} ({reason})",
            "it in all models, or in none",
            f"Save the models with the same tensors: `{method.spec.name}` cannot do without.",
        )


def _refusal(tensor: FoundTensor, method: Any) -> str | None:
    """Why the method stops at an optional tensor that some inputs lack; None if it does not."""
    from mergekit.merge_methods.base import OptionalTensorPolicy

    planned, policy = tensor.planned, method.spec.optional_tensor_policy
    everything = [model for model, _ in planned.inputs]
    present = [model for model in everything if model in tensor.found]
    only_base = present == [planned.base]
    if len(present) == 1 and (
        policy == OptionalTensorPolicy.PASSTHROUGH_SINGLETON
        or (policy == OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON and only_base)
    ):
        return None
    few = len(present) < method.spec.contract.min_inputs
    if policy == OptionalTensorPolicy.BASE_OR_SKIP and few:
        return None
    try:
        method.validate_inputs(everything, planned.base)
    except ValueError:
        return None  # said already, for the whole group
    try:
        method.validate_inputs(present, planned.base)
    except ValueError as error:
        return str(error)
    return None


def _report_shapes(shapes: Mapping[tuple[bool, str], list[str]], findings: Findings) -> None:
    for (resizable, listed), names in shapes.items():
        findings.problem(
            tensors_at(names),
            f"shapes that differ: {listed}",
            "one shape",
            "Add `tokenizer:` with `source: union` or `source: base`, which aligns the "
            "vocabularies (or give --unsafe-truncate-embeddings if equal token ids mean equal "
            "tokens)."
            if resizable
            else "Take out the models that do not fit.",
        )
