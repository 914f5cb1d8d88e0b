"""A small LLaVA that says of a picture what colour a square has, or where it is.

Its language model is merged; the vision tower and the projector are the base's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

TASKS = {"colour": 0, "place": 1}
SETTINGS = {"parameters": {"include": "language_model.*"}, "dtype": "float32"}
BASE, TUNING = (200, 2e-3), (80, 2e-3)  # steps and learning rates
_COLOURS, _PLACES, _BATCH = 3, 4, 32
# Tokens: the picture, the two questions, and the answers.
_IMAGE, _QUESTION, _COLOUR, _PLACE, _COUNT = 0, 1, 3, 6, 10
_SIDE, _PATCH = 16, 8


def base() -> LlavaForConditionalGeneration:
    """Return an untrained model."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision = {"model_type": "clip_vision_model", "image_size": _SIDE, "patch_size": _PATCH}
    text = {"model_type": "llama", "vocab_size": _COUNT, "num_key_value_heads": 4}
    positions = {"max_position_embeddings": 16, "pad_token_id": _IMAGE}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={**shape, **vision, "projection_dim": 48},
            text_config={**shape, **text, **positions},
            image_token_index=_IMAGE,
            image_seq_length=_PLACES,
        )
    )


def load(folder: Path) -> LlavaForConditionalGeneration:
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    # Fine-tunes leave what sees as it is.
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "language_model" in name or "lm_head" in name
    return model


def _batch(task: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return pictures, questions, and the tokens of the answers."""
    colour = torch.randint(_COLOURS, (_BATCH,), generator=generator)
    place = torch.randint(_PLACES, (_BATCH,), generator=generator)
    pictures = 0.3 * torch.randn(_BATCH, 3, _SIDE, _SIDE, generator=generator)
    for index, (shade, quarter) in enumerate(zip(colour, place, strict=True)):
        row, column = divmod(int(quarter), 2)
        square = slice(8 * row + 2, 8 * row + 6), slice(8 * column + 2, 8 * column + 6)
        pictures[index, shade][square] += 2.0
    question = torch.tensor([_IMAGE] * _PLACES + [_QUESTION + TASKS[task]]).expand(_BATCH, -1)
    answer = place + _PLACE if TASKS[task] else colour + _COLOUR
    return pictures, question, answer


def _logits(model: LlavaForConditionalGeneration, pictures: Tensor, question: Tensor) -> Tensor:
    return model(pixel_values=pictures, input_ids=question).logits[:, -1]


def loss(model: LlavaForConditionalGeneration, task: str) -> Tensor:
    pictures, question, answer = _batch(task, torch.default_generator)
    return torch.nn.functional.cross_entropy(_logits(model, pictures, question), answer)


def accuracy(model: LlavaForConditionalGeneration, task: str) -> float:
    """Return the share of right answers."""
    pictures, question, answer = _batch(task, torch.Generator().manual_seed(99))
    chosen = _logits(model, pictures, question).argmax(-1)
    return float((chosen == answer).float().mean())
