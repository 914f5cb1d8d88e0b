r"""Names of tensors and modules in PEFT's files, and which of them a configuration selects.

PEFT wraps an adapted module, and what was in it moves below ``base_layer``: the bias of an adapted
``query`` is stored as ``query.base_layer.bias``, the output projection inside an adapted attention
of torch as ``attention.base_layer.out_proj``, and a second target parameter of ``experts`` as
``experts.base_layer``. Whether a module is wrapped differs between adapters, so whole tensors have
the base's own names here, and `stored` puts the wrappers back in.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

# The number of a module's layer: the first in its name.
LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
PREFIX = "base_model.model."
# Fields that together say which modules are adapted.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Last part of the names of embeddings and heads, which PEFT saves when a vocabulary was resized.
_EMBEDDINGS = {
    *("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"),
    *("tok_embeddings", "output", "embeddings", "embedding", "decoder"),
}
_WRAPPED = "base_layer"
# What torch.compile, FSDP and activation checkpointing put into the path of a module, anywhere;
# DistributedDataParallel wraps whole models only, as PEFT does.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_OUTER = re.compile(rf"^(?:module\.|{re.escape(PREFIX)})+")
# Of characters: what takes a name apart at each of its dots would not end with millions of them.
_LONGEST = 1 << 10
_OUT_PROJECTION = f".{_WRAPPED}.out_proj"


def sound(name: str) -> bool:
    """Return whether a name is dotted parts without separators of paths or control characters."""
    return len(name) <= _LONGEST and all(
        part and part.isprintable() and not set(part) & set("/\\") for part in name.split(".")
    )


def plain(name: str) -> str:
    """Return a tensor's or module's name without what training wrapped around modules.

    ``module.base_model.model._orig_mod.layers.0.q_proj`` is ``base_model.model.layers.0.q_proj``.
    PEFT's prefix stays if there is one, once: a PeftModel in a PeftModel gives two.
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return _OUTER.sub(lambda outer: PREFIX if PREFIX in outer[0] else "", name)


def unwrapped(name: str) -> str:
    """Return the name of a module or tensor in the base model, without PEFT's wrappers."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def stored(name: str, adapted: Collection[str]) -> str:
    """Return the stored name of a base model's tensor when the modules `adapted` are wrapped."""
    *path, leaf = name.split(".")
    found = ""
    for part in path:
        found = f"{found}.{part}" if found else part
        while found in adapted:
            found += f".{_WRAPPED}"
    return f"{found}.{leaf}" if found else leaf


def owner(name: str, adapted: Collection[str]) -> str:
    """Return the base model's module whose entry in the configuration governs the module `name`."""
    # PEFT adapts both projections of torch's attention together: one entry, one rank, one scaling.
    attention = name.removesuffix(_OUT_PROJECTION)
    return unwrapped(attention if attention in adapted else name)


def one_expert(stack: str, among: Iterable[str]) -> str | None:
    """Return a name among several that is of one expert of the module `stack`; None without one."""
    leaf = unwrapped(stack).rpartition(".")[2]
    each = re.compile(rf"(?:^|.*\.){re.escape(leaf)}\.\d+\..*")
    return next(filter(each.fullmatch, among), None)


def is_whole(name: str, config: Mapping[str, Any], adapted: Collection[str]) -> bool:
    """Return whether a stored tensor, by its name without prefix, replaces one of the base.

    Those of `modules_to_save` do, trained biases of the base (`bias: all | lora_only`), and
    embeddings, which PEFT adds when they are adapted or were resized.
    """
    base = unwrapped(name)
    module, _, leaf = base.rpartition(".")
    if config.get("bias", "none") != "none" and leaf == "bias":
        return True
    if module_to_save(base, config) is not None:
        return True
    wrapped = stored(base, adapted) == name != base
    return leaf in ("weight", "bias") and (wrapped or module.rpartition(".")[2] in _EMBEDDINGS)


def module_to_save(tensor: str, config: Mapping[str, Any]) -> str | None:
    """Return the entry of `modules_to_save` that a tensor of the base belongs to."""
    # PEFT saves every module whose name ends with an entry, with or without a dot before it.
    parts = tensor.split(".")[:-1]
    modules = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    for entry in config.get("modules_to_save") or ():
        if any(module.endswith(entry) for module in modules):
            return str(entry)
    return None


def is_tied(tensor: str) -> bool:
    """Return whether PEFT takes a tensor for an end of a tied embedding (`ensure_weight_tying`)."""
    return tensor.endswith(("embed_tokens.weight", "lm_head.weight"))


class Targets:
    """The modules and parameters that a configuration selects."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._chosen = _entries(config.get("target_modules"))
        self._excluded = _entries(config.get("exclude_modules"))
        self._leaves: dict[str, set[str]] = {}  # of target parameters, by their owners
        for entry in config.get("target_parameters") or ():
            module, _, leaf = entry.rpartition(".")
            self._leaves.setdefault(module, set()).add(leaf)

    def parameters(self, module: str) -> list[str]:
        """Return the names of the parameters of `module` that `target_parameters` may mean.

        An entry ``experts.up`` means `up` of every module that is ``experts`` or ends with
        ``.experts``; one without a dot any module's. PEFT adapts no parameters of adapted modules.
        """
        if not self._leaves:
            return []
        found = [self._leaves.get(end, set()) for end in ("", *ends(module))]
        leaves = sorted(set[str]().union(*found))
        return [] if leaves and _matches(self._chosen, module) else leaves

    def adapt(self, module: str) -> bool:
        """Return whether PEFT adapts `module` when it loads an adapter of this configuration.

        As PEFT's ``check_target_module_exists`` decides, save for `modules_to_save`; True where
        names do not decide: no `target_modules`, "all-linear", tied layers.
        """
        chosen, config = self._chosen, self._config
        if config.get("target_modules") is None or config.get("ensure_weight_tying"):
            return True
        if isinstance(chosen, str) and chosen.lower() == "all-linear":
            return True
        if self._excluded and _matches(self._excluded, module):
            return False
        if not _matches(chosen, module):
            return False
        layers = config.get("layers_to_transform")
        if isinstance(chosen, str) or module in chosen or layers is None or layers == []:
            return True
        given = config.get("layers_pattern") or []
        given = [given] if isinstance(given, str) else given
        for pattern in [rf"(?:^|.*?\.){each}" for each in given] or [r".*?\.[^.]*"]:
            if (found := re.match(rf"{pattern}\.(?P<idx>\d+)\.", module)) is not None:
                return int(found["idx"]) in (layers if isinstance(layers, list) else [layers])
        return False


def _entries(value: Any) -> str | frozenset[str]:
    return value if isinstance(value, str) else frozenset(value or ())


def _matches(chosen: str | frozenset[str], module: str) -> bool:
    """PEFT's rule for expressions and for lists: an entry is a name, or its end after a dot."""
    if isinstance(chosen, str):
        return bool(chosen) and re.fullmatch(chosen, module) is not None
    return any(end in chosen for end in ends(module))


def ends(module: str) -> Iterator[str]:
    """Yield a name, and what follows each of its dots."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def scaling(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    r"""Return the rank of the module (or target parameter) `name`, and the factor of its change.

    :math:`\alpha / r`, or :math:`\alpha / \sqrt r` with rsLoRA (Hu et al. 2021, section 4.1;
    Kalajdzievski 2023, equation 8). Of the patterns' keys the first that matches counts.
    """
    rank = int(_resolved(config.get("rank_pattern"), name, config.get("r", 8)))
    alpha = float(_resolved(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _resolved(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if _compiled(key).match(name):
            return value
    return (patterns or {}).get(name, default)


@lru_cache(1 << 14)
def _compiled(key: str) -> re.Pattern[str]:
    # `re` forgets them from 512 on, and every key is tried for every module.
    return re.compile(keyed(key))


def keyed(key: str) -> str:
    """Return the expression that PEFT makes of a key of `rank_pattern` or `alpha_pattern`."""
    return rf"(.*\.)?({key})$"


def qualified(name: str, leaves: Iterable[str] = ()) -> str:
    r"""Return a pattern key that matches the module `name`, or its parameters `leaves`, alone.

    ``^`` keeps ``layers.1.x`` from matching ``encoder.layers.1.x``.
    """
    key = f"^{re.escape(name)}"
    choices = sorted(leaves)
    return rf"{key}\.(?:{'|'.join(map(re.escape, choices))})" if choices else key


def either(keys: Iterable[str]) -> str:
    """Return one key for what several keys of `qualified` match."""
    first, *others = keys
    if not others:
        return first
    return f"^(?:{'|'.join(key.removeprefix('^') for key in (first, *others))})"
