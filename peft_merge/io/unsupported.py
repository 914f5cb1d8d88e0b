"""Fields of adapter_config.json: their types, and those that cannot be merged exactly, and why.

In PEFT 0.21 `update_layer` (tuners/lora/layer.py) runs the initialisation again whenever an adapter
is loaded, before its tensors are read: `pissa`, `olora`, `loftq` and `corda` change the weights of
the base then; `lora_ga` changed them in training; all others never do.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mergekit_ext.core.parameters import schema_problems
from mergekit_ext.errors import Problem, shown
from peft_merge.io.names import keyed

T = TypeVar("T")

_REMEDY = (
    "Leave it out; or merge it into its base with PEFT (merge_and_unload), and merge the resulting "
    "models with mergekit."
)
_CONVERT = (
    "Save it as an ordinary LoRA: save_pretrained(..., path_initial_model_for_weight_conversion="
    "<the adapter before training>). If its base is a saved residual model, or loading it leaves "
    "the base's weights as they are, set init_lora_weights to true in adapter_config.json."
)
_REMOVE = (
    "Remove the field if it changes training only; otherwise merge this adapter into its base with "
    "the PEFT that wrote it."
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


def _compiled(value: Any, template: str = "{}") -> Any:
    """Check texts that PEFT takes for regular expressions, each in a template of PEFT's."""
    texts = [value] if isinstance(value, str) else list(value)
    if sum(map(len, texts)) > 1_000_000:  # compiling 16 MB takes two minutes and 4 GB
        raise ValueError("1,000,000 characters at most")
    text = ""
    try:
        for text in texts:
            re.compile(template.replace("{}", text))
    except (re.error, RecursionError, OverflowError):
        raise ValueError(f"a regular expression, which {shown(text)} is not") from None
    return value


def _selection(value: Any) -> Any:
    named = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    if not named and not isinstance(value, str | None):
        raise ValueError("a list of names, a regular expression, or null")
    return _compiled(value) if isinstance(value, str) else value


def _few(value: list[str]) -> list[str]:
    if len({name.rpartition(".")[2] for name in value}) > 64:  # each is tried in every module
        raise ValueError("64 different parameters at most")
    return value


def _values(valid: Callable[[Any], bool], expected: str) -> AfterValidator:
    def check(mapping: dict[str, Any]) -> dict[str, Any]:
        for value in mapping.values():
            if not valid(value):
                raise ValueError(f"{expected}, which {shown(value)} is not")
        return mapping

    return AfterValidator(check)


# Checking stops at the first wrong entry: a hostile list may have millions.
_Items = Annotated[list[T], Field(fail_fast=True)]
_Names = _Items[Annotated[str, Field(min_length=1)]]
_Selection = Annotated[Any, AfterValidator(_selection)]
_Layers = Annotated[
    str | _Items[str], AfterValidator(partial(_compiled, template=r"(?:^|.*?\.){}\.(?P<idx>\d+)\."))
]
_Pair = Annotated[list[int], Field(min_length=2, max_length=2, fail_fast=True)]
_Keys = AfterValidator(partial(_compiled, template=keyed("{}")))
_Ranks = _values(lambda each: type(each) is int and 1 <= each < 2**63, "ranks from 1")
_Alphas = _values(lambda each: type(each) in (int, float) and abs(each) < 1e300, "numbers")


class _Fields(BaseModel):
    """The types of the fields that are read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    target_modules: _Selection = None
    exclude_modules: _Selection = None
    feedforward_modules: _Selection = None
    layers_to_transform: int | _Items[int] | None = None
    layers_pattern: _Layers | None = None
    modules_to_save: _Names | None = None
    target_parameters: Annotated[_Names, AfterValidator(_few)] | None = None
    fan_in_fan_out: bool | None = None
    use_rslora: bool | None = None
    lora_bias: bool | None = None
    r: Annotated[int, Field(ge=1, lt=2**63)] = 8
    lora_alpha: float = 8
    lora_dropout: float | None = None
    rank_pattern: Annotated[dict[str, Any], _Ranks, _Keys] | None = None
    alpha_pattern: Annotated[dict[str, Any], _Alphas, _Keys] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    layer_replication: _Items[_Pair] | None = None


# Fields of LoraConfig and IA3Config (PEFT 0.21) that are read, or that cannot change the function.
_COMMON = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "runtime_config", "target_modules", "exclude_modules"),
    *("fan_in_fan_out", "modules_to_save"),
    # Of other trainers, for training only; PEFT drops them when it loads an adapter:
    "merge_weights",  # PEFT before 0.4: whether the model merged it for evaluation
    "lora_dtype",  # ms-swift: the dtype of the factors in training
    "lorap_lr_ratio",  # ms-swift: LoRA+, the learning rate of B over that of A
    "lorap_emb_lr",  # ms-swift: LoRA+, the learning rate of embeddings
}
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


def field_problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """Return why an adapter of this configuration cannot be read, or not be merged exactly."""
    found = [
        Problem(field, f"{shown(config.get(field))}; {reason}", expected, remedy)
        for field, reason, expected, remedy in _refused(config)
    ]
    try:
        _Fields.model_validate(dict(config))
    except ValidationError as error:
        found += schema_problems(error, config)
    return [replace(problem, where=f"{where}: {problem.where}") for problem in found]


def _refused(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield fields that are refused, the reason, what is expected, and the remedy."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KNOWN:
        expected = "LORA or IA3, the adapters that are sums or products of weights"
        yield "peft_type", "no kind that can be merged", expected, _REMEDY
        return
    for field, reason in REFUSALS.items():
        if field in KNOWN[kind] and config.get(field):
            yield field, reason, "an adapter without it", _REMEDY
    name = str(config.get("init_lora_weights") or "false").lower()
    if name not in _HARMLESS_INITIALISATIONS:
        reason = next(why for start, why in _INITIALISATIONS.items() if name.startswith(start))
        harmless = ", ".join(_HARMLESS_INITIALISATIONS)
        expected = f"one that leaves its base as it is, such as {harmless}"
        yield "init_lora_weights", reason, expected, _CONVERT
    for field in sorted(set(config) - KNOWN[kind]):
        value = config[field]
        if value is not None and value is not False and value not in ("", [], {}):
            reason = "a field of a newer PEFT or of another method"
            yield field, reason, "fields of a known use", _REMOVE
