"""Describe a method's parameter once, and turn pydantic's errors into problems."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import NoneType
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import BeforeValidator, Field, Strict, TypeAdapter, ValidationError

from mergekit_ext.errors import ConfigError, Problem, did_you_mean, join, shown

REQUIRED: Any = object()
Values = Mapping[str, Any]  # by name: of parameters, or in a report
# pydantic's types of errors that it words for Python.
_OF_FILES = {
    **dict.fromkeys(("dict_type", "model_type"), "a mapping"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    "missing": "this key, which is required",
}


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


# A float; pydantic alone takes true for 1.
Number = Annotated[float, BeforeValidator(_number)]
Finite = Annotated[Number, Field(allow_inf_nan=False)]
# Wide enough for every use, and no product of it leaves float32.
Factor = Annotated[Number, Field(ge=-1e6, le=1e6)]
AUTO: Final = "auto"  # a factor that norms decide: `kernels.calibration`
Auto = Literal["auto"]
Share = Annotated[Number, Field(gt=0, le=1)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
Switch = Annotated[bool, Strict()]


def choice(*names: str) -> Any:
    """Return the type of a text that is one of `names`."""
    return Literal[names]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as it stands in YAML."""

    name: str
    kind: Any  # pydantic's; `X | None` where leaving it out means something
    default: Any = REQUIRED
    description: str = ""  # one line for documentation and errors
    per_model: bool = False  # one value for each input; otherwise one for the merge
    remedy: str = ""  # what to write, where the type's own message does not say it

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def interpolates(self) -> bool:
        """Whether a gradient over the layers takes values between those given."""
        return _is_float(self.kind)

    def read(self, value: Any) -> Any:
        """Return the value as the parameter's type, or raise `ValidationError`."""
        return _adapter(self.kind).validate_python(value)

    def problem(self, value: Any) -> tuple[str, str] | None:
        """Return what was expected instead of `value`, and a remedy; None when it is fine."""
        return unfit(self.read, value, self.remedy)


def read_all(
    parameters: Iterable[Parameter], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the values of parameters, by name, that fit, and a problem for each other one."""
    values, problems = dict[str, Any](), list[Problem]()
    for parameter in parameters:
        value = given[parameter.name]
        if (wrong := parameter.problem(value)) is None:
            values[parameter.name] = parameter.read(value)
        else:
            problems.append(Problem(parameter.name, shown(value), *wrong))
    return values, problems


WEIGHT = Parameter("weight", Factor, 1.0, "factor of the input", per_model=True)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


_WORDS = {float: "number", int: "whole number", bool: "true or false", str: "text"}
_BOUNDS = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}


def in_words(kind: Any) -> str:
    """Return which values a parameter's type takes: "number above 0 to 1"."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(parts)
    if hasattr(kind, "__metadata__"):
        rules = [rule for item in kind.__metadata__ for rule in getattr(item, "metadata", ())]
        bounds = [(w, getattr(rule, key, None)) for rule in rules for key, w in _BOUNDS.items()]
        stated = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
        return " ".join([in_words(parts[0]), *stated])
    words = (in_words(part) for part in parts if part is not NoneType)
    return " or ".join(words) if parts else _WORDS.get(kind, "size")


def _is_float(kind: Any) -> bool:
    return kind is float or any(map(_is_float, get_args(kind)))


_OF_NUMBERS = ("greater_than", "less_than", "finite_number")  # how types of errors begin
_FINITE, _MEND = "a finite number", "Mend it, or take it out."


def unfit(read: Any, value: Any, remedy: str = "") -> tuple[str, str] | None:
    """Return what the pydantic reader `read` expects instead of `value`, and a remedy."""
    nan = isinstance(value, float) and value != value
    try:
        read(value)
    except ValidationError as error:
        if nan and all(item["type"].startswith(_OF_NUMBERS) for item in error.errors()):
            return _FINITE, remedy or _MEND
        wanted = " or ".join(dict.fromkeys(expectation(item) for item in error.errors()))
        choices = [item["msg"] for item in error.errors() if item["type"] == "literal_error"]
        names = re.findall(r"'([^']+)'", " ".join(choices))
        near = did_you_mean(value, names, listed=True) if names and isinstance(value, str) else ""
        return wanted, remedy_if_open(value) or remedy or near
    return (_FINITE, remedy or _MEND) if nan else None


def expectation(item: Any) -> str:
    """Return what one error of pydantic's wanted, as the end of "expected ..."."""
    if item["type"] in _OF_FILES:
        return _OF_FILES[item["type"]]
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message.removeprefix("Input should be ")
    if item["type"].endswith(("too_short", "too_long")):  # "List should have at least 2 items ..."
        return message.partition(" should have ")[2].partition(" after ")[0]
    return message[:1].lower() + message[1:] if message[1:2].islower() else message


def schema_problems(error: ValidationError, document: Any, root: str = "") -> list[Problem]:
    """Return one problem for each place in `document`, called `root`, of an error of pydantic's.

    The branches of a union are one place. A validator that raises a `ConfigError` says what is
    wrong itself, with places relative to what it validates.
    """
    found: dict[str, Any] = {}
    wanted: dict[str, dict[str, None]] = {}
    problems = []
    for item in error.errors(include_url=False):
        where, value = place_of(item, document, root)
        raised = item.get("ctx", {}).get("error")
        if isinstance(raised, ConfigError):
            for problem in raised.problems:
                inner = ".".join(part for part in (where, problem.where) if part)
                problems.append(replace(problem, where=inner or "the document"))
        else:
            found[where] = value
            wanted.setdefault(where, {})[expectation(item)] = None
    for where, value in found.items():
        # Shown once for each place: the repr of a document takes as long as the document is.
        text = "nothing" if value is REQUIRED else shown(value)
        expected = " or ".join(wanted[where])
        if remedy := remedy_if_open(value, where):
            expected = "one value"
        problems.append(Problem(where or "the document", text, expected, remedy))
    return problems


def remedy_if_open(value: object, where: str = "") -> str:
    """Return what to do with a value that only a search can find; "" for others."""
    methods = where == "merge_method" and isinstance(value, list)
    searched = methods or (isinstance(value, dict) and {"from", "choose"} & {*value})
    return "Open values are for the command `tune`." if searched else ""


def place_of(item: Any, document: Any, root: str = "") -> tuple[str, Any]:
    """Return the path as far as it exists in the document, and what is there or `REQUIRED`."""
    path, value = root, document
    for step in item["loc"]:  # names the branches of unions and keys, too
        inside = (isinstance(value, Mapping) and step in value) or (
            isinstance(value, (list, tuple)) and isinstance(step, int) and step < len(value)
        )
        if not inside:
            if item["type"] == "missing" and step == item["loc"][-1]:
                return join(path, step), REQUIRED
            if item["type"] == "extra_forbidden":
                continue
            break
        path, value = join(path, step), value[step]
    return path, value
