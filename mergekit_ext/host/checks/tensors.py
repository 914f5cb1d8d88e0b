"""The tensors that a merge reads, compared with each other: presence, shapes, dtypes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.plan import BY_FILES, FoundTensor, Inventory
from mergekit_ext.io.headers import NARROW, PACKED, WHOLE, is_counter, same_bytes

# The largest tensor whose values are compared before the merge.
_LARGEST_READ = 1 << 20
# What was found, what is expected, a remedy.
_Wrong = Iterator[tuple[str, str, str]]


def check_tensors(inventory: Inventory, besides: Collection[Any] = ()) -> None:
    """Report missing tensors, shapes, dtypes and whole numbers that do not fit.

    Models in `besides` are not compared.
    """
    config, findings = inventory.config, inventory.findings
    mixed: set[str] = set()
    for tensor in [tensor.without(besides) for tensor in inventory.located]:
        for problem in (
            *_missing(tensor, inventory.method, inventory.models),
            *_shapes(tensor, inventory.aligned),
            *_dtypes(tensor, config.dtype is not None),
            *_whole_numbers(tensor),
        ):
            findings.tensor(tensor.name, *problem)
        if len(dtypes := {header.dtype for header in tensor.headers}) > 1:
            mixed |= dtypes
    floating = mixed and not mixed & NARROW and not mixed & WHOLE
    if floating and config.dtype is None:  # otherwise everything is converted on loading
        findings.note(
            f"The inputs have different dtypes ({', '.join(sorted(mixed))}) and are merged in the "
            "widest; `dtype:` fixes it."
        )


def _missing(tensor: FoundTensor, method: Any, facts: Mapping[Any, ModelFacts]) -> _Wrong:
    if not tensor.missing:
        return
    places = ", ".join(f"{model} ({facts[model].where})" for model in tensor.missing)
    if not tensor.planned.weight.optional and not tensor.found:
        expected = "the tensors that mergekit's table lists for this architecture"
        yield "nothing in any model", expected, BY_FILES
    elif not tensor.planned.weight.optional:
        remedy = "Take the model out, or give the checkpoint that has them."
        yield f"nothing in {places}", "the same tensors in every model", remedy
    elif method is not None and (reason := _refusal(tensor, method)):
        yield (
            f"nothing in {places}, and it is optional ({reason})",
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


def _shapes(tensor: FoundTensor, aligned: bool) -> _Wrong:
    axis = tensor.planned.weight.vocabulary_axis
    shapes = {header.shape for header in tensor.headers}
    besides = {shape if axis is None else shape[:axis] + shape[axis + 1 :] for shape in shapes}
    if len(besides if aligned else shapes) > 1:
        remedy = "Take out the models that do not fit."
        if len(besides) == 1:
            remedy = (
                "Add `tokenizer:` with `source: union` or `source: base`, which aligns the "
                "vocabularies (or give --unsafe-truncate-embeddings if equal token ids mean equal "
                "tokens)."
            )
        yield f"shapes that differ: {_each(tensor, 'shape')}", "one shape", remedy


def _dtypes(tensor: FoundTensor, converted: bool) -> _Wrong:
    dtypes = {header.dtype for header in tensor.headers}
    before = "Give the models before quantisation."
    for dtype in sorted(dtypes & PACKED):
        yield f"{dtype}, which cannot be converted", "a dtype of 8 bits at least", before
    if converted:
        return
    if len(dtypes) > 1 and not all(header.floating for header in tensor.headers):
        expected = "one dtype: whole numbers are copied, not merged"
        yield _each(tensor, "dtype"), expected, "Save the models with the same dtype for it."
    for dtype in sorted(dtypes & (NARROW - PACKED)):
        remedy = "Add `dtype: bfloat16`, or give the models before quantisation."
        yield f"{dtype}, in which there is no arithmetic", "a dtype to merge in", remedy


def _whole_numbers(tensor: FoundTensor) -> _Wrong:
    """Whole numbers that differ have no mean. Larger tensors are not read here."""
    known = [(model, h) for model, h in tensor.found.items() if h is not None and h.file]
    if is_counter(tensor.name) or len({(h.dtype, h.shape) for _, h in known}) != 1:
        return
    (first, one), *others = known
    if one.dtype in WHOLE and one.nbytes <= _LARGEST_READ:
        for model in [model for model, other in others if not same_bytes(one, other)][:1]:
            yield (
                f"whole numbers that differ between {first} and {model}",
                "the same ones, because they have no mean and are copied",
                "Save the models with the same values, or take one out of the merge.",
            )


def _each(tensor: FoundTensor, what: str) -> str:
    """A property of a tensor in each of the inputs."""
    values = {m: getattr(h, what) for m, h in tensor.found.items() if h is not None}
    return ", ".join(
        f"{list(value) if what == 'shape' else value} in {model}" for model, value in values.items()
    )
