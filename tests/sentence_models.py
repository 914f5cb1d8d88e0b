"""Small sentence-transformers, made on the spot: a ModernBERT, a pooling and a dense layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as kinds
from transformers import ModernBertConfig, ModernBertModel, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SENTENCES = ["w1 w2 w3", "w9 w3", "w17 w4 w4 w21 w30"]


def make(folder: Path, seed: int, dense: int | None = None, width: int = 8) -> Path:
    """Save a sentence-transformer: one body, moved by `seed`, and a dense layer of that `dense`."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    body = ModernBertModel(
        ModernBertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            vocab_size=40,
            max_position_embeddings=32,
            **{f"{name}_token_id": i for name, i in (("pad", 0), ("cls", 2), ("sep", 3))},
            bos_token_id=2,
            eos_token_id=3,
        )
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02 if seed else 0.0)
    plain = folder.parent / f"{folder.name}-body"
    body.save_pretrained(plain)
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(35))])}
    made = Tokenizer(kinds.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=made, **{f"{name}_token": word for name, word in names.items()}
    ).save_pretrained(plain)
    torch.manual_seed(seed if dense is None else dense)
    parts = [Transformer(str(plain)), Pooling(16, pooling_mode="cls"), Dense(16, width)]
    library.SentenceTransformer(modules=parts, device="cpu").save(str(folder))
    return folder


def load(folder: Path) -> Any:
    """The sentence-transformer in a folder."""
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(folder), device="cpu")


def embeddings(model: Any) -> torch.Tensor:
    """Of a few sentences."""
    return torch.from_numpy(model.encode(SENTENCES))
