"""From the configuration and the headers of an adapter to its modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import Problem
from mergekit_ext.headers import TensorHeader
from peft_merge.adapter import (
    Adapter,
    Ia3Adapter,
    LayoutName,
    LoraAdapter,
    ModuleInfo,
    Update,
    VectorInfo,
)
from peft_merge.io import names, whole
from peft_merge.io.tensors import DTYPES, VECTOR, Tensors, finite
from peft_merge.layouts import BIAS, LAYOUTS, LayoutError
from peft_merge.patterns import Scaling, parameter_scalings, scaling, targeted_parameters
from peft_merge.refused import unknown_tensor

_PARTS = ("lora_A.weight", "lora_B.weight", BIAS, "lora_embedding_A", "lora_embedding_B", VECTOR)
# Kept by training only (VeLoRA's projection of activations).
_IGNORED = (".lora_velora_embed",)


@dataclass
class _Stored:
    """Headers of an adapter, sorted by what they are."""

    modules: dict[str, dict[str, TensorHeader]]
    rest: dict[str, TensorHeader]


def parse(
    name: str, config: Mapping[str, Any], tensors: Tensors, where: str
) -> tuple[Adapter | None, list[Problem]]:
    """Make an adapter of a checked configuration and of tensors, or list what is wrong.

    Args:
        name: of the adapter.
        config: of an accepted kind, every field of its type.
        tensors: under PEFT's names, ``base_model.model.`` included.
        where: the file, for the messages.
    """
    found: list[Problem] = []
    stored = _sort(tensors.headers, where, found)
    saved = whole.collect(config, stored.rest, stored.modules, where, found)
    read = _Reader(name, tensors)
    load_saved = {key: partial(read.whole, header) for key, header in saved.items()}
    adapter: Adapter
    if config["peft_type"] == "IA3":
        vectors = dict(_vectors(config, stored.modules, where, found))
        adapter = Ia3Adapter(name, config, vectors, read.vector, load_saved)
    else:
        described = dict(_factors(config, stored.modules, where, found))
        infos = {module: info for module, (info, _) in described.items()}
        scales = {module: each.scale for module, (_, each) in described.items()}
        load = partial(read.update, infos, scales)
        adapter = LoraAdapter(name, config, infos, load, load_saved)
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


def _sort(headers: Mapping[str, TensorHeader], where: str, found: list[Problem]) -> _Stored:
    stored = _Stored({}, {})
    unsound, foreign = [], []
    for key, header in headers.items():
        if not names.sound(key):
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
                "names of dotted parts without slashes and control characters",
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


def _factors(
    config: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, TensorHeader]],
    where: str,
    found: list[Problem],
) -> Iterator[tuple[str, tuple[ModuleInfo, Scaling]]]:
    governing = _scalings(config, modules, where, found)
    with_bias = bool(config.get("lora_bias"))
    for module, parts in modules.items():
        if module not in governing:
            continue
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        kind: LayoutName = "embedding" if embedding else "linear"
        wanted = [LAYOUTS[kind].a, LAYOUTS[kind].b]
        # PEFT has no bias for embeddings and target parameters.
        if with_bias and not embedding:
            wanted.append(BIAS)
        if not _complete(module, parts, wanted, where, found):
            continue
        a, b = parts[LAYOUTS[kind].a], parts[LAYOUTS[kind].b]
        if targeted_parameters(config, names.unwrapped(module)) and not embedding:
            kind = "parameter"
        elif len(a.shape) > 2:
            kind = "convolution"
        each = governing[module]
        dtype = torch.promote_types(DTYPES[a.dtype], DTYPES[b.dtype])
        try:
            info = LAYOUTS[kind].describe(a.shape, b.shape, each.rank, BIAS in parts, dtype)
        except LayoutError as error:
            found.append(
                Problem(
                    f"{where}: {module}",
                    error.found,
                    error.expected,
                    "Restore the adapter_config.json that was saved with these tensors.",
                )
            )
            continue
        if info.bias and parts[BIAS].shape != (info.matrices * info.rows,):
            shape = list(parts[BIAS].shape)
            outputs = info.matrices * info.rows
            found.append(
                Problem(f"{where}: {module}.{BIAS}", f"shape {shape}", f"shape {[outputs]}")
            )
            continue
        yield module, (info, each)


def _scalings(
    config: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, TensorHeader]],
    where: str,
    found: list[Problem],
) -> dict[str, Scaling]:
    """Rank and scaling of every module; modules of which they cannot be known are left out."""
    known: dict[str, Scaling] = {}
    wrappers: dict[str, list[str]] = {}
    for module in modules:
        base = names.owner(module, modules)
        if targeted_parameters(config, base) and LAYOUTS["parameter"].a in modules[module]:
            wrappers.setdefault(base, []).append(module)
        else:
            known[module] = scaling(config, base)
    for base, nested in wrappers.items():
        nested.sort(key=len)
        leaves = targeted_parameters(config, base)
        sizes = [modules[module][LAYOUTS["parameter"].a].shape[:1] for module in nested]
        stacked = [size[0] for size in sizes if size]
        each = parameter_scalings(config, base, leaves, stacked)
        if each is None or len(each) != len(nested):
            found.append(
                Problem(
                    f"{where}: {base}",
                    f"{len(nested)} stacks of factors with {stacked} rows for the parameters "
                    f"{', '.join(leaves)}, whose ranks or alphas differ",
                    "factors that tell which parameter each is of",
                    "Files do not name target parameters; give all of one module the same rank "
                    "and alpha, and train or convert the adapter again.",
                )
            )
            continue
        known |= dict(zip(nested, each, strict=True))
    return known


def _vectors(
    config: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, TensorHeader]],
    where: str,
    found: list[Problem],
) -> Iterator[tuple[str, VectorInfo]]:
    chosen = config.get("feedforward_modules")
    for module, parts in modules.items():
        if not _complete(module, parts, [VECTOR], where, found):
            continue
        header = parts[VECTOR]
        shape = header.shape
        by_shape = {
            feedforward
            for feedforward, axis in ((True, 1), (False, 0 if len(shape) == 2 else 1))
            if len(shape) > 1 and shape[axis] > 0 and _is_vector(shape, axis)
        }
        if chosen is None:
            possible = by_shape
        elif isinstance(chosen, str):
            possible = by_shape & {bool(re.fullmatch(chosen, module))}
        else:
            possible = by_shape & {module.endswith(tuple(chosen))}
        if len(possible) != 1:
            found.append(
                Problem(
                    f"{where}: {module}.{VECTOR}",
                    f"shape {list(shape)} with feedforward_modules {chosen!r}",
                    "(1, in) for a feedforward module, (out, 1) for another, (1, channels, 1, ...)"
                    " for a convolution",
                    "Restore the adapter_config.json that was saved with these tensors.",
                )
            )
            continue
        yield module, VectorInfo(shape, possible.pop(), DTYPES[header.dtype])


def _is_vector(shape: tuple[int, ...], axis: int) -> bool:
    """Whether all axes but one have length 1."""
    return all(length == 1 for place, length in enumerate(shape) if place != axis)


def _complete(
    module: str,
    parts: Mapping[str, TensorHeader],
    wanted: list[str],
    where: str,
    found: list[Problem],
) -> bool:
    missing = [part for part in wanted if part not in parts]
    extra = [part for part in parts if part not in wanted]
    wrong = [part for part, header in parts.items() if header.dtype not in DTYPES]
    if missing or extra:
        text = [f"no {part}" for part in missing] + [
            f"{part}, which has no place" for part in extra
        ]
        found.append(
            Problem(
                f"{where}: {module}",
                " and ".join(text),
                f"{', '.join(wanted)}, as its configuration says",
                "Save the adapter again with PEFT's save_pretrained.",
            )
        )
    if wrong:
        found.append(
            Problem(
                f"{where}: {module}",
                f"{wrong[0]} of dtype {parts[wrong[0]].dtype}",
                f"one of {', '.join(DTYPES)}",
                "Save the adapter in a floating-point dtype.",
            )
        )
    return not (missing or extra or wrong)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return f"{', '.join(map(repr, keys[:2]))}{more} ({unknown_tensor(keys[0])})"


class _Reader:
    """Reads what the modules of one adapter need, and stops at NaN."""

    def __init__(self, adapter: str, tensors: Tensors):
        self._adapter, self._tensors = adapter, tensors

    def _get(self, key: str) -> Tensor:
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
