"""Small checkpoints of one Llama, changed as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mergekit_ext.host.checks.merge import check_merge
from mergekit_ext.host.checks.report import CheckReport

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    """Make the same weights on each call, as far as `changes` leave their shapes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()


def tuned(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Add seeded noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def family(folder: Path, **changes: Any) -> list[Path]:
    """Save a base and two fine-tunes; returns their folders."""
    folders = [folder / name for name in ("base", "one", "two")]
    for seed, place in enumerate(folders):
        (tuned(llama(**changes), seed) if seed else llama(**changes)).save_pretrained(place)
    return folders


def merging(base: Path, *models: Path | str, method: str = "nan", **rest: Any) -> dict[str, Any]:
    """Write the configuration of a merge."""
    entries = [{"model": str(model)} for model in models]
    return {"merge_method": method, "base_model": str(base), "models": entries, **rest}


def checked(document: dict[str, Any], **options: Any) -> CheckReport:
    """Check it as `mergekit-ext check` does."""
    config = MergeConfiguration.model_validate(document)
    return check_merge(config, MergeOptions(**options), document)
