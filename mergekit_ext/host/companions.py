"""What the output of one merge gets beside its weights: the law of `mergekit_ext.io.model_files`.

The donor gives it: the base, or else the first model, as for mergekit's configuration.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mergekit_ext import parallel
from mergekit_ext.errors import MergeWarning
from mergekit_ext.host import session as sessions
from mergekit_ext.host.checks.settings import wants_tokenizer
from mergekit_ext.host.inputs import donor_first, folder_of
from mergekit_ext.host.modules import merge_modules, with_modules
from mergekit_ext.io.model_files import MODULES, companions, copy, module_folders

_VOCABULARY = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
    *("*.model", "*.spm", "*.tiktoken", "*.vocab", "*.bpe"),
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*")


@contextmanager
def completed(config: Any, target: Path, options: Any) -> Iterator[Any]:
    """Inside, mergekit writes a model into `target`; afterwards it has all that belongs to it.

    What the merge has made stays. A vocabulary and a chat template that it has made are whole
    without the donor's. Yields mergekit's options, under which it looks for no tokenizer where the
    donor has none: it would show a traceback.
    """
    given = config.model_copy()  # mergekit rewrites what it plans
    folders = {model: folder_of(model, options) for model in donor_first(given)}
    donor, home = next(iter(folders.values())), next(iter(with_modules(folders).values()), None)
    built, copied = wants_tokenizer(given), options.copy_tokenizer
    found = bool(given.chat_template) or any(_is_one_of(n, _VOCABULARY) for n in companions(donor))
    yield options.model_copy(update={"quiet": True, "copy_tokenizer": copied and found})
    if not parallel.current().is_main:
        return
    templates = any(_is_one_of(name, _TEMPLATES) for name in companions(target))
    without = (
        *(_VOCABULARY if built or not copied else ()),
        *(_TEMPLATES if not copied or (templates and (built or given.chat_template)) else ()),
    )
    merge_modules(given, folders, target, options)
    _add(donor, target, lambda name: not _is_one_of(name, without))
    if built:
        _warn_of_moved_tokens(donor, target)
    if home is not None:  # what sentence-transformers reads besides
        inner = module_folders(home)
        _add(home, target, lambda n: n == MODULES or "sentence" in n or n.startswith(inner))


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns)


def _add(source: Path, target: Path, is_wanted: Callable[[str], bool]) -> None:
    names = [name for name in companions(source) if is_wanted(name)]
    copy(source, target, [name for name in names if not (target / name).exists()])


def _warn_of_moved_tokens(donor: Path, target: Path) -> None:
    try:
        before, after = map(AutoTokenizer.from_pretrained, (donor, target))
    except Exception:  # transformers raises many kinds
        return  # a donor without a tokenizer: what its ids stand for is not known
    moved = []
    for file in ("config.json", "generation_config.json"):
        path = target / file
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for field, value in content.items():
            ids = [value] if type(value) is int else value if isinstance(value, list) else []
            tokens = before.convert_ids_to_tokens(ids) if field.endswith("token_id") else []
            if tokens and tokens != after.convert_ids_to_tokens(ids):
                found = after.convert_tokens_to_ids(tokens)
                moved.append(f"{field} {value} in {file} (of {tokens}, which are {found} here)")
    if moved and (session := sessions.current()):
        what = f"The output's vocabulary is not that of {donor}, whose settings it has"
        text = f"{what}: {'; '.join(moved)}. Correct these files."
        session.afterwards.append(MergeWarning(text))
