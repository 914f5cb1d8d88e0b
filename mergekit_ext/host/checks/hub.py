"""Models named as on the Hugging Face Hub: the local cache first, then metadata only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_ext.host.checks.report import Findings
from mergekit_ext.io.headers import BITS, PICKLE_REMEDY, TensorHeader, pickles_allowed
from mergekit_ext.io.model_files import may_be_hub_name


def offline() -> bool:
    """Whether huggingface_hub must not use the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_folder(path: Any, options: Any = None, file: str = "config.json") -> Path | None:
    """Return the cached snapshot of a repository that holds `file`, or None.

    Args:
        path: mergekit's `ModelPath`.
        options: mergekit's, for its cache.
        file: a name in the repository.
    """
    from huggingface_hub import try_to_load_from_cache

    if not may_be_hub_name(path.path):
        return None
    for cache in dict.fromkeys((options and options.transformers_cache, None)):
        found = try_to_load_from_cache(path.path, file, cache_dir=cache, revision=path.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def remote_tensors(path: Any, where: str, findings: Findings) -> dict[str, TensorHeader] | None:
    """Read the headers of a repository's safetensors files; its `ModelPath` names it.

    Returns None, with a problem or a note, when the Hub does not give them.
    """
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = huggingface_hub.get_safetensors_metadata(path.path, revision=path.revision)
    except NotASafetensorsRepoError:
        if pickles_allowed():
            findings.note(
                f"{where}: {path.path} has no model.safetensors; its names and shapes are not "
                "checked before the download. Of pickles only tensors are read."
            )
        else:
            found = (
                f"{path.path} without model.safetensors; pickles, which may run any code, are left"
            )
            findings.problem(where, found, "safetensors", PICKLE_REMEDY)
        return None
    except Exception as error:  # network, access, parsing: the client's message is kept
        first = (str(error).splitlines() or [""])[0]
        findings.problem(
            where,
            f"{path.path}, which the Hub does not give ({type(error).__name__}: {first})",
            "a folder that exists, or a model of the Hub that you may read",
            "Check the name, the revision and your access (`hf auth login`).",
        )
        return None
    tensors: dict[str, TensorHeader] = {}
    for name, file in metadata.weight_map.items():
        entry: Any = metadata.files_metadata[file].tensors.get(name)
        if entry is not None:
            begin, end = entry.data_offsets
            dtype = entry.dtype if entry.dtype in BITS else str(entry.dtype)
            tensors[name] = TensorHeader(name, dtype, tuple(entry.shape), end - begin)
    return tensors
