"""Names of tensors in PEFT's files, and of the modules that they belong to.

PEFT wraps an adapted module, and what was in it moves below ``base_layer``: the bias of an adapted
``query`` is stored as ``query.base_layer.bias``, the output projection inside an adapted attention
of torch as ``attention.base_layer.out_proj``, and a second target parameter of ``experts`` as
``experts.base_layer``. Whether a module is wrapped differs between adapters, so whole tensors are
kept here under the base's own names and `stored` puts the wrappers back in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

# The number of a module's layer: the first in its name.
LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
PREFIX = "base_model.model."
_WRAPPED = "base_layer"
# What torch.compile, FSDP and activation checkpointing put into the path of a module, anywhere;
# DistributedDataParallel wraps whole models only.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_PARALLEL = "module."
# Of characters. What takes a name apart at each of its dots would not end with millions of them.
_LONGEST = 1 << 10
_OUT_PROJECTION = f".{_WRAPPED}.out_proj"


def plain(name: str) -> str:
    """Return a tensor's or module's name without what training wrapped around modules.

    ``module.base_model.model._orig_mod.layers.0.q_proj`` is ``base_model.model.layers.0.q_proj``.
    PEFT's prefix stays if there is one, once: a PeftModel in a PeftModel gives two.
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    start = ""
    while name.startswith((_PARALLEL, PREFIX)):
        if name.startswith(PREFIX):
            start = PREFIX
        name = name.removeprefix(PREFIX if name.startswith(PREFIX) else _PARALLEL)
    return start + name


def unwrapped(name: str) -> str:
    """Return a module's or tensor's name in the base model, without PEFT's wrappers."""
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


def in_attention(name: str, adapted: Collection[str]) -> bool:
    """Return whether a module is the output projection inside an adapted attention of torch.

    PEFT adapts both projections together: one entry in the configuration, one rank, one scaling.
    """
    return name.endswith(_OUT_PROJECTION) and name.removesuffix(_OUT_PROJECTION) in adapted


def owner(name: str, adapted: Collection[str]) -> str:
    """Return the base model's module whose entry in the configuration governs the module `name`."""
    if in_attention(name, adapted):
        name = name.removesuffix(_OUT_PROJECTION)
    return unwrapped(name)


def one_expert(stack: str, among: Iterable[str]) -> str | None:
    """Return a name among several that is of one expert of the module `stack`; None without one."""
    leaf = unwrapped(stack).rpartition(".")[2]
    each = re.compile(rf"(?:^|.*\.){re.escape(leaf)}\.\d+\..*")
    return next(filter(each.fullmatch, among), None)


def sound(name: str) -> bool:
    """Return whether a name is dotted parts without separators of paths or control characters."""
    return len(name) <= _LONGEST and all(
        part and part.isprintable() and not set(part) & set("/\\") for part in name.split(".")
    )
