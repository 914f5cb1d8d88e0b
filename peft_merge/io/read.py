"""Adapters read from folders, names on the Hub, and live models."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, Problem, attempted, require
from mergekit_ext.io.documents import json_object
from mergekit_ext.io.headers import PICKLE_FOUND, TensorHeader, read_pickle, read_safetensors
from mergekit_ext.io.hub import folder_of
from peft_merge.adapter import Adapter
from peft_merge.io import diffusers_lora, names
from peft_merge.io.parse import Tensors, parse
from peft_merge.io.unsupported import field_problems

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_SAVED = "an adapter as PEFT's save_pretrained writes it"
# Of the configuration, in bytes; one that names 100,000 modules has half of them.
_LARGEST = 16 << 20


def load_adapter(
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """Read a LoRA or (IA)^3 adapter as PEFT saves it, or a LoRA of diffusers.

    Only its configuration and the header of its tensors are read; factors and vectors come one
    module at a time when `load` is called, and stop with `NonFiniteError` at NaN or infinity.

    Args:
        source: a folder, or a name on the Hub; of a LoRA of diffusers or kohya also its file.
        name: of the adapter; the last component of `source` by default.
        revision: branch, tag or commit on the Hub.
        allow_pickle: also read adapter_model.bin (tensors only, by torch's restricted unpickler).

    Raises:
        ConfigError: with everything that is wrong with it, or why it cannot be merged exactly.

    Example:
        >>> peft_merge.load_adapter("lora").infos
    """
    path = Path(os.fspath(source))
    last = path.resolve().name if path.name in ("", "..") else path.name
    called = last if name is None else name
    problems = []
    if not called or called in (".", "..") or not names.sound(called.replace(".", "_")):
        expected = "a name without slashes and control characters"
        problems.append(Problem("name", repr(called), expected, "Give it a name."))
    try:
        folder = locate(source, revision, allow_pickle)
        lora = folder / diffusers_lora.FILE if folder.is_dir() else folder
        if not os.path.exists(folder / CONFIG) and lora.is_file():
            config, stored = diffusers_lora.content(lora)
            if not problems:
                return of_memory(called, config, stored, str(lora))
        config = _configuration(folder)
        problems += field_problems(config, str(folder / CONFIG))
        tensors = open_folder(folder, allow_pickle)
        if not problems:
            return parse(called, config, tensors, str(folder))
    except ConfigError as error:
        problems += error.problems
    raise ConfigError(problems, f"the adapter {os.fspath(source)}")


def locate(source: str | os.PathLike[str], revision: str | None, allow_pickle: bool) -> Path:
    """Return the folder of an adapter, see `folder_of`; or a safetensors file, of diffusers."""
    path = Path(os.path.expanduser(os.fspath(source)))
    if path.suffix == ".safetensors" and os.path.isfile(path):
        return path
    wanted = [CONFIG, SAFETENSORS, diffusers_lora.FILE, *([PICKLE] if allow_pickle else [])]
    return folder_of(source, revision, wanted)


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not os.path.exists(path):
        remedy = "Merge full models with `mergekit-yaml`." * (folder / "config.json").exists()
        if inner := sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}")):
            remedy = f"Give one of the folders in it: {', '.join(inner)}."
        raise ConfigError([Problem(str(folder), f"no {CONFIG}", _SAVED, remedy)])
    config, wrong = json_object(path, "a JSON object", _LARGEST)
    if wrong is not None:
        raise ConfigError([Problem(CONFIG, *wrong)])
    return config


def open_folder(folder: Path, allow_pickle: bool) -> Tensors:
    """Return the tensors of an adapter's folder, mapped into memory, or raise `ConfigError`."""
    path, pickle = folder / SAFETENSORS, folder / PICKLE
    if os.path.isfile(path):
        from safetensors import safe_open

        return Tensors(read_safetensors(path), safe_open(path, framework="pt").get_tensor)
    if os.path.isfile(pickle) and allow_pickle:
        headers = read_pickle(pickle)
        state = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)
        state = state if headers else {}
        return Tensors(headers, state.get("state_dict", state).__getitem__)
    if not os.path.isfile(pickle):
        raise ConfigError([Problem(str(folder), f"no {SAFETENSORS}", _SAVED)])
    remedy = (
        "Ask for a safetensors file; or, if you trust its author, give --allow-pickle (in "
        "Python allow_pickle): only tensors are read from it."
    )
    raise ConfigError([Problem(str(pickle), PICKLE_FOUND, SAFETENSORS, remedy)])


def of_memory(
    name: str, config: dict[str, Any], tensors: dict[str, Tensor], where: str, *, live: bool = False
) -> Adapter:
    """Return an adapter of tensors under PEFT's names, which are not copied; see `parse`."""
    require(field_problems(config, where), where)
    headers = {key: TensorHeader.of(key, t.dtype, t.shape) for key, t in tensors.items()}
    stored = Tensors(headers, lambda key: tensors[key].detach())
    return parse(name, config, stored, where, live=live)


def adapters_of(model: Any, names: Iterable[str]) -> list[Adapter]:
    """Return adapters that a PeftModel holds, as `load_adapter` gives those of folders.

    Tensors are the model's own (no copies). Embeddings of the base are left out, resized ones too:
    they belong to the model, not to one of its adapters.
    """
    from peft import get_peft_model_state_dict

    def held(name: str) -> Adapter:
        if name not in model.peft_config:
            known = ", ".join(model.peft_config)
            raise ConfigError([Problem("adapters", repr(name), f"adapters of the model: {known}")])
        fields = model.peft_config[name].to_dict()
        config = json.loads(json.dumps(fields, default=_as_json))
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        return of_memory(name, config, state, f"the adapter {name}", live=True)

    adapters, problems = attempted(held, names)
    require(problems, "the adapters of this model")
    return adapters


def with_live(model: Any, adapters: Any) -> Any:
    """Return a list or mapping of adapters, those of the PeftModel in place of their names."""
    live = getattr(model, "peft_config", None)
    if not isinstance(live, Mapping):
        raise ConfigError([Problem("model", type(model).__name__, "a PeftModel")])
    listed = list(adapters.values() if isinstance(adapters, Mapping) else adapters)
    names = [one for one in listed if isinstance(one, str) and one in live]
    held = dict(zip(names, adapters_of(model, names), strict=True))
    found = [held.get(one, one) if isinstance(one, str) else one for one in listed]
    return dict(zip(adapters, found, strict=True)) if isinstance(adapters, Mapping) else found


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
