"""A Whisper of two layers that writes down the tone that it hears in noise: low, or high."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

TASKS = {"low": 220.0, "high": 880.0}  # the lowest tone in Hz
SETTINGS = {"dtype": "float32"}
BASE, TUNING = (60, 1e-3), (40, 2e-4)  # steps and learning rates
_TONES, _RATE, _BATCH, _SCORED = 6, 16_000, 24, 4
_START, _END = 0, 1  # tokens; those of the tones follow
_FEATURES = WhisperFeatureExtractor(feature_size=40, chunk_length=1)


def base() -> WhisperForConditionalGeneration:
    """Return an untrained model."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=2 + _TONES,
        init_std=0.1,
        num_mel_bins=40,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50,
        max_target_positions=8,
        decoder_start_token_id=_START,
        pad_token_id=_END,
        bos_token_id=_START,
        eos_token_id=_END,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def load(folder: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(folder)


def _batch(task: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return features (batch, mel bins, frames), and the tokens of the tones, (batch, 1)."""
    tones = rng.integers(_TONES, size=(_BATCH, 1))
    frequencies = np.repeat(TASKS[task] * 2 ** (tones / _TONES), _RATE, axis=1)
    waves = np.sin(2 * np.pi * np.cumsum(frequencies, axis=1) / _RATE)
    noisy = waves + rng.normal(scale=0.5, size=waves.shape)
    found = _FEATURES(list(noisy.astype(np.float32)), sampling_rate=_RATE, return_tensors="pt")
    return found.input_features, torch.from_numpy(tones) + 2


def loss(model: WhisperForConditionalGeneration, task: str) -> Tensor:
    rng = np.random.default_rng(int(torch.randint(1 << 30, ())))
    features, tokens = _batch(task, rng)
    return model(input_features=features, labels=tokens).loss


def accuracy(model: WhisperForConditionalGeneration, task: str) -> float:
    """Return the share of tones that are written down."""
    rng, right = np.random.default_rng(99), 0
    for _ in range(_SCORED):
        features, tokens = _batch(task, rng)
        start = torch.full_like(tokens, _START)
        logits = model(input_features=features, decoder_input_ids=start).logits
        right += int((logits.argmax(-1) == tokens).sum())
    return right / (_SCORED * _BATCH)
