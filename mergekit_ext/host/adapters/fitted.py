"""Adapters on the stored tensors of one base: matched, and read as one model."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from mergekit_ext.errors import ConfigError, Problem, listing, require, tensors_at
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.io.class_model import class_names, class_of
from mergekit_ext.io.headers import TensorHeader
from peft_merge.adapter import Adapter
from peft_merge.io.forms import renamed
from peft_merge.io.read import CONFIG, load_adapter
from peft_merge.matching import class_orientation, match
from peft_merge.weights import AdaptedWeights

VARIABLE = "MERGEKIT_EXT_ADAPTERS"
_BEFOREHAND = f"With {VARIABLE}=0 mergekit merges the adapter with PEFT beforehand."


def applies(reference: Any) -> bool:
    """Return whether a `ModelReference` has an adapter that is applied while reading."""
    return reference.lora is not None and os.environ.get(VARIABLE) != "0"


def base_of(reference: Any) -> Any:
    """Return the same `ModelReference` without its adapter."""
    return reference.model_copy(update={"lora": None})


def read_adapter(path: Any) -> Adapter:
    """Return the adapter at mergekit's `ModelPath`; `ConfigError` if it is not applied exactly."""
    # Pickles are read as mergekit reads those of models: by torch's restricted unpickler.
    try:
        return load_adapter(path.path, revision=path.revision, allow_pickle=True)
    except ConfigError as error:
        # A kind that is refused; other problems stop PEFT, too.
        problems = (_or_beforehand(p) if CONFIG in p.where else p for p in error.problems)
        raise ConfigError(problems, error.subject) from None


def fit(adapter: Adapter, tensors: Mapping[str, TensorHeader], config: Any) -> AdaptedWeights:
    """Match `adapter` with the stored tensors of a base; `ConfigError` if not exactly possible."""
    # Names are compared as those of the base's class, to which PEFT and transformers rename both.
    names = class_names(tensors, config)

    def transposed(name: str) -> bool | None:
        if names.model is None or name in names.converted:
            return None
        return class_orientation(names.model, name)

    adapter = renamed(adapter, names.rename)
    try:
        shapes = {names.of[name]: header.shape for name, header in tensors.items()}
        found = match(adapter, shapes, transposed)
        weights = found.stored_as({own: name for name, own in names.of.items()})
        problems = list(_tied(adapter, sorted({*found.touched, *found.added}), config))
        codes = [n for n, h in tensors.items() if n in weights.touched and h.dtype not in FLOATING]
        if codes:
            what = f"{tensors[codes[0]].dtype} in the base, which looks quantised"
            remedy = "Give the base as it was before quantisation."
            problems.append(Problem(tensors_at(codes), what, ", ".join(FLOATING), remedy))
        require(problems, f"adapter {adapter.name} on this base")
    except ConfigError as error:
        raise ConfigError(map(_or_beforehand, error.problems), error.subject) from None
    return weights


def adapted_headers(
    weights: AdaptedWeights, base: Mapping[str, TensorHeader], dtype: torch.dtype | None = None
) -> dict[str, TensorHeader]:
    """Return the headers of the base and of what the adapter adds; what it changes has no file.

    Floating tensors get `dtype` (mergekit's ``--lora-merge-dtype``) if it is given.
    """
    touched = weights.touched
    found = {n: replace(h, file=None) if n in touched else h for n, h in base.items()}
    for name, read in weights.added.items():
        tensor = read()
        found[name] = TensorHeader.of(name, tensor.dtype, tensor.shape)
    for name, header in found.items():
        if dtype is not None and header.dtype in FLOATING:
            found[name] = TensorHeader.of(header.name, dtype, header.shape)
    return found


def _or_beforehand(problem: Problem) -> Problem:
    return replace(problem, remedy=f"{problem.remedy} {_BEFOREHAND}".strip())


def _tied(adapter: Adapter, changed: list[str], config: Any) -> Iterator[Problem]:
    """Yield what the model's class ties to another tensor; the file may hold one of the two only.

    An adapter that is trained tied changes the tensor in all its uses.
    """
    tied_in_base = getattr(config, "tie_word_embeddings", False)
    if adapter.config.get("ensure_weight_tying") or not tied_in_base:
        return
    tied = getattr(class_of(config), "_tied_weights_keys", None) or {}
    patterns = {*tied, *tied.values()} if isinstance(tied, dict) else {*tied}
    names = [n for n in changed if any(re.search(rf"(^|\.)(?:{p})$", n) for p in patterns)]
    if names:
        found = f"a change of {listing(names)} alone, which this base ties to another tensor"
        expected = "a change of what is not tied: a tensor cannot be adapted in one use only"
        remedy = "Save the base with `tie_word_embeddings=False` and both tensors, and give that."
        yield Problem(tensors_at(names), found, expected, remedy)
