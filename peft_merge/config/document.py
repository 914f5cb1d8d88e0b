"""A merge as a user writes it, before it is checked: in Python, or in YAML as mergekit has it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mergekit_ext.errors import ConfigError, FileError, Problem, did_you_mean, join, shown
from mergekit_ext.io.documents import read as parsed
from mergekit_ext.io.documents import text_of
from peft_merge.adapter import Adapter

Source = Adapter | str | os.PathLike[str]

# In the order in which they are written.
_OPTIONS = ("rank", "patterns", "space", "seed", "dtype", "modules_to_save", "base_model")
_KEYS = ("merge_method", "models", "parameters", *_OPTIONS)
_MODEL_KEYS = ("model", "name", "parameters")

# Keys of mergekit that mean nothing for adapters.
_FULL_MODELS = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")


@dataclass(frozen=True)
class Input:
    """One adapter of a merge."""

    where: str  # in the configuration, for messages: ``models[0]``, ``adapters[0]``
    source: Source
    name: str | None  # None: the last component of its path
    revision: str | None  # of a name on the Hub
    parameters: Mapping[str, Any]  # its own settings


@dataclass(frozen=True)
class Request:
    """A merge as the user wrote it: values of any type, to be checked by `check.checked`."""

    method: Any
    inputs: tuple[Input, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rank: Any = None
    patterns: Any = None
    space: Any = None
    seed: Any = 0
    dtype: Any = None
    device: Any = "cpu"
    modules_to_save: Any = None
    base_model: Any = None
    name: str = "merged"  # of the merged adapter
    text: str | None = None  # the YAML that the user wrote, which is written beside the result
    subject: str = "this merge"  # in an error's first line
    allow_pickle: bool = False


def models_of(
    adapters: Sequence[Source] | Mapping[str, Source],
    weights: Sequence[float] | None,
    each: Sequence[Mapping[str, Any]] | None,
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Return the entries of `models:` that stand for arguments of `merge_adapters`.

    Raises:
        TypeError: the adapters are no list.
    """
    if isinstance(adapters, (str, os.PathLike, Adapter)):
        raise TypeError("adapters: found one of them; expected a list, as in [adapter].")
    named = adapters.items() if isinstance(adapters, Mapping) else ((None, a) for a in adapters)
    entries: list[dict[str, Any]] = [
        {"model": source, "name": name, "parameters": {}} for name, source in named
    ]
    problems = []
    for argument, values in {"weights": weights, "each": each}.items():
        if values is None:
            continue
        if isinstance(values, (Mapping, str)) or len(values) != len(entries):
            expected = f"a list of {len(entries)}, one for each adapter in their order"
            problems.append(Problem(argument, shown(values), expected))
            continue
        for i, (entry, value) in enumerate(zip(entries, values, strict=True)):
            own = {"weight": value} if argument == "weights" else dict(value)  # type: ignore[call-overload]
            if entry["parameters"].keys() & own.keys():
                found = "a weight in `weights` too"
                problems.append(Problem(f"each[{i}].weight", found, "one of the two"))
            entry["parameters"] |= own
    return entries, problems


def read(
    source: str | os.PathLike[str] | Mapping[str, Any], instead: Mapping[str, Any]
) -> tuple[Request, list[Problem]]:
    """Return a request from a YAML file or a parsed document, and what is wrong with its form.

    Keys of `instead` replace those of the document.

    Raises:
        ConfigError: the file cannot be read, or is no mapping, so that there is nothing to check.
    """
    if isinstance(source, Mapping):
        return request_of({**source, **instead})
    subject = os.fspath(source)
    text = text_of(Path(source))
    try:
        documents, repeated = parsed(text)
    except FileError as error:
        where = error.problem.where
        located_at = subject if where == "the file" else f"{subject}, {where}"
        raise ConfigError([replace(error.problem, where=located_at)]) from None
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        found = f"{len(documents)} documents" if len(documents) != 1 else shown(documents[0])
        expected = "one mapping with `merge_method:` and `models:`"
        raise ConfigError([Problem(subject, found, expected)])
    request, problems = request_of({**documents[0], **instead})
    request = replace(request, text=None if instead else text, subject=subject)
    return request, repeated + problems


def request_of(content: Mapping[str, Any], models: str = "models") -> tuple[Request, list[Problem]]:
    """Return the request of a document's content, and what is wrong with its form.

    Messages call the list of adapters `models`.
    """
    problems: list[Problem] = []
    entries = content.get("models")
    if not isinstance(entries, list) or not entries:
        expected = "a list of one adapter at least"
        problems.append(Problem(models, shown(entries), expected, "List the adapters to merge."))
        entries = []
    _check_keys(content, _KEYS, "", problems)
    base = content.get("base_model")
    inputs = [_input(entry, join(models, i), base, problems) for i, entry in enumerate(entries)]
    request = Request(
        method=content.get("merge_method"),
        inputs=tuple(item for item in inputs if item is not None),
        parameters=_mapping(content.get("parameters"), "parameters", problems),
        **{key: content[key] for key in _OPTIONS if content.get(key) is not None},
    )
    return request, problems


def _input(entry: Any, where: str, base_model: Any, problems: list[Problem]) -> Input | None:
    if not isinstance(entry, Mapping):
        remedy = f"Write `- model: {entry}`." if isinstance(entry, str) else ""
        problems.append(Problem(where, shown(entry), "an entry with `model:`", remedy))
        return None
    _check_keys(entry, _MODEL_KEYS, where, problems)
    source: Any = entry.get("model")
    name, revision = entry.get("name"), None
    if name is not None and (not isinstance(name, str) or not name):
        problems.append(Problem(f"{where}.name", shown(name), "a text"))
        name = None
    wrong, expected, remedy = "", "an adapter alone", "the base is not needed."
    if not isinstance(source, (str, os.PathLike, Adapter)) or source == "":
        wrong, expected, remedy = shown(source), "an adapter's folder, or its name on the Hub", ""
    elif isinstance(source, str):
        local = os.path.exists(os.path.expanduser(source))
        if not local:
            source, _, revision = source.partition("@")  # as mergekit writes a revision
        if source == base_model:
            wrong, remedy = "the base model", f"Take it out: {remedy}"
        elif "+" in source and not local:
            wrong, remedy = shown(source), f"Write `model: {source.split('+', 1)[1]}`: {remedy}"
    if wrong:
        problems.append(Problem(f"{where}.model", wrong, expected, remedy))
        return None
    parameters = _mapping(entry.get("parameters"), f"{where}.parameters", problems)
    return Input(where, source, name, revision or None, parameters)


def _mapping(value: Any, where: str, problems: list[Problem]) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        problems.append(Problem(where, shown(value), "a mapping from parameters to values"))
    return value if isinstance(value, Mapping) else {}


def _check_keys(
    document: Mapping[Any, Any], known: tuple[str, ...], path: str, problems: list[Problem]
) -> None:
    for key in document:
        if key not in known:
            found, remedy = "an unknown key", did_you_mean(key, known, listed=True)
            if not path and key in _FULL_MODELS:
                found = "a key for full models"
                remedy = "Take it out: adapters are merged whole, and have no tokenizer."
            expected = f"one of {', '.join(sorted(known))}"
            problems.append(Problem(join(path, str(key)), found, expected, remedy))


def written(request: Request, adapters: Sequence[Adapter]) -> str:
    """Return the YAML of a request: the user's own text, or what gives the same merge."""
    if request.text is not None:
        return request.text
    models = []
    for item, adapter in zip(request.inputs, adapters, strict=True):
        source = adapter.name if isinstance(item.source, Adapter) else os.fspath(item.source)
        model = source + (f"@{item.revision}" if item.revision else "")
        entry = {"model": model, "name": adapter.name, "parameters": item.parameters}
        models.append({key: value for key, value in entry.items() if value})
    values = {
        "merge_method": request.method,
        "models": models,
        "parameters": request.parameters,
        **{key: getattr(request, key) for key in _OPTIONS},
        "seed": request.seed or None,
        "dtype": request.dtype and str(request.dtype).removeprefix("torch."),
    }
    document = {key: value for key, value in values.items() if value not in (None, {})}
    return yaml.safe_dump(plain(document), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """Return a value through JSON, without paths, tuples, tensors and NumPy's numbers."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else os.fspath(value)
