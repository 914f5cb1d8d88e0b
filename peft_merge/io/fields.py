"""Types and values of the fields of adapter_config.json that are read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ext.errors import Problem
from peft_merge.patterns import keyed

# As far as torch counts.
_LARGEST_RANK = 2**63 - 1
# Different names; each is looked up in every module.
_MOST_PARAMETERS = 64
# Fields whose texts must be expressions, and the most characters of one of them: a merged adapter
# may name every module in one.
EXPRESSIONS = (
    *("rank_pattern", "alpha_pattern", "feedforward_modules"),
    *("target_modules", "exclude_modules", "layers_pattern"),
)
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Field:
    """What a field must hold, as a test and in words."""

    fits: Callable[[Any], bool]
    expected: str


def _rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST_RANK


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    )


def _names_or_regex(value: Any) -> bool:
    return isinstance(value, str) or _names(value)


def _parameters(value: Any) -> bool:
    return _names(value) and (
        len({name.rpartition(".")[2] for name in value or ()}) <= _MOST_PARAMETERS
    )


def _layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(type(number) is int for number in numbers)


def _patterns(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return value is None or isinstance(value, str)


def _pattern(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        return value is None or (
            isinstance(value, dict)
            and all(isinstance(key, str) and of(item) for key, item in value.items())
        )

    return fits


def _replication(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
            for pair in value
        )
    )


_FLAG = Field(lambda value: value is None or isinstance(value, bool), "true or false")
_NAMES = Field(_names, "a list of names, or null")
_NAMES_OR_REGEX = Field(_names_or_regex, "a list of names, a regular expression, or null")
_TEXT = Field(lambda value: value is None or isinstance(value, str), "a text, or null")

FIELDS: dict[str, Field] = {
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "task_type": _TEXT,
    "target_modules": _NAMES_OR_REGEX,
    "exclude_modules": _NAMES_OR_REGEX,
    "feedforward_modules": _NAMES_OR_REGEX,
    "layers_to_transform": Field(_layers, "a whole number, a list of them, or null"),
    "layers_pattern": Field(_patterns, "a regular expression, a list of them, or null"),
    "modules_to_save": _NAMES,
    "target_parameters": Field(
        _parameters, f"a list of names of {_MOST_PARAMETERS} different parameters at most, or null"
    ),
    "fan_in_fan_out": _FLAG,
    "use_rslora": _FLAG,
    "lora_bias": _FLAG,
    "r": Field(_rank, "a whole number, 1 or more"),
    "lora_alpha": Field(_number, "a number"),
    "rank_pattern": Field(
        _pattern(_rank), "an object of regular expressions and ranks, 1 or more each"
    ),
    "alpha_pattern": Field(_pattern(_number), "an object of regular expressions and numbers"),
    "bias": Field(lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "layer_replication": Field(_replication, "a list of pairs of whole numbers, or null"),
}


def problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Every field that holds what it cannot, and expressions that Python does not take."""
    wrong = {
        name: config[name]
        for name, field in FIELDS.items()
        if name in config and not field.fits(config[name])
    }
    for name, value in wrong.items():
        yield Problem(f"{where}: {name}", repr(value)[:80], FIELDS[name].expected)
    for name in EXPRESSIONS:
        if name not in wrong:
            yield from _unusable(name, config.get(name), where)


def _unusable(field: str, value: Any, where: str) -> Iterator[Problem]:
    """Texts that PEFT takes for regular expressions, and that are none or too long to compile."""
    texts = _expressions(field, value)
    if sum(map(len, texts)) > _LONGEST:
        found, expected = f"{sum(map(len, texts)):,} characters", f"{_LONGEST:,} at most"
        yield Problem(f"{where}: {field}", found, expected, "Name the modules.")
        return
    for text in texts:
        if not _compiles(texts[text]):
            yield Problem(f"{where}: {field}", repr(text[:80]), "a regular expression")


def _compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _expressions(field: str, value: Any) -> dict[str, str]:
    """Each text of a field that PEFT takes for an expression, and what PEFT makes of it."""
    if field in ("rank_pattern", "alpha_pattern"):
        return {key: keyed(key) for key in value or ()}
    if field == "layers_pattern":
        texts = [value] if isinstance(value, str) else value or ()
        return {text: rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\." for text in texts}
    return {value: value} if isinstance(value, str) else {}
