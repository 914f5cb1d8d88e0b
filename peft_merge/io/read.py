"""Reading adapters: folders and names on the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mergekit_ext.errors import ConfigError, Problem
from peft_merge import refused
from peft_merge.adapter import Adapter
from peft_merge.io import fields, names
from peft_merge.io.hub import locate
from peft_merge.io.parse import parse
from peft_merge.io.tensors import CONFIG, open_folder

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
        name: what to call it; the last component of `source` by default.
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
    problems = [] if _usable(called) else [_unusable(called)]
    folder = locate(source, revision, allow_pickle)
    if isinstance(folder, Problem):
        return None, [*problems, folder]
    config = _configuration(folder)
    if isinstance(config, Problem):
        return None, [*problems, config]
    where = str(folder / CONFIG)
    problems += [*refused.refusals(config, where), *fields.problems(config, where)]
    tensors = open_folder(folder, allow_pickle)
    if isinstance(tensors, Problem):
        return None, [*problems, tensors]
    if problems:
        return None, problems
    return parse(called, config, tensors, str(folder))


def default_name(source: Source) -> str:
    """The last component of a path or of a name on the Hub."""
    path = Path(os.fspath(source))
    return path.resolve().name if path.name in ("", "..") else path.name


def _usable(name: str) -> bool:
    return bool(name) and name not in (".", "..") and names.sound(name.replace(".", "_"))


def _unusable(name: str) -> Problem:
    return Problem(
        "name", repr(name), "a name without slashes and control characters", "Give it a name."
    )


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
        return Problem(
            str(folder),
            f"no {CONFIG}",
            "an adapter as PEFT's save_pretrained writes it",
            f"Give one of the folders in it: {', '.join(inner)}." if inner else "",
        )
    except (OSError, ValueError, RecursionError) as error:
        return Problem(str(path), f"a file that is not JSON ({error})", "a JSON object")
    if not isinstance(config, dict):
        return Problem(str(path), f"a JSON {type(config).__name__}", "a JSON object")
    return config
