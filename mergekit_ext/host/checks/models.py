"""The inputs of a merge: does each exist, can it be read, what tensors does it hold."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ext.headers import HeaderError, TensorHeader, read_folder, weights_of
from mergekit_ext.host.checks import hub
from mergekit_ext.host.checks.report import Findings

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class ModelFacts:
    """What is known about one model.

    Attributes:
        reference: mergekit's `ModelReference`.
        where: the place in the configuration that names it first.
        config: the transformers configuration; None when it cannot be read.
        tensors: its stored tensors; None when they are not known.
        pending: the model is the result of another document and does not exist yet.
    """

    reference: Any
    where: str
    config: Any = None
    tensors: Mapping[str, TensorHeader] | None = None
    pending: bool = False


def read_model(
    reference: Any, where: str, options: Any, findings: Findings, pending: Collection[str] = ()
) -> ModelFacts:
    """Look at one model, and at its adapter if it has one."""
    path, revision = reference.model.path, reference.model.revision
    if reference.lora is not None:
        _check_adapter(reference, where, options, findings)
    if path in pending:
        return ModelFacts(reference, where, pending=True)
    if not Path(path).exists():
        return _hub_model(reference, path, revision, where, options, findings)
    if not Path(path).is_dir():
        findings.problem(
            where,
            f"{path}, which is a file",
            "a model's folder, or a name on the Hub",
            "Give its folder; single weight files are merged with mergekit-pytorch.",
        )
        return ModelFacts(reference, where)
    tensors = _merged_adapter(reference, where, options, findings)
    if tensors is None:
        tensors = _folder_tensors(Path(path), where, findings)
    if not (Path(path) / "config.json").is_file():
        adapter = (Path(path) / "adapter_config.json").is_file()
        findings.problem(
            where,
            f"an adapter alone in {path}" if adapter else f"no config.json in {path}",
            "a model's folder with config.json and weights",
            f"Write `<base model>+{path}`." if adapter else "Copy the model's config.json there.",
        )
        return ModelFacts(reference, where, tensors=tensors)
    return ModelFacts(reference, where, _config(reference, where, options, findings), tensors)


def _folder_tensors(folder: Path, where: str, findings: Findings) -> dict[str, TensorHeader] | None:
    if weights_of(folder) is None and (folder / "adapter_config.json").is_file():
        return None  # said once, with the missing config.json
    try:
        tensors = read_folder(folder)
    except HeaderError as error:
        findings.problem(where, f"{error.file} with {error.found}", error.expected, error.remedy)
        return None
    weights = weights_of(folder)
    if weights is not None and weights.name.startswith("pytorch_model"):
        findings.note(
            f"{where}: {folder} holds pickles ({weights.name}) and no safetensors; pickles from "
            "somebody you do not trust may run code when they are loaded."
        )
    return tensors


def _hub_model(
    reference: Any, path: str, revision: str | None, where: str, options: Any, findings: Findings
) -> ModelFacts:
    if not hub.may_be_hub_name(path):
        _missing_folder(path, where, findings)
        return ModelFacts(reference, where)
    folder = hub.cached_folder(path, revision, "config.json", options.transformers_cache)
    known = folder is not None and weights_of(folder) is not None
    if hub.offline():
        # mergekit asks the Hub for the list of files even when it has them all.
        findings.problem(
            where,
            f"{path}, which is no folder here, while HF_HUB_OFFLINE is set",
            "a folder that exists" if known else "a folder that exists, or a network",
            (
                f"Write the path of the cached copy, {folder}."
                if known
                else "Unset HF_HUB_OFFLINE, or download the model and write its path." + _near(path)
            ),
        )
        if not known:
            return ModelFacts(reference, where)
    if known and folder is not None:
        tensors = _folder_tensors(folder, where, findings)
    else:
        before = findings.count
        tensors = hub.remote_tensors(path, revision, where, findings)
        if findings.count > before:
            return ModelFacts(reference, where)
    return ModelFacts(reference, where, _config(reference, where, options, findings), tensors)


def _missing_folder(path: str, where: str, findings: Findings) -> None:
    remedy = "Check the path." + _near(path)
    if path.startswith("~"):
        remedy = f"Write {Path(path).expanduser()}: mergekit does not expand `~`."
    findings.problem(
        where, f"{path}, which does not exist", "a model's folder, or a name on the Hub", remedy
    )


def _near(path: str) -> str:
    """A neighbour in the file system with nearly that name, as the end of a remedy."""
    parent = Path(path).parent
    try:
        names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(Path(path).name, names, n=1)
    return f" Did you mean {parent / close[0]}?" if close else ""


def _config(reference: Any, where: str, options: Any, findings: Findings) -> Any:
    try:
        config = reference.config(trust_remote_code=options.trust_remote_code)
    except Exception as error:  # transformers raises many kinds; its message is kept
        first = (str(error).splitlines() or [""])[0]
        findings.problem(
            where,
            f"a config.json that transformers refuses ({type(error).__name__}: {first})",
            "the configuration of a model that transformers knows",
            (
                "Mend config.json, or give --trust-remote-code if its model type needs the "
                "repository's own code and you trust it."
            ),
        )
        return None
    architectures = getattr(config, "architectures", None) or []
    if len(architectures) != 1:
        findings.problem(
            where,
            f"{architectures} as `architectures` in config.json of {reference.model}",
            "the name of one architecture",
            "Add it to config.json, or give the model with `override_architecture:`.",
        )
        return None
    if getattr(config, "quantization_config", None):
        findings.note(
            f"{where}: {reference.model} is quantised; mergekit merges the stored numbers without "
            "their scales. Give the model as it was before quantisation."
        )
    return config


def _check_adapter(reference: Any, where: str, options: Any, findings: Findings) -> None:
    path = reference.lora.path
    if not options.lora_merge_cache:
        findings.problem(
            where,
            f"{reference}, a model with an adapter, and no folder for the merged copy",
            "a folder that has room for one whole model per adapter",
            "Add --lora-merge-cache with such a folder.",
        )
    folder = Path(path)
    if not folder.is_dir():
        if not hub.may_be_hub_name(path) or hub.offline():
            findings.problem(
                where,
                f"the adapter {path}, which does not exist",
                "an adapter's folder, or a name on the Hub",
                "Check the part after `+`." + _near(path),
            )
        return
    try:
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        findings.problem(
            where,
            f"an adapter {path} without a readable adapter_config.json ({error})",
            "a PEFT adapter's folder",
            "Give the folder that PeftModel.save_pretrained wrote.",
        )
    weights = [folder / name for name in _ADAPTER_FILES if (folder / name).is_file()]
    if not weights:
        findings.problem(
            where,
            f"an adapter {path} without weights",
            f"one of {', '.join(_ADAPTER_FILES)}",
            "Give the folder that PeftModel.save_pretrained wrote.",
        )
    elif weights[0].suffix == ".safetensors":
        _read_adapter(weights[0], where, findings)


def _read_adapter(weights: Path, where: str, findings: Findings) -> None:
    from mergekit_ext.headers import read_safetensors

    try:
        read_safetensors(weights)
    except HeaderError as error:
        findings.problem(where, f"{error.file} with {error.found}", error.expected, error.remedy)


def _merged_adapter(
    reference: Any, where: str, options: Any, findings: Findings
) -> dict[str, TensorHeader] | None:
    """The merged copy that an earlier run left: mergekit trusts it whatever is in it."""
    if reference.lora is None or not options.lora_merge_cache:
        return None
    name = f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
    folder = Path(options.lora_merge_cache) / name
    if not folder.exists():
        return None
    try:
        return read_folder(folder)
    except HeaderError as error:
        findings.problem(
            where,
            f"an unfinished merged copy in {folder} ({error.file} with {error.found})",
            "a whole model, because mergekit uses that copy as it is",
            f"Delete {folder}.",
        )
        return None
