"""The inputs of a merge: does each exist, can it be read, what tensors does it hold."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import NotASafetensorsRepoError

from mergekit_ext.errors import ConfigError, FileError, one_line
from mergekit_ext.host.adapters.fitted import applies
from mergekit_ext.host.checks.adapters import adapted_tensors, merged_beforehand, near
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.inputs import cached_folder
from mergekit_ext.io.class_model import Loading, loading
from mergekit_ext.io.documents import json_object
from mergekit_ext.io.headers import (
    PICKLE_REMEDY,
    TensorHeader,
    pickles_allowed,
    read_file,
    read_folder,
    weights_of,
)
from mergekit_ext.io.hub import remedy_for
from mergekit_ext.io.model_files import may_be_hub_name
from mergekit_ext.io.quantised import QuantisedHeader, dequantised, detach

_LARGEST_CONFIG = 64 << 20
# transformers and mergekit go through layers and experts one by one, some classes already when
# they are made: a count of 10^12 would fill the memory before anything is compared with it.
_COUNT = re.compile(r"(^|_)(num|n)(_.*)?(layer|expert|head|block|label|group)|_layers$|^layers$")
# Every tensor of every layer is named: several times what the largest models have.
_LAYERS, _MOST_LAYERS = re.compile("layer|block"), 1_000
_MOST, _EXPERTS = 100_000, re.compile("expert")


@dataclass(frozen=True)
class ModelFacts:
    """What is known about one model; `config` and `tensors` are None where they are not."""

    reference: Any  # mergekit's `ModelReference`, or the name of a file
    where: str  # the place in the configuration that names it first
    config: Any = None  # of transformers
    tensors: Mapping[str, TensorHeader] | None = None
    pending: bool = False  # it is the result of another document and does not exist yet

    @property
    def kind(self) -> str:
        """The name of its class, where there is a `config`."""
        return str(self.config.architectures[0])

    @cached_property
    def loading(self) -> Loading | None:
        """What transformers does with its tensors; None if that is not known."""
        if self.config is None or self.tensors is None:
            return None
        return loading(self.config, {name: h.shape for name, h in self.tensors.items()})


def read_model(
    reference: Any, where: str, options: Any, findings: Findings, pending: Collection[str] = ()
) -> ModelFacts:
    """Look at one model, and at its adapter if it has one."""
    path, merged = reference.model.path, None
    if reference.lora is not None and not applies(reference):
        merged = merged_beforehand(reference, where, options, findings)
    base = ModelFacts(reference, where, pending=path in pending)
    if base.pending:
        findings.note("Nothing is estimated: a model is the result of another document.")
    elif os.path.isdir(path):
        base = _local_model(base, merged is not None, options, findings)
    elif os.path.exists(path) or not may_be_hub_name(path):
        found = f"{path}, which {'is a file' if os.path.exists(path) else 'does not exist'}"
        hint = "mergekit does not expand `~`; weights are in a folder with their config.json."
        remedy = f"Check the path. {hint}{near(path)}"
        findings.problem(where, found, "a model's folder, or a name on the Hub", remedy)
    else:
        base = _hub_model(base, options, findings)
    base = _dequantised(base, findings)
    tensors = merged or base.tensors
    if applies(reference):
        tensors = adapted_tensors(base, options, findings)
    return replace(base, tensors=tensors)


def _dequantised(fact: ModelFacts, findings: Findings) -> ModelFacts:
    """Return a model's facts as those of the plain model that a quantised one stands for."""
    quantisation = detach(fact.config) if fact.config else None
    if fact.tensors is None:
        return fact
    name = fact.reference.model.path
    try:
        if quantisation and not any(header.file for header in fact.tensors.values()):
            findings.note(f"{fact.where}: {name} is quantised, and checked when it is read.")
            return replace(fact, tensors=None)
        tensors = dequantised(fact.tensors, quantisation, name)
    except ConfigError as error:
        findings.extend(error.problems, within=fact.where)
        return replace(fact, tensors=None)
    for stored in {h.format.precision for h in tensors.values() if isinstance(h, QuantisedHeader)}:
        findings.dequantised[str(fact.reference)] = stored
        findings.note(f"{fact.where}: {name} is dequantised from {stored} when it is read.")
    return replace(fact, tensors=tensors)


def _local_model(fact: ModelFacts, merged: bool, options: Any, findings: Findings) -> ModelFacts:
    """Look at a folder; its tensors are not read where there is a `merged` copy with an adapter."""
    reference, where, folder = fact.reference, fact.where, Path(fact.reference.model.path)
    adapter = (folder / "adapter_config.json").is_file()
    if not merged and (not adapter or weights_of(folder) is not None):
        fact = replace(fact, tensors=read_tensors(folder, where, findings))
    if not (folder / "config.json").is_file():
        found, remedy = f"no config.json in {folder}", "Copy the model's config.json there."
        if adapter:
            found, remedy = f"an adapter alone in {folder}", f"Write `<base model>+{folder}`."
        findings.problem(where, found, "a model's folder with config.json and weights", remedy)
        return fact
    if adapter and (reference.lora is None or Path(reference.lora.path) != folder):
        found = f"an adapter_config.json in {folder}, which transformers applies, not mergekit"
        remedy = f"Write `{folder}+{folder}` to apply it, or remove it if the weights contain it."
        findings.problem(where, found, "a model's folder without an adapter", remedy)
    return replace(fact, config=_config(reference, where, options, findings))


def _hub_model(fact: ModelFacts, options: Any, findings: Findings) -> ModelFacts:
    model, where = fact.reference.model, fact.where
    folder = cached_folder(model, options)
    if folder is not None and weights_of(folder) is None:
        folder = None
    if huggingface_hub.is_offline_mode():
        # mergekit asks the Hub for the list of files even when it has them all.
        remedy = f"Unset HF_HUB_OFFLINE, or give a folder.{near(model.path)}"
        if folder is not None:
            remedy = f"Write the path of the cached copy, {folder}."
        found = f"{model.path}, which is no folder here, while HF_HUB_OFFLINE is set"
        findings.problem(where, found, "a folder that exists, or a network", remedy)
        if folder is None:
            return fact
    before = findings.count
    read, source = (_remote_tensors, model) if folder is None else (read_tensors, folder)
    tensors = read(source, where, findings)
    if tensors is None and findings.count > before:
        return fact
    config = _config(fact.reference, where, options, findings)
    return replace(fact, config=config, tensors=tensors)


def read_tensors(path: Path, where: str, findings: Findings) -> dict[str, TensorHeader] | None:
    """Return the tensors of a folder, or of a file of weights; None with a problem."""
    read, weights = (read_folder, weights_of(path)) if path.is_dir() else (read_file, path)
    try:
        tensors = read(path, allow_pickle=pickles_allowed())
    except FileError as error:
        wrong = error.problem
        found = f"{wrong.where} with {wrong.found}"
        findings.problem(where, found, wrong.expected, wrong.remedy)
        return None
    if weights is not None and "safetensors" not in weights.name:
        findings.note(f"{where}: {weights} is a pickle, as allowed; only tensors are read from it.")
    return tensors


def _remote_tensors(path: Any, where: str, findings: Findings) -> dict[str, TensorHeader] | None:
    """Read the headers of a repository (`ModelPath`); None, with a problem or a note, without."""
    try:
        metadata = _metadata(path)
    except Exception as error:  # network, access, parsing: the client's message is kept
        found = f"{path.path}, which the Hub does not give ({one_line(error)})"
        expected = "a folder that exists, or a model of the Hub that you may read"
        findings.problem(where, found, expected, remedy_for(error))
        return None
    if metadata is None:
        if pickles_allowed():
            what = "pickles, of which only tensors are read; they are checked after the download"
            findings.note(f"{where}: {path.path} holds {what}.")
        else:
            found = f"{path.path} without model.safetensors, but with pickles"
            findings.problem(where, found, "safetensors", PICKLE_REMEDY)
        return None
    tensors: dict[str, TensorHeader] = {}
    for name, file in metadata.weight_map.items():
        if entry := metadata.files_metadata[file].tensors.get(name):
            begin, end = entry.data_offsets
            tensors[name] = TensorHeader(name, str(entry.dtype), tuple(entry.shape), end - begin)
    return tensors


def _metadata(path: Any) -> Any:
    """Return what the Hub says of a repository's safetensors; None where it has other weights."""
    try:
        return huggingface_hub.get_safetensors_metadata(path.path, revision=path.revision)
    except NotASafetensorsRepoError:  # which is raised for one that is not there, too
        huggingface_hub.model_info(path.path, revision=path.revision)
        return None


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
        found = f"a config.json that transformers refuses ({one_line(error)})"
        remedy = "Mend config.json, or give --trust-remote-code if it needs code that you trust."
        findings.problem(where, found, "the configuration of a model that it knows", remedy)
        return None
    architectures = getattr(config, "architectures", None) or []
    if not isinstance(architectures, list) or [type(name) for name in architectures] != [str]:
        found = f"{architectures} as `architectures` in config.json of {reference.model}"
        remedy = "Add it to config.json, or give the model with `override_architecture:`."
        findings.problem(where, found, "the name of one architecture", remedy)
        return None
    if file := getattr(config, "transformers_weights", None):
        found = f"{file}, which transformers loads and mergekit does not look at"
        expected = "the weights in a file of the usual name"
        remedy = "Save the model again with `save_pretrained` into an empty folder."
        findings.problem(f"{where} (config.json: transformers_weights)", found, expected, remedy)
    return config


def _too_many(content: dict[str, Any], path: Path) -> tuple[str, str] | None:
    """Find a count in a configuration that nothing goes through: it, and what is expected."""
    layers = experts = 1
    inner: list[tuple[str, Any]] = [("", content)]
    while inner:  # no recursion, which JSON may be too deep for
        name, item = inner.pop()
        if isinstance(item, dict):
            inner += item.items()
        elif isinstance(item, list):
            inner += [(name, each) for each in item]
        elif type(item) is int and _COUNT.search(name):
            limit = _MOST_LAYERS if _LAYERS.search(name) else _MOST
            if not 0 <= item <= limit:
                shown = str(item) if abs(item) < 2**63 else "more than 64 bits"
                return f"{name} of {shown} in {path}", f"0 to {limit:,}"
            if _LAYERS.search(name):
                layers = max(layers, item)
            if _EXPERTS.search(name):
                experts = max(experts, item)
    if layers * experts > _MOST:
        return f"{layers:,} layers of {experts:,} experts in {path}", f"{_MOST:,} experts at most"
    return None
