"""The tensors of a merge, compared with each other and with what their classes need.

transformers fills missing tensors with random numbers and ignores unknown ones.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit.merge_methods.base import OptionalTensorPolicy

from mergekit_ext.errors import listing, tensors_at
from mergekit_ext.host.blocks import layer_of
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.parameters import refusal
from mergekit_ext.host.checks.plan import Inventory, PlannedTensor, lacking, output_loading
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.io.class_model import Loading
from mergekit_ext.io.headers import NARROW, WHOLE, is_counter, same_bytes

# The largest tensor whose values are compared before the merge.
_LARGEST_READ = 1 << 20
_MADE = "the config.json that mergekit makes for it"
_LAYERS = "Take as many layers as that configuration has"
# What was found, what is expected, a remedy.
_Wrong = Iterator[tuple[str, str, str]]


def check_tensors(inventory: Inventory, besides: Collection[Any]) -> None:
    """Report missing tensors, shapes, dtypes and whole numbers that do not fit.

    Models in `besides` are not compared.
    """
    config, findings = inventory.config, inventory.findings
    mixed: set[str] = set()
    for tensor in inventory.located:
        found = {model: header for model, header in tensor.found.items() if model not in besides}
        missing = tuple(model for model in tensor.missing if model not in besides)
        tensor = replace(tensor, found=found, missing=missing)
        for problem in (*_missing(tensor, inventory), *_differences(tensor, inventory)):
            findings.tensor(tensor.name, *problem)
        if len(dtypes := {header.dtype for header in tensor.headers}) > 1:
            mixed |= dtypes
    floating = mixed and not mixed & NARROW and not mixed & WHOLE
    if floating and config.dtype is None:  # otherwise everything is converted on loading
        unlike = f"different dtypes ({', '.join(sorted(mixed))})"
        findings.note(f"The inputs have {unlike} and are merged in the widest; `dtype:` fixes it.")


def _missing(tensor: PlannedTensor, inventory: Inventory) -> _Wrong:
    if not tensor.missing:
        return
    method, models = inventory.method, inventory.models
    places = ", ".join(f"{model} ({models[model].where})" for model in tensor.missing)
    if not tensor.weight.optional:
        yield (
            f"nothing in {places}",
            "the same tensors in every model",
            "Take the model out, give the checkpoint that has them, or write `heads:` under "
            "`parameters:` with the model whose the output has.",
        )
    elif method is not None and (reason := _refusal(tensor, method)):
        yield (
            f"nothing in {places}, and it is optional ({reason})",
            "it in all models, or in none",
            f"Save the models with the same tensors: `{method.spec.name}` cannot do without.",
        )


def _refusal(tensor: PlannedTensor, method: Any) -> str | None:
    """Return why the method stops at an optional tensor that some inputs lack, if it does."""
    spec, base = method.spec, tensor.group.base
    policy = spec.optional_tensor_policy
    present = [model for model in tensor.inputs if model in tensor.found]
    if len(present) == 1 and (
        policy == OptionalTensorPolicy.PASSTHROUGH_SINGLETON
        or (policy == OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON and present == [base])
    ):
        return None
    few = len(present) < spec.contract.min_inputs
    if policy == OptionalTensorPolicy.BASE_OR_SKIP and few:
        return None
    # What is wrong with all of them is reported for the whole group.
    if refusal(spec.contract, list(tensor.inputs), base):
        return None
    return refusal(spec.contract, present, base)


def _differences(tensor: PlannedTensor, inventory: Inventory) -> _Wrong:
    known = {model: header for model, header in tensor.found.items() if header is not None}
    axis = tensor.weight.vocabulary_axis
    shapes = {header.shape for header in known.values()}
    besides = {shape if axis is None else shape[:axis] + shape[axis + 1 :] for shape in shapes}
    if len(besides if inventory.aligned else shapes) > 1:
        remedy = "Take out the models that do not fit."
        if layer_of(tensor.name) is None:
            remedy += " Or write `heads:` under `parameters:` with the model whose the output has."
        if len(besides) == 1:
            remedy = (
                "Add `tokenizer:` with `source: union` or `base`, which aligns the vocabularies "
                "(or --unsafe-truncate-embeddings if equal token ids mean equal tokens)."
            )
        each = ", ".join(f"{list(header.shape)} in {model}" for model, header in known.items())
        yield f"shapes that differ: {each}", "one shape", remedy
    dtypes = {header.dtype for header in known.values()}
    converted = inventory.config.dtype is not None
    if len(dtypes) > 1 and not converted and not all(h.floating for h in known.values()):
        each = ", ".join(f"{header.dtype} in {model}" for model, header in known.items())
        expected = "one dtype: whole numbers are copied, not merged"
        yield each, expected, "Save the models with the same dtype for it."
    for dtype in () if converted else sorted(dtypes & NARROW):
        remedy = "Add `dtype: bfloat16`, or give the models before quantisation."
        yield f"{dtype}, in which there is no arithmetic", "a dtype to merge in", remedy
    # Whole numbers that differ have no mean. Larger tensors are not read here.
    stored = [(model, header) for model, header in known.items() if header.file]
    if len({(h.dtype, h.shape) for _, h in stored}) == 1 and not is_counter(tensor.name):
        (first, one), *others = stored
        compared = one.dtype in WHOLE and one.nbytes <= _LARGEST_READ
        if unlike := [m for m, other in others if compared and not same_bytes(one, other)]:
            yield (
                f"whole numbers that differ between {first} and {unlike[0]}",
                "the same ones, because they have no mean and are copied",
                "Save the models with the same values, or take one out of the merge.",
            )


def check_inputs(facts: Mapping[Any, ModelFacts], findings: Findings) -> set[Any]:
    """Report models that transformers would complete with random numbers, and return them.

    Such are weights that ZeRO-3 saved empty, or a shard that is gone. A pooler or a head that no
    model of its class has is a warning: bodies are often saved without.
    """
    broken = set()
    for model, fact in facts.items():
        found = fact.loading
        if found is None:
            continue
        without = lacking(facts, fact.kind) if found.missing else frozenset()
        if without:
            what = f"{fact.kind} has {tensors_at(sorted(without))}, which no model has"
            filled = "transformers fills that with random numbers in the output, as in the inputs"
            findings.warn(f"{what}: {filled}.")
        if wrong := _wrong(replace(found, missing=_besides(found.missing, without))):
            broken.add(model)
            what = f"{wrong} in {model}, a {fact.kind}: it would be filled with random numbers"
            remedy = "Give a whole checkpoint of it; consolidate parts (DeepSpeed, FSDP) first."
            findings.problem(fact.where, what, f"every tensor of {fact.kind}", remedy)
        if found.ignored:
            ignored = f"{listing(found.ignored)}, which transformers does not load either"
            findings.note(f"{model}: {fact.kind} does not have {ignored}.")
    return broken


def check_output(inventory: Inventory) -> None:
    """Report what the class of the output needs and lacks, has no place for, or would lose."""
    # What the inputs' classes lack or do not have, the output may, too.
    facts, config = inventory.models, inventory.out_config
    found = output_loading(inventory) if inventory.is_sound else None
    if found is None:
        return
    kind = config.architectures[0]
    if inventory.aligned or not all(tensor.headers for tensor in inventory.located):
        # What shapes would say is for the comparison of the inputs.
        found = replace(found, misshapen=(), error="")
    if wrong := _wrong(replace(found, misshapen=())):
        expected = f"every tensor of {kind}, as transformers loads it"
        inventory.findings.problem("the output", f"{wrong}, by {_MADE}", expected, f"{_LAYERS}.")
    ignored = {name for fact in facts.values() if fact.loading for name in fact.loading.ignored}
    if unfit := [*_besides(found.ignored, ignored), *found.misshapen]:
        what = f"{tensors_at(unfit)}, which {kind} lacks, or has in another shape, by {_MADE}"
        remedy = f"{_LAYERS}, and vocabularies of one size (or add `tokenizer:`, to align them)."
        inventory.findings.problem("the output", what, f"the tensors of {kind}", remedy)


def _besides(names: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in known)


def _wrong(found: Loading) -> str:
    """What keeps a class from being loaded whole; nothing if nothing does."""
    wrong = [
        *([f"{tensors_at(found.missing)} missing"] if found.missing else []),
        *([f"another shape in {tensors_at(found.misshapen)}"] if found.misshapen else []),
        *([f"what transformers cannot convert ({found.error})"] if found.error else []),
    ]
    return " and ".join(wrong)
