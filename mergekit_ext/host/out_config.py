"""Let the config.json of an output say what is in its files: dtype, ties, lists for each layer."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.host.blocks import tied_groups
from mergekit_ext.host.inputs import donor_of
from mergekit_ext.io.headers import TensorHeader, read_folder, same_bytes, weights_of
from mergekit_ext.io.quantised import detach

_DTYPE_KEYS = ("dtype", "torch_dtype")
_TIED = "tie_word_embeddings"


def agree(folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write into the config.json of a folder, if there is one, what its weights are.

    The dtype is that of most bytes, or else `dtype`. A head that differs from the embedding is not
    tied to it, and nothing is quantised, whatever the inputs' configurations say.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    tensors = read_folder(folder, allow_pickle=True) if weights_of(folder) is not None else {}
    content = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(content)
    detach(content)
    parts = {name: part for name, part in content.items() if isinstance(part, dict)}
    sizes: Counter[torch.dtype] = Counter()
    for header in tensors.values():
        if header.dtype in FLOATING:
            sizes[FLOATING[header.dtype]] += header.nbytes
    if dtype := next((most for most, _ in sizes.most_common(1)), dtype):
        called = str(dtype).removeprefix("torch.")
        present = [key for key in _DTYPE_KEYS if key in content] or [_DTYPE_KEYS[0]]
        content.update(dict.fromkeys(present, called))
        for part in parts.values():
            part.update({key: called for key in _DTYPE_KEYS if part.get(key) is not None})
    if _has_head_of_its_own(tensors):
        content[_TIED] = False
        for name, part in parts.items():
            if _TIED in part or name == "text_config":
                part[_TIED] = False
    if json.dumps(content) != before:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _has_head_of_its_own(tensors: dict[str, TensorHeader]) -> bool:
    always = tied_groups(tensors, False)
    for group in tied_groups(tensors, True):
        first, *others = (tensors[name] for name in sorted(group))
        if group not in always and any(not same_bytes(first, other) for other in others):
            return True
    return False


def following_layers(stock: Callable[..., Any], config: Any, *given: Any, **options: Any) -> Any:
    """Extend ``_model_out_config``, which sets the number of layers only.

    The configuration is that of the donor, without quantisation. Lists with a value for each
    layer, such as ``layer_types``, follow the slices.
    """
    config = config.model_copy(update={"base_model": donor_of(config)})
    out = stock(config, *given, **options)
    detach(out)
    if taken := list(_layers(config, *given, **options)):
        first = taken[0][0]
        for name, value in first.to_dict().items():
            # Of one layer a list may be anything.
            if isinstance(value, list) and len(value) == first.num_hidden_layers > 1:
                setattr(out, name, [getattr(source, name)[index] for source, index in taken])
    return out


def _layers(config: Any, _: Any, trust_remote_code: bool = False) -> Iterator[tuple[Any, int]]:
    """Yield for each layer of the output the configuration and the number of the one taken."""
    modules = list((config.modules or {}).values())
    slices = config.slices or (modules[0].slices if len(modules) == 1 else None) or ()
    for piece in slices:
        source = piece.sources[0]
        found = source.model.config(trust_remote_code=trust_remote_code)
        for index in range(*source.layer_range):
            if index >= getattr(found, "num_hidden_layers", 0):
                return  # a wrong range, which the check reports
            yield found, index
