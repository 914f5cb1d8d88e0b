"""Models named as on the Hugging Face Hub: the local cache first, then metadata only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mergekit_ext.dtypes import BITS
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.io import pickles
from mergekit_ext.io.headers import TensorHeader

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def may_be_hub_name(path: str) -> bool:
    """Whether a path that does not exist could be the name of a repository."""
    return bool(_HUB_NAME.fullmatch(path)) and len(path) <= 96


def offline() -> bool:
    """Whether huggingface_hub was told not to use the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_folder(repo: str, revision: str | None, file: str, cache: str | None) -> Path | None:
    """The cached snapshot of a repository that holds `file`, or None."""
    from huggingface_hub import try_to_load_from_cache

    for place in dict.fromkeys((cache, None)):
        found = try_to_load_from_cache(repo, file, cache_dir=place, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def remote_tensors(
    repo: str, revision: str | None, where: str, findings: Findings
) -> dict[str, TensorHeader] | None:
    """The tensors of a repository, from the headers of its safetensors files only.

    Returns None, with a problem or a note, when the Hub does not give them.
    """
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = huggingface_hub.get_safetensors_metadata(repo, revision=revision)
    except NotASafetensorsRepoError:
        if pickles.are_allowed():
            findings.note(
                f"{where}: {repo} has no model.safetensors; its names and shapes are not checked "
                "before the download. Of pickles only tensors are read."
            )
        else:
            findings.problem(
                where,
                f"{repo} without model.safetensors; pickles, which may run any code, are left",
                pickles.EXPECTED,
                pickles.REMEDY,
            )
        return None
    except Exception as error:  # network, access, parsing: the client's message is kept
        first = (str(error).splitlines() or [""])[0]
        findings.problem(
            where,
            f"{repo}, which the Hub does not give ({type(error).__name__}: {first})",
            "a folder that exists, or a model of the Hub that you may read",
            "Check the name, the revision and your access (`hf auth login`).",
        )
        return None
    found: dict[str, TensorHeader] = {}
    for name, file in metadata.weight_map.items():
        entry: Any = metadata.files_metadata[file].tensors.get(name)
        if entry is not None:
            begin, end = entry.data_offsets
            dtype = entry.dtype if entry.dtype in BITS else str(entry.dtype)
            found[name] = TensorHeader(name, dtype, tuple(entry.shape), end - begin)
    return found
