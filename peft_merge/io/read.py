"""Reading adapters: folders, names on the Hub, and adapters of a live model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from mergekit_ext.errors import ConfigError, Problem
from peft_merge.adapter import Adapter
from peft_merge.io import names, unsupported
from peft_merge.io.hub import locate
from peft_merge.io.parse import parse
from peft_merge.io.tensors import CONFIG, of_memory, open_folder

Source = str | os.PathLike[str]

# Of bytes. Longer ones are no configuration, and would fill the memory.
LARGEST_CONFIG = 1 << 26


def load_adapter(
    source: Source,
    *,
    name: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """Read a LoRA or (IA)^3 adapter as PEFT saves it.

    Only its configuration and the header of its tensors are read; factors and vectors come one
    module at a time when `load` is called, and stop with `NonFiniteError` at NaN or infinity.

    Args:
        source: a folder, or a name on the Hub.
        name: of the adapter; the last component of `source` by default.
        revision: branch, tag or commit on the Hub.
        allow_pickle: also read adapter_model.bin (tensors only, by torch's restricted unpickler).

    Raises:
        ConfigError: with everything that is wrong with it, or why it cannot be merged exactly.
    """
    adapter, problems = _read(source, name, revision, allow_pickle)
    if problems or adapter is None:
        raise ConfigError(problems, f"the adapter {os.fspath(source)}")
    return adapter


def _read(
    source: Source, name: str | None, revision: str | None, allow_pickle: bool
) -> tuple[Adapter | None, list[Problem]]:
    called = default_name(source) if name is None else name
    problems = []
    if not called or called in (".", "..") or not names.sound(called.replace(".", "_")):
        expected = "a name without slashes and control characters"
        problems.append(Problem("name", repr(called), expected, "Give it a name."))
    folder = locate(source, revision, allow_pickle)
    if isinstance(folder, Problem):
        return None, [*problems, folder]
    config = _configuration(folder)
    if isinstance(config, Problem):
        return None, [*problems, config]
    problems += unsupported.problems(config, str(folder / CONFIG))
    tensors = open_folder(folder, allow_pickle)
    if isinstance(tensors, Problem):
        return None, [*problems, tensors]
    if problems:
        return None, problems
    return parse(called, config, tensors, str(folder))


def default_name(source: Source) -> str:
    """Return the last component of a path or of a name on the Hub."""
    path = Path(os.fspath(source))
    return path.resolve().name if path.name in ("", "..") else path.name


def _configuration(folder: Path) -> dict[str, Any] | Problem:
    path = folder / CONFIG
    try:
        if path.exists() and not path.is_file():
            return Problem(str(path), "no file", "a JSON object in a file")
        with path.open("rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
        if len(content) > LARGEST_CONFIG:
            remedy = "Save the adapter again with PEFT's save_pretrained."
            found = f"more than {LARGEST_CONFIG >> 20} MiB"
            return Problem(str(path), found, "a configuration of a few kilobytes", remedy)
        config = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        remedy = f"Give one of the folders in it: {', '.join(inner)}." if inner else ""
        expected = "an adapter as PEFT's save_pretrained writes it"
        return Problem(str(folder), f"no {CONFIG}", expected, remedy)
    except (OSError, ValueError, RecursionError) as error:
        return Problem(str(path), f"a file that is not JSON ({error})", "a JSON object")
    if not isinstance(config, dict):
        return Problem(str(path), f"a JSON {type(config).__name__}", "a JSON object")
    return config


def adapters_of(model: Any, names: Iterable[str]) -> list[Adapter]:
    """Return adapters that a PeftModel holds, as `load_adapter` gives those of folders.

    Tensors are the model's own (no copies). Embeddings of the base are left out, resized ones too:
    they belong to the model, not to one of its adapters.

    Args:
        model: a PeftModel.
        names: of its adapters.

    Raises:
        ConfigError: with everything that is wrong, or why they cannot be merged exactly.
    """
    from peft import get_peft_model_state_dict

    adapters: list[Adapter] = []
    problems: list[Problem] = []
    for name in names:
        if name not in model.peft_config:
            known = ", ".join(model.peft_config)
            problems.append(Problem("adapters", repr(name), f"adapters of the model: {known}"))
            continue
        config = {key: _plain(value) for key, value in model.peft_config[name].to_dict().items()}
        where = f"the adapter {name}"
        found = unsupported.problems(config, where)
        if not found:
            state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            adapter, found = parse(name, config, of_memory(state), where, live=True)
            adapters += [adapter] if adapter is not None else []
        problems += found
    if problems:
        raise ConfigError(problems, "the adapters of this model")
    return adapters


def _plain(value: Any) -> Any:
    """A field of a PeftConfig as adapter_config.json holds it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
