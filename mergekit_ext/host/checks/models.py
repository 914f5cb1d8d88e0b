"""The inputs of a merge: does each exist, can it be read, what tensors does it hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ext.codes import REMEDY, stored_codes
from mergekit_ext.core.wording import listing
from mergekit_ext.host.adapters import applies
from mergekit_ext.host.checks import hub
from mergekit_ext.host.checks.adapters import (
    adapted_tensors,
    check_heads,
    check_merged_beforehand,
    near,
    note_unused,
)
from mergekit_ext.host.checks.configuration import unreadable
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.settings import dtype_of
from mergekit_ext.io import paths, pickles
from mergekit_ext.io.headers import HeaderError, TensorHeader, read_folder, weights_of


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
    if applies(reference):
        note_unused(options, findings)
        base = _read_base(reference, where, options, findings, pending)
        return _with_adapter(base, options, findings)
    merged = None
    if reference.lora is not None:
        merged = check_merged_beforehand(reference, where, options, findings)
    return _read_base(reference, where, options, findings, pending, merged)


def _with_adapter(base: ModelFacts, options: Any, findings: Findings) -> ModelFacts:
    reference, where = base.reference, base.where
    known = base.tensors if base.config is not None else None
    dtype = dtype_of(options.lora_merge_dtype)
    path = reference.model.path
    tensors = adapted_tensors(reference.lora, path, known, base.config, where, findings, dtype)
    if known is not None and tensors is not None:
        check_heads(known, tensors, reference, base.config, where, findings)
    return dataclasses.replace(base, tensors=tensors)


def _read_base(
    reference: Any,
    where: str,
    options: Any,
    findings: Findings,
    pending: Collection[str],
    merged: dict[str, TensorHeader] | None = None,
) -> ModelFacts:
    """Look at a model without its adapter; `merged` are the tensors that mergekit merged before."""
    path, revision = reference.model.path, reference.model.revision
    if path in pending:
        return ModelFacts(reference, where, pending=True)
    if not paths.exists(path):
        return _hub_model(reference, path, revision, where, options, findings)
    if not paths.is_folder(path):
        findings.problem(
            where,
            f"{path}, which is a file",
            "a model's folder, or a name on the Hub",
            "Give its folder; single weight files are merged with mergekit-pytorch.",
        )
        return ModelFacts(reference, where)
    tensors = merged or _folder_tensors(Path(path), where, findings)
    if not (Path(path) / "config.json").is_file():
        adapter = (Path(path) / "adapter_config.json").is_file()
        findings.problem(
            where,
            f"an adapter alone in {path}" if adapter else f"no config.json in {path}",
            "a model's folder with config.json and weights",
            f"Write `<base model>+{path}`." if adapter else "Copy the model's config.json there.",
        )
        return ModelFacts(reference, where, tensors=tensors)
    own = reference.lora is not None and Path(reference.lora.path) == Path(path)
    if (Path(path) / "adapter_config.json").is_file() and not own:
        findings.problem(
            where,
            f"an adapter_config.json in {path}: transformers applies that adapter when it loads "
            "the model, mergekit does not read it",
            "a model's folder without an adapter",
            f"Write `{path}+{path}` to apply it, or remove it if the weights contain it.",
        )
    return ModelFacts(reference, where, _config(reference, where, options, findings), tensors)


def _folder_tensors(folder: Path, where: str, findings: Findings) -> dict[str, TensorHeader] | None:
    if weights_of(folder) is None and (folder / "adapter_config.json").is_file():
        return None  # said once, with the missing config.json
    try:
        tensors = read_folder(folder, allow_pickle=pickles.are_allowed())
    except HeaderError as error:
        findings.problem(where, f"{error.file} with {error.found}", error.expected, error.remedy)
        return None
    refuse_codes(tensors, folder, where, findings)
    weights = weights_of(folder)
    if weights is not None and weights.name.startswith("pytorch_model"):
        findings.note(
            f"{where}: {folder} holds pickles ({weights.name}) and no safetensors, as allowed; "
            "only tensors are read from them."
        )
    return tensors


def refuse_codes(
    tensors: Mapping[str, TensorHeader], source: str | Path, where: str, findings: Findings
) -> None:
    """Report what a quantised model stores in the place of weights."""
    if codes := stored_codes(tensors):
        findings.problem(
            where,
            f"codes of a quantised model in {source}, with their scales ({listing(codes)})",
            "weights",
            REMEDY,
        )


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
                else "Unset HF_HUB_OFFLINE, or download the model and write its path." + near(path)
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
        refuse_codes(tensors or {}, path, where, findings)
    return ModelFacts(reference, where, _config(reference, where, options, findings), tensors)


def _missing_folder(path: str, where: str, findings: Findings) -> None:
    remedy = "Check the path." + near(path)
    if path.startswith("~"):
        remedy = f"Write {paths.expanded(path)}: mergekit does not expand `~`."
    findings.problem(
        where, f"{path}, which does not exist", "a model's folder, or a name on the Hub", remedy
    )


def _config(reference: Any, where: str, options: Any, findings: Findings) -> Any:
    folder = Path(reference.model.path)
    if paths.is_folder(folder) and (wrong := unreadable(folder)) is not None:
        findings.problem(where, *wrong, "Mend config.json, or download it again.")
        return None
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
    named = isinstance(architectures, list) and [type(name) for name in architectures]
    if named != [str]:
        findings.problem(
            where,
            f"{architectures} as `architectures` in config.json of {reference.model}",
            "the name of one architecture",
            "Add it to config.json, or give the model with `override_architecture:`.",
        )
        return None
    for field, found, expected, remedy in _other_readings(config):
        findings.problem(f"{where} (config.json: {field})", found, expected, remedy)
    return config


def _other_readings(config: Any) -> Iterator[tuple[str, str, str, str]]:
    """Fields with which transformers reads other weights than the files that mergekit reads."""
    content = config.to_dict()
    parts = {"": content, **{f"{k}.": v for k, v in content.items() if isinstance(v, dict)}}
    for prefix, part in parts.items():
        if quantised := part.get("quantization_config"):
            kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            yield (
                f"{prefix}quantization_config",
                f"a model quantised by {kind}, whose codes are no weights without their scales",
                "weights",
                f"{REMEDY} If its files hold plain weights, remove that field.",
            )
    if file := content.get("transformers_weights"):
        yield (
            "transformers_weights",
            f"{file}, which transformers loads and mergekit does not look at",
            "the weights in a file of the usual name",
            "Save the model again with `save_pretrained` into an empty folder.",
        )
