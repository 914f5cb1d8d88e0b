"""What mergekit uses late: dtypes, the device, the chat template, the tokenizer and its files."""

import filecmp
import importlib.resources
import os
from pathlib import Path
from typing import Any

import torch
from mergekit._data import chat_templates
from mergekit.common import dtype_from_name

from mergekit_ext.errors import did_you_mean, listing, nearest, one_line, shown
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.io.documents import json_object
from mergekit_ext.io.model_files import may_be_hub_name

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model"),
    *("vocab.json", "vocab.txt"),
)
_VOCABULARY = "tokenizer.json"
_JSON_FILES = (
    *(name for name in TOKENIZER_FILES if name.endswith(".json")),
    *("special_tokens_map.json", "added_tokens.json"),
)
# Those of the largest vocabularies have some 40 MB.
_LARGEST = 256 << 20
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the torch dtype of a name that mergekit accepts; None for none or an unknown one."""
    try:
        return dtype_from_name(name)
    except RuntimeError:
        return None


def wants_tokenizer(config: Any) -> bool:
    """Whether mergekit builds a tokenizer and aligns the vocabularies."""
    return bool(getattr(config, "tokenizer_source", None) or getattr(config, "tokenizer", None))


def check_settings(config: Any, options: Any, findings: Findings) -> None:
    """Check what is not about models, parameters or tensors."""
    stated = {"dtype": config.dtype, "out_dtype": config.out_dtype}
    for where, name in {**stated, "--lora-merge-dtype": options.lora_merge_dtype}.items():
        dtype = dtype_of(name)
        if name and (dtype is None or not dtype.is_floating_point):
            remedy = did_you_mean(name.removeprefix("torch."), _DTYPES, listed=True)
            findings.problem(where, shown(name), f"one of {', '.join(_DTYPES)}", remedy)
    device = str(options.device)
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend has its own way to say that it is not there
        where = "--cuda" if options.cuda and device == "cuda" else "--device"
        found = f"{device}, which cannot be used ({one_line(error)})"
        remedy = "Choose another device, or install a build of torch that supports this one."
        findings.problem(where, found, "a device that torch can use, such as cpu", remedy)
    # mergekit looks at the template when all the weights are written, and stops there.
    template = getattr(config, "chat_template", None) or "auto"
    files = importlib.resources.files(chat_templates).iterdir()
    known = ["auto", *sorted(Path(f.name).stem for f in files if f.name.endswith(".jinja"))]
    if template not in known and not (len(template) >= 20 and "{" in template):
        expected = f"a Jinja template, or one of {', '.join(known)}"
        remedy = did_you_mean(template, known, listed=True)
        findings.problem("chat_template", shown(template), expected, remedy)


def check_tokenizers(config: Any, options: Any, findings: Findings) -> int | None:
    """Check the files of tokenizers that are read, or copied when all the weights are written.

    mergekit fails on the first model's only, and takes that in place of any other. Returns how
    many rows the embeddings of a tokenizer that is built will have; None if that is not known.
    """
    named, built = models_at(config), wants_tokenizer(config)
    first = config.base_model or next(iter(named), None)
    source = at = None
    if built:
        at, source = "tokenizer_source", config.tokenizer_source
        if not source:
            at, source = "tokenizer.source", config.tokenizer.source
        if source == "base" and config.base_model is None:
            remedy = "Add `base_model:`, or write `union` or a model here."
            findings.problem(at, "'base' without a base model", "a model", remedy)
        if not isinstance(source, str):
            named.setdefault(source, at)
    elif not options.copy_tokenizer:
        return None
    elif config.chat_template != "auto":  # which asks all models
        named = {model: where for model, where in named.items() if model == first}
    joined = set(named) if source == "union" else {first if source == "base" else source}
    tokens, is_known = set(config.tokenizer.tokens or ()) if config.tokenizer else set(), built
    for model, where in named.items():
        folder = Path(model.model.path)
        is_here = os.path.isdir(folder)
        if not is_here and may_be_hub_name(model.model.path):
            is_known &= model not in joined
            near = nearest(model.model.path, ("union", "base")) if where == at else None
            for found, expected in _load(model.model, False, options)[1] if near else ():
                findings.problem(where, found, expected, f"Write `{near}`.")
            continue
        files = [folder / name for name in _JSON_FILES if os.path.exists(folder / name)]
        read = (json_object(file, "a tokenizer's file", _LARGEST)[1] for file in files)
        wrong = [*filter(None, read)]
        is_there = any(os.path.exists(folder / name) for name in TOKENIZER_FILES)
        if built and is_there and not wrong:
            own, wrong = _load(model.model, model == first, options)
            tokens |= own if model in joined else set()
        for found, expected in wrong:
            findings.problem(where, found, expected, "Mend it, or download it again.")
        # mergekit loads the tokenizer of the base, or of the first model, and the one named here;
        # for the others it makes do with the base's.
        if built and not is_there and (model == source or (is_here and model == first)):
            remedy = "Check the path, or copy the model's tokenizer files there."
            expected = f"one of {', '.join(TOKENIZER_FILES)} there"
            findings.problem(str(at), f"no tokenizer in {folder}", expected, remedy)
    multiple = (config.tokenizer.pad_to_multiple_of if config.tokenizer else None) or 1
    return -(-len(tokens) // multiple) * multiple if is_known else None


def compare_tokenizers(config: Any, findings: Findings, *, copied: bool) -> None:
    """Warn of models that give other ids to tokens than the base, or the first model, does.

    Rows of embeddings are merged by id: those of different tokens would be mixed. Warn of other
    chat templates, too, where a tokenizer is `copied` into the output.
    """
    named = models_at(config)
    first = config.base_model or next(iter(named), None)
    if wants_tokenizer(config) or not first or not os.path.isdir(first.model.path):
        return
    own = _template(first)
    unlike = [where for model, where in named.items() if _template(model) not in ("", own)]
    if unlike and copied and not config.chat_template:
        findings.warn(
            f"chat_template: the output has that of {first}{'' if own else ' (none)'}, and "
            f"{listing(unlike)} another. Write `chat_template: auto` for the most frequent one."
        )
    path = Path(first.model.path) / _VOCABULARY
    files = {where: Path(model.model.path) / _VOCABULARY for model, where in named.items()}
    there = {where: file for where, file in files.items() if os.path.isfile(file)}
    if not os.path.isfile(path):
        return
    differing = {w: file for w, file in there.items() if not filecmp.cmp(path, file, shallow=False)}
    ids = _ids(path) if differing else {}
    for where, file in differing.items():
        others = _ids(file)
        if moved := [token for token in ids if others.get(token, ids[token]) != ids[token]]:
            findings.warn(
                f"{where}: {file} gives tokens other ids than {path} does ({len(moved)}: "
                f"{listing([shown(token) for token in moved])}), and embeddings are merged by id. "
                "Give models with one vocabulary, or `tokenizer_source`, where the method takes it."
            )


def _template(model: Any) -> str:
    """Return the chat template of a model in a folder; "" without one."""
    file = Path(model.model.path) / "chat_template.jinja"
    if os.path.isfile(file):
        return file.read_text(encoding="utf-8", errors="replace").strip()
    content, _ = json_object(file.with_name("tokenizer_config.json"), "", _LARGEST)
    return str(content.get("chat_template") or "").strip()


def _ids(path: Path) -> dict[str, int]:
    """Return the ids of tokens; those of what is no tokenizer's file are another check's."""
    content, _ = json_object(path, "a tokenizer's file", _LARGEST)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # of Unigram: tokens with scores, in the order of their ids
        words = ((at, row[0]) for at, row in enumerate(vocabulary) if isinstance(row, list) and row)
        vocabulary = {word: at for at, word in words if isinstance(word, str)}
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for each in added if isinstance(added, list) else ():
        if isinstance(each, dict) and isinstance(each.get("content"), str):
            ids[each["content"]] = each.get("id")
    return ids


def _load(path: Any, first: bool, options: Any) -> tuple[set[str], list[tuple[str, str]]]:
    """Load a tokenizer as mergekit does: its tokens, or what is wrong and what is expected."""
    from mergekit.tokenizer.build import get_stripped_tokenizer
    from transformers import AutoTokenizer

    try:
        trust = options.trust_remote_code
        if first:
            return set(get_stripped_tokenizer(path, trust).get_vocab()), []
        made = AutoTokenizer.from_pretrained(path.path, trust_remote_code=trust)
        return set(made.get_vocab()), []
    except Exception as error:  # whatever the classes of tokenizers make of such files
        found = f"a tokenizer in {path} that cannot be loaded ({one_line(error)})"
        expected = "files that `AutoTokenizer` loads, with a row of embeddings for each token"
        return set(), [(found, expected)]
