"""What of PEFT's configurations cannot be merged exactly, why, and what to do instead.

Facts of PEFT 0.21 (``tuners/lora/layer.py``: `update_layer` runs the initialisation again whenever
an adapter is loaded, before its tensors are read):

- `pissa`, `pissa_niter_N`, `olora`, `loftq`: loading changes the weights of the base.
- `corda`: loading needs the covariances of the training run and then changes the base, too.
- `lora_ga`: loading leaves the base alone, but training subtracted the initial factors from it, so
  the tensors are no change of the base that the configuration names.
- `eva`, `gaussian`, `orthogonal`, `mica`: the base is never changed. Accepted.
- `velora_config` changes gradients only; its ``lora_velora_embed`` is not read. Accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ext.errors import Problem

_INTO_BASE = (
    "Merge it into its base with PEFT (merge_and_unload), and merge the resulting models with "
    "mergekit."
)
_LEAVE_OUT = "Leave this adapter out."


@dataclass(frozen=True)
class Refusal:
    """A field of the configuration that makes an adapter more than additive low-rank factors."""

    field: str
    reason: str
    remedy: str = _INTO_BASE
    applies: Callable[[Any], bool] = bool


_CONVERT = (
    "Save it as an ordinary LoRA: save_pretrained(..., path_initial_model_for_weight_conversion="
    "<the adapter before training>). If its base is a saved residual model, set init_lora_weights "
    "to true in adapter_config.json."
)

# By how the value starts, in lower case.
_INITIALISATIONS: dict[str, str] = {
    "pissa": "loading it subtracts principal components from the base's weights",
    "olora": "loading it subtracts the QR factors from the base's weights",
    "corda": "loading it needs the covariances of its training and changes the base's weights",
    "loftq": "loading it quantises the base's weights",
    "lora_ga": "its training subtracted the initial factors from the base's weights",
}
_HARMLESS_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "use_dora",
        "DoRA rescales the columns of the base's weight plus the change to learnt magnitudes, so "
        "its change depends on the base",
        "Convert it (peft.convert_to_lora), or merge it into its base with PEFT "
        "(merge_and_unload), and merge the resulting models with mergekit.",
    ),
    Refusal(
        "kasa_config",
        "KaSA truncates the base's weight and scales by learnt singular values",
    ),
    Refusal(
        "alora_invocation_tokens",
        "an activated LoRA acts only after its invocation tokens, so it is no change of a weight",
        _LEAVE_OUT,
    ),
    Refusal(
        "use_qalora",
        "QA-LoRA pools the inputs of A in groups, so that B A is no change of a weight",
    ),
    Refusal(
        "use_bdlora",
        "BD-LoRA stores block-diagonal factors in a form of its own",
    ),
    Refusal(
        "arrow_config",
        "Arrow routes every token to adapters of its own choice",
        "Merge the adapters that it routes to.",
    ),
    Refusal("monteclora_config", "MonteCLoRA samples its factors from learnt distributions"),
    Refusal(
        "trainable_token_indices",
        "single rows of the embedding are replaced, not changed, and only those that the adapter "
        "has trained",
    ),
    Refusal(
        "megatron_config",
        "the factors are those of Megatron's parallel layers, stored in shards",
        "Save it from a model without Megatron's layers.",
    ),
)

# Fields of LoraConfig and IA3Config (PEFT 0.21) that are read, or that cannot change the function.
_COMMON = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "runtime_config", "target_modules", "exclude_modules"),
        *("fan_in_fan_out", "modules_to_save"),
    )
)
_LORA = _COMMON | {
    *("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("qalora_group_size", "layer_replication", "lora_bias", "target_parameters"),
    *("ensure_weight_tying", "modules_to_tie", "target_modules_to_tie"),
    *(refusal.field for refusal in REFUSALS),
}
_IA3 = _COMMON | {"feedforward_modules", "init_ia3_weights"}

FIELDS: dict[str, frozenset[str]] = {"LORA": frozenset(_LORA), "IA3": frozenset(_IA3)}

# Fields of other trainers that PEFT drops when it loads an adapter, and what they are for. They
# change how factors were found, not what they mean.
TRAINING_ONLY: dict[str, str] = {
    "merge_weights": "PEFT before 0.4: whether the model merged it for evaluation",
    "lora_dtype": "ms-swift: the dtype of the factors in training",
    "lorap_lr_ratio": "ms-swift: LoRA+, the learning rate of B over that of A",
    "lorap_emb_lr": "ms-swift: LoRA+, the learning rate of embeddings",
}

# Tensors of variants, by a part of their names.
_TENSORS: dict[str, str] = {
    "lora_magnitude_vector": "a magnitude of DoRA",
    "lora_diag": "singular values of KaSA",
    "trainable_tokens": "rows of single tokens",
    "token_adapter": "rows of single tokens",
    "prompt_embeddings": "a prompt",
}


def refusals(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Every reason why an adapter of this configuration cannot be merged exactly.

    Args:
        config: the fields of adapter_config.json.
        where: its file, for the messages.
    """
    kind = config.get("peft_type")
    if kind is None:
        yield Problem(
            f"{where}: peft_type",
            "nothing: this is no PEFT configuration",
            "LORA or IA3",
            "Give the folder that PEFT's save_pretrained wrote.",
        )
        return
    if not isinstance(kind, str) or kind not in FIELDS:
        yield Problem(
            f"{where}: peft_type",
            repr(kind),
            "LORA or IA3, the adapters that are sums or products of weights",
            _INTO_BASE,
        )
        return
    for refusal in REFUSALS:
        if refusal.field in FIELDS[kind] and refusal.applies(config.get(refusal.field)):
            yield Problem(
                f"{where}: {refusal.field}",
                f"{_shown(config[refusal.field])}; {refusal.reason}",
                "an adapter without it",
                refusal.remedy,
            )
    yield from _initialisation(config, where)
    for field in sorted(set(config) - FIELDS[kind] - TRAINING_ONLY.keys()):
        if _set(config[field]):
            yield Problem(
                f"{where}: {field}",
                f"{_shown(config[field])}, a field of a newer PEFT or of another method",
                "fields of which is known what they do",
                "Remove the field if it changes training only; otherwise merge this adapter into "
                "its base with the PEFT that wrote it.",
            )


def unknown_tensor(name: str) -> str:
    """What a tensor is that has no place in an adapter of an accepted kind."""
    for part, meaning in _TENSORS.items():
        if part in name:
            return meaning
    return "a tensor of unknown use"


def _initialisation(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    value = config.get("init_lora_weights", True)
    name = str(value).lower()
    if value is None or name in _HARMLESS_INITIALISATIONS:
        return
    for start, reason in _INITIALISATIONS.items():
        if name.startswith(start):
            yield Problem(
                f"{where}: init_lora_weights",
                f"{value!r}; {reason}",
                "an adapter that leaves its base as it is",
                _CONVERT,
            )
            return
    yield Problem(
        f"{where}: init_lora_weights",
        f"{_shown(value)}, an initialisation that is not known",
        f"one of {', '.join(_HARMLESS_INITIALISATIONS)}",
        "Set it to true in adapter_config.json if it leaves the base's weights as they are.",
    )


def _set(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {}, ())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
