"""Merged adapters in memory: tensors, and a configuration under which PEFT loads exactly them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from peft_merge.adapter import Ia3Adapter, LoraAdapter, ModuleInfo, Update, VectorInfo
from peft_merge.io import names
from peft_merge.io.configuration import ia3_configuration, lora_configuration
from peft_merge.layouts import at_rank, one_rank
from peft_merge.ranks import padded

# PEFT has no bias for these.
_WITHOUT_BIAS = ("embedding", "parameter")


def merged_lora(
    name: str,
    updates: Mapping[str, Update],
    infos: Mapping[str, ModuleInfo],
    inputs: Sequence[LoraAdapter],
    saved: Mapping[str, Tensor] | None = None,
    patterns: bool = False,
) -> LoraAdapter:
    """Make a LoRA of merged changes.

    An adapter means the same to every reader: llama.cpp scales by `lora_alpha` over each tensor's
    rank, vLLM, SGLang and LoRAX by one `lora_alpha` over one `r`, PEFT by patterns as well. So all
    modules have one rank, filled up with zeros, which change nothing, and alpha = r without rsLoRA.

    Args:
        name: of the adapter.
        updates: of each module, in the dtype to be stored.
        infos: layout, shape and kernel of each; rank, bias and dtype follow from `updates`.
        inputs: the merged adapters, which agree (`peft_merge.io.compatible`) in all that is not
            merged.
        saved: whole tensors, by the base's names (as in `LoraAdapter.saved`).
        patterns: give each module the least rank, which `rank_pattern` and `alpha_pattern` say;
            only PEFT reads them. Modules that PEFT configures together (both projections of
            torch's attention, the target parameters of one module) have one rank.
    """
    with_bias = any(update.bias is not None for update in updates.values())
    ranked = {
        module: replace(infos[module], rank=max(1, update.a.shape[1]))
        for module, update in updates.items()
    }
    ranks = stored_ranks(ranked, None if patterns else one_rank(ranked.values()))
    stored = {
        module: _filled(unscaled(update), ranks[module], infos[module], with_bias)
        for module, update in updates.items()
    }
    described = {
        module: replace(
            infos[module],
            rank=ranks[module],
            bias=update.bias is not None,
            dtype=update.a.dtype,
        )
        for module, update in stored.items()
    }
    whole = dict(saved or {})
    config = lora_configuration(described, inputs, whole)
    return LoraAdapter(name, config, described, stored.__getitem__, _loaders(whole))


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


def unscaled(update: Update) -> Update:
    """Return the same change with a scale of 1, which is in B then."""
    if update.scale == 1:
        return update

    def scaled(tensor: Tensor) -> Tensor:
        return (tensor.double() * update.scale).to(tensor.dtype)

    bias = None if update.bias is None else scaled(update.bias)
    return Update(update.a, scaled(update.b), 1.0, bias)


def stored_ranks(infos: Mapping[str, ModuleInfo], r: int | None) -> dict[str, int]:
    """Return the rank that each module is stored with.

    Args:
        infos: with the ranks that the modules need.
        r: that of the whole configuration; None if patterns name the ranks.
    """
    if r is not None:
        return {module: at_rank(info, r) for module, info in infos.items()}
    largest: dict[str, int] = {}
    for module, info in infos.items():
        owner = names.owner(module, infos)
        largest[owner] = max(largest.get(owner, 1), info.rank)
    return {module: largest[names.owner(module, infos)] for module in infos}


def filled(update: Update, rank: int) -> Update:
    """Return the same change with zeros up to a rank; itself if it has it."""
    if update.a.shape[-2] == rank:
        return update
    return replace(update, a=padded(update.a, rank, -2), b=padded(update.b, rank, -1))


def _filled(update: Update, rank: int, info: ModuleInfo, with_bias: bool) -> Update:
    bias = update.bias
    if with_bias and bias is None and info.layout not in _WITHOUT_BIAS:
        bias = torch.zeros(info.matrices * info.rows, dtype=update.b.dtype, device=update.b.device)
    return replace(filled(update, rank), bias=bias)
