"""Settings that mergekit uses late: dtypes, the device, the chat template, the tokenizer."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

from mergekit_ext.core.wording import did_you_mean, shown
from mergekit_ext.host.checks.hub import may_be_hub_name
from mergekit_ext.host.checks.layout import groups_of, references
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.io import paths

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model"),
    *("vocab.json", "vocab.txt"),
)
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def dtype_of(name: str | None) -> Any:
    """The torch dtype of a name that mergekit accepts; None for no name or an unknown one."""
    from mergekit.common import dtype_from_name

    try:
        return dtype_from_name(name)
    except RuntimeError:
        return None


def check_settings(config: Any, options: Any, findings: Findings) -> None:
    """Check what is not about models, parameters or tensors."""
    for where, name in (
        ("dtype", config.dtype),
        ("out_dtype", config.out_dtype),
        ("--lora-merge-dtype", options.lora_merge_dtype),
    ):
        dtype = dtype_of(name)
        if name and (dtype is None or not dtype.is_floating_point):
            findings.problem(
                where,
                shown(name),
                f"one of {', '.join(_DTYPES)}",
                did_you_mean(name.removeprefix("torch."), _DTYPES),
            )
    _device(options, findings)
    _chat_template(getattr(config, "chat_template", None), findings)
    _tokenizer(config, findings)


def wants_tokenizer(config: Any) -> bool:
    """Whether mergekit builds a tokenizer and aligns the vocabularies."""
    return bool(getattr(config, "tokenizer_source", None) or getattr(config, "tokenizer", None))


def has_tokenizer(folder: Path) -> bool:
    """Whether any file of a tokenizer is in a model's folder."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def _device(options: Any, findings: Findings) -> None:
    import torch

    name = str(options.device)
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # every backend has its own way to say that it is not there
        reason = (str(error).splitlines() or [""])[0].split(". ")[0]
        findings.problem(
            "--cuda" if options.cuda and name == "cuda" else "--device",
            f"{name}, which cannot be used ({type(error).__name__}: {reason.rstrip('.')})",
            f"one of {', '.join(_devices())}",
            "Choose another device, or install a build of torch that supports this one.",
        )


def check_multi_gpu(options: Any, findings: Findings) -> None:
    """`--multi-gpu` needs an accelerator, for merges that mergekit's executor runs."""
    if options.multi_gpu and len(_devices()) == 1:
        findings.problem(
            "--multi-gpu", "no accelerator", "one at least", "Leave `--multi-gpu` out."
        )


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    for kind in ("cuda", "xpu", "mps"):
        backend = getattr(torch, kind, None)
        if backend is not None and (count := backend.device_count()):
            found += [f"{kind}:{index}" for index in range(count)]
    return found


def _chat_template(template: str | None, findings: Findings) -> None:
    # mergekit looks at it when all the weights are written, and stops there.
    if not template or template == "auto":
        return
    from mergekit._data import chat_templates

    known = sorted(
        Path(f.name).stem
        for f in importlib.resources.files(chat_templates).iterdir()
        if f.name.endswith(".jinja")
    )
    named = len(template) < 256 and "\n" not in template and "{" not in template
    if (named and template in known) or (len(template) >= 20 and "{" in template):
        return
    findings.problem(
        "chat_template",
        shown(template),
        f"`auto`, a Jinja template, or one of {', '.join(known)}",
        did_you_mean(template, ["auto", *known]),
    )


def _tokenizer(config: Any, findings: Findings) -> None:
    if not wants_tokenizer(config):
        return
    where = "tokenizer_source" if config.tokenizer_source else "tokenizer.source"
    source = config.tokenizer_source or config.tokenizer.source
    if source == "base" and config.base_model is None:
        findings.problem(
            where,
            "'base' without a base model",
            "a base model, or the name of the model whose tokenizer to take",
            "Add `base_model:`, or write `union` or a model here.",
        )
    # mergekit loads the tokenizer of the base, or of the first model, and the one named here;
    # for the others it makes do with the base's.
    models = [model for _, model in references(groups_of(config), config.base_model)]
    needed = [config.base_model] if config.base_model is not None else models[:1]
    if not isinstance(source, str):
        needed.append(source)
    for reference in dict.fromkeys(needed):
        folder = Path(reference.model.path)
        if not paths.is_folder(folder):
            if reference == source and not may_be_hub_name(reference.model.path):
                findings.problem(
                    where, f"{source}, which does not exist", "a model's folder", "Check the path."
                )
        elif not has_tokenizer(folder):
            findings.problem(
                where,
                f"no tokenizer in {folder}",
                f"one of {', '.join(_TOKENIZER_FILES)} there",
                "Copy the model's tokenizer files into the folder.",
            )
