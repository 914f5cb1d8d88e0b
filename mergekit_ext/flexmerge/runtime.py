"""The models of a FlexMerge checkpoint as transformers modules that share their tensors."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from mergekit_ext.errors import CheckpointError, Problem, require, shown
from mergekit_ext.flexmerge.factored import Factored, leave_factors
from mergekit_ext.flexmerge.files import regular_file
from mergekit_ext.flexmerge.placement import AUTO, SUBJECT, DeviceMap, MaxMemory, Sharing, place
from mergekit_ext.flexmerge.reader import TaskTensors, located, open_checkpoint


def load(
    path: str | os.PathLike[str],
    task: str | None = None,
    *,
    device: str | torch.device = "cpu",
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
    merged: bool = False,
    revision: str | None = None,
) -> Any:
    """Load one task's model, or all of them with shared tensors.

    What one dense group stores is one storage in all of its modules, on the CPU the mapped file, so
    that m tasks take the memory of the checkpoint; masked blocks are reconstructed for every task.
    Training one module in place changes the others, never the files. Residual blocks stay a base
    and factors (`theta_0`, `lora_B`, `lora_A`); `weight` is formed whenever it is read, and cannot
    be written to.

    Args:
        path: folder with ``flexmerge.json``, or a name on the Hub; of one task that is not verified
            what it needs is downloaded.
        task: name of one task; None for all.
        device: where the modules go.
        device_map: spread them with accelerate instead: ``"auto"``, or a mapping from parts of the
            modules to devices, ``"cpu"`` and ``"disk"``. What tasks share lies in one place.
        max_memory: with ``"auto"``: ``{0: "20GB", "cpu": "60GB"}``; by default what is free.
        offload_folder: for tensors on disk that no file holds as they are.
        dtype: by default as ``from_pretrained`` decides.
        verify: compare the files with their digests first, which reads all of them.
        trust_remote_code: run a model's own code if its class is not one of transformers'.
        merged: form residual weights once, in the memory of m models, as ordinary parameters.
        revision: branch, tag or commit on the Hub.

    Returns:
        The task's module, of the class that ``config.json`` names, in evaluation mode; without
        `task`, a dictionary of all in the manifest's order.

    Raises:
        ConfigError: the modules cannot be placed so; `dtype` is none.
        CheckpointError: the checkpoint is not as docs/flexmerge-format.md says, has no such task,
            or does not fit its model's class: a parameter that is missing is never initialised.

    Example:
        >>> models = mergekit_ext.load("out")
        >>> model = mergekit_ext.load("out", "code", device="cuda")
        >>> model = mergekit_ext.load("someone/merged", "code")
    """
    problems = []
    if max_memory is not None and device_map != AUTO:
        remedy = "A mapping says where everything goes."
        problems.append(Problem("max_memory", "it", f"it with device_map={AUTO!r} only", remedy))
    if offload_folder is not None and device_map is None:
        problems.append(Problem("offload_folder", "it", "it with device_map only"))
    if device_map is not None and torch.device(device).type != "cpu":
        problems.append(Problem("device", f"{device} beside device_map", "one of the two"))
    known = dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype)
    if not known and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        expected = "torch.bfloat16, 'bfloat16' or the like, or 'auto'"
        problems.append(Problem("dtype", shown(dtype), expected))
    require(problems, SUBJECT)
    alone = None if verify else task
    checkpoint = open_checkpoint(located(path, alone, revision), verify, alone)
    names = checkpoint.tasks if task is None else (task,)
    held = {name: checkpoint.tensors(name) for name in names}
    sharing = Sharing(torch.device(device))
    modules: dict[str, Any] = {}
    for name, tensors in held.items():
        home = checkpoint.folder / name
        for file in ("config.json", "generation_config.json"):
            if file == "config.json" or (home / file).exists():
                regular_file(checkpoint.folder, f"{name}/{file}")
        given = {key: _given(tensors, key, merged) for key in tensors}
        module = build_module(home, given, dtype, trust_remote_code=trust_remote_code)
        leave_factors(module)
        # Tensors that were reconstructed are the task's own, and so in the module alone.
        sharing.add(module, [tensor for tensor, _, _ in tensors.stored()])
        modules[name] = module
    if device_map is not None:
        place(modules, held, device_map, max_memory, offload_folder)
    return modules if task is None else modules[task]


def _given(tensors: TaskTensors, name: str, merged: bool) -> torch.Tensor:
    parts = None if merged else tensors.parts(name)
    return tensors[name] if parts is None else Factored.of(*parts)


def build_module(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """Return a transformers module in evaluation mode, of `tensors` themselves where it can.

    `folder` has the ``config.json``; `tensors` are all of the model, by stored names. See `load`.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code
        )
        generation = None
        if (folder / "generation_config.json").is_file():
            generation = transformers.GenerationConfig.from_pretrained(str(folder))
        kind = _class(folder, config, trust_remote_code)
        # Without a path transformers puts the tensors into the module as they are, renamed or
        # converted where its own files would be.
        module, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            generation_config=generation,
            # Reported below, with both shapes.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, StrictDataclassError) as error:
        problem = Problem(str(folder), f"an error of transformers: {error}", "a model that loads")
        raise CheckpointError([problem], str(folder)) from error
    require(_misfits(folder.name, report), str(folder), CheckpointError)
    module.name_or_path = module.config.name_or_path = str(folder)
    return module


def _class(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """Return the model's class, as ``config.json`` names it, if it is transformers' or trusted."""
    named = getattr(config, "architectures", None)
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    if isinstance(name, str):
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    listed = getattr(config, "auto_map", None)
    for reference in listed.values() if isinstance(listed, dict) and trust_remote_code else ():
        if isinstance(reference, str) and reference.rpartition(".")[2] == name:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(reference, str(folder))
    problem = Problem(
        f"{folder / 'config.json'}, architectures",
        f"{named}",
        f"the name of one model of transformers {transformers.__version__}",
        "If it is the model's own code, read that, and pass trust_remote_code=True if you trust "
        "it.",
    )
    raise CheckpointError([problem], str(folder))


def _misfits(task: str, report: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what transformers would initialise, or leave out, and only warn of."""
    for name in sorted(report["missing_keys"]):
        yield Problem(f"{task}, {name}", "no tensor", "a value for every parameter of the model")
    for name in sorted(report["unexpected_keys"]):
        yield Problem(f"{task}, {name}", "a tensor that the model has no place for", "none")
    for name, found, expected in sorted(report["mismatched_keys"]):
        yield Problem(f"{task}, {name}", f"shape {list(found)}", f"{list(expected)}")
    for message in report["error_msgs"]:
        yield Problem(task, str(message), "a model that loads")
