"""Small checkpoints, changed as real ones are, and checks of their merges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mergekit_ext.errors import Problem
from mergekit_ext.host.checks.merge import check_merge, check_source
from mergekit_ext.host.checks.report import CheckReport
from tests import models

LINEAR = {"merge_method": "linear", "parameters": {"weight": 0.5}}
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SMALL = {**_SIZES, "vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 32}


def bert(**changes: Any) -> BertConfig:
    """Return the configuration of a small BERT."""
    return BertConfig(**{**_SIZES, "vocab_size": 64, "max_position_embeddings": 32, **changes})


def llama(**changes: Any) -> LlamaForCausalLM:
    """Make the same weights on each call, as far as `changes` leave their shapes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()


def zoo(root: Path) -> Path:
    """Save small models of several classes and sizes, each in a folder of its name."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        tuned(llama(), seed).save_pretrained(root / name)
    models.tokenizer(root / "a")
    llama(vocab_size=72).save_pretrained(root / "large_vocab")
    llama(intermediate_size=48).save_pretrained(root / "wide")
    llama(num_hidden_layers=4).save_pretrained(root / "deep")
    llama().to(torch.bfloat16).save_pretrained(root / "half")
    llama(tie_word_embeddings=True).save_pretrained(root / "tied")
    llama().save_pretrained(root / "sharded", max_shard_size="10KB")
    sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2}
    t5 = T5Config(**sizes, num_heads=2, feed_forward_proj="gated-gelu")
    old_t5 = T5Config(**sizes, num_heads=2, feed_forward_proj="relu")
    for name, config in (("t5_a", t5), ("t5_b", t5), ("t5_old", old_t5)):
        T5ForConditionalGeneration(config).save_pretrained(root / name)
    vit = ViTConfig(**_SIZES, image_size=32, patch_size=8)
    for letter in "ab":
        BertForSequenceClassification(bert()).save_pretrained(root / f"bert_{letter}")
        ViTForImageClassification(vit).save_pretrained(root / f"vit_{letter}")
    return root


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


def merging(
    base: Path,
    *paths: Path | str,
    method: str = "nan",
    parameters: Mapping[str, Any] | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Write the configuration of a merge; of NAN with the paper's factor."""
    return {**models.config(method, [*map(Path, paths)], base, parameters), **rest}


def checked(document: dict[str, Any], **options: Any) -> CheckReport:
    """Check it as `mergekit-ext check` does."""
    config = MergeConfiguration.model_validate(document)
    return check_merge(config, MergeOptions(**options), document)[0]


def entries(root: Path, *names: str | Path, **parameters: Any) -> list[dict[str, Any]]:
    """Write the models of a configuration, all with the same parameters."""
    extra = {"parameters": parameters} if parameters else {}
    return [{"model": str(root / name), **extra} for name in names]


def run(document: Mapping[str, Any], **options: Any) -> CheckReport:
    """Check one document through its YAML text."""
    ((_, report),) = check_source(yaml.safe_dump(dict(document)), MergeOptions(**options))
    return report


def at(report: CheckReport, where: str) -> Problem:
    """Return the one problem at a place."""
    found = [problem for problem in report.problems if problem.where == where]
    assert len(found) == 1, [str(problem) for problem in report.problems]
    return found[0]


def the(report: CheckReport) -> Problem:
    """Return the only problem."""
    assert len(report.problems) == 1, [str(problem) for problem in report.problems]
    return report.problems[0]
