"""The adapter of a ``base+adapter`` input: can it be read, and applied to that base."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergekit_ext.core.wording import listing, nearest
from mergekit_ext.errors import ConfigError
from mergekit_ext.host.adapters import BEFOREHAND, VARIABLE, fit, read_adapter
from mergekit_ext.host.checks import hub
from mergekit_ext.host.checks.configuration import json_object
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.class_model import empty_model
from mergekit_ext.io import paths, pickles
from mergekit_ext.io.headers import HeaderError, TensorHeader, read_folder, read_safetensors
from peft_merge.adapter import Adapter

_WRITTEN = "the configuration of a PEFT adapter"
_SAFE, _PICKLE = _ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def note_unused(options: Any, findings: Findings) -> None:
    """Say that ``--lora-merge-cache`` is not needed."""
    if options.lora_merge_cache:
        findings.note(unused_cache(options))


def unused_cache(options: Any) -> str:
    """What becomes of ``--lora-merge-cache``."""
    return (
        f"--lora-merge-cache {options.lora_merge_cache} is not used: adapters are applied while "
        f"their base is read, and nothing is written there. {VARIABLE}=0 brings mergekit's own "
        "way back."
    )


def adapted_tensors(
    path: Any,
    base: str,
    tensors: Mapping[str, TensorHeader] | None,
    config: Any,
    where: str,
    findings: Findings,
    dtype: torch.dtype | None = None,
    otherwise: str = BEFOREHAND,
) -> dict[str, TensorHeader] | None:
    """The tensors of a base with an adapter; None with problems, or when they are not known yet.

    Args:
        path: mergekit's `ModelPath` of the adapter.
        base: the base's folder, or its name on the Hub.
        tensors: the base's; None when they are not known.
        config: the base's configuration; None for a bare file of weights.
        dtype: that they are read in; None for that of the file.
        otherwise: see `fit`.
    """
    if not _is_here(path, where, findings):
        return None
    if _is_pickle(paths.expanded(path.path), where, findings):
        return None
    try:
        adapter = read_adapter(path, otherwise)
        if tensors is None:
            return None
        _warn_of_base(adapter, base, where, findings)
        return fit(adapter, tensors, config, otherwise).tensors(tensors, dtype)
    except ConfigError as error:
        for problem in error.problems:
            place = f"{where} ({problem.where})"
            findings.problem(place, problem.found, problem.expected, problem.remedy)
        return None


def _warn_of_base(adapter: Adapter, base: str, where: str, findings: Findings) -> None:
    named = str(adapter.config.get("base_model_name_or_path") or "")
    ours, theirs = _components(os.path.realpath(base)), _components(named)
    if theirs and theirs[-1] not in ours and ours[-1] not in theirs:
        findings.warn(
            f"{where}: the adapter {adapter.name} names {named} as its base and is applied to "
            f"{base}. That only makes sense if these are copies of one model."
        )


def _components(path: str) -> list[str]:
    """The parts of a path; of a folder of the Hub's cache (models--org--name) the name."""
    return [part.rpartition("--")[2] for part in re.split(r"[/\\]", path.lower()) if part]


def check_heads(
    base: Mapping[str, TensorHeader],
    adapted: Mapping[str, TensorHeader],
    reference: Any,
    config: Any,
    where: str,
    findings: Findings,
) -> None:
    """Whole tensors that the adapter brings must be tensors of the architecture.

    The output has the tensors of its architecture and no others: a classifier on a causal
    language model would be lost.
    """
    added = sorted(adapted.keys() - base.keys())
    model = empty_model(config) if added else None
    if model is None:
        return
    lost = sorted(set(added) - model.state_dict().keys())
    if lost:
        findings.problem(
            where,
            f"{listing(lost)} in the adapter {reference.lora}, which {config.architectures[0]}, "
            f"the architecture of {reference.model}, does not have",
            "a base of the class that the adapter was trained on",
            "Give the base with `override_architecture:` and that class, or save it as that class.",
        )


def check_merged_beforehand(
    reference: Any, where: str, options: Any, findings: Findings
) -> dict[str, TensorHeader] | None:
    """Check what mergekit's own way needs.

    Returns the tensors of the merged copy that an earlier run left, if it did: mergekit trusts it
    whatever is in it.
    """
    if not options.lora_merge_cache:
        findings.problem(
            where,
            f"{reference}, a model with an adapter, and no folder for the merged copy",
            "a folder that has room for one whole model per adapter",
            f"Add --lora-merge-cache with such a folder, or do without {VARIABLE}=0.",
        )
    path = reference.lora.path
    here = _is_here(reference.lora, where, findings) and paths.is_folder(path)
    if here and not _is_pickle(Path(path), where, findings):
        _check_files(Path(path), where, findings)
    return _merged_copy(reference, where, options, findings)


def _is_here(path: Any, where: str, findings: Findings) -> bool:
    """Whether an adapter can be read without a download; a problem if it never can."""
    if paths.is_folder(paths.expanded(path.path)):
        return True
    if hub.may_be_hub_name(path.path):
        if hub.cached_folder(path.path, path.revision, "adapter_config.json", None) is not None:
            return True
        if not hub.offline():
            findings.note(
                f"{where}: the adapter {path} is checked when it has been downloaded, before "
                "anything is merged."
            )
            return False
    findings.problem(
        where,
        f"the adapter {path}, which does not exist",
        "an adapter's folder, or a name on the Hub",
        "Check the part after `+`." + near(path.path),
    )
    return False


def _is_pickle(folder: Path, where: str, findings: Findings) -> bool:
    """Whether an adapter is a pickle that nobody asked for, which is a problem."""
    if pickles.are_allowed() or (folder / _SAFE).exists() or not (folder / _PICKLE).exists():
        return False
    file = folder / _PICKLE
    findings.problem(where, f"{file} with {pickles.FOUND}", pickles.EXPECTED, pickles.REMEDY)
    return True


def near(path: str) -> str:
    """A neighbour in the file system with nearly that name, as the end of a remedy."""
    parent = Path(path).parent
    try:
        names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        return ""
    close = nearest(Path(path).name, names)
    return f" Did you mean {parent / close}?" if close else ""


def _check_files(folder: Path, where: str, findings: Findings) -> None:
    from peft import PeftConfig

    from peft_merge.io.read import LARGEST_CONFIG

    _, wrong = json_object(folder / "adapter_config.json", _WRITTEN, LARGEST_CONFIG)
    try:
        if wrong is None and not PeftConfig.from_pretrained(str(folder)).peft_type:
            wrong = f"an adapter {folder} whose adapter_config.json has no peft_type", _WRITTEN
    except Exception as error:  # whatever PEFT's classes make of such fields
        text = " ".join(str(error).split())
        found = f"an adapter_config.json in {folder} that PEFT cannot read"
        wrong = f"{found} ({type(error).__name__}: {text})", _WRITTEN
    if wrong is not None:
        findings.problem(where, *wrong, "Give the folder that PeftModel.save_pretrained wrote.")
    weights = [folder / name for name in _ADAPTER_FILES if (folder / name).is_file()]
    if not weights:
        findings.problem(
            where,
            f"an adapter {folder} without weights",
            f"one of {', '.join(_ADAPTER_FILES)}",
            "Give the folder that PeftModel.save_pretrained wrote.",
        )
    elif weights[0].suffix == ".safetensors":
        try:
            read_safetensors(weights[0])
        except HeaderError as error:
            findings.problem(
                where, f"{error.file} with {error.found}", error.expected, error.remedy
            )


def _merged_copy(
    reference: Any, where: str, options: Any, findings: Findings
) -> dict[str, TensorHeader] | None:
    if not options.lora_merge_cache:
        return None
    name = f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
    folder = Path(options.lora_merge_cache) / name
    if not folder.exists():
        return None
    try:
        return read_folder(folder, allow_pickle=pickles.are_allowed())
    except HeaderError as error:
        findings.problem(
            where,
            f"an unfinished merged copy in {folder} ({error.file} with {error.found})",
            "a whole model, because mergekit uses that copy as it is",
            f"Delete {folder}.",
        )
        return None
