"""From the configuration and the headers of an adapter to its modules."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, Problem, listing
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.io.headers import WHOLE, TensorHeader
from mergekit_ext.kernels.numerics import finite
from peft_merge import adapter as data
from peft_merge.adapter import Adapter, Ia3Adapter, LoraAdapter, ModuleInfo, Update, VectorInfo
from peft_merge.io import names

# What follows the module's name in the keys of A and of B, of the bias of B, of a vector.
_FACTORS = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
BIAS = "lora_B.bias"
VECTOR = "ia3_l"
_PARTS = (*_FACTORS, BIAS, *_EMBEDDING_FACTORS, VECTOR)
# Fields that may list modules.
_LISTS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
# Kept by training only (VeLoRA's projection of activations).
_IGNORED = (".lora_velora_embed",)
# PEFT stores `modules_to_save` twice more if their vocabulary was resized, and their biases with
# `bias: all`; neither is used.
_COPIES = (".original_module.", ".modules_to_save.")
_RESTORE = "Restore the adapter_config.json that was saved with these tensors."
_SAVE_AGAIN = "Save the adapter again with PEFT's save_pretrained."
_FLOATING = f"one of {', '.join(FLOATING)}"


@dataclass(frozen=True)
class Tensors:
    """Named tensors of which names, shapes and dtypes are known without reading them."""

    headers: Mapping[str, TensorHeader]
    get: Callable[[str], Tensor]


def factor_keys(layout: data.LayoutName) -> tuple[str, str]:
    """Return what follows a module's name in the keys of A and of B."""
    return _EMBEDDING_FACTORS if layout == "embedding" else _FACTORS


def parse(
    name: str, config: Mapping[str, Any], tensors: Tensors, where: str, *, live: bool = False
) -> Adapter:
    """Return the adapter of a checked configuration and of tensors, or raise `ConfigError`.

    With `live` the adapter is in a model, where PEFT has matched its expressions already.
    """
    if not live:
        config = {
            field: [names.plain(entry) for entry in value]
            if field in _LISTS and isinstance(value, list)
            else value
            for field, value in config.items()
        }
    stored = _Stored(name, config, tensors, where, live)
    adapter = stored.adapter()
    if stored.problems:
        raise ConfigError(stored.problems, where)
    return adapter


class _Stored:
    """An adapter's headers, sorted by what they are; it reads tensors by the names of modules."""

    def __init__(
        self, name: str, config: Mapping[str, Any], tensors: Tensors, where: str, live: bool
    ):
        self.problems: list[Problem] = []
        self._name, self._config, self._tensors, self._where = name, config, tensors, where
        self._targets = names.Targets(config)
        self._keys: dict[str, str] = {}  # of the file, by the plain name
        self._modules: dict[str, dict[str, TensorHeader]] = {}  # by what follows the module's name
        self._rest: dict[str, TensorHeader] = {}
        self._sort(live)

    def adapter(self) -> Adapter:
        saved = {base: partial(self._get, h.name) for base, h in self._whole_tensors().items()}
        adapter: Adapter
        if self._config["peft_type"] == "IA3":
            vectors = dict(self._vectors())
            adapter = Ia3Adapter(self._name, self._config, vectors, self._vector, saved)
        else:
            factors = dict(self._factors())
            infos = {module: info for module, (info, _) in factors.items()}
            load = partial(self._update, factors)
            adapter = LoraAdapter(self._name, self._config, infos, load, saved)
        self._idle()
        if not self._modules and not self.problems:
            expected = f"tensors named {names.PREFIX}<module>.<part>"
            self._wrong("", "no factors and no vectors", expected, _SAVE_AGAIN)
        return adapter

    def _wrong(self, at: str, found: str, expected: str, remedy: str = "") -> None:
        where = f"{self._where}: {at}" if at else self._where
        self.problems.append(Problem(where, found, expected, remedy))

    def _sort(self, live: bool) -> None:
        unsound, foreign = [], []
        for raw, header in self._tensors.headers.items():
            sound = names.sound(raw)
            key = names.plain(raw) if sound and not live else raw
            if (other := self._keys.setdefault(key, raw)) != raw:
                found, expected = f"{other} and {raw}, one module", "one tensor of each name"
                self._wrong("", found, expected, _SAVE_AGAIN)
            elif not sound:
                unsound.append(key)
            elif not key.startswith(names.PREFIX):
                foreign.append(key)
            elif not key.endswith(_IGNORED):
                inner = key.removeprefix(names.PREFIX)
                part = next((part for part in _PARTS if inner.endswith(f".{part}")), None)
                if part is None:
                    self._rest[inner] = header
                else:
                    self._modules.setdefault(inner.removesuffix(f".{part}"), {})[part] = header
        expected = "dotted names without slashes and control characters, not longer than 1,024"
        self._unknown(unsound, expected, "Do not use this adapter unless you know its author.")
        self._unknown(foreign, f"names that start with {names.PREFIX}", _SAVE_AGAIN)

    def _unknown(self, keys: list[str], expected: str, remedy: str) -> None:
        if keys:
            listed = listing([*map(repr, keys)], 2)
            self._wrong("", f"{listed} among its tensors", expected, remedy)

    def _whole_tensors(self) -> dict[str, TensorHeader]:
        """Return the tensors that belong to no adapted module, by the base's names."""
        saved: dict[str, TensorHeader] = {}
        unknown = []
        for name, header in self._rest.items():
            if any(name.replace(copy, ".") in self._rest for copy in _COPIES if copy in name):
                continue
            base = names.unwrapped(name)
            if base in saved or not names.is_whole(name, self._config, self._modules):
                unknown.append(name)
            elif header.dtype in FLOATING or header.dtype in WHOLE:
                saved[base] = header
            else:
                expected = f"{_FLOATING}, or whole numbers"
                self._wrong(name, f"dtype {header.dtype}", expected, _SAVE_AGAIN)
        expected = "factors, vectors, embeddings, and what the configuration says is saved"
        remedy = f"{_SAVE_AGAIN[:-1]}, or merge it into its base with PEFT."
        self._unknown(unknown, expected, remedy)
        return saved

    def _complete(self, module: str, wanted: list[str]) -> bool:
        """Return whether a module has the parts `wanted`, no others, in floating-point dtypes."""
        parts = self._modules[module]
        odd = [f"no {part}" for part in wanted if part not in parts]
        odd += [f"{part}, which has no place" for part in parts if part not in wanted]
        if odd:
            expected = f"{', '.join(wanted)}, as its configuration says"
            self._wrong(module, " and ".join(odd), expected, _SAVE_AGAIN)
        wrong = [part for part, header in parts.items() if header.dtype not in FLOATING]
        if wrong:
            found = f"{wrong[0]} of dtype {parts[wrong[0]].dtype}"
            self._wrong(module, found, _FLOATING, "Save the adapter in a floating-point dtype.")
        return not odd and not wrong

    def _factors(self) -> Iterator[tuple[str, tuple[ModuleInfo, float]]]:
        """Yield the modules of a LoRA and their scalings."""
        stacks = Counter(names.owner(module, self._modules) for module in self._modules)
        for module, parts in self._modules.items():
            embedding = any(part in parts for part in _EMBEDDING_FACTORS)
            kind: data.LayoutName = "embedding" if embedding else "linear"
            keys = factor_keys(kind)
            # PEFT has no bias for embeddings and target parameters.
            with_bias = self._config.get("lora_bias") and not embedding
            if not self._complete(module, [*keys, *([BIAS] if with_bias else [])]):
                continue
            a, b = (parts[part] for part in keys)
            owner = names.owner(module, self._modules)
            leaves = [] if embedding else self._targets.parameters(owner)
            governing = [f"{owner}.{leaf}" for leaf in leaves] or [owner]
            (rank, scale), *others = {names.scaling(self._config, name) for name in governing}
            if leaves:
                kind = "parameter"
            elif not embedding and len(a.shape) > 2:
                kind = "convolution"
            if leaves and (others or stacks[owner] > len(leaves)):
                found = f"{stacks[owner]} stacks of factors for {', '.join(leaves)}, "
                found += f"with {len(others) + 1} ranks or alphas"
                expected = "one for each parameter and one rank, as files do not name them"
                self._wrong(module, found, expected, "Train or convert the adapter again.")
                continue
            dtype = torch.promote_types(FLOATING[a.dtype], FLOATING[b.dtype])
            info = data.described(kind, a.shape, b.shape, rank, BIAS in parts, dtype)
            if info is None:
                found = f"A of shape {list(a.shape)} and B of shape {list(b.shape)}"
                expected = f"{kind} factors of rank {rank}, that of the configuration"
                self._wrong(module, found, expected, _RESTORE)
            elif info.bias and parts[BIAS].shape != (outputs := (info.matrices * info.rows,)):
                found = f"shape {list(parts[BIAS].shape)}"
                self._wrong(f"{module}.{BIAS}", found, f"shape {list(outputs)}")
            else:
                yield module, (info, scale)

    def _vectors(self) -> Iterator[tuple[str, VectorInfo]]:
        """Yield the modules of an (IA)^3, in whose kind `feedforward_modules` and shape agree."""
        chosen = self._config.get("feedforward_modules")
        for module, parts in self._modules.items():
            if not self._complete(module, [VECTOR]):
                continue
            shape = parts[VECTOR].shape
            possible = {way for way in (True, False) if _is_vector(shape, way)}
            if isinstance(chosen, str):
                possible &= {re.fullmatch(chosen, module) is not None}
            elif chosen is not None:
                possible &= {module.endswith(tuple(chosen))}
            if len(possible) == 1:
                yield module, VectorInfo(shape, possible.pop(), FLOATING[parts[VECTOR].dtype])
                continue
            found = f"shape {list(shape)} with feedforward_modules {chosen!r}"
            expected = "(1, in) if feedforward, else (out, 1); of a convolution (1, channels, 1, 1)"
            self._wrong(f"{module}.{VECTOR}", found, expected, _RESTORE)

    def _idle(self) -> None:
        """Report modules with tensors that PEFT would not read."""
        owners = dict.fromkeys(names.owner(module, self._modules) for module in self._modules)
        targets = self._targets
        idle = [o for o in owners if not targets.adapt(o) and not targets.parameters(o)]
        if idle:
            fields = " and ".join(field for field in names.SELECTION if self._config.get(field))
            found = f"{fields} without {listing(idle, 2)}: PEFT would not load their tensors"
            expected = "tensors of modules that the configuration adapts"
            self._wrong("target_modules", found, expected, _RESTORE)

    def _get(self, name: str) -> Tensor:
        key = self._keys.get(name, name)
        return finite(self._tensors.get(key), key, self._name)

    def _update(self, factors: Mapping[str, tuple[ModuleInfo, float]], module: str) -> Update:
        info, scale = factors[module]
        start = f"{names.PREFIX}{module}."
        a, b = (self._get(start + part).to(info.dtype) for part in factor_keys(info.layout))
        bias = self._get(start + BIAS) if info.bias else None
        return Update(*info.stack(a, b), scale, bias)

    def _vector(self, module: str) -> Tensor:
        return self._get(f"{names.PREFIX}{module}.{VECTOR}")


def _is_vector(shape: tuple[int, ...], feedforward: bool) -> bool:
    """Return whether only the axis that a module of this kind multiplies has a length."""
    axis = 1 if feedforward or len(shape) != 2 else 0
    if len(shape) < 2 or shape[axis] == 0:
        return False
    return all(length == 1 for place, length in enumerate(shape) if place != axis)
