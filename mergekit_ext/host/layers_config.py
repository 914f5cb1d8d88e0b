"""Fields of a configuration that have a value for each layer, after a merge of slices.

mergekit sets the number of layers only: ``layer_types`` and the like would describe other layers
than those that the output has, or contradict that number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def following_layers(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Extend ``_model_out_config``: what each layer has comes from the layer that is taken."""

    def model_out_config(config: Any, *arguments: Any, **options: Any) -> Any:
        out = stock(config, *arguments, **options)
        taken = list(_layers(config, *arguments, **options))
        if taken:
            for name in _per_layer(taken[0][0]):
                setattr(out, name, [getattr(source, name)[index] for source, index in taken])
        return out

    return model_out_config


def _layers(config: Any, _: Any, trust_remote_code: bool = False) -> Iterator[tuple[Any, int]]:
    """For each layer of the output the configuration and the number of the first source's."""
    modules = list((config.modules or {}).values())
    slices = config.slices or (modules[0].slices if len(modules) == 1 else None) or ()
    for piece in slices:
        source = piece.sources[0]
        found = source.model.config(trust_remote_code=trust_remote_code)
        for index in range(*source.layer_range):
            if index >= getattr(found, "num_hidden_layers", 0):
                return  # a wrong range, which the check reports
            yield found, index


def _per_layer(config: Any) -> list[str]:
    count = config.num_hidden_layers
    values = config.to_dict().items()
    # Of one layer a list may be anything.
    return [n for n, v in values if isinstance(v, list) and len(v) == count > 1]
