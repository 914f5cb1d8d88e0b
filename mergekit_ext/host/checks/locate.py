"""Where each planned tensor is in the inputs, by mergekit's rules for names."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ext.core.wording import listing
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.survey import PlannedTensor
from mergekit_ext.host.loading import class_of
from mergekit_ext.io.headers import TensorHeader

# What to do where mergekit's plan has other names than the files.
BY_FILES = (
    "Use `merge_method: flexmerge` (with `target_size: 1` for one model), or merge the weight "
    "files with mergekit-pytorch and copy config.json and the tokenizer beside the result: both "
    "take the names in the files."
)
# With so many tensors of a model missing, whether others can be made of what is stored, a
# question to all of its names, changes nothing any more.
_ENOUGH_MISSING = 100


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

    def without(self, models: Collection[Any]) -> FoundTensor:
        """Return the same tensor as if `models` were not there."""
        found = {model: header for model, header in self.found.items() if model not in models}
        return FoundTensor(self.planned, found, tuple(m for m in self.missing if m not in models))


def locate(planned: Sequence[PlannedTensor], facts: Mapping[Any, ModelFacts]) -> list[FoundTensor]:
    """Find each planned tensor in its inputs, as mergekit will. Leaves out what it would skip."""
    result = []
    lacking: Counter[Any] = Counter()  # tensors without which no model is merged
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
            hopeless = not weight.optional and lacking[model] >= _ENOUGH_MISSING
            if header is None and known and (hopeless or not _converted(facts[model], weight)):
                missing.append(model)
                lacking[model] += not weight.optional
            else:
                found[model] = header
        result.append(FoundTensor(tensor, found, tuple(missing)))
    return result


def left_out(
    planned: Sequence[PlannedTensor],
    located: Sequence[FoundTensor],
    facts: Mapping[Any, ModelFacts],
    findings: Findings,
) -> list[str]:
    """Name the stored tensors that the merge does not use, and which the output will not have.

    Whether the output's class needs them is for `check_output`. What a class from elsewhere
    needs is not known: there each of them is a problem. Returns all of these names.
    """
    used: dict[Any, set[str]] = {model: set() for model in facts}
    for tensor in planned:
        for model, weight in tensor.inputs:
            used[model].update(_names(weight, tied=True))
    merged = {id(tensor.planned) for tensor in located}
    skipped = sorted(tensor.weight.name for tensor in planned if id(tensor) not in merged)
    lost: dict[tuple[str, ...], list[ModelFacts]] = {}
    unused: dict[str, None] = {}
    for model, fact in facts.items():
        rest = sorted(set(fact.tensors or ()) - used[model])
        if not rest or not used[model]:
            continue
        unused.update(dict.fromkeys(rest))
        if class_of(fact.config) is None:
            lost.setdefault(tuple(rest), []).append(fact)
        elif not _has_conversions(fact):  # converted names cannot be told from extra ones
            findings.note(f"{model}: the merge does not use {listing(rest)}.")
    for names, owners in lost.items():
        instead = f" (it looks for {listing(skipped)})" if skipped else ""
        findings.problem(
            owners[0].where,
            f"{len(names)} tensors of {', '.join(str(fact.reference) for fact in owners)} that "
            f"mergekit's plan leaves out{instead}: {listing(names)}",
            "a use for every stored tensor, because the model's class is not one of transformers",
            BY_FILES,
        )
    return list(unused)


def _names(weight: Any, *, tied: bool) -> list[str]:
    names = [weight.name, *(weight.aliases or ())]
    return names + list(weight.tied_names or ()) if tied else names


def _by_name(fact: ModelFacts, weight: Any, *, tied: bool) -> TensorHeader | None:
    stored = fact.tensors or {}
    return next((stored[n] for n in _names(weight, tied=tied) if n in stored), None)


def _has_conversions(fact: ModelFacts) -> bool:
    kind = getattr(fact.config, "model_type", None)
    return bool(kind) and _converts(kind)


@functools.cache
def _converts(model_type: str) -> bool:
    """Asked for every tensor; transformers copies the whole mapping each time."""
    from mergekit.architecture.conversion import get_checkpoint_conversion_mapping

    return bool(get_checkpoint_conversion_mapping(model_type))


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
