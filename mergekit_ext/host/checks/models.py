"""The inputs of a merge: does each exist, can it be read, what tensors does it hold."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ext.errors import FileError, listing
from mergekit_ext.host.adapters.fitted import applies
from mergekit_ext.host.checks.adapters import (
    adapted_tensors,
    merged_beforehand,
    near,
    unused_cache,
)
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.settings import dtype_of
from mergekit_ext.host.inputs import cached_folder, is_offline
from mergekit_ext.io.documents import json_object
from mergekit_ext.io.headers import (
    PICKLE_REMEDY,
    TensorHeader,
    pickles_allowed,
    read_file,
    read_folder,
    weights_of,
)
from mergekit_ext.io.model_files import may_be_hub_name

_LARGEST_CONFIG = 64 << 20
# transformers and mergekit go through layers and experts one by one, some classes already when
# they are made: a count of 10^12 would fill the memory before anything is compared with it.
_COUNT = re.compile(r"(^|_)(num|n)(_.*)?(layer|expert|head|block|label|group)|_layers$|^layers$")
_MOST = 100_000
# Every tensor of every layer is named: several times what the largest models have.
_LAYERS, _MOST_LAYERS = re.compile("layer|block"), 1_000
_EXPERTS, _MOST_OF_BOTH = re.compile("expert"), 100_000

# Averaged without their scales, codes give a model that loads and answers nonsense.
_UNQUANTISED = "Give the model as it was before quantisation, or dequantise it and save that."
# Scales, zero points and tables as their writers name them: compressed-tensors, fine-grained fp8,
# bitsandbytes, MXFP4, torchao, quanto. `of` is what they belong to.
_BESIDE = re.compile(
    r"(?P<of>.+?)(?:_(?:scale|scale_inv|scales|zero_point|global_scale|blocks)"
    r"|\.(?:absmax|quant_map|quant_state\..+|SCB|_scale|_zero_point)|:_?(?:scale|qdata))"
)
# GPTQ, AWQ, HQQ, compressed-tensors: packed codes have names of their own.
_PACKED = re.compile(r".*\.(?:qweight|qzeros|W_q|weight_packed)")


@dataclass(frozen=True)
class ModelFacts:
    """What is known about one model; `config` and `tensors` are None where they are not."""

    reference: Any  # mergekit's `ModelReference`, or the name of a file
    where: str  # the place in the configuration that names it first
    config: Any = None  # of transformers
    tensors: Mapping[str, TensorHeader] | None = None
    pending: bool = False  # it is the result of another document and does not exist yet


def read_model(
    reference: Any, where: str, options: Any, findings: Findings, pending: Collection[str] = ()
) -> ModelFacts:
    """Look at one model, and at its adapter if it has one."""
    merged = None
    if reference.lora is not None and not applies(reference):
        merged = merged_beforehand(reference, where, options, findings)
    if reference.model.path in pending:
        base = ModelFacts(reference, where, pending=True)
    elif os.path.exists(reference.model.path):
        base = _local_model(reference, where, options, findings, merged)
    else:
        base = _hub_model(reference, where, options, findings)
    if not applies(reference):
        return dataclasses.replace(base, tensors=merged or base.tensors)
    if options.lora_merge_cache:
        findings.warn(unused_cache(options))
    known = base.tensors if base.config is not None else None
    dtype = dtype_of(options.lora_merge_dtype)
    tensors = adapted_tensors(reference, known, base.config, where, findings, dtype)
    return dataclasses.replace(base, tensors=tensors)


def _local_model(
    reference: Any,
    where: str,
    options: Any,
    findings: Findings,
    tensors: Mapping[str, TensorHeader] | None,
) -> ModelFacts:
    """Look at a folder; `tensors`, those of a merged copy, are read in the place of its own."""
    folder = Path(reference.model.path)
    if not folder.is_dir():
        expected = "a model's folder, or a name on the Hub"
        remedy = "Give its folder; single weight files are merged with mergekit-pytorch."
        findings.problem(where, f"{folder}, which is a file", expected, remedy)
        return ModelFacts(reference, where)
    adapter = (folder / "adapter_config.json").is_file()
    if tensors is None and (not adapter or weights_of(folder) is not None):
        tensors = read_tensors(folder, where, findings)
    if not (folder / "config.json").is_file():
        findings.problem(
            where,
            f"an adapter alone in {folder}" if adapter else f"no config.json in {folder}",
            "a model's folder with config.json and weights",
            f"Write `<base model>+{folder}`." if adapter else "Copy the model's config.json there.",
        )
        return ModelFacts(reference, where, tensors=tensors)
    if adapter and (reference.lora is None or Path(reference.lora.path) != folder):
        findings.problem(
            where,
            f"an adapter_config.json in {folder}: transformers applies that adapter when it loads "
            "the model, mergekit does not read it",
            "a model's folder without an adapter",
            f"Write `{folder}+{folder}` to apply it, or remove it if the weights contain it.",
        )
    return ModelFacts(reference, where, _config(reference, where, options, findings), tensors)


def _hub_model(reference: Any, where: str, options: Any, findings: Findings) -> ModelFacts:
    path, nothing = reference.model.path, ModelFacts(reference, where)
    if not may_be_hub_name(path):
        remedy = "Check the path." + near(path)
        if path.startswith("~"):
            remedy = f"Write {os.path.expanduser(path)}: mergekit does not expand `~`."
        expected = "a model's folder, or a name on the Hub"
        findings.problem(where, f"{path}, which does not exist", expected, remedy)
        return nothing
    folder = cached_folder(reference.model, options)
    if folder is not None and weights_of(folder) is None:
        folder = None
    if is_offline():
        # mergekit asks the Hub for the list of files even when it has them all.
        remedy = "Unset HF_HUB_OFFLINE, or download the model and write its path." + near(path)
        if folder is not None:
            remedy = f"Write the path of the cached copy, {folder}."
        found = f"{path}, which is no folder here, while HF_HUB_OFFLINE is set"
        findings.problem(where, found, "a folder that exists, or a network", remedy)
        if folder is None:
            return nothing
    if folder is not None:
        tensors = read_tensors(folder, where, findings)
    else:
        before = findings.count
        tensors = _remote_tensors(reference.model, where, findings)
        if tensors is None and findings.count > before:
            return nothing
    return ModelFacts(reference, where, _config(reference, where, options, findings), tensors)


def read_tensors(path: Path, where: str, findings: Findings) -> dict[str, TensorHeader] | None:
    """Return the tensors of a folder, or of a file of weights; None with a problem."""
    read, weights = (read_folder, weights_of(path)) if path.is_dir() else (read_file, path)
    try:
        tensors = read(path, allow_pickle=pickles_allowed())
    except FileError as error:
        findings.unreadable(where, error)
        return None
    _refuse_codes(tensors, path, where, findings)
    if weights is not None and "safetensors" not in weights.name:
        findings.note(f"{where}: {weights} is a pickle, as allowed; only tensors are read from it.")
    return tensors


def _remote_tensors(path: Any, where: str, findings: Findings) -> dict[str, TensorHeader] | None:
    """Read the headers of a repository's safetensors files; its `ModelPath` names it.

    Returns None, with a problem or a note, when the Hub does not give them.
    """
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = huggingface_hub.get_safetensors_metadata(path.path, revision=path.revision)
    except NotASafetensorsRepoError:
        if pickles_allowed():
            findings.note(
                f"{where}: {path.path} holds pickles, which are not checked before the download; "
                "only tensors are read from them."
            )
        else:
            found = f"{path.path} without model.safetensors, but with pickles"
            findings.problem(where, found, "safetensors", PICKLE_REMEDY)
        return None
    except Exception as error:  # network, access, parsing: the client's message is kept
        first = (str(error).splitlines() or [""])[0]
        findings.problem(
            where,
            f"{path.path}, which the Hub does not give ({type(error).__name__}: {first})",
            "a folder that exists, or a model of the Hub that you may read",
            "Check the name, the revision and your access (`hf auth login`).",
        )
        return None
    tensors: dict[str, TensorHeader] = {}
    for name, file in metadata.weight_map.items():
        if entry := metadata.files_metadata[file].tensors.get(name):
            begin, end = entry.data_offsets
            tensors[name] = TensorHeader(name, str(entry.dtype), tuple(entry.shape), end - begin)
    _refuse_codes(tensors, path.path, where, findings)
    return tensors


def _refuse_codes(
    tensors: Mapping[str, TensorHeader], source: str | Path, where: str, findings: Findings
) -> None:
    """Report what a quantised model stores in the place of weights."""
    if codes := stored_codes(tensors):
        found = f"codes of a quantised model in {source}, with their scales ({listing(codes)})"
        findings.problem(where, found, "weights", _UNQUANTISED)


def stored_codes(names: Collection[str]) -> list[str]:
    """Return those of `names` that hold scales or packed codes.

    A scale is one only beside the tensor that it scales: models have parameters of such names.
    """
    stored = frozenset(names)
    return [name for name in names if _PACKED.fullmatch(name) or _scales(name, stored)]


def _scales(name: str, stored: frozenset[str]) -> bool:
    found = _BESIDE.fullmatch(name)
    if found is None:
        return False
    codes = (f"{found['of']}{end}" for end in ("", ".weight", "_blocks", "._data", ":qdata"))
    return any(code in stored and code != name for code in codes)


def _config(reference: Any, where: str, options: Any, findings: Findings) -> Any:
    if os.path.isdir(reference.model.path):
        path = Path(reference.model.path) / "config.json"
        content, wrong = json_object(path, "a model's configuration", _LARGEST_CONFIG)
        if wrong := wrong or _too_many(content, path):
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
            "Mend config.json, or give --trust-remote-code if its model type needs the "
            "repository's own code and you trust it.",
        )
        return None
    architectures = getattr(config, "architectures", None) or []
    if not isinstance(architectures, list) or [type(name) for name in architectures] != [str]:
        found = f"{architectures} as `architectures` in config.json of {reference.model}"
        remedy = "Add it to config.json, or give the model with `override_architecture:`."
        findings.problem(where, found, "the name of one architecture", remedy)
        return None
    _check_readings(config, where, findings)
    return config


def _too_many(content: dict[str, Any], path: Path) -> tuple[str, str] | None:
    """Find a count in a configuration that nothing goes through: it, and what is expected."""
    most: dict[re.Pattern[str], int] = {_LAYERS: 0, _EXPERTS: 0}
    for name, value in _counts(content):
        limit = _MOST_LAYERS if _LAYERS.search(name) else _MOST
        if not 0 <= value <= limit:
            shown = str(value) if abs(value) < 2**63 else "more than 64 bits"
            return f"{name} of {shown} in {path}", f"0 to {limit:,}"
        most |= {kind: max(value, most[kind]) for kind in most if kind.search(name)}
    if most[_LAYERS] * most[_EXPERTS] > _MOST_OF_BOTH:
        found = f"{most[_LAYERS]:,} layers of {most[_EXPERTS]:,} experts in {path}"
        return found, f"{_MOST_OF_BOTH:,} experts at most"
    return None


def _counts(content: Any) -> Iterator[tuple[str, int]]:
    """Counts of layers, experts and the like, and the keys that they stand under."""
    inner: list[tuple[str, Any]] = [("", content)]
    while inner:  # no recursion, which JSON may be too deep for
        name, item = inner.pop()
        if isinstance(item, dict):
            inner += item.items()
        elif isinstance(item, list):
            inner += [(name, each) for each in item]
        elif type(item) is int and _COUNT.search(name):
            yield name, item


def _check_readings(config: Any, where: str, findings: Findings) -> None:
    """Report fields with which transformers reads other weights than those that mergekit reads."""
    content = config.to_dict()
    parts = {"": content, **{f"{k}.": v for k, v in content.items() if isinstance(v, dict)}}
    for prefix, part in parts.items():
        if quantised := part.get("quantization_config"):
            kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            findings.problem(
                f"{where} (config.json: {prefix}quantization_config)",
                f"a model quantised by {kind}, whose codes are no weights without their scales",
                "weights",
                f"{_UNQUANTISED} If its files hold plain weights, remove that field.",
            )
    if file := content.get("transformers_weights"):
        found = f"{file}, which transformers loads and mergekit does not look at"
        expected = "the weights in a file of the usual name"
        remedy = "Save the model again with `save_pretrained` into an empty folder."
        findings.problem(f"{where} (config.json: transformers_weights)", found, expected, remedy)
