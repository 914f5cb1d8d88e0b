"""Merged adapters in memory: tensors, and a configuration under which PEFT loads exactly them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from peft_merge.adapter import Ia3Adapter, LoraAdapter, ModuleInfo, Update, VectorInfo
from peft_merge.io import names
from peft_merge.io.configuration import ia3_configuration, lora_configuration

# PEFT has no bias for these.
_WITHOUT_BIAS = ("embedding", "parameter")


def merged_lora(
    name: str,
    updates: Mapping[str, Update],
    infos: Mapping[str, ModuleInfo],
    inputs: Sequence[LoraAdapter],
    saved: Mapping[str, Tensor] | None = None,
) -> LoraAdapter:
    """Make a LoRA of merged changes.

    The configuration has alpha = r for every module and no rsLoRA, so that every scaling is 1; an
    update's own scale goes into its factors, half into each. Ranks may differ between modules, save
    for those that PEFT configures together (both projections of torch's attention, the target
    parameters of one module) and ranks of 0: these are filled up with zeros, which changes nothing.

    Args:
        name: of the adapter.
        updates: of each module, in the dtype to be stored.
        infos: layout, shape and kernel of each; rank, bias and dtype follow from `updates`.
        inputs: the merged adapters, which agree (`peft_merge.io.compatible`) in all that is not
            merged.
        saved: whole tensors, by the base's names (as in `LoraAdapter.saved`).
    """
    with_bias = any(update.bias is not None for update in updates.values())
    unscaled = {module: _unscaled(update) for module, update in updates.items()}
    filled = {
        module: _filled(update, rank, infos[module], with_bias)
        for (module, update), rank in zip(unscaled.items(), _ranks(unscaled), strict=True)
    }
    described = {
        module: replace(
            infos[module],
            rank=update.a.shape[1],
            bias=update.bias is not None,
            dtype=update.a.dtype,
        )
        for module, update in filled.items()
    }
    whole = dict(saved or {})
    config = lora_configuration(described, inputs, whole)
    return LoraAdapter(name, config, described, filled.__getitem__, _loaders(whole))


def merged_ia3(
    name: str,
    vectors: Mapping[str, Tensor],
    infos: Mapping[str, VectorInfo],
    inputs: Sequence[Ia3Adapter],
    saved: Mapping[str, Tensor] | None = None,
) -> Ia3Adapter:
    """Make an (IA)^3 of merged vectors, each in its stored shape and dtype.

    Args:
        name: of the adapter.
        vectors: of each module.
        infos: their shapes and kinds; the dtype follows from `vectors`.
        inputs: the merged adapters, which agree (`peft_merge.io.compatible`) in all that is not
            merged.
        saved: whole tensors, by the base's names.
    """
    described = {
        module: replace(infos[module], dtype=vector.dtype) for module, vector in vectors.items()
    }
    whole = dict(saved or {})
    config = ia3_configuration(described, inputs, whole)
    return Ia3Adapter(name, config, described, dict(vectors).__getitem__, _loaders(whole))


def _loaders(whole: Mapping[str, Tensor]) -> dict[str, partial[Tensor]]:
    return {key: partial(whole.__getitem__, key) for key in whole}


def _unscaled(update: Update) -> Update:
    if update.scale == 1:
        return update
    half = math.sqrt(abs(update.scale))
    dtype = update.a.dtype
    bias = None if update.bias is None else update.bias.double() * update.scale
    return Update(
        (update.a.double() * half).to(dtype),
        (update.b.double() * math.copysign(half, update.scale)).to(dtype),
        1.0,
        None if bias is None or update.bias is None else bias.to(update.bias.dtype),
    )


def _ranks(updates: Mapping[str, Update]) -> list[int]:
    """Of each module, as great as those of the modules that are configured with it; 1 at least."""
    shared: dict[str, int] = {}
    owners = [names.owner(module, updates) for module in updates]
    for owner, update in zip(owners, updates.values(), strict=True):
        shared[owner] = max(shared.get(owner, 1), update.a.shape[1])
    return [shared[owner] for owner in owners]


def _filled(update: Update, rank: int, info: ModuleInfo, with_bias: bool) -> Update:
    missing = rank - update.a.shape[1]
    bias = update.bias
    if with_bias and bias is None and info.layout not in _WITHOUT_BIAS:
        bias = torch.zeros(info.matrices * info.rows, dtype=update.b.dtype, device=update.b.device)
    return Update(pad(update.a, (0, 0, 0, missing)), pad(update.b, (0, missing)), 1.0, bias)
