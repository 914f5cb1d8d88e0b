"""Writing an adapter as PEFT's save_pretrained would, and checking it before it appears."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.io.staging import new_folder
from peft_merge.adapter import Adapter, LoraAdapter
from peft_merge.io import layouts, names
from peft_merge.io.card import card as default_card
from peft_merge.io.read import load_adapter
from peft_merge.io.tensors import CONFIG, SAFETENSORS, VECTOR

MERGE_CONFIG = "merge_config.yml"
REPORT = "merge_report.json"
CARD = "README.md"


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    merge_config: str | None = None,
    report: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write an adapter's folder: it appears complete and checked, or not at all.

    The folder is written beside `path`, read again (names, shapes, scalings, finite values), and
    then renamed.

    Args:
        adapter: as read, or merged.
        path: a folder that does not exist or is empty.
        merge_config: for merge_config.yml.
        report: JSON values for merge_report.json.
        card: the text of README.md; one is made if it is None.

    Raises:
        ConfigError: there is something at `path`, or it cannot be written.
        NonFiniteError: a tensor overflowed in the dtype in which it is to be stored.
    """
    with new_folder(path, f"writing the adapter {adapter.name}") as folder:
        fill_folder(adapter, folder, merge_config=merge_config, report=report, card=card)


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Return all tensors of an adapter under the names of PEFT's files, on the CPU, contiguous."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in _named(adapter):
        tensor = value.detach().to("cpu").contiguous()
        # safetensors takes no two tensors that share memory.
        start = tensor.untyped_storage().data_ptr()
        if start in seen:
            tensor = tensor.clone()
        seen.add(start)
        stored[names.PREFIX + name] = tensor
    return stored


def _named(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    if isinstance(adapter, LoraAdapter):
        for module, info in adapter.infos.items():
            update = adapter.load(module)
            factors = layouts.store(info, update.a, update.b)
            for key, factor in zip(layouts.keys(info.layout), factors, strict=True):
                yield f"{module}.{key}", factor
            if update.bias is not None:
                yield f"{module}.{layouts.BIAS}", update.bias
    else:
        for module in adapter.infos:
            yield f"{module}.{VECTOR}", adapter.load(module)
    for name, load in adapter.saved.items():
        yield names.stored(name, adapter.infos), load()


def fill_folder(
    adapter: Adapter,
    folder: Path,
    *,
    merge_config: str | None = None,
    report: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write an adapter's files into an empty folder, and check them; see `save_adapter`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state_dict(adapter), folder / SAFETENSORS, {"format": "pt"})
    except SafetensorError as error:  # raised for a full disk
        raise OSError(str(error)) from error
    texts = {
        CONFIG: json.dumps(adapter.config, indent=2, sort_keys=True),
        MERGE_CONFIG: merge_config and merge_config.rstrip(),
        REPORT: None if report is None else json.dumps(report, indent=2),
        CARD: (default_card(adapter, merge_config, report) if card is None else card).rstrip(),
    }
    for name, text in texts.items():
        if text is not None:
            (folder / name).write_text(text + "\n", encoding="utf-8")
    _check(adapter, folder)


def _check(adapter: Adapter, folder: Path) -> None:
    """Read the folder again and compare."""
    again = load_adapter(folder, name=adapter.name)
    different = sorted(
        module
        for module in {*adapter.infos, *again.infos}
        if adapter.infos.get(module) != again.infos.get(module) or not _same(adapter, again, module)
    )
    different += sorted(set(adapter.saved) ^ set(again.saved))
    if different:
        raise MergeError(
            f"{adapter.name}: {', '.join(different[:5])} read differently from what was to be "
            f"written ({len(different)} in all); the configuration does not describe the tensors."
        )


def _same(adapter: Adapter, again: Adapter, module: str) -> bool:
    if isinstance(adapter, LoraAdapter) and isinstance(again, LoraAdapter):
        left, right = adapter.load(module), again.load(module)
        return abs(left.scale - right.scale) <= 1e-9 * abs(left.scale)
    first, second = adapter.load(module), again.load(module)
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and torch.equal(first.to("cpu"), second)
    )
