"""Which stored names are one tensor in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mergekit_ext.host.blocks.names import layer_of
from mergekit_ext.host.blocks.tables import (
    CODER_EMBEDDING,
    DECODER_BIAS,
    OUTPUT_EMBEDDING,
    SHARED_EMBEDDING,
    TOKEN_EMBEDDING,
)


def tied_groups(names: Iterable[str], tie_word_embeddings: bool) -> list[set[str]]:
    """Return the sets of `names` that are one tensor under several names.

    Files often hold only one of the names; a set has at least two that are there. Always tied
    are an embedding that encoder and decoder share (T5, BART: `shared`), and an output bias that a
    head and its decoder both name (`cls.predictions.bias`). `tie_word_embeddings`, the setting of
    the model's configuration, ties each output embedding to the input embedding nearest to it: of
    the same submodel, the decoder's.

    The sets are disjoint, ordered by their first name.

    >>> tied_groups(["transformer.wte.weight", "lm_head.weight"], True) == [
    ...     {"lm_head.weight", "transformer.wte.weight"}]
    True
    """
    present = {name for name in names if layer_of(name) is None}
    pairs = [*_shared_embeddings(present), *_output_biases(present)]
    if tie_word_embeddings:
        pairs += [*_coder_embeddings(present), *_output_embeddings(present)]
    return _united(pairs)


def _shared_embeddings(present: set[str]) -> Iterator[tuple[str, str]]:
    for owner in present:
        if not (found := SHARED_EMBEDDING.search(owner)):
            continue
        prefix = owner[: found.start("owner")]
        for name in present - {owner}:
            coder = CODER_EMBEDDING.search(name)
            if coder and name[: coder.start("part")] == prefix:
                yield owner, name


def _coder_embeddings(present: set[str]) -> Iterator[tuple[str, str]]:
    """Encoder and decoder side by side, in a file that does not name what they share."""
    coders = {name: found for name in present if (found := CODER_EMBEDDING.search(name))}
    first_of: dict[str, str] = {}
    for name, found in sorted(coders.items()):
        yield first_of.setdefault(name[: found.start("part")], name), name


def _output_biases(present: set[str]) -> Iterator[tuple[str, str]]:
    for name in present:
        plain = name.removesuffix(".decoder.bias") + ".bias"
        if DECODER_BIAS.search(name) and plain in present:
            yield plain, name


def _output_embeddings(present: set[str]) -> Iterator[tuple[str, str]]:
    inputs = sorted(name for name in present if TOKEN_EMBEDDING.search(name))
    for output in sorted(name for name in present if OUTPUT_EMBEDDING.search(name)):
        if inputs:
            yield max(inputs, key=lambda name: _nearness(name, output)), output


def _nearness(embedding: str, output: str) -> tuple[int, bool]:
    ours, theirs = embedding.split("."), output.split(".")
    common = 0
    while common < min(len(ours), len(theirs)) and ours[common] == theirs[common]:
        common += 1
    return common, any(part.endswith("decoder") for part in ours)


def _united(pairs: Iterable[tuple[str, str]]) -> list[set[str]]:
    groups: list[set[str]] = []
    for pair in pairs:
        touched = [group for group in groups if not group.isdisjoint(pair)]
        groups = [group for group in groups if group.isdisjoint(pair)]
        groups.append(set(pair).union(*touched))
    return sorted((group for group in groups if len(group) > 1), key=min)
