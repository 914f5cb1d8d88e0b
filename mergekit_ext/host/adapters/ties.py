"""Which tensors a model uses in more than one place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def tied_names(names: Iterable[str], config: Any) -> list[str]:
    """Those of `names` that the model's class ties to another tensor.

    The class says which (transformers' ``_tied_weights_keys``), not the file: it may hold one of
    the two only. Nothing is tied without ``tie_word_embeddings``, or in a class that is not part
    of transformers.
    """
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return []
    patterns = [re.compile(rf"(^|\.)(?:{pattern})$") for pattern in _patterns(config)]
    return sorted(name for name in names if any(pattern.search(name) for pattern in patterns))


def _patterns(config: Any) -> set[str]:
    import transformers

    architecture = (getattr(config, "architectures", None) or [""])[0]
    tied = getattr(getattr(transformers, architecture, None), "_tied_weights_keys", None) or {}
    return {*tied, *tied.values()} if isinstance(tied, dict) else set(tied)
