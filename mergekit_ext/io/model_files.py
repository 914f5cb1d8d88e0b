"""Which files of a model's folder come along into an output beside its weights.

All but what describes another model or its training, and what the output has made itself; so do
folders that ``modules.json`` names (sentence-transformers), with the weights in them.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mergekit_ext.io.documents import bounded_text, json_object, parse_json

MODULES = "modules.json"
_LARGEST = 1 << 20
# Weights in all formats, and the state of their training.
WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx"),
    *(".onnx_data", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel", ".engine"),
}
_ADAPTER = "adapter_config.json"  # with it transformers would look for the adapter's weights
# What describes the model that was there, by its ending, by its name, and by its folder's name.
_PROSE = {
    *(".md", ".html", ".ipynb", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"),
    *(".pdf", ".csv", ".tsv", ".jsonl", ".parquet", ".arrow", ".log", ".out", ".yml"),
    *(".yaml", ".zip", ".gz", ".tar"),
}
_DESCRIPTIONS = {
    *("merge_report.json", "flexmerge.json", "flexmerge_analysis.json", "trainer_state.json"),
    *("optimizer.json", "all_results.json", "train_results.json", "eval_results.json"),
    *("test_results.json", "predict_results.json"),
}
_PAST = {"runs", "wandb", "mlruns", "logs", "eval", "__pycache__"}


def companions(folder: Path) -> list[str]:
    """Return the files that belong to a model beside its weights, relative to its folder.

    A folder below with weights, if ``modules.json`` does not name it, is another model.
    """
    modules = module_folders(folder)
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and _belongs(path)]
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        # Not `rglob`, which raises where a folder vanishes while it is listed.
        inner = sorted(Path(place, name) for place, _, names in os.walk(below) for name in names)
        inner = [path for path in inner if path.is_file()]
        own = [path for path in inner if path.relative_to(folder).as_posix().startswith(modules)]
        found += own
        if below.name not in _PAST and not any(map(is_weights, {*inner} - {*own})):
            found += [path for path in inner if path not in own and _belongs(path)]
    names = [path.relative_to(folder) for path in found]
    return [name.as_posix() for name in names if not any(part[0] == "." for part in name.parts)]


def module_folders(folder: Path) -> tuple[str, ...]:
    """Return the folders in `folder` that ``modules.json`` names, each with a slash at its end."""
    try:
        content = parse_json(bounded_text(folder / MODULES, _LARGEST))
        names = [module["path"].rstrip("/") for module in content]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return ()
    return tuple(f"{name}/" for name in names if name and is_inside(name))


def classes_of(folder: Path) -> tuple[str, str]:
    """Return the names of a model's classes in sentence-transformers and transformers, or ""."""
    settings, _ = json_object(folder / "config_sentence_transformers.json", "", _LARGEST)
    config, _ = json_object(folder / "config.json", "", _LARGEST)
    sentences = str(settings.get("model_type", "SentenceTransformer"))
    names = config.get("architectures")
    named = str(names[0]) if isinstance(names, list) and names else ""
    return sentences if (folder / MODULES).is_file() else "", named


def module_weights(folder: Path) -> list[str]:
    """Return the files of weights among the `companions`."""
    return [name for name in companions(folder) if is_weights(PurePosixPath(name))]


def is_weights(path: Path | PurePosixPath) -> bool:
    """Return whether a file holds weights, or is an index of them."""
    return path.suffix in WEIGHTS or path.name.endswith(".index.json")


def copy(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files to the same places in another folder."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _belongs(path: Path) -> bool:
    return not (
        is_weights(path)
        or path.suffix.lower() in _PROSE
        or path.name == _ADAPTER
        or path.name in _DESCRIPTIONS
        or path.name.startswith("events.out.tfevents")
    )


def is_inside(name: str) -> bool:
    """Return whether a relative name, of any system, stays in its folder."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return not (posix.is_absolute() or windows.anchor or ".." in posix.parts + windows.parts)


def may_be_hub_name(name: Any) -> bool:
    """Return whether a name may be that of a repository on the Hugging Face Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None
