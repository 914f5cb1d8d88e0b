"""Changes to adapters' files."""

from __future__ import annotations

import json

from safetensors.torch import load_file, save_file

# A module of the kind "plain", as stored.
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def change_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder
