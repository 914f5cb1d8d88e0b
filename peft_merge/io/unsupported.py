"""Fields of adapter_config.json: their types, and those that cannot be merged exactly, and why.

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

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from mergekit_ext.core.parameters import unfit
from mergekit_ext.errors import Problem, shown
from peft_merge.io.targets import keyed

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

# Of a field of expressions: a merged adapter may name every module in one.
_LONGEST = 1 << 20
# Different names of target parameters; each is looked up in every module.
_MOST_PARAMETERS = 64


def _compiled(value: Any, template: str = "{}") -> Any:
    """Check texts that PEFT takes for regular expressions, each in a template of PEFT's."""
    texts = [value] if isinstance(value, str) else list(value or ())
    if (length := sum(map(len, texts))) > _LONGEST:
        raise ValueError(f"{length:,} characters of at most {_LONGEST:,}")
    text = ""
    try:
        for text in texts:
            re.compile(template.replace("{}", text))
    except (re.error, RecursionError, OverflowError):
        raise ValueError(f"of which {text[:80]!r} is none") from None
    return value


def _few(value: list[str] | None) -> list[str] | None:
    if (count := len({name.rpartition(".")[2] for name in value or ()})) > _MOST_PARAMETERS:
        raise ValueError(f"{count} different parameters")
    return value


def _values(kind: Any) -> AfterValidator:
    """Check a mapping's values, up to the first wrong one."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(strict=True))

    def check(mapping: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        given = (mapping or {}).values()
        for value in (value for value in given if unfit(adapter.validate_python, value)):
            raise ValueError(f"of which {repr(value)[:80]} is none")
        return mapping

    return AfterValidator(check)


_Rank = Annotated[int, Field(ge=1, le=2**63 - 1)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
# Checking stops at the first wrong entry: a hostile list may have millions.
_Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)] | None
_Selection = Annotated[
    Annotated[str, AfterValidator(_compiled)] | _Names,
    Field(description="a list of names, a regular expression, or null"),
]
_Layers = Annotated[
    str | Annotated[list[str], Field(fail_fast=True)] | None,
    AfterValidator(partial(_compiled, template=r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")),
    Field(description="a regular expression, a list of them, or null"),
]
_Pair = Annotated[list[int], Field(min_length=2, max_length=2), Field(fail_fast=True)]
_Keys = AfterValidator(partial(_compiled, template=keyed("{}")))
_Flag = Annotated[bool | None, Field(description="true or false")]
_Text = Annotated[str | None, Field(description="a text, or null")]


class _Fields(BaseModel):
    """The types of the fields that are read; a description ends "expected ..."."""

    model_config = ConfigDict(strict=True)

    base_model_name_or_path: _Text = None
    revision: _Text = None
    task_type: _Text = None
    target_modules: _Selection = None
    exclude_modules: _Selection = None
    feedforward_modules: _Selection = None
    layers_to_transform: int | Annotated[list[int], Field(fail_fast=True)] | None = Field(
        None, description="a whole number, a list of them, or null"
    )
    layers_pattern: _Layers = None
    modules_to_save: _Names = Field(None, description="a list of names, or null")
    target_parameters: Annotated[_Names, AfterValidator(_few)] = Field(
        None,
        description=f"a list of names of {_MOST_PARAMETERS} different parameters at most, or null",
    )
    fan_in_fan_out: _Flag = None
    use_rslora: _Flag = None
    lora_bias: _Flag = None
    r: _Rank = Field(8, description="a whole number, 1 or more")
    lora_alpha: _Number = Field(8, description="a number")
    rank_pattern: Annotated[dict[str, Any] | None, _values(_Rank), _Keys] = Field(
        None, description="an object of regular expressions and ranks, 1 or more each"
    )
    alpha_pattern: Annotated[dict[str, Any] | None, _values(_Number), _Keys] = Field(
        None, description="an object of regular expressions and numbers"
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="none, all or lora_only")
    layer_replication: Annotated[list[_Pair], Field(fail_fast=True)] | None = Field(
        None, description="a list of pairs of whole numbers, or null"
    )


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


def problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """Return why an adapter of this configuration cannot be read, or not be merged exactly.

    Args:
        config: the fields of adapter_config.json.
        where: its file, for the messages.
    """
    return [*_refusals(config, where), *_wrong_values(config, where)]


def _refusals(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in FIELDS:
        found, remedy = repr(kind), _INTO_BASE
        if kind is None:
            found = "nothing: this is no PEFT configuration"
            remedy = "Give the folder that PEFT's save_pretrained wrote."
        expected = "LORA or IA3, the adapters that are sums or products of weights"
        yield Problem(f"{where}: peft_type", found, expected, remedy)
        return
    for refusal in REFUSALS:
        if refusal.field in FIELDS[kind] and (value := config.get(refusal.field)):
            found = f"{shown(value)}; {refusal.reason}"
            expected = "an adapter without it"
            yield Problem(f"{where}: {refusal.field}", found, expected, refusal.remedy)
    yield from _initialisation(config, where)
    for field in sorted(set(config) - FIELDS[kind] - TRAINING_ONLY.keys()):
        value = config[field]
        if value is None or value is False or value in ("", [], {}, ()):
            continue
        yield Problem(
            f"{where}: {field}",
            f"{shown(value)}, a field of a newer PEFT or of another method",
            "fields of a known use",
            "Remove the field if it changes training only; otherwise merge this adapter into its "
            "base with the PEFT that wrote it.",
        )


def _wrong_values(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    try:
        _Fields.model_validate(dict(config))
    except ValidationError as error:
        reasons: dict[str, str] = {}
        for item in error.errors():
            reason = str(item["ctx"]["error"]) if item["type"] == "value_error" else ""
            name = str(item["loc"][0])
            reasons[name] = reasons.get(name) or reason
        for name, reason in reasons.items():
            found = f"{repr(config[name])[:80]}{reason and f', {reason}'}"
            expected = str(_Fields.model_fields[name].description)
            yield Problem(f"{where}: {name}", found, expected)


def unknown_tensor(name: str) -> str:
    """Return what a tensor is that has no place in an adapter of an accepted kind."""
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
        f"{shown(value)}, an initialisation that is not known",
        f"one of {', '.join(_HARMLESS_INITIALISATIONS)}",
        "Set it to true in adapter_config.json if it leaves the base's weights as they are.",
    )
