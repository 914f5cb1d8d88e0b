"""From the configuration and the headers of an adapter to its modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from mergekit_ext.errors import Problem
from mergekit_ext.io.headers import TensorHeader
from peft_merge.adapter import (
    Adapter,
    Ia3Adapter,
    LoraAdapter,
    ModuleInfo,
    Update,
)
from peft_merge.io import names, whole
from peft_merge.io.factors import factors
from peft_merge.io.tensors import VECTOR, Tensors, finite
from peft_merge.io.vectors import vectors
from peft_merge.layouts import BIAS, LAYOUTS
from peft_merge.refused import unknown_tensor
from peft_merge.targets import SELECTION, Targets

_PARTS = ("lora_A.weight", "lora_B.weight", BIAS, "lora_embedding_A", "lora_embedding_B", VECTOR)
# Fields that may list modules.
_LISTS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
# Kept by training only (VeLoRA's projection of activations).
_IGNORED = (".lora_velora_embed",)


@dataclass
class _Stored:
    """Headers of an adapter, sorted by what they are, and the file's name of each tensor."""

    modules: dict[str, dict[str, TensorHeader]]
    rest: dict[str, TensorHeader]
    keys: dict[str, str]


def parse(
    name: str, config: Mapping[str, Any], tensors: Tensors, where: str, *, live: bool = False
) -> tuple[Adapter | None, list[Problem]]:
    """Make an adapter of a checked configuration and of tensors, or list what is wrong.

    Args:
        name: of the adapter.
        config: of an accepted kind, every field of its type.
        tensors: under PEFT's names, ``base_model.model.`` included.
        where: the file, for the messages.
        live: the adapter is in a model, so that PEFT has matched its expressions already.
    """
    found: list[Problem] = []
    if not live:
        config = _plain(config)
    stored = _sort(tensors.headers, where, found, live)
    saved = whole.collect(config, stored.rest, stored.modules, where, found)
    read = _Reader(name, tensors, stored.keys)
    load_saved = {key: partial(read.whole, header) for key, header in saved.items()}
    adapter: Adapter
    if config["peft_type"] == "IA3":
        multiplied = dict(vectors(config, stored.modules, where, found))
        adapter = Ia3Adapter(name, config, multiplied, read.vector, load_saved)
    else:
        described = dict(factors(config, stored.modules, where, found))
        infos = {module: info for module, (info, _) in described.items()}
        scales = {module: each.scale for module, (_, each) in described.items()}
        load = partial(read.update, infos, scales)
        adapter = LoraAdapter(name, config, infos, load, load_saved)
    found += _idle(config, stored.modules, where)
    if not stored.modules and not found:
        found.append(
            Problem(
                where,
                "no factors and no vectors",
                f"tensors named {names.PREFIX}<module>.<part>",
                "Save the adapter again with PEFT's save_pretrained.",
            )
        )
    return (None if found else adapter), found


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose lists name modules as `names.plain` does."""
    listed = {
        field: [names.plain(entry) for entry in config[field]]
        for field in _LISTS
        if isinstance(config.get(field), list)
    }
    return {**config, **listed}


def _sort(
    headers: Mapping[str, TensorHeader], where: str, found: list[Problem], live: bool
) -> _Stored:
    stored = _Stored({}, {}, {})
    unsound, foreign = [], []
    for raw, header in headers.items():
        key = raw if live or not names.sound(raw) else names.plain(raw)
        if (other := stored.keys.setdefault(key, raw)) != raw:
            expected, remedy = "one tensor of each name", "Save the adapter again with PEFT."
            found.append(Problem(where, f"{other} and {raw}, one module", expected, remedy))
        elif not names.sound(raw):
            unsound.append(key)
        elif not key.startswith(names.PREFIX):
            foreign.append(key)
        elif not key.endswith(_IGNORED):
            inner = key.removeprefix(names.PREFIX)
            part = next((part for part in _PARTS if inner.endswith(f".{part}")), None)
            if part is None:
                stored.rest[inner] = header
            else:
                stored.modules.setdefault(inner.removesuffix(f".{part}"), {})[part] = header
    if unsound:
        found.append(
            Problem(
                where,
                f"{_some(unsound)} among its tensors",
                "names of dotted parts without slashes and control characters, of 1,024 at most",
                "Do not use this adapter unless you know who wrote it.",
            )
        )
    if foreign:
        found.append(
            Problem(
                where,
                f"{_some(foreign)} among its tensors",
                f"names that start with {names.PREFIX}",
                "Convert the adapter to PEFT's format: load it with the library that wrote it, "
                "and save it with PEFT.",
            )
        )
    return stored


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return f"{', '.join(map(repr, keys[:2]))}{more} ({unknown_tensor(keys[0])})"


def _idle(
    config: Mapping[str, Any], modules: Mapping[str, Mapping[str, TensorHeader]], where: str
) -> Iterator[Problem]:
    """Modules with tensors that PEFT would not read."""
    owners = dict.fromkeys(names.owner(module, modules) for module in modules)
    targets = Targets(config)
    idle = [o for o in owners if not targets.adapt(o) and not targets.parameters(o)]
    if idle:
        fields = [field for field in SELECTION if config.get(field)]
        more = f" and {len(idle) - 2} more" if len(idle) > 2 else ""
        yield Problem(
            f"{where}: target_modules",
            f"tensors of {', '.join(idle[:2])}{more}, which {' with '.join(fields)} "
            f"{'leave' if len(fields) > 1 else 'leaves'} out: PEFT would not load them",
            "tensors of modules that the configuration adapts",
            "Restore the adapter_config.json that was saved with these tensors.",
        )


class _Reader:
    """Reads what the modules of one adapter need, and stops at NaN."""

    def __init__(self, adapter: str, tensors: Tensors, keys: Mapping[str, str]):
        self._adapter, self._tensors, self._keys = adapter, tensors, keys

    def _get(self, name: str) -> Tensor:
        key = self._keys.get(name, name)
        return finite(self._tensors.get(key), key, self._adapter)

    def update(
        self, infos: Mapping[str, ModuleInfo], scales: Mapping[str, float], module: str
    ) -> Update:
        info = infos[module]
        layout = LAYOUTS[info.layout]
        start = f"{names.PREFIX}{module}."
        a, b = (self._get(start + part).to(info.dtype) for part in (layout.a, layout.b))
        bias = self._get(start + BIAS) if info.bias else None
        a, b = layout.stack(info, a, b)
        return Update(a, b, scales[module], bias)

    def vector(self, module: str) -> Tensor:
        return self._get(f"{names.PREFIX}{module}.{VECTOR}")

    def whole(self, header: TensorHeader) -> Tensor:
        return self._get(header.name)
