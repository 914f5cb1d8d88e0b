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
            _by_name(facts[model], weight, tied=False) is not None or facts[model].tensors is None
            for model, weight in tensor.inputs
        ):
            continue
        found: dict[Any, TensorHeader | None] = {}
        missing = []
        for model, weight in tensor.inputs:
            header = _by_name(facts[model], weight, tied=True)
            known = facts[model].tensors is not None
            if header is None and known and not _converted(facts[model], weight):
                missing.append(model)
            else:
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
    if config.dtype is None:  # otherwise everything is converted on loading
        _check_dtypes(located, findings)


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
        for dtype in dtypes:
            if dtype.startswith(("F8", "F6", "F4")):
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
    if mixed:
        findings.note(
            f"The inputs have different dtypes ({', '.join(sorted(mixed))}) and are merged in the "
            "widest; `dtype:` fixes it."
        )


def left_out(
    planned: Sequence[PlannedTensor],
    located: Sequence[FoundTensor],
    facts: Mapping[Any, ModelFacts],
    inferred: bool,
    findings: Findings,
) -> None:
    """Report stored tensors that the merge does not use, and which the output will not have.

    A few extra ones are a note. With an inferred architecture it may be whole layers: transformers
    calls them otherwise than the file does, and mergekit takes them for optional weights that
    nobody has. That is a problem.
    """
    used: dict[Any, set[str]] = {model: set() for model in facts}
    for tensor in planned:
        for model, weight in tensor.inputs:
            used[model].update(_names(weight, tied=True))
    merged = {id(tensor.planned) for tensor in located}
    skipped = [tensor.weight.name for tensor in planned if id(tensor) not in merged]
    for model, fact in facts.items():
        rest = sorted(set(fact.tensors or ()) - used[model])
        if not rest or not used[model]:
            continue
        if inferred and skipped:
            findings.problem(
                fact.where,
                f"{len(rest)} tensors of {model} that the output would not have ({listing(rest)}): "
                f"transformers calls them otherwise ({listing(skipped)}), and mergekit skips them",
                "stored names that are those of the transformers class",
                "Merge the weight files with mergekit-pytorch, which takes stored names as they "
                "are, and copy config.json and the tokenizer beside the result.",
            )
        elif not _has_conversions(fact):  # converted names cannot be told from extra ones
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
            "Merge the weight files with mergekit-pytorch, which needs no table.",
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
