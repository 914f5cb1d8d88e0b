"""What the output of one merge gets beside its weights: the law of `mergekit_ext.io.model_files`.

The donor gives it: the base, or else the first model, as for mergekit's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import AutoTokenizer

from mergekit_ext import parallel
from mergekit_ext.errors import MergeWarning
from mergekit_ext.host import session as sessions
from mergekit_ext.host.checks.settings import wants_tokenizer
from mergekit_ext.host.inputs import donor_first, folder_of
from mergekit_ext.host.modules import first_with_modules, merge_modules
from mergekit_ext.io.model_files import MODULES, companions, copy, module_folders

_VOCABULARY = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
    }
)
_VOCABULARY_ENDINGS = frozenset({".model", ".spm", ".tiktoken", ".vocab", ".bpe"})
_TEMPLATES = frozenset({"chat_template.jinja", "chat_template.json", "additional_chat_templates"})


@contextmanager
def completed(config: Any, target: Path, options: Any) -> Iterator[None]:
    """Inside, mergekit writes a model; afterwards its folder has all that belongs to it.

    What the merge has made stays. A vocabulary and a chat template that it has made are whole
    without the donor's.

    Args:
        config: mergekit's configuration, in the order of the file.
        target: where the main process writes.
        options: mergekit's.
    """
    given = config.model_copy()  # mergekit rewrites what it plans
    # Of a merge that was stopped, the last file may be cut off.
    for name in companions(target):
        (target / name).unlink()
    yield
    if parallel.current().is_main:
        _bring_along(given, target, options)


def _bring_along(config: Any, target: Path, options: Any) -> None:
    folders = {model: folder_of(model, options) for model in donor_first(config)}
    donor = next(iter(folders.values()))
    built = wants_tokenizer(config) or not options.copy_tokenizer
    template = not options.copy_tokenizer or (
        bool(wants_tokenizer(config) or config.chat_template)
        and any((target / name).exists() for name in _TEMPLATES)
    )
    names = [
        name
        for name in companions(donor)
        if not (built and _is_vocabulary(PurePosixPath(name)))
        and not (template and PurePosixPath(name).parts[0] in _TEMPLATES)
    ]
    merge_modules(config, folders, target, options)
    _add(donor, target, names)
    if wants_tokenizer(config):
        _warn_of_moved_tokens(donor, target)
    home = first_with_modules(folders.values())
    if home is not None:
        _add(home, target, [name for name in companions(home) if _is_of_modules(name, home)])


def _add(source: Path, target: Path, names: list[str]) -> None:
    copy(source, target, [name for name in names if not (target / name).exists()])


def _is_of_modules(name: str, home: Path) -> bool:
    """Whether sentence-transformers reads a file besides what transformers reads."""
    return name == MODULES or "sentence" in name or name.startswith(module_folders(home))


def _is_vocabulary(path: PurePosixPath) -> bool:
    named = path.name in _VOCABULARY or path.suffix in _VOCABULARY_ENDINGS
    return named and len(path.parts) == 1


def _warn_of_moved_tokens(donor: Path, target: Path) -> None:
    """Warn of ids in the donor's settings that are other tokens in the vocabulary of the output."""
    try:
        before, after = map(AutoTokenizer.from_pretrained, (donor, target))
    except Exception:  # transformers raises many kinds
        return  # a donor without a tokenizer: what its ids stand for is not known
    moved = []
    for file in ("config.json", "generation_config.json"):
        if not (target / file).is_file():
            continue
        for field, value in json.loads((target / file).read_text(encoding="utf-8")).items():
            ids = [value] if type(value) is int else value if isinstance(value, list) else []
            if field.endswith("token_id") and (
                before.convert_ids_to_tokens(ids) != after.convert_ids_to_tokens(ids)
            ):
                tokens = before.convert_ids_to_tokens(ids)
                found = after.convert_tokens_to_ids(tokens)
                moved.append(f"{field} {value} in {file} (of {tokens}, which are {found} here)")
    if moved and (session := sessions.current()):
        session.afterwards.append(
            MergeWarning(
                f"The output's vocabulary is not that of {donor}, whose settings it has: "
                f"{'; '.join(moved)}. Correct these files."
            )
        )
