"""Where an adapter's files are: a folder, or a download from the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from mergekit_ext.errors import Problem
from mergekit_ext.io.model_files import may_be_hub_name
from peft_merge.io.tensors import CONFIG, PICKLE, SAFETENSORS


def locate(
    source: str | os.PathLike[str], revision: str | None, allow_pickle: bool
) -> Path | Problem:
    """The folder of an adapter; from the Hub only the adapter's own files are downloaded.

    A folder that exists wins over a name on the Hub. With ``HF_HUB_OFFLINE`` the cache is used.
    """
    text = os.fspath(source)
    try:
        folder = Path(text).expanduser()
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except (OSError, RuntimeError, ValueError):  # no name of a file on this system
        exists = False
    if not isinstance(source, str) or exists or not may_be_hub_name(text):
        return Problem(
            text or "an empty name",
            "a file" if exists else "no such folder",
            f"a folder with {CONFIG}, or a name on the Hub",
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [CONFIG, SAFETENSORS, *([PICKLE] if allow_pickle else [])]
    try:
        found = huggingface_hub.snapshot_download(text, revision=revision, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return Problem(
            text,
            f"no such folder, and no download from the Hub ({first})",
            "a folder, or a name on the Hub that is cached or can be downloaded",
            "Check the name; for a private adapter, log in with `hf auth login`.",
        )
    return Path(found)
