"""Adapters of a live PeftModel."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

from mergekit_ext.errors import ConfigError, Problem
from peft_merge import refused
from peft_merge.adapter import Adapter
from peft_merge.io import fields
from peft_merge.io.parse import parse
from peft_merge.io.tensors import Memory


def adapters_of(model: Any, names: Iterable[str]) -> list[Adapter]:
    """Adapters that a PeftModel holds, as `load_adapter` gives those of folders.

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
        config = configuration(model.peft_config[name])
        where = f"the adapter {name}"
        found = [*refused.refusals(config, where), *fields.problems(config, where)]
        if not found:
            state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            adapter, found = parse(name, config, Memory(state), where, live=True)
            adapters += [adapter] if adapter is not None else []
        problems += found
    if problems:
        raise ConfigError(problems, "the adapters of this model")
    return adapters


def configuration(config: Any) -> dict[str, Any]:
    """A PeftConfig's fields as adapter_config.json holds them."""
    return {name: _plain(value) for name, value in config.to_dict().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
