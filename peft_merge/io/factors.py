"""The modules of a LoRA, from its configuration and the headers of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mergekit_ext.errors import Problem
from mergekit_ext.io.headers import TensorHeader
from peft_merge.adapter import LayoutName, ModuleInfo
from peft_merge.io import names
from peft_merge.io.parts import complete
from peft_merge.io.tensors import DTYPES
from peft_merge.layouts import BIAS, LAYOUTS, LayoutError
from peft_merge.patterns import Scaling, parameter_scalings, scaling
from peft_merge.targets import Targets


def factors(
    config: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, TensorHeader]],
    where: str,
    found: list[Problem],
) -> Iterator[tuple[str, tuple[ModuleInfo, Scaling]]]:
    """Each module with what is known of it and its scaling; those that are wrong become problems.

    Args:
        config: of the adapter.
        modules: the headers of each module's tensors, by what follows the module's name.
        where: the file, for the messages.
        found: problems are added to it.
    """
    targets = Targets(config)
    governing = _scalings(config, targets, modules, where, found)
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
        if not complete(module, parts, wanted, where, found):
            continue
        a, b = parts[LAYOUTS[kind].a], parts[LAYOUTS[kind].b]
        if not embedding and targets.parameters(names.owner(module, modules)):
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
    targets: Targets,
    modules: Mapping[str, Mapping[str, TensorHeader]],
    where: str,
    found: list[Problem],
) -> dict[str, Scaling]:
    """Rank and scaling of every module; modules of which they cannot be known are left out."""
    known: dict[str, Scaling] = {}
    wrappers: dict[str, list[str]] = {}
    for module in modules:
        base = names.owner(module, modules)
        if LAYOUTS["parameter"].a in modules[module] and targets.parameters(base):
            wrappers.setdefault(base, []).append(module)
        else:
            known[module] = scaling(config, base)
    for base, nested in wrappers.items():
        nested.sort(key=len)
        leaves = targets.parameters(base)
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
