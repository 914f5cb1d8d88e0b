"""What decides a model's function besides its weights: the fields of config.json, compared."""

import re
from collections.abc import Iterator
from typing import Any

from mergekit_ext.errors import shown
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
_MISSING = object()


def differences(mine: Any, given: Any) -> Iterator[tuple[str, str, str, bool]]:
    """Yield fields in which configurations of one type differ, both values, and what they decide.

    That is whether weights of one shape mean something else with the other value.
    """
    one, other = dict(_leaves(mine.to_dict())), dict(_leaves(given.to_dict()))
    for name in sorted(one.keys() | other.keys()):
        values = one.get(name, _MISSING), other.get(name, _MISSING)
        parts = name.split(".")
        if values[0] == values[1] or any(map(_WITHOUT_EFFECT.fullmatch, parts)):
            continue
        if _MISSING in values and class_of(mine) is not None:
            continue  # left by an older version: what a class reads it always has a value for
        ours, theirs = ("missing" if value is _MISSING else shown(value) for value in values)
        yield name, ours, theirs, _MEANING.fullmatch(parts[-1]) is not None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
