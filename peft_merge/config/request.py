"""What a user asks for, before it is checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_ext.io import paths
from peft_merge.adapter import Adapter


@dataclass(frozen=True)
class Input:
    """One adapter of a merge.

    Attributes:
        where: in the configuration (``models[0]``, ``adapters[0]``), for messages.
        source: a folder, a name on the Hub, or the adapter itself.
        revision: of a name on the Hub.
        name: what the user calls it; None for the last component of its path.
        parameters: its own settings, under ``<where>.parameters`` in YAML.
        settings_at: where those stand, for messages.
    """

    where: str
    source: Adapter | str | os.PathLike[str]
    name: str | None = None
    revision: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    settings_at: str = ""


@dataclass(frozen=True)
class Request:
    """A merge as the user wrote it: values of any type, to be checked by `check.checked`.

    Attributes:
        subject: the merge in an error's first line.
        method: the name of a rule or of a whole-merge method.
        inputs: the adapters, in the user's order.
        parameters: settings of the whole merge, and defaults of per-model ones.
        text: the YAML that the user wrote, and that is written beside the result, or None.
        others: see docs/adapters.md, "Configuration"; None where the user said nothing.
    """

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
    name: str = "merged"
    text: str | None = None
    subject: str = "this merge"
    allow_pickle: bool = False


def exists(path: str) -> bool:
    """Whether there is something at a path, which may be no path at all."""
    return paths.exists(paths.expanded(path))


def located(model: str) -> tuple[str, str | None]:
    """The folder or name, and the revision of ``name@revision`` as mergekit writes it."""
    if "@" not in model or exists(model):
        return model, None
    name, _, revision = model.partition("@")
    return name, revision
