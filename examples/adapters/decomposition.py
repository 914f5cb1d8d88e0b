"""Full fine-tunes of the language model as one base and LoRAs, which PEFT serves in one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

import mergekit_ext

from . import language_model, studies
from .report import Row

NAME = "decomposed"
SIZES = (1.25, 1.5, 2.0)  # models; four of them are the fine-tunes
LEARNING_RATE = 2e-3


def run(out: Path, quick: bool, seed: int) -> list[Row]:
    """Fine-tune, decompose at each size, and score every task's LoRA in batches of all tasks."""
    study = studies.LanguageStudy()
    styles = study.members[: 2 if quick else None]
    schedule = language_model.QUICK if quick else language_model.FULL
    folder, texts = out / NAME, language_model.read_styles()
    tuned = {}
    for number, style in enumerate(styles, start=1):
        model, text = study.base(out), language_model.split(texts[style], "train")
        steps = schedule.finetune_steps
        language_model.train(model, text, steps, LEARNING_RATE, seed + number)
        model.save_pretrained(folder / style)
        tuned |= study.scores(model, out, [style], quick)
    before = study.scores(study.base(out), out, styles, quick)
    found = [("base", "base", before), ("full fine-tunes", "individual", tuned)]
    for size in SIZES[: 1 if quick else None]:
        target = folder / f"size{size:g}"
        mergekit_ext.merge(_configuration(out, folder, styles, size), target)
        tests = torch.stack(
            [
                language_model.scored_windows(
                    language_model.split(texts[style], "test"), schedule.test
                )
                for style in styles
            ],
            dim=1,
        )
        scores = perplexities(served(target, styles), tests, styles)
        found.append((f"base and LoRAs, size {size:g}", "merged", scores))
    return [
        Row(NAME, name, kind, scores, studies.mean(study, scores)) for name, kind, scores in found
    ]


def served(folder: Path, tasks: Sequence[str]) -> Any:
    """The base with all LoRAs, in evaluation mode: what a server holds."""
    from peft import PeftModel

    base = language_model.load_base(folder / "base")
    model = PeftModel.from_pretrained(base, folder / tasks[0], adapter_name=tasks[0])
    for task in tasks[1:]:
        model.load_adapter(folder / task, adapter_name=task)
    return model.eval()


@torch.no_grad()
def perplexities(model: Any, windows: torch.Tensor, tasks: Sequence[str]) -> dict[str, float]:
    """Of (count, tasks, bytes): each batch has one window of every task, read by its own LoRA."""
    losses = torch.zeros(len(tasks))
    for batch in windows:
        logits = model(input_ids=batch, adapter_names=list(tasks)).logits
        each = F.cross_entropy(logits[:, :-1].mT, batch[:, 1:], reduction="none")
        losses += each.mean(dim=1) / len(windows)
    return {task: math.exp(loss) for task, loss in zip(tasks, losses.tolist(), strict=True)}


def _configuration(out: Path, folder: Path, styles: Sequence[str], size: float) -> str:
    document = {
        "merge_method": "decompose",
        "base_model": str(out / studies.LanguageStudy().name / "base"),
        "models": [{"model": str(folder / style)} for style in styles],
        "parameters": {"target_size": size},
    }
    return yaml.safe_dump(document)
