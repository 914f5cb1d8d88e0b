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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mergekit_ext.core.parameters import schema_problems
from mergekit_ext.errors import Problem, shown
from peft_merge.io.names import keyed

_REMEDY = (
    "Leave it out; or merge it into its base with PEFT (merge_and_unload), and merge the resulting "
    "models with mergekit."
)
_CONVERT = (
    "Save it as an ordinary LoRA: save_pretrained(..., path_initial_model_for_weight_conversion="
    "<the adapter before training>). If its base is a saved residual model, set init_lora_weights "
    "to true in adapter_config.json."
)

# Fields that make an adapter more than additive low-rank factors, and why.
REFUSALS = {
    "use_dora": "DoRA rescales the columns of the base's weight plus the change to learnt "
    "magnitudes, so its change depends on the base (peft.convert_to_lora makes a LoRA of it)",
    "kasa_config": "KaSA truncates the base's weight and scales by learnt singular values",
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens, so it is "
    "no change of a weight",
    "use_qalora": "QA-LoRA pools the inputs of A in groups, so that B A is no change of a weight",
    "use_bdlora": "BD-LoRA stores block-diagonal factors in a form of its own",
    "arrow_config": "Arrow routes every token to adapters of its own choice: merge those",
    "monteclora_config": "MonteCLoRA samples its factors from learnt distributions",
    "trainable_token_indices": "single rows of the embedding are replaced, not changed, and only "
    "those that the adapter has trained",
    "megatron_config": "the factors are those of Megatron's parallel layers, stored in shards: "
    "save it from a model without them",
}

# Values of `init_lora_weights`, by how they start in lower case.
_INITIALISATIONS = {
    "pissa": "loading it subtracts principal components from the base's weights",
    "olora": "loading it subtracts the QR factors from the base's weights",
    "corda": "loading it needs the covariances of its training and changes the base's weights",
    "loftq": "loading it quantises the base's weights",
    "lora_ga": "its training subtracted the initial factors from the base's weights",
    "": "an initialisation that is not known",
}
_HARMLESS_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")

# Of a field of expressions: a merged adapter may name every module in one.
_LONGEST = 1 << 20
# Different names of target parameters; each is looked up in every module.
_MOST_PARAMETERS = 64


def _compiled(value: Any, template: str = "{}") -> Any:
    """Check texts that PEFT takes for regular expressions, each in a template of PEFT's."""
    texts = [value] if isinstance(value, str) else list(value)
    if (length := sum(map(len, texts))) > _LONGEST:
        raise ValueError(f"{_LONGEST:,} characters at most, not {length:,}")
    text = ""
    try:
        for text in texts:
            re.compile(template.replace("{}", text))
    except (re.error, RecursionError, OverflowError):
        raise ValueError(f"a regular expression, which {text[:80]!r} is not") from None
    return value


def _selection(value: Any) -> Any:
    named = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    if not named and not isinstance(value, str | None):
        raise ValueError("a list of names, a regular expression, or null")
    return _compiled(value) if isinstance(value, str) else value


def _few(value: list[str]) -> list[str]:
    if (count := len({name.rpartition(".")[2] for name in value})) > _MOST_PARAMETERS:
        raise ValueError(f"{_MOST_PARAMETERS} different parameters at most, not {count}")
    return value


def _values(valid: Callable[[Any], bool], expected: str) -> AfterValidator:
    """Check a mapping's values, up to the first wrong one."""

    def check(mapping: dict[str, Any]) -> dict[str, Any]:
        for value in mapping.values():
            if not valid(value):
                raise ValueError(f"{expected}, which {shown(value)} is not")
        return mapping

    return AfterValidator(check)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300


# Checking stops at the first wrong entry: a hostile list may have millions.
_Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)]
_Selection = Annotated[Any, AfterValidator(_selection)]
_Layers = Annotated[
    str | Annotated[list[str], Field(fail_fast=True)],
    AfterValidator(partial(_compiled, template=r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")),
]
_Pair = Annotated[list[int], Field(min_length=2, max_length=2), Field(fail_fast=True)]
_Keys = AfterValidator(partial(_compiled, template=keyed("{}")))


class _Fields(BaseModel):
    """The types of the fields that are read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    target_modules: _Selection = None
    exclude_modules: _Selection = None
    feedforward_modules: _Selection = None
    layers_to_transform: int | Annotated[list[int], Field(fail_fast=True)] | None = None
    layers_pattern: _Layers | None = None
    modules_to_save: _Names | None = None
    target_parameters: Annotated[_Names, AfterValidator(_few)] | None = None
    fan_in_fan_out: bool | None = None
    use_rslora: bool | None = None
    lora_bias: bool | None = None
    r: Annotated[int, Field(ge=1, lt=2**63)] = 8
    lora_alpha: float = 8
    lora_dropout: float | None = None
    rank_pattern: Annotated[dict[str, Any], _values(_is_rank, "ranks from 1"), _Keys] | None = None
    alpha_pattern: Annotated[dict[str, Any], _values(_is_number, "numbers"), _Keys] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    layer_replication: Annotated[list[_Pair], Field(fail_fast=True)] | None = None


# Fields of LoraConfig and IA3Config (PEFT 0.21) that are read, or that cannot change the function.
_COMMON = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "runtime_config", "target_modules", "exclude_modules"),
        *("fan_in_fan_out", "modules_to_save"),
        # Of other trainers, for training only; PEFT drops them when it loads an adapter:
        "merge_weights",  # PEFT before 0.4: whether the model merged it for evaluation
        "lora_dtype",  # ms-swift: the dtype of the factors in training
        "lorap_lr_ratio",  # ms-swift: LoRA+, the learning rate of B over that of A
        "lorap_emb_lr",  # ms-swift: LoRA+, the learning rate of embeddings
    )
)
KNOWN = {
    "LORA": _COMMON
    | {
        *(_Fields.model_fields.keys() - {"feedforward_modules"}),
        *REFUSALS,
        *("init_lora_weights", "megatron_core"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
        *("qalora_group_size", "ensure_weight_tying", "modules_to_tie", "target_modules_to_tie"),
    },
    "IA3": _COMMON | {"feedforward_modules", "init_ia3_weights"},
}

# Tensors of variants, by a part of their names.
_TENSORS: dict[str, str] = {
    "lora_magnitude_vector": "a magnitude of DoRA",
    "lora_diag": "singular values of KaSA",
    "trainable_tokens": "rows of single tokens",
    "token_adapter": "rows of single tokens",
    "prompt_embeddings": "a prompt",
}


def unknown_tensor(name: str) -> str:
    """Return what a tensor is that has no place in an adapter of an accepted kind."""
    known = (meaning for part, meaning in _TENSORS.items() if part in name)
    return next(known, "a tensor of unknown use")


def field_problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """Return why an adapter of this configuration cannot be read, or not be merged exactly.

    Args:
        config: the fields of adapter_config.json.
        where: its file, for the messages.
    """
    found = list(_refused(config))
    try:
        _Fields.model_validate(dict(config))
    except ValidationError as error:
        found += schema_problems(error, config)
    return [replace(problem, where=f"{where}: {problem.where}") for problem in found]


def _refused(config: Mapping[str, Any]) -> Iterator[Problem]:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KNOWN:
        found, remedy = repr(kind), _REMEDY
        if kind is None:
            found = "nothing: this is no PEFT configuration"
            remedy = "Give the folder that PEFT's save_pretrained wrote."
        expected = "LORA or IA3, the adapters that are sums or products of weights"
        yield Problem("peft_type", found, expected, remedy)
        return
    for field, reason in REFUSALS.items():
        if field in KNOWN[kind] and (value := config.get(field)):
            yield Problem(field, f"{shown(value)}; {reason}", "an adapter without it", _REMEDY)
    value = config.get("init_lora_weights")
    name = str(value).lower()
    if value is not None and name not in _HARMLESS_INITIALISATIONS:
        reason = next(why for start, why in _INITIALISATIONS.items() if name.startswith(start))
        expected = "one that leaves its base as it is, such as " + ", ".join(
            _HARMLESS_INITIALISATIONS
        )
        remedy = _CONVERT
        if reason == _INITIALISATIONS[""]:
            remedy = (
                "Set it to true in adapter_config.json if it leaves the base's weights as they are."
            )
        yield Problem("init_lora_weights", f"{shown(value)}; {reason}", expected, remedy)
    for field in sorted(set(config) - KNOWN[kind]):
        value = config[field]
        if value is not None and value is not False and value not in ("", [], {}, ()):
            yield Problem(
                field,
                f"{shown(value)}, a field of a newer PEFT or of another method",
                "fields of a known use",
                "Remove the field if it changes training only; otherwise merge this adapter into "
                "its base with the PEFT that wrote it.",
            )
