"""Files of tokenizers that a merge reads or copies when all the weights are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_ext.host.checks.configuration import json_object
from mergekit_ext.host.checks.layout import groups_of, references
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.settings import has_tokenizer, wants_tokenizer
from mergekit_ext.io import paths

_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json"),
)
# Those of the largest vocabularies have some 40 MB.
_LARGEST = 256 << 20


def check_tokenizers(config: Any, options: Any, findings: Findings) -> None:
    """Check that files are JSON of a size that can be read, and that what is loaded can be loaded.

    Whatever has the files of a tokenizer must be one wherever a merge loads it: mergekit fails on
    the first model's only, and takes that in place of any other. That there are files is checked
    with the settings.
    """
    first = config.base_model or next((m for _, m in references(groups_of(config), None)), None)
    for where, model in _models(config, options).items():
        folder = Path(model.model.path)
        wrong = [
            wrong
            for name in _FILES
            if paths.exists(folder / name)
            and (wrong := json_object(folder / name, "a tokenizer's file", _LARGEST)[1])
        ]
        if wants_tokenizer(config) and not wrong and has_tokenizer(folder):
            wrong = _not_loaded(model.model, model == first, options)
        for found, expected in wrong:
            findings.problem(where, found, expected, "Mend it, or download it again.")


def _not_loaded(path: Any, first: bool, options: Any) -> list[tuple[str, str]]:
    """What keeps a tokenizer from being loaded as mergekit does it, and what is expected."""
    from mergekit.tokenizer.build import get_stripped_tokenizer
    from transformers import AutoTokenizer

    try:
        if first:
            get_stripped_tokenizer(path, options.trust_remote_code)
        else:
            AutoTokenizer.from_pretrained(path.path, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # whatever the classes of tokenizers make of such files
        text = " ".join(str(error).split())
        found = f"a tokenizer in {path} that cannot be loaded ({type(error).__name__}: {text})"
        return [
            (found, "files that `AutoTokenizer` loads, with a row of embeddings for each token")
        ]
    return []


def _models(config: Any, options: Any) -> dict[str, Any]:
    """The local models whose tokenizers are read or copied, by where they are named."""
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
    return {where: model for model, where in named.items() if paths.is_folder(model.model.path)}
