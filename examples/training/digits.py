"""A small image classifier and scikit-learn's handwritten digits; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from examples.quickstart.data import IMAGE_SIZE, divide, load_digit_images, upright


@dataclass(frozen=True)
class Run:
    """How long to train, and which snapshots to merge: the last `keep` of every `every`-th step."""

    steps: int
    every: int
    keep: int = 8
    batch: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


FULL = Run(steps=600, every=25)
QUICK = Run(steps=24, every=3, keep=3)
# The sum of task vectors, LoRE's default, is for models of different tasks; checkpoints of one run
# repeat each other. With `combine: mean` and lambda 1 it would be the mean of the checkpoints.
# Lambda was chosen on the validation split, which neither training nor the tables see.
LORE = {"mu_relative": 0.1, "combine": "mean", "lambda": 0.5}


@dataclass(frozen=True)
class Digits:
    """Images ``(n, 3, 16, 16)`` in [-1, 1] and which digits they are, for training and testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Digits:
    """About half of the digits to train with, a quarter to test; `seed` decides which."""
    images, labels = load_digit_images()
    images = upright(images) * 2 - 1
    rows = divide(len(labels), np.random.default_rng(seed))
    train, test = rows["train"], rows["test"]
    return Digits(images[train], labels[train], images[test], labels[test])


def new_model(seed: int) -> ViTForImageClassification:
    """A vision transformer of two layers, randomly initialised."""
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            image_size=IMAGE_SIZE,
            patch_size=4,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=10,
        )
    )
