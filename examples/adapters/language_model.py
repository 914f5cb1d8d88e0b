"""A small causal language model of bytes, and LoRAs of it for other kinds of text.

It is trained for a moment on Python source (the standard library); the LoRAs on C++ headers
(torch), JSON (mergekit), prose (docstrings of scikit-learn) and tables (its CSV files).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import sources

START = "python"
STYLES = ("headers", "json", "prose", "tables")
LENGTH = 128  # bytes that the model sees
BATCH = 16
RANK = 8


@dataclass(frozen=True)
class Schedule:
    """Steps of training; ``test``: windows of each style that are scored."""

    pretrain_steps: int
    finetune_steps: int
    test: int
    pretrain_lr: float = 3e-3
    finetune_lr: float = 5e-3


FULL = Schedule(pretrain_steps=300, finetune_steps=60, test=96)
QUICK = Schedule(pretrain_steps=12, finetune_steps=4, test=4)


def read_styles(largest: int = 1_500_000) -> dict[str, Tensor]:
    """Bytes of each kind of text; the last tenth is for tests, that before it for validation."""
    sklearn = sources.package_folder("sklearn")
    prose = "\n\n".join(
        docstring for tree in sources.trees("sklearn", 80) for docstring in sources.docstrings(tree)
    )
    found = {
        "python": _joined(sources.spread(sources.standard_library(), "*.py", 120)),
        "headers": _joined(sources.spread(sources.package_folder("torch") / "include", "*.h", 200)),
        "json": _joined(sources.spread(sources.package_folder("mergekit"), "*.json", 200)),
        "prose": prose,
        "tables": _joined(sources.spread(sklearn, "*.csv", 20)),
    }
    return {
        name: torch.tensor(list(text.encode()[:largest]), dtype=torch.uint8)
        for name, text in found.items()
    }


def split(text: Tensor, name: str) -> Tensor:
    cuts = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
    start, end = (int(len(text) * share) for share in cuts[name])
    return text[start:end]


def new_model(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
    )


def with_lora(model: Any, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def train(model: Any, text: Tensor, steps: int, lr: float, seed: int) -> None:
    """AdamW, one cycle, on windows from random places."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        loss = _loss(model, _windows(text, starts.tolist()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
    model.eval()


@torch.no_grad()
def perplexity(model: Any, text: Tensor, count: int) -> float:
    """Of the bytes of `count` windows, the same ones in every call."""
    parts = scored_windows(text, count).split(2 * BATCH)
    return math.exp(sum(float(_loss(model, part)) * len(part) for part in parts) / count)


def scored_windows(text: Tensor, count: int) -> Tensor:
    """(count, LENGTH) of the text."""
    rng = random.Random(0)
    return _windows(text, [rng.randrange(len(text) - LENGTH) for _ in range(count)])


def load_base(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder).eval()


def _loss(model: Any, windows: Tensor) -> Tensor:
    return model(input_ids=windows, labels=windows).loss


def _windows(text: Tensor, starts: list[int]) -> Tensor:
    return torch.stack([text[start : start + LENGTH] for start in starts]).long()


def _joined(files: list[Path]) -> str:
    # In a random order, so that the three parts are alike.
    random.Random(0).shuffle(files)
    return "\n".join(sources.text(path) for path in files)
