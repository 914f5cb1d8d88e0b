"""The tensors that a merge reads, compared with the headers of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ext.host.checks.headers import TensorHeader
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.support import listing, tensors_at
from mergekit_ext.host.checks.survey import PlannedTensor


@dataclass(frozen=True)
class FoundTensor:
    """A planned tensor and what the inputs hold for it.

    Attributes:
        planned: the tensor of the output.
        found: the models that have it, with the header, or None where its shape is not known.
        missing: the models that do not have it.
    """

    planned: PlannedTensor
    found: Mapping[Any, TensorHeader | None]
    missing: tuple[Any, ...]

    @property
    def headers(self) -> list[TensorHeader]:
        """The known headers."""
        return [header for header in self.found.values() if header is not None]


def locate(planned: Sequence[PlannedTensor], facts: Mapping[Any, ModelFacts]) -> list[FoundTensor]:
    """Find each planned tensor in its inputs, as mergekit will. Leaves out what it would skip."""
    result = []
    for tensor in planned:
        # mergekit leaves an optional weight out unless one input has its name or an alias.
        if tensor.weight.optional and not any(
            _by_name(facts[model], weight, tied=False) is not None
            or facts[model].tensors is None
            for model, weight in tensor.inputs
        ):
            continue
        found: dict[Any, TensorHeader | None] = {}
        missing = []
        for model, weight in tensor.inputs:
            header = _by_name(facts[model], weight, tied=True)
            if header is None and facts[model].tensors is not None:
                if not _converted(facts[model], weight):
                    missing.append(model)
                    continue
            found[model] = header
        result.append(FoundTensor(tensor, found, tuple(missing)))
    return result


def check_tensors(
    located: Sequence[FoundTensor],
    method: Any,
    config: Any,
    facts: Mapping[Any, ModelFacts],
    aligned: bool,
    findings: Findings,
) -> None:
    """Report missing tensors, shapes and dtypes that do not fit.

    `aligned`: vocabularies are made equal before the merge (a tokenizer, or truncation).
    """
    _missing(located, method, facts, findings)
    shapes: dict[tuple[Any, ...], list[str]] = {}
    integers: dict[tuple[Any, ...], list[str]] = {}
    eights: dict[str, list[str]] = {}
    mixed: set[str] = set()
    for tensor in located:
        known = {str(m): h for m, h in tensor.found.items() if h is not None}
        name, axis = tensor.planned.weight.name, tensor.planned.weight.vocabulary_axis
        compared = {_comparable(h.shape, axis if aligned else None) for h in known.values()}
        if len(compared) > 1:
            key = (axis is not None, *((model, h.shape) for model, h in known.items()))
            shapes.setdefault(key, []).append(name)
        dtypes = {h.dtype for h in known.values()}
        if config.dtype is None and len(dtypes) > 1:
            if any(not h.floating for h in known.values()):
                key = tuple((model, h.dtype) for model, h in known.items())
                integers.setdefault(key, []).append(name)
            else:
                mixed |= dtypes
        for dtype in dtypes if config.dtype is None else ():
            if dtype.startswith(("F8", "F6", "F4")):
                eights.setdefault(dtype, []).append(name)
    _report_shapes(shapes, findings)
    for key, names in integers.items():
        findings.problem(
            tensors_at(names),
            ", ".join(f"{dtype} in {model}" for model, dtype in key),
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
    if mixed:
        findings.note(
            f"The inputs have different dtypes ({', '.join(sorted(mixed))}) and are merged in the "
            "widest; `dtype:` fixes it."
        )


def left_out(
    planned: Sequence[PlannedTensor], facts: Mapping[Any, ModelFacts], findings: Findings
) -> None:
    """Note stored tensors that the merge does not use, and which the output will not have."""
    used: dict[Any, set[str]] = {model: set() for model in facts}
    for tensor in planned:
        for model, weight in tensor.inputs:
            used[model].update(_names(weight, tied=True))
    for model, fact in facts.items():
        rest = sorted(set(fact.tensors or ()) - used[model])
        # Names of an older layout are converted on reading, and cannot be told from extra ones.
        if rest and used[model] and not _has_conversions(fact):
            findings.note(f"{model}: the merge does not use {listing(rest)}.")


def _names(weight: Any, *, tied: bool) -> list[str]:
    names = [weight.name, *(weight.aliases or ())]
    return names + list(weight.tied_names or ()) if tied else names


def _by_name(fact: ModelFacts, weight: Any, *, tied: bool) -> TensorHeader | None:
    stored = fact.tensors or {}
    return next((stored[n] for n in _names(weight, tied=tied) if n in stored), None)


def _has_conversions(fact: ModelFacts) -> bool:
    from mergekit.architecture.conversion import get_checkpoint_conversion_mapping

    kind = getattr(fact.config, "model_type", None)
    return bool(kind and get_checkpoint_conversion_mapping(kind))


def _converted(fact: ModelFacts, weight: Any) -> bool:
    """Whether mergekit makes the tensor from others (transformers' renamed layouts)."""
    if not _has_conversions(fact):
        return False
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    stored = set(fact.tensors or ())
    return any(
        can_convert_checkpoint_keys(fact.config.model_type, stored, name)
        for name in _names(weight, tied=False)
    )


def _comparable(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def _missing(
    located: Sequence[FoundTensor],
    method: Any,
    facts: Mapping[Any, ModelFacts],
    findings: Findings,
) -> None:
    required: dict[Any, list[str]] = {}
    partly: dict[tuple[Any, ...], list[str]] = {}
    for tensor in located:
        weight = tensor.planned.weight
        if tensor.missing and not weight.optional:
            for model in tensor.missing:
                required.setdefault(model, []).append(weight.name)
        elif tensor.missing and method is not None:
            reason = _refusal(tensor, method)
            if reason:
                partly.setdefault((reason, tensor.missing), []).append(weight.name)
    for model, names in required.items():
        names = list(dict.fromkeys(names))
        findings.problem(
            tensors_at(names),
            f"{'it' if len(names) == 1 else 'them'} missing in {model} ({facts[model].where})",
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


def _report_shapes(shapes: Mapping[tuple[Any, ...], list[str]], findings: Findings) -> None:
    for (vocabulary, *pairs), names in shapes.items():
        findings.problem(
            tensors_at(names),
            "shapes that differ: " + ", ".join(f"{list(shape)} in {m}" for m, shape in pairs),
            "one shape",
            "Add `tokenizer:` with `source: union` or `source: base`, which aligns the "
            "vocabularies (or give --unsafe-truncate-embeddings if equal token ids mean equal "
            "tokens)."
            if vocabulary and len({len(shape) for _, shape in pairs}) == 1
            else "Take out the models that do not fit.",
        )
