"""Merging adapters of a live PeftModel into a further adapter of it.

PEFT's combination types merge factors, or a dense change that is then truncated. What either
approximates is a merge of the changes themselves: `COMBINATION_TYPES` names it. `cat` was exact
already; the rank of its result is now the least that holds it. Random types draw other entries.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, Problem, did_you_mean, listing, require, shown
from peft_merge.adapter import Adapter, LoraAdapter
from peft_merge.io.names import PREFIX
from peft_merge.io.read import adapters_of
from peft_merge.io.write import state_dict
from peft_merge.merge import merge_adapters
from peft_merge.modules import rules

BASE = "Load the model that the adapters were trained on, with the class that they were."


class Meaning(NamedTuple):
    """A method, and the parameters that make it what PEFT approximates."""

    method: str
    parameters: Mapping[str, Any] = {}


_SUM = Meaning("linear", {"normalize": False})
_DARE = Meaning("dare_linear", {"normalize": False, "rescale": True})
_PRUNE = Meaning("magnitude_prune", {"normalize": False, "rescale": False})
COMBINATION_TYPES: Mapping[str, Meaning] = {
    **dict.fromkeys(("linear", "cat", "svd"), _SUM),
    **dict.fromkeys(("ties", "ties_svd"), Meaning("peft_ties")),
    **dict.fromkeys(("dare_ties", "dare_ties_svd"), Meaning("peft_dare_ties")),
    **dict.fromkeys(("dare_linear", "dare_linear_svd"), _DARE),
    **dict.fromkeys(("magnitude_prune", "magnitude_prune_svd"), _PRUNE),
}


def add_merged_adapter(
    peft_model: Any,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    adapter_name: str | None = None,
    combination_type: str | None = None,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    *,
    method: str | None = None,
    rank: int | str | Mapping[str, float] | None = None,
    space: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    modules_to_save: str | None = None,
    callbacks: Iterable[object] = (),
    **parameters: Any,
) -> dict[str, Any]:
    """Merge adapters of a model into a new one, as `add_weighted_adapter` of PEFT is called.

    Weights are not normalised unless `normalize` says so. The new adapter is not active and not
    trained; nothing else of the model changes.

    Args:
        peft_model: a PeftModel with LoRA or (IA)^3 adapters.
        adapters: names of adapters in it.
        weights: one for each; default 1.
        adapter_name: of the new adapter.
        combination_type: one of PEFT's, taken as the method that it approximates.
        svd_rank: PEFT's name of `rank`.
        svd_clamp: refused: it would change the result.
        svd_full_matrices, svd_driver: taken for PEFT's sake; they change nothing.
        density: share of entries kept, for the methods that drop some.
        majority_sign_method: of PEFT's TIES types.
        method: any method of `merge_adapters` that makes one adapter, instead of a combination
            type; default `linear`.
        device: where is computed; by default where the model is.
        rank, space, seed, dtype, modules_to_save, callbacks: as in `merge_adapters`.
        **parameters: of the method. A trailing underscore is left out: `lambda_=0.5`.

    Returns:
        The report of the merge: ranks, truncation errors, coefficients.

    Raises:
        ConfigError: wrong arguments, or adapters that cannot be merged exactly.
        NonFiniteError: an adapter holds NaN or infinity. After any error the model is as it was.

    Example:
        >>> peft_merge.add_merged_adapter(model, ["a", "b"], adapter_name="ab", method="nan")
    """
    from peft import PeftModel

    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"peft_model: found {type(peft_model).__name__}; expected a PeftModel")
    meant = Meaning(method) if method not in (None, "linear") else _SUM
    problems = list(_unfit_names(peft_model, adapter_name, adapters))
    if combination_type is not None:
        meant = COMBINATION_TYPES.get(combination_type, meant)
        if combination_type not in COMBINATION_TYPES:
            remedy = did_you_mean(combination_type, list(COMBINATION_TYPES))
            found, expected = shown(combination_type), "a combination type of PEFT"
            problems.append(Problem("combination_type", found, expected, remedy))
        elif meant is not _SUM and density is None:
            remedy = "Add `density=0.5`, say."
            problems.append(Problem("density", "nothing", "the share of entries to keep", remedy))
        if method is not None:
            problems.append(Problem("method", "it beside `combination_type`", "one of the two"))
    if method is not None and method not in rules():
        expected, remedy = "a method that makes one adapter", did_you_mean(method, list(rules()))
        problems.append(Problem("method", shown(method), expected, remedy))
    if svd_clamp is not None:
        expected = "nothing: clamped factors are not those of the merged change"
        problems.append(Problem("svd_clamp", shown(svd_clamp), expected))
    if rank is not None and svd_rank is not None:
        problems.append(Problem("svd_rank", "it beside `rank`", "one of the two"))
    if problems or adapter_name is None:
        raise ConfigError(problems, "add_merged_adapter")
    given = {**meant.parameters, **{name.removesuffix("_"): v for name, v in parameters.items()}}
    if density is not None:
        given["density"] = density
    if majority_sign_method != "total":
        given["majority_sign_method"] = majority_sign_method
    inputs = [
        # Trained biases of the base act with every adapter of a live model.
        replace(a, saved={name: a.saved[name] for name in a.saved if _owner(peft_model, name)})
        for a in adapters_of(peft_model, adapters)
    ]
    if weights is not None:  # which may be computed: one-element tensors and NumPy's numbers
        weights = [each.item() if hasattr(each, "item") else each for each in weights]
    in_memory = (weight.device for weight in peft_model.parameters() if not weight.is_meta)
    merged = merge_adapters(
        inputs,
        meant.method,
        weights=weights,
        parameters=given,
        patterns=True if isinstance(inputs[0], LoraAdapter) else None,
        rank=svd_rank if rank is None else rank,
        space=space,
        seed=seed,
        dtype=dtype,
        device=next(in_memory, "cpu") if device is None else device,
        modules_to_save=modules_to_save,
        name=adapter_name,
        callbacks=callbacks,
    )
    add_adapter(peft_model, adapter_name, merged.adapter)
    return merged.report


def _unfit_names(model: Any, name: Any, adapters: Sequence[str]) -> Iterator[Problem]:
    text = name if isinstance(name, str) else ""
    holders = (torch.nn.ModuleDict, torch.nn.ParameterDict)
    if not text or "." in text or any(hasattr(holder, text) for holder in holders):
        expected = "a name without dots that is no attribute of torch's modules"
        yield Problem("adapter_name", shown(name), expected, "Give the new adapter one.")
    elif text in model.peft_config:
        expected = "a name that the model does not have yet"
        remedy = "Choose another one, or call `delete_adapter` first."
        yield Problem("adapter_name", f"an adapter called {text!r} already", expected, remedy)
    if isinstance(adapters, str) or not adapters:
        yield Problem("adapters", shown(adapters), "a list of names of the model's adapters")
        return
    for one in dict.fromkeys(adapters):
        if one not in model.peft_config:
            remedy = did_you_mean(one, list(model.peft_config))
            yield Problem("adapters", shown(one), "an adapter of the model", remedy)
        if list(adapters).count(one) > 1:
            found = f"{one!r} more than once"
            yield Problem("adapters", found, "each once", "Add its weights up.")


def _owner(model: Any, tensor: str) -> str | None:
    """The module of `modules_to_save` that a whole tensor is in."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in model.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and tensor.startswith(f"{name}."):
            return str(name)
    return None


def add_adapter(model: Any, name: str, adapter: Adapter) -> None:
    """Add the adapter, and leave everything else as it was, whether that works or not."""
    from peft import PeftConfig

    config = PeftConfig.from_peft_type(**_settings(model, adapter))
    trained = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    known = {id(module) for module in model.modules()}
    active, tuner_active = model.active_adapter, model.base_model.active_adapter
    try:
        model.add_adapter(name, config)
        fill(model, name, adapter)
    except BaseException:
        # PEFT forgets the configuration of an adapter that failed, but not its layers.
        model.peft_config.setdefault(name, config)
        model.delete_adapter(name)
        raise
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(trained.get(id(parameter), False))
        for module in model.modules():
            if id(module) not in known:
                module.train(model.training)
        model.active_adapter, model.base_model.active_adapter = active, tuner_active
    if adapter.config.get("layer_replication"):
        config.layer_replication = adapter.config["layer_replication"]


def _settings(model: Any, adapter: Adapter) -> dict[str, Any]:
    """The adapter's configuration, for a model that has adapters like it already."""
    settings = dict(adapter.config)
    if settings["peft_type"] == "LORA":
        # Layers are replicated already, and biases belong to the model.
        settings |= {"layer_replication": None, "bias": "none"}
    if settings.get("ensure_weight_tying"):
        # PEFT does not find modules tied to one that it has wrapped before.
        owners = {_owner(model, name) for name in adapter.saved}
        settings |= {"ensure_weight_tying": False}
        settings["modules_to_save"] = sorted(owner for owner in owners if owner) or None
    return settings


def fill(model: Any, name: str, adapter: Adapter) -> None:
    """Give the adapter `name` of a model the tensors of `adapter`, factors in their own dtypes.

    Raises:
        ConfigError: the model lacks some of them, or has them in another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    factor = model.base_model.prefix
    dtypes = {module: adapter.infos[module].dtype for module in adapter.infos}
    usual = next(iter(dtypes.values()))
    for key, parameter in model.named_parameters():
        module, found, rest = key.rpartition(f".{factor}")
        if found and rest.split(".")[1:2] == [name]:
            dtype = dtypes.get(module.removeprefix(PREFIX), usual)
            parameter.data = parameter.data.to(dtype)
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = state_dict(adapter)
    require_places(name, tensors, expected)
    # PEFT adapts modules whose names end like a merged one's too: there it must change nothing.
    for key in expected.keys() - tensors.keys():
        if f".{factor}" in key:
            neutral = torch.ones_like if key.endswith(".ia3_l") else torch.zeros_like
            tensors[key] = neutral(expected[key])
        else:
            tensors[key] = expected[key]
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def require_places(name: str, tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    """Raise `ConfigError` for tensors of the adapter `name` that a model has no `places` for."""
    unfit: dict[str, list[str]] = {}
    for key, tensor in sorted(tensors.items()):
        module, place = key.removeprefix(PREFIX), places.get(key)
        if place is None:
            unfit.setdefault("tensors that the model lacks", []).append(module)
        elif place.shape != tensor.shape:
            both = f"{module} ({list(tensor.shape)}, in the model {list(place.shape)})"
            unfit.setdefault("tensors of another shape", []).append(both)
    found = (f"{what}: {listing(names)}" for what, names in unfit.items())
    problems = [Problem(f"adapter {name}", f, "tensors of the model", BASE) for f in found]
    require(problems, f"the adapter {name}")
