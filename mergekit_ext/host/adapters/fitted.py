"""An adapter matched with the stored tensors of one base: which it changes, and to what."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, Problem, listing, tensors_at
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.host.class_model import class_names, class_of
from mergekit_ext.io.headers import TensorHeader, dtype_name
from peft_merge.adapter import Adapter
from peft_merge.matching import class_orientation
from peft_merge.weights import AdaptedWeights

VARIABLE = "MERGEKIT_EXT_ADAPTERS"
BEFOREHAND = f"Or set {VARIABLE}=0, with which mergekit merges the adapter with PEFT beforehand."
# Where refused kinds of adapters are reported.
_CONFIG = "adapter_config.json"


def applies(reference: Any) -> bool:
    """Whether `reference`, a `ModelReference`, has an adapter that is applied while reading."""
    return reference.lora is not None and os.environ.get(VARIABLE) != "0"


def base_of(reference: Any) -> Any:
    """Return the same `ModelReference` without its adapter."""
    return reference.model_copy(update={"lora": None})


@dataclass(frozen=True)
class Fitted:
    """An adapter on one base.

    Attributes:
        adapter: as read.
        touched: stored tensors that it changes -> what `weights` calls them.
        added: whole tensors that it has and the base lacks, by the name that they are read by.
        weights: what applies it.
    """

    adapter: Adapter
    touched: Mapping[str, str]
    added: Mapping[str, Callable[[], Tensor]]
    weights: AdaptedWeights

    def tensors(
        self, base: Mapping[str, TensorHeader], dtype: torch.dtype | None = None
    ) -> dict[str, TensorHeader]:
        """The headers of the base and of what the adapter adds.

        What it changes lies in no file. With `dtype` (mergekit's ``--lora-merge-dtype``) all
        floating tensors are read in it.
        """
        changed = {name: replace(base[name], file=None) for name in self.touched if name in base}
        added = {name: _header(name, read()) for name, read in self.added.items()}
        found = {**base, **changed, **added}
        return found if dtype is None else {n: _cast(header, dtype) for n, header in found.items()}

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The stored tensor `name` with the adapter applied, in the dtype of `tensor`."""
        if name not in self.touched:
            return tensor
        return self.weights.apply(self.touched[name], tensor)


def _header(name: str, tensor: Tensor) -> TensorHeader:
    size = tensor.numel() * tensor.element_size()
    return TensorHeader(name, dtype_name(tensor.dtype), tuple(tensor.shape), size)


def _cast(header: TensorHeader, dtype: torch.dtype) -> TensorHeader:
    if header.dtype not in FLOATING:
        return header
    size = math.prod(header.shape) * dtype.itemsize
    return TensorHeader(header.name, dtype_name(dtype), header.shape, size)


def fit(
    adapter: Adapter,
    tensors: Mapping[str, TensorHeader],
    config: Any,
    otherwise: str = BEFOREHAND,
) -> Fitted:
    """Match `adapter` with a base; no weight is read.

    Args:
        adapter: LoRA or (IA)^3.
        tensors: every stored tensor of the base.
        config: the base's transformers configuration; None for a bare file of weights.
        otherwise: what else can be done with an adapter that does not fit, added to the remedies.

    Raises:
        ConfigError: the adapter cannot be applied to these tensors exactly.
    """
    try:
        weights, stored = _matched(adapter, tensors, config)
        touched = {name: known for known, name in stored.items()}
        problems = [
            *_not_floating(tensors, touched),
            *_tied(adapter, {*stored, *weights.added}, config),
        ]
        if problems:
            raise ConfigError(problems, f"adapter {adapter.name} on this base")
    except ConfigError as error:
        raise ConfigError((_or(p, otherwise) for p in error.problems), error.subject) from None
    return Fitted(adapter, touched, weights.added, weights)


def read_adapter(path: Any, otherwise: str = BEFOREHAND) -> Adapter:
    """The adapter at mergekit's `ModelPath`.

    Pickles are read as mergekit reads those of models: by torch's restricted unpickler.
    `otherwise` is as in `fit`.

    Raises:
        ConfigError: it cannot be read, or is of a kind that is not applied exactly.
    """
    from peft_merge.io import load_adapter

    try:
        return load_adapter(path.path, revision=path.revision, allow_pickle=True)
    except ConfigError as error:
        problems = (_or(p, otherwise) if _CONFIG in p.where else p for p in error.problems)
        raise ConfigError(problems, error.subject) from None


def _or(problem: Problem, otherwise: str) -> Problem:
    if not problem.remedy:  # nothing else helps
        otherwise = otherwise.removeprefix("Or ")
        return replace(problem, remedy=otherwise[:1].upper() + otherwise[1:])
    return replace(problem, remedy=f"{problem.remedy} {otherwise}")


def _matched(
    adapter: Adapter, tensors: Mapping[str, TensorHeader], config: Any
) -> tuple[AdaptedWeights, dict[str, str]]:
    """The adapter under the names of the base's class, to which PEFT and transformers rename both.

    The second value gives each tensor's stored name.
    """
    names = class_names(tensors, config)

    def transposed(name: str) -> bool | None:
        if names.model is None or name in names.converted:
            return None
        return class_orientation(names.model, name)

    weights = AdaptedWeights(_renamed(adapter, names.rename))
    shapes = {names.of[name]: header.shape for name, header in tensors.items()}
    known = weights.touched(shapes, transposed)
    return weights, {names.of[name]: name for name in tensors if names.of[name] in known}


def _renamed(adapter: Adapter, rename: Callable[[str], str]) -> Adapter:
    modules = {rename(f"{name}.weight").removesuffix(".weight"): name for name in adapter.infos}
    saved = {rename(name): load for name, load in adapter.saved.items()}
    if len(modules) < len(adapter.infos) or len(saved) < len(adapter.saved):
        return adapter  # of no version of this class
    infos: Any = {new: adapter.infos[name] for new, name in modules.items()}
    return replace(adapter, infos=infos, load=lambda n: adapter.load(modules[n]), saved=saved)


def _not_floating(tensors: Mapping[str, TensorHeader], touched: Iterable[str]) -> list[Problem]:
    found: dict[str, list[str]] = {}
    for name in touched:
        if tensors[name].dtype not in FLOATING:
            found.setdefault(tensors[name].dtype, []).append(name)
    return [
        Problem(
            tensors_at(names),
            f"{dtype} in the base, which looks quantised",
            f"one of {', '.join(FLOATING)}, which an adapter can be added to",
            "Give the base as it was before quantisation.",
        )
        for dtype, names in found.items()
    ]


def _tied(adapter: Adapter, changed: set[str], config: Any) -> list[Problem]:
    if adapter.config.get("ensure_weight_tying"):
        return []  # trained tied: what is done to one name is done to the tensor
    names = sorted(name for name in changed if _is_tied(name, config))
    if not names:
        return []
    return [
        Problem(
            tensors_at(names),
            f"a change of {listing(names)} alone, which this base ties to another tensor",
            "a change of what is not tied: one tensor cannot be adapted in one of its uses only",
            "Save the base with `tie_word_embeddings=False` and both tensors, and give that.",
        )
    ]


def _is_tied(name: str, config: Any) -> bool:
    """Whether the model's class ties a tensor to another.

    The class says so (transformers' ``_tied_weights_keys``), not the file: it may hold one of the
    two only. Nothing is tied without ``tie_word_embeddings``, or in a class from elsewhere.
    """
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return False
    tied = getattr(class_of(config), "_tied_weights_keys", None) or {}
    patterns = {*tied, *tied.values()} if isinstance(tied, dict) else {*tied}
    return any(re.search(rf"(^|\.)(?:{pattern})$", name) for pattern in patterns)
