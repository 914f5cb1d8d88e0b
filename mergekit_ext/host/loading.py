"""What transformers does with a model's tensors: its own loader, run on names and shapes alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Fields of a configuration that differ between copies of one model.
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})


@dataclass(frozen=True)
class Loading:
    """What `from_pretrained` of a model's class makes of stored tensors.

    Names are those of the class, after transformers' renamings.

    Attributes:
        missing: what the class needs and would be filled with random numbers.
        ignored: what the class does not have, and would not be read.
        misshapen: what is stored in another shape than the class has, with both shapes.
        error: why transformers cannot convert the stored tensors; empty if it can.
    """

    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    error: str = ""


# By a digest of all that decides them: the models of a merge are mostly of one kind.
_known: dict[str, Loading | None] = {}


def class_of(config: Any) -> Any:
    """Return the transformers class of a configuration; None for a class from elsewhere."""
    import transformers

    kind: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if known and isinstance(config, kind.config_class or object) else None


def loading(config: Any, shapes: Mapping[str, Sequence[int]]) -> Loading | None:
    """Return what transformers does with tensors of these names and shapes; reads no weight.

    Args:
        config: a transformers configuration.
        shapes: of the stored tensors, by name.

    Returns:
        None if the class is not one of transformers, or cannot be built here.
    """
    kind = class_of(config)
    if kind is None:
        return None
    fields = {name: v for name, v in config.to_dict().items() if name not in _VOLATILE}
    text = json.dumps([kind.__name__, fields, sorted(shapes.items())], default=str, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    if key not in _known:
        _known[key] = _load(kind, config, shapes)
    return _known[key]


def _load(kind: Any, config: Any, shapes: Mapping[str, Sequence[int]]) -> Loading | None:
    import torch

    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with _without_bars():
        try:
            _, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # transformers and each of its models raise their own
            return _refused(kind, config, error)
    return Loading(
        tuple(sorted(found["missing_keys"])),
        tuple(sorted(found["unexpected_keys"])),
        tuple(
            f"{name} ({list(stored)}; the class has {list(own)})"
            for name, stored, own in sorted(found["mismatched_keys"])
        ),
    )


def _refused(kind: Any, config: Any, error: Exception) -> Loading | None:
    """Tell a class that cannot be built on this machine from tensors that do not fit it."""
    import torch

    try:
        with torch.device("meta"):
            kind(config)
    except Exception:  # as above
        return None
    lines = str(error).splitlines() or [""]
    return Loading(error=f"{type(error).__name__}: {lines[0]}")


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
