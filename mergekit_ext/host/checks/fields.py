"""What decides a model's function besides its weights: the fields of config.json, compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_ext.errors import shown
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.io.class_model import class_of

# No part of the function that the weights compute, or compared elsewhere: names, dtypes, the
# vocabulary, what training does, what is returned. Of a dotted name the last part counts.
_WITHOUT_EFFECT = re.compile(
    r"_name_or_path|transformers_version|(torch_)?dtype|architectures|auto_map|model_type"
    r"|use_cache|vocab_size|(bos|eos|pad|sep|cls|unk|mask)_token_id|tie_word_embeddings"
    r"|num_labels|problem_type|task.*|id2label"
    r"|output_\w+|return_dict\w*|gradient_checkpointing|.*drop\w*|.*initializer\w*|.*_std"
    r"|chunk_size_feed_forward|pretraining_tp|.*aux_loss\w*|router_jitter_noise|label2id"
    r"|_?attn_implementation\w*|num_hidden_layers|n_layers?|max_window_layers|unsloth\w*"
    r"|finetuning_task|use_bfloat16|is_encoder_decoder|tokenizer_class|prefix|bad_words_ids"
)
# Weights of one shape that mean something else: merged, they mean nothing.
_MEANING = re.compile(
    r"(num|n)_(attention_|key_value_|kv_|query_)?heads?|\w*attention_heads|num_heads|n_head|head_dim"
    r"|hidden_act|hidden_activation|activation\w*|feed_forward_proj|dense_act_fn|is_gated_act"
    r"|position_embedding_type|alibi|is_decoder|multi_query|parallel_attn"
    r"|use_parallel_residual|new_decoder_architecture|do_layer_norm_before|layer_norm_type"
    r"|norm_type|layer_types|patch_size|image_size|partial_rotary_factor|rotary_pct"
)
# What is expected of them, and of the labels of a classifier, and what to do.
_ONE_MEANING = (
    "one value: weights of the same shape mean something else with another",
    "Take that model out, or give --allow-crimes to merge it nevertheless.",
)
_ONE_ORDER = (
    "the same labels in the same order: rows of the classifiers are merged by their number",
    "Use `merge_method: flexmerge`, which keeps heads apart, or give --allow-crimes.",
)
_DEFAULT_LABEL = re.compile(r"LABEL_\d+")
_MISSING = object()


def check_fields(
    facts: Mapping[Any, ModelFacts],
    donor: Any,
    findings: Findings,
    *,
    crimes: bool,
    heads: bool,
    outcome: str = "the output has the latter",
) -> None:
    """Compare the configurations of the inputs with that of the `donor`, which the output gets.

    A field that changes what weights of one shape mean stops the merge unless `crimes` are allowed;
    any other that changes the function is a warning. Labels count where `heads` are merged.
    """
    given = facts[donor].config if donor in facts else None
    for model, fact in facts.items():
        if given is None or fact.config is None or fact.config.model_type != given.model_type:
            continue  # reported as other architectures
        for name, mine, other, stops in (
            *(_labels(fact.config, given) if heads else ()),
            *_fields(fact.config, given),
        ):
            values = f"{_value(mine)} in {model}, {_value(other)} in {donor}"
            if stops and not crimes:
                findings.problem(f"{fact.where} (config.json: {name})", values, *stops)
            else:
                findings.warn(f"config.json: {name} is {values}; {outcome}.")


# A field, both of its values, and what is expected of them and what to do where it stops a merge.
_Difference = tuple[str, Any, Any, tuple[str, str] | None]


def _fields(mine: Any, given: Any) -> Iterator[_Difference]:
    one, other = dict(_leaves(mine.to_dict())), dict(_leaves(given.to_dict()))
    for name in sorted(one.keys() | other.keys()):
        values = one.get(name, _MISSING), other.get(name, _MISSING)
        parts = name.split(".")
        if values[0] == values[1] or any(map(_WITHOUT_EFFECT.fullmatch, parts)):
            continue
        if _MISSING in values and class_of(mine) is not None:
            continue  # left by an older version: what a class reads it always has a value for
        yield name, *values, _ONE_MEANING if _MEANING.fullmatch(parts[-1]) else None


def _labels(mine: Any, given: Any) -> Iterator[_Difference]:
    """Compare the order of the labels, which decides what a row of a classifier means."""
    found = []
    for config in (mine, given):
        labels = getattr(config, "id2label", None) or {}
        found.append([str(labels[key]) for key in sorted(labels, key=int)])
    one, other = found
    named = all(not all(map(_DEFAULT_LABEL.fullmatch, labels)) for labels in found)
    if named and one != other and len(one) == len(other):  # else the head has another shape
        yield "id2label", one, other, _ONE_ORDER


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _value(value: Any) -> str:
    return "missing" if value is _MISSING else shown(value)
