"""Files of tokenizers that a merge reads or copies when all the weights are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_ext import paths
from mergekit_ext.host.checks.configuration import json_object
from mergekit_ext.host.checks.layout import groups_of, references
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.settings import wants_tokenizer

_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json"),
)
# Those of the largest vocabularies have some 40 MB.
_LARGEST = 256 << 20


def check_tokenizers(config: Any, options: Any, findings: Findings) -> None:
    """Each file must be JSON of a size that can be read; that there is one is not asked here."""
    for where, folder in _folders(config, options).items():
        for name in _FILES:
            if not paths.exists(folder / name):
                continue
            _, wrong = json_object(folder / name, "a tokenizer's file", _LARGEST)
            if wrong is not None:
                findings.problem(where, *wrong, "Mend it, or download it again.")


def _folders(config: Any, options: Any) -> dict[str, Path]:
    """The folders of the tokenizers that are read or copied, by where their models are named."""
    named = {model: where for where, model in references(groups_of(config), config.base_model)}
    if wants_tokenizer(config):
        source = config.tokenizer_source or config.tokenizer.source
        if not isinstance(source, str):
            where = "tokenizer_source" if config.tokenizer_source else "tokenizer.source"
            named.setdefault(source, where)
    elif not options.copy_tokenizer:
        return {}
    elif config.chat_template != "auto":  # which asks all models
        donor = config.base_model or next(iter(named), None)
        named = {model: where for model, where in named.items() if model == donor}
    return {
        where: Path(model.model.path)
        for model, where in named.items()
        if paths.is_folder(model.model.path)
    }
