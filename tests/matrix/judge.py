"""Whether a merge of a class is right, refused before work, or wrong: the cells of the matrix."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml
from torch import Tensor

from mergekit_ext.cli import main as mergekit_ext_command
from tests.matrix import reference
from tests.matrix.family import TASKS, Family
from tests.models import config, write_yaml
from tests.reference import tsv

RIGHT, REFUSED, WRONG = "right", "refused", "wrong"
# In float32: of the change that the merge makes in a tensor, and of the tensor.
_TOLERANCE, _ROUNDING = 1e-4, 1e-6
_MU = 0.2


@dataclass(frozen=True)
class Verdict:
    """One cell. `why` is the message of the refusal, or what is wrong."""

    outcome: str
    why: str = ""


@dataclass(frozen=True)
class _Merge:
    """A configuration, and what each folder of its output should hold."""

    method: str
    models: Sequence[str]
    expected: Mapping[str, Mapping[str, Tensor]]
    based: bool = True
    parameters: Mapping[str, Any] = field(default_factory=dict)


def _nan(family: Family) -> _Merge:
    expected = {"": family.expected(reference.inverse_norms)}
    return _Merge("nan", TASKS, expected, parameters={"scale": "paper"})


def _lore(family: Family) -> _Merge:
    rule = reference.low_rank(_MU, reference.convolutions(family.base))
    return _Merge("lore", TASKS, {"": family.expected(rule)}, parameters={"mu": _MU, "lambda": 1})


def _tsv_m(family: Family) -> _Merge:
    rule = reference.by_matrix(tsv.merge, reference.convolutions(family.base))
    return _Merge("tsv_m", TASKS, {"": family.expected(rule)}, parameters={"lambda": 1})


def _pcb(family: Family) -> _Merge:
    return _Merge("pcb", TASKS, {"": family.expected(reference.competing)})


def _emr(family: Family) -> _Merge:
    expected = {"": family.expected(reference.unified)}
    return _Merge("emr", TASKS, expected, parameters={"lambda": 1})


def _flexmerge(family: Family) -> _Merge:
    expected = family.tasks(reference.task_arithmetic)
    return _Merge("flexmerge", TASKS, expected, parameters={"target_size": 1})


def _adapter_nan(family: Family) -> _Merge:
    return _Merge("nan", _adapter(family), {"": family.adapted})


def _adapter_linear(family: Family) -> _Merge:
    expected, weight = {"": family.adapted}, {"weight": 1.0}
    return _Merge("linear", _adapter(family), expected, based=False, parameters=weight)


def _adapter(family: Family) -> Sequence[str]:
    return [f"base+{family.folder / 'adapter'}"]


COLUMNS = {
    "nan": _nan,
    "lore": _lore,
    "tsv_m": _tsv_m,
    "pcb": _pcb,
    "emr": _emr,
    "flexmerge": _flexmerge,
    "base+adapter, nan": _adapter_nan,
    "base+adapter, linear": _adapter_linear,
}


def judge(family: Family, column: str) -> Verdict:
    """Run `check` and the merge of a column; compare the two, and the output with its reference."""
    merge, folder = COLUMNS[column](family), family.folder
    models = [folder / model for model in merge.models]
    base = folder / "base" if merge.based else None
    content = config(merge.method, models, base, merge.parameters)
    file = write_yaml(folder / f"{column}.yml", content)
    before, out = set(folder.iterdir()), folder / column
    checked = CliRunner().invoke(mergekit_ext_command, ["check", str(file)])
    done = CliRunner().invoke(mergekit_yaml, [str(file), str(out), "--quiet"])
    for result in (checked, done):
        if result.exception and not isinstance(result.exception, SystemExit):
            trace = "".join(traceback.format_exception(result.exception)[-3:])
            return Verdict(WRONG, f"a traceback: {trace}")
    if done.exit_code:
        left = set(folder.iterdir()) - before
        verdict = Verdict(WRONG if left else REFUSED, f"{done.output} {left or ''}".strip())
    else:
        faults = [
            f"{task or 'output'}: {fault}"
            for task, expected in merge.expected.items()
            for fault in _faults(family, out / task, expected)
        ]
        verdict = Verdict(WRONG if faults else RIGHT, "; ".join(faults))
    if _problems(checked) != _problems(done):
        why = f"the merge is {verdict.outcome}: {verdict.why}\nbut check says: {checked.output}"
        return Verdict(WRONG, why)
    return verdict


def _problems(result: Result) -> tuple[bool, Sequence[str]]:
    """Whether a command refuses, and the problems that it names."""
    return bool(result.exit_code), re.findall(r"^ +\d+\. .*", result.output, re.MULTILINE)


def _faults(family: Family, folder: Path, expected: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the model in `folder`, as transformers loads it."""
    load = type(family.base).from_pretrained
    _, before = load(family.folder / "base", output_loading_info=True)
    model, info = load(folder, output_loading_info=True)
    faults = [f"{key} {found}" for key, found in info.items() if found != before[key]]
    named = json.loads((folder / "config.json").read_text())["architectures"]
    if named != [type(family.base).__name__]:
        faults.append(f"architectures {named}")
    state, start = model.state_dict(), family.base.state_dict()
    if state.keys() != start.keys():
        faults.append(f"tensors {sorted(state.keys() ^ start.keys())}")
    wrong = []
    for name in sorted(expected.keys() & state.keys()):
        found, wanted = state[name].double(), expected[name].double()
        change = float((wanted - start[name]).abs().max())
        bound = _TOLERANCE * change + _ROUNDING * float(wanted.abs().max())
        far = float((wanted - found).abs().max())
        if state[name].dtype != start[name].dtype or not far <= bound:
            wrong.append(f"{name} ({state[name].dtype}) by {far:.2g} of a change of {change:.2g}")
    if wrong:
        faults.append(f"{len(wrong)} of {len(expected)} tensors differ: {wrong[:8]}")
    return faults
