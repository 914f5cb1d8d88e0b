"""What the transformers class of a model makes of stored tensors; no weight is read."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mergekit_ext.errors import one_line

# Fields of a configuration that differ between copies of one model.
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})


def class_of(config: Any) -> Any:
    """Return the transformers class of a configuration, or None."""
    import transformers

    kind: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if known and isinstance(config, kind.config_class or object) else None


@dataclass(frozen=True)
class Loading:
    """What `from_pretrained` of a class makes of stored tensors, under the names of the class."""

    missing: tuple[str, ...] = ()  # what the class needs: it would get random numbers
    ignored: tuple[str, ...] = ()  # what the class does not have, and would not be read
    misshapen: tuple[str, ...] = ()  # what the class has in another shape, with both shapes
    error: str = ""  # why transformers cannot convert the stored tensors


# By all that decides them: the models of a merge are mostly of one kind.
_loadings: dict[str, Loading | None] = {}


def loading(config: Any, shapes: Mapping[str, Sequence[int]]) -> Loading | None:
    """Return what transformers' loader does with tensors of these names and shapes, if it can."""
    kind = class_of(config)
    if kind is None:
        return None
    fields = {name: v for name, v in config.to_dict().items() if name not in _VOLATILE}
    key = json.dumps([kind.__name__, fields, sorted(shapes.items())], default=str, sort_keys=True)
    if key not in _loadings:
        _loadings[key] = _load(kind, config, shapes)
    return _loadings[key]


def _load(kind: Any, config: Any, shapes: Mapping[str, Sequence[int]]) -> Loading | None:
    import torch

    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    try:
        with without_bars():
            _, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and each of its models raise their own
        if empty_model(config) is None:
            return None
        return Loading(error=one_line(error))
    missing, ignored = (tuple(sorted(found[key])) for key in ("missing_keys", "unexpected_keys"))
    clashes = sorted(found["mismatched_keys"])
    misshapen = (f"{n} ({list(stored)}; the class has {list(own)})" for n, stored, own in clashes)
    return Loading(missing, ignored, tuple(misshapen))


@contextmanager
def without_bars(wanted: bool = True) -> Iterator[None]:
    """Keep transformers and huggingface_hub from showing bars of loads, downloads and uploads."""
    import huggingface_hub
    from transformers.utils import logging

    hub: Any = huggingface_hub.utils
    loads, transfers = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    if wanted:
        logging.disable_progress_bar()  # the Hub's too
    try:
        yield
    finally:
        if loads:
            logging.enable_progress_bar()
        (hub.enable_progress_bars if transfers else hub.disable_progress_bars)()


# Those built last, by their configurations.
_models: dict[str, Any] = {}
_KEPT = 4


def empty_model(config: Any) -> Any:
    """Return the model of a configuration on the meta device, shared; None if there is none."""
    import torch
    from transformers.initialization import no_init_weights

    kind = class_of(config)
    if kind is None:
        return None
    key = f"{kind.__name__} {config.to_json_string()}"
    if key not in _models:
        for oldest in list(_models)[: len(_models) - _KEPT + 1]:
            del _models[oldest]
        try:
            with torch.device("meta"), no_init_weights():
                _models[key] = kind(copy.deepcopy(config))
        except Exception:  # of any kind: whatever the class says to values that it cannot use
            _models[key] = None
    return _models[key]


@dataclass(frozen=True)
class ClassNames:
    """What the class of a model calls stored tensors."""

    model: Any  # of the class, on the meta device; None if there is none
    of: dict[str, str]  # stored name -> the class's
    # Those of the class's names whose values transformers changes (stacks, splits, transposes).
    converted: frozenset[str]
    # A name in an older version of the class -> the class's, without the outer prefix that
    # transformers adds or takes away to load one head's checkpoint into another.
    rename: Callable[[str], str]


def class_names(stored: Iterable[str], config: Any) -> ClassNames:
    """Name stored tensors as transformers renames them on loading.

    Tensors that transformers stacks or joins while loading keep their own names, and so do all of
    a class that is not part of transformers, or if two would get one name.
    """
    plain = {name: name for name in stored}
    model = empty_model(config)
    if model is None:
        return ClassNames(None, plain, frozenset(), str)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    def transforms(kind: type) -> list[Any]:  # new ones: some know what they have renamed before
        return [item for item in get_model_conversion_mapping(model) if isinstance(item, kind)]

    renamings, converters = transforms(WeightRenaming), transforms(WeightConverter)
    fresh, state = transforms(WeightRenaming), model.state_dict()
    names, converted = {}, set()
    for name in plain:
        names[name], _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
        if rename_source_key(names[name], [], converters)[1] is not None:
            converted.add(names[name])
    if len(set(names.values())) < len(names):
        return ClassNames(model, plain, frozenset(), str)
    return ClassNames(
        model, names, frozenset(converted), lambda name: str(rename_source_key(name, fresh, [])[0])
    )
