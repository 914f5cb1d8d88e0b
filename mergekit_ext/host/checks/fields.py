"""What decides a model's function besides its weights: the fields of config.json, compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_ext.errors import shown
from mergekit_ext.host.checks.models import ModelFacts
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.class_model import class_of

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
    """Compare the configurations of the inputs with that of one of them.

    A field that changes what weights of one shape mean stops the merge; any other that changes
    the function is a warning with all values.

    Args:
        facts: the models.
        donor: the one to compare with, whose config.json the output gets.
        crimes: mergekit's ``--allow-crimes``, with which nothing stops the merge.
        heads: whether classification heads are merged with each other.
        outcome: which of two values acts in the output.
    """
    known = {m: dict(_leaves(f.config.to_dict())) for m, f in facts.items() if f.config is not None}
    if donor not in known:
        return
    for model, fields in known.items():
        if facts[model].config.model_type != facts[donor].config.model_type:
            continue  # reported as other architectures
        if heads:
            _check_labels(facts[model], facts[donor], findings, crimes, outcome)
        for name in sorted(fields.keys() | known[donor].keys()):
            mine, given = fields.get(name, _MISSING), known[donor].get(name, _MISSING)
            *path, leaf = name.split(".")
            if mine == given or any(map(_WITHOUT_EFFECT.fullmatch, (*path, leaf))):
                continue
            if _MISSING in (mine, given) and class_of(facts[model].config) is not None:
                continue  # left by an older version: what a class reads it always has a value for
            values = f"{_value(mine)} in {model}, {_value(given)} in {donor}"
            if _MEANING.fullmatch(leaf) and not crimes:
                findings.problem(
                    f"{facts[model].where} (config.json: {name})",
                    values,
                    "one value: weights of the same shape mean something else with another",
                    "Take that model out, or give --allow-crimes to merge it nevertheless.",
                )
            else:
                findings.warn(f"config.json: {name} is {values}; {outcome}.")


def _check_labels(
    fact: ModelFacts, donor: ModelFacts, findings: Findings, crimes: bool, outcome: str
) -> None:
    """Compare the order of the labels, which decides what a row of a classifier means."""
    mine, given = _labels(fact.config), _labels(donor.config)
    if not mine or not given or mine == given or len(mine) != len(given):
        return  # of another length the head has another shape
    listed = f"{shown(mine)} in {fact.reference}, {shown(given)} in {donor.reference}"
    if crimes:
        findings.warn(f"config.json: id2label is {listed}; {outcome}.")
        return
    findings.problem(
        f"{fact.where} (config.json: id2label)",
        listed,
        "the same labels in the same order: rows of the classifiers are merged by their number",
        "Use `merge_method: flexmerge`, which keeps heads apart, or give --allow-crimes.",
    )


def _labels(config: Any) -> list[str]:
    """Return the labels in their order; none where nothing but default names is written."""
    labels = getattr(config, "id2label", None) or {}
    found = [str(labels[key]) for key in sorted(labels, key=int)]
    return [] if all(_DEFAULT_LABEL.fullmatch(label) for label in found) else found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _value(value: Any) -> str:
    return "missing" if value is _MISSING else shown(value)
