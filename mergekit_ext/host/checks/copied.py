"""Tensors of the output that are one model's: heads, other shapes, what `exclude:` takes out."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mergekit_ext.errors import Problem, did_you_mean, listing, shown
from mergekit_ext.host.blocks import is_router, is_task_head, layer_of
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.plan import Inventory, PlannedTensor
from mergekit_ext.host.inputs import HEADS, named_model

# Parameters of the whole merge, whatever its method: the models whose heads, and whose tensors that
# are not merged, the output has; patterns of names that are merged, and that are not.
OTHERS, INCLUDE, EXCLUDE = "others", "include", "exclude"
OF_MERGES = (HEADS, OTHERS, INCLUDE, EXCLUDE)


def settle_copies(inventory: Inventory) -> None:
    """Decide which tensors are one model's, and have only that one as their input.

    These are what `include` and `exclude` leave; all heads of tasks, if `heads` names a model; and
    what other models lack or have in another shape: that of `heads`, or outside of the layers of
    the base. Elsewhere a difference stays for `check_tensors` to report.
    """
    config, findings = inventory.config, inventory.findings
    names = [tensor.name for tensor in inventory.planned]
    findings.extend(selection_problems(config, names, (HEADS, OTHERS)))
    heads, others = named_model(config, HEADS), named_model(config, OTHERS)
    reasons: dict[tuple[Any, str], list[str]] = {}
    for tensor in inventory.located:
        first, is_token = next(iter(tensor.inputs)), tensor.weight.vocabulary_axis is not None
        differs, base = _differs(tensor, inventory.aligned), tensor.group.base
        if not is_merged(tensor.name, config.parameters or {}):
            giver, why = others or base or first, "which is not merged"
        elif heads is not None and (differs or is_task_head(tensor.name)):
            giver, why = heads, "as `heads:` says"
        elif differs and base is not None and layer_of(tensor.name) is None and not is_token:
            giver, why = base, "because others lack it or have another shape"
        else:
            continue
        if giver in tensor.found:
            tensor.take(giver)
            reasons.setdefault((giver, why), []).append(tensor.name)
        elif giver not in tensor.inputs:
            expected = f"it among the inputs of {tensor.group.where}, for {tensor.name}"
            remedy = "List it there, or name another model."
            findings.problem("parameters", f"{giver}, {why}", expected, remedy)
    for (giver, why), names in reasons.items():
        if why.startswith("because"):  # not asked for
            findings.warn(f"The output has {giver}'s {listing(names)}, {why}; `heads:` changes it.")
        else:
            findings.note(f"The output has {giver}'s {listing(names)}, {why}.")


def note_routers(inventory: Inventory) -> None:
    """Name the routers of a mixture of experts: what they choose among has changed with them."""
    located = inventory.located
    routers = [t.name for t in located if is_router(t.name) and not t.copied]
    if routers and any("experts." in tensor.name for tensor in located):
        also = "`exclude:` with their names keeps those of one model."
        inventory.findings.note(f"{listing(routers)}: routers, merged like any tensor. {also}")


def _differs(tensor: PlannedTensor, aligned: bool) -> bool:
    if tensor.missing and not tensor.weight.optional:
        return bool(tensor.found)
    shapes = {header.shape for header in tensor.headers}
    return len(shapes) > 1 and not (aligned and tensor.weight.vocabulary_axis is not None)


def is_merged(name: str, parameters: Mapping[str, Any]) -> bool:
    """Return whether `include` and `exclude` of the whole merge leave a tensor to be merged."""
    given = _patterns(parameters, INCLUDE)
    wanted = not given or _matches(name, given)
    return wanted and not _matches(name, _patterns(parameters, EXCLUDE))


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _patterns(parameters: Mapping[str, Any], parameter: str) -> Sequence[str]:
    return [pattern for pattern in _listed(parameters, parameter) if isinstance(pattern, str)]


def _listed(parameters: Mapping[str, Any], parameter: str) -> Sequence[Any]:
    given = parameters.get(parameter, [])
    return given if isinstance(given, list) else [given]


def selection_problems(
    config: Any, names: Collection[str], naming: Sequence[str]
) -> Iterator[Problem]:
    """Yield what is wrong with `include`, `exclude`, and the parameters `naming` a model.

    `names` are those of the tensors; none while they are not known.
    """
    models, given = list(map(str, models_at(config))), config.parameters or {}
    for parameter in naming:
        if parameter in given and named_model(config, parameter) is None:
            value, otherwise = given[parameter], "Write it as it stands there."
            remedy = did_you_mean(value, models, listed=True, otherwise=otherwise)
            expected = f"one of the models: {', '.join(models)}"
            yield Problem(f"parameters.{parameter}", shown(value), expected, remedy)
    if OTHERS in given and not {INCLUDE, EXCLUDE} & given.keys():
        expected, remedy = "`include:` or `exclude:` beside it", "Add one of them, or take it out."
        yield Problem(f"parameters.{OTHERS}", shown(given[OTHERS]), expected, remedy)
    if names and all(_matches(name, _patterns(given, EXCLUDE)) for name in names):
        expected, remedy = "one tensor at least that is merged", "Exclude fewer."
        yield Problem(f"parameters.{EXCLUDE}", shown(given[EXCLUDE]), expected, remedy)
    for parameter in (INCLUDE, EXCLUDE):
        patterns = _patterns(given, parameter)
        if parameter in given and (not patterns or patterns != _listed(given, parameter)):
            found, expected = shown(given[parameter]), "a pattern of names, or a list of them"
            yield Problem(f"parameters.{parameter}", found, expected, 'Such as "vision_tower.*".')
        for pattern in patterns if names else ():
            if not any(fnmatchcase(name, pattern) for name in names):
                expected = f"a pattern that a whole name fits, such as {min(names)}"
                remedy = "`*` stands for any letters."
                yield Problem(f"parameters.{parameter}", shown(pattern), expected, remedy)
