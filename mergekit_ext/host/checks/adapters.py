"""The adapter of a ``base+adapter`` input: can it be read, and applied to that base."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode

from mergekit_ext.errors import ConfigError, FileError, attempted, listing, nearest, shown
from mergekit_ext.host.adapters.fitted import VARIABLE, adapted_headers, fit, read_adapter
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.settings import dtype_of
from mergekit_ext.host.inputs import cached_folder
from mergekit_ext.io.class_model import empty_model
from mergekit_ext.io.documents import json_object
from mergekit_ext.io.headers import (
    PICKLE_FOUND,
    PICKLE_REMEDY,
    TensorHeader,
    pickles_allowed,
    read_folder,
)
from mergekit_ext.io.model_files import may_be_hub_name
from mergekit_ext.io.schema import LARGEST
from peft_merge.adapter import Adapter
from peft_merge.io.read import CONFIG, PICKLE, SAFETENSORS, open_folder


def adapted_tensors(base: Any, options: Any, findings: Findings) -> dict[str, TensorHeader] | None:
    """Return the tensors of a base (its `ModelFacts`) with its adapter.

    None with problems, or if they are not known yet. Whole tensors of the adapter must be tensors
    of the architecture, as the output has no others: a classifier on a causal language model would
    be lost.
    """
    reference, where, config, tensors = base.reference, base.where, base.config, base.tensors
    if options.lora_merge_cache:
        findings.warn(
            f"--lora-merge-cache {options.lora_merge_cache} is not used: adapters are applied as "
            f"their base is read. {VARIABLE}=0 brings mergekit's own way back."
        )
    if not _is_readable(reference.lora, where, findings):
        return None
    try:
        adapter = read_adapter(reference.lora)
        if tensors is None or config is None:
            return None
        _warn_of_base(adapter, reference.model.path, where, findings)
        dtype = dtype_of(options.lora_merge_dtype)
        adapted = adapted_headers(fit(adapter, tensors, config), tensors, dtype)
    except ConfigError as error:
        findings.extend(error.problems, within=where)
        return None
    added = adapted.keys() - tensors.keys()
    model = empty_model(config) if added else None
    if model is not None and (lost := sorted(added - model.state_dict().keys())):
        kind = f"{config.architectures[0]}, the architecture of {reference.model}"
        found = f"{listing(lost)} in the adapter {reference.lora}, which {kind}, does not have"
        remedy = "Give the base with `override_architecture:` and that class, or save it as that."
        findings.problem(where, found, "a base of the class it was trained on", remedy)
    return adapted


def merged_beforehand(
    reference: Any, where: str, options: Any, findings: Findings
) -> dict[str, TensorHeader] | None:
    """Check what mergekit's own way needs.

    Returns the tensors of the merged copy that an earlier run left, if it did: mergekit trusts it
    whatever is in it.
    """
    adapter = reference.lora
    if _is_readable(adapter, where, findings) and os.path.isdir(adapter.path):
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        file, expected = Path(adapter.path) / CONFIG, "the configuration of a PEFT adapter"
        content, wrong = json_object(file, expected, LARGEST)
        kind = content.get("peft_type")
        if wrong is None and not (isinstance(kind, str) and kind in PEFT_TYPE_TO_CONFIG_MAPPING):
            wrong = f"peft_type {shown(kind)} in {file}", expected
        if wrong is not None:
            findings.problem(where, *wrong, "Give the folder that PeftModel.save_pretrained wrote.")
        _, problems = attempted(lambda path: open_folder(Path(path), True), [adapter.path])
        findings.extend(problems, within=where)
    if not options.lora_merge_cache:
        found = f"{reference}, a model with an adapter, and no folder for the merged copy"
        expected = "a folder that has space for one whole model per adapter"
        remedy = f"Add --lora-merge-cache with such a folder, or do without {VARIABLE}=0."
        findings.problem(where, found, expected, remedy)
        return None
    name = f"{reference.model._unique_id()}_{adapter._unique_id()}"
    folder = Path(options.lora_merge_cache) / name
    try:
        return read_folder(folder, allow_pickle=pickles_allowed()) if folder.exists() else None
    except FileError as error:
        found = f"an unfinished merged copy in {folder} ({error.problem})"
        expected = "a whole model, because mergekit uses that copy as it is"
        findings.problem(where, found, expected, f"Delete {folder}.")
        return None


def near(path: str) -> str:
    """Return a neighbour in the file system with nearly that name, as the end of a remedy."""
    parent = Path(path).parent
    try:
        close = nearest(Path(path).name, [e.name for e in parent.iterdir() if e.is_dir()])
    except (OSError, ValueError):
        return ""
    return f" Did you mean {parent / close}?" if close else ""


def _is_readable(path: Any, where: str, findings: Findings) -> bool:
    """Whether an adapter can be read now; a problem if it never can, or is a pickle."""
    folder = Path(os.path.expanduser(path.path))
    if not os.path.isdir(folder):
        may_be = may_be_hub_name(path.path)
        if may_be and cached_folder(path, None, CONFIG) is not None:
            return True
        if may_be and not is_offline_mode():
            findings.note(f"{where}: the adapter {path} is checked when it has been downloaded.")
        else:
            found, remedy = f"the adapter {path}, which does not exist", near(path.path)
            expected = "an adapter's folder, or a name on the Hub"
            findings.problem(where, found, expected, f"Check the part after `+`.{remedy}")
        return False
    pickle = folder / PICKLE
    if pickles_allowed() or (folder / SAFETENSORS).exists() or not pickle.exists():
        return True
    findings.problem(where, f"{pickle} with {PICKLE_FOUND}", "safetensors", PICKLE_REMEDY)
    return False


def _warn_of_base(adapter: Adapter, base: str, where: str, findings: Findings) -> None:
    """Compare names; a folder of the Hub's cache (models--org--name) has the model's in its own."""
    named = str(adapter.config.get("base_model_name_or_path") or "")
    ours, theirs = (
        re.split(r"/|\\|--", path.lower().rstrip("/\\")) for path in (os.path.realpath(base), named)
    )
    if theirs[-1] and theirs[-1] not in ours and ours[-1] not in theirs:
        findings.warn(
            f"{where}: the adapter {adapter.name} names {named} as its base and is applied to "
            f"{base}. That only makes sense if these are copies of one model."
        )
