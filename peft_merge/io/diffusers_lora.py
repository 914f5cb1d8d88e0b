"""LoRAs of diffusers' pipelines: one file with the factors of several components.

diffusers' own conversions give PEFT's names, below that of the component (``unet.<module>``). What
is written has scalings in B and no alphas, for which diffusers takes the ranks.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mergekit_ext.errors import ConfigError, Problem, listing, require
from mergekit_ext.io.documents import parse_json
from mergekit_ext.io.headers import read_safetensors
from peft_merge.adapter import Adapter
from peft_merge.io import names
from peft_merge.io.unsupported import field_problems

FILE = "pytorch_lora_weights.safetensors"
# In the configuration of such an adapter, which has none in files.
_MARK = {"parent_library": "diffusers"}
_COMPONENT = re.compile(r"((?:unet|transformer|text_encoder)(?:_\d)?)\.(.+)")
_KOHYA, _OF_FLUX = re.compile(r"lora_(?:unet|te\d?)_"), re.compile("_(?:double|single)_blocks_")
_OTHERS = re.compile(r"dora_scale|magnitude_vector|\.(?:lokr|hada|oft)_")
_INSTALL = "Install it with pip install 'mergekit-ext[diffusers]'."
_SAVE = "Load it in its pipeline, and save it with the pipeline's save_lora_weights."


def is_of_diffusers(adapter: Adapter) -> bool:
    """Return whether an adapter comes from such a file, and is to be written as one."""
    return adapter.config.get("auto_mapping") == _MARK


def content(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors, as PEFT would save them, of a file; or `ConfigError`."""
    where, headers = str(file), read_safetensors(file)
    if others := listing(list(filter(_OTHERS.search, headers)), 2):
        raise ConfigError([Problem(where, others, "a LoRA, and no other kind", "Leave it out.")])
    with safe_open(file, framework="pt") as stored:
        state = {key: stored.get_tensor(key) for key in headers}
        metadata = (stored.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        tensors, scalings = _converted(state, parse_json(metadata))
        (rank, alpha), _ = Counter(scalings.values()).most_common(1)[0]
    except ImportError:
        found, expected = "a LoRA of diffusers", "its library, which is not installed"
        raise ConfigError([Problem(where, found, expected, _INSTALL)]) from None
    except (ValueError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        found = f"what diffusers does not convert ({str(error)[:200]})"
        expected = "names of a pipeline's components (unet., transformer., ...), or kohya's"
        raise ConfigError([Problem(where, found, expected, _SAVE)]) from None
    odd = {names.qualified(m): own for m, own in scalings.items() if own != (rank, alpha)}
    config = dict[str, Any](peft_type="LORA", auto_mapping=_MARK, target_modules=[*scalings])
    config |= {"r": rank, "rank_pattern": {key: own for key, (own, _) in odd.items()}}
    config |= {"lora_alpha": alpha, "alpha_pattern": {key: own for key, (_, own) in odd.items()}}
    return config, tensors


def _converted(
    state: dict[str, Tensor], metadata: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, float]]]:
    """Return tensors under PEFT's names, and rank and alpha of each module.

    As in diffusers' loader alphas are those of its configurations in `metadata`, or the file's own;
    a module without has the commonest of its component, or its rank.
    """
    from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
    from diffusers.utils import state_dict_utils as rename

    alphas: Mapping[str, Any] = {}
    if all(map(_KOHYA.match, state)) and any(map(_OF_FLUX.search, state)):
        state = FluxLoraLoaderMixin.lora_state_dict(state)  # with alphas in the factors
    elif all(map(_KOHYA.match, state)):  # the UNets of Stable Diffusion have two layers in a block
        unet = SimpleNamespace(layers_per_block=2)
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(state, unet_config=unet)
    else:
        alphas = {key: state.pop(key) for key in list(state) if key.endswith(".alpha")}
    alphas = {key.removesuffix(".alpha"): float(alpha) for key, alpha in alphas.items()}
    keys: dict[str, dict[str, str]] = {}
    for key in state:
        if (match := _COMPONENT.fullmatch(key)) is None:
            raise ValueError(key)
        keys.setdefault(match[1], {})[match[2]] = key
    tensors, scalings = {}, {}
    for component, own in keys.items():
        if component.startswith("text_encoder"):
            renamed = rename.convert_state_dict_to_peft(rename.convert_state_dict_to_diffusers(own))
        else:
            renamed = rename.convert_unet_state_dict_to_peft(own)
        inside = (item for item in metadata.items() if item[0].startswith(f"{component}."))
        given = {field.partition(".")[2]: value for field, value in inside}
        require(field_problems(given, component) if given else ())
        usual = Counter(a for key, a in alphas.items() if key.startswith(f"{component}."))
        for name, key in renamed.items():
            # CLIP's text encoders have lost the first part in transformers 5; loaders know both.
            path = re.sub(r"^encoder\.layers\.", "text_model.encoder.layers.", name)
            tensors[f"{names.PREFIX}{component}.{path}"] = state[key]
            if (module := name.removesuffix(".lora_A.weight")) != name:
                rank = state[key].shape[0]
                alpha = max(usual, key=usual.__getitem__, default=rank)
                alpha = alphas.get(key, alphas.get(f"{component}.{module}", alpha))
                if given:
                    rank, scale = names.scaling(given, module)
                    alpha = scale * rank
                scalings[f"{component}.{path.removesuffix('.lora_A.weight')}"] = rank, alpha
    return tensors, scalings
