"""Whether a merge of a class is right, refused before work, or wrong: the cells of the matrix."""

from __future__ import annotations

import copy
import functools
import json
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_ext.cli import main as mergekit_ext
from tests.matrix import reference
from tests.matrix.classes import Row
from tests.models import config, write_yaml

RIGHT, REFUSED, WRONG = "right", "refused", "wrong"
# Of the change that the merge makes in a tensor, and of the tensor, in float32.
_TOLERANCE, _ROUNDING = 1e-4, 1e-6
_MU = 0.2
_TASKS = ("one", "two")


@dataclass(frozen=True)
class Verdict:
    """One cell. `why` is the message of the refusal, or what is wrong."""

    outcome: str
    why: str = ""


class Family:
    """A class made small, saved as a user saves it: a base, two fine-tunes, an adapter."""

    def __init__(self, row: Row, folder: Path):
        self.row, self.folder = row, folder
        torch.manual_seed(0)
        self.base = _moved(row.make().eval(), 0, 0.02)
        self.tuned = [_moved(copy.deepcopy(self.base), n, 0.03 * n) for n in (1, 2)]
        for name, model in zip(("base", *_TASKS), (self.base, *self.tuned), strict=True):
            model.save_pretrained(folder / name)

    @functools.cached_property
    def with_adapter(self) -> dict[str, Tensor]:
        """Save a LoRA of the base; return what PEFT makes of the two."""
        torch.manual_seed(3)
        settings = LoraConfig(
            r=4, lora_alpha=8, target_modules=list(self.row.lora), init_lora_weights=False
        )
        model = get_peft_model(type(self.base).from_pretrained(self.folder / "base"), settings)
        model.save_pretrained(self.folder / "adapter")
        return _state(model.merge_and_unload())

    def expected(self, rule: reference.Rule) -> dict[str, Tensor]:
        return reference.merged(rule, _state(self.base), [*map(_state, self.tuned)])


def _moved(model: PreTrainedModel, seed: int, amount: float) -> PreTrainedModel:
    """The model after noise on all that training changes, and a step of its counters."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]  # others may not be saved
    saved = {id(t) for t in model.state_dict(keep_vars=True).values()}
    with torch.no_grad():
        for tensor in [*trained, *(b for b in model.buffers() if id(b) in saved)]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=amount)
            else:
                tensor.add_(seed)
    return model


def _state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _nan(family: Family) -> Verdict:
    return _merge(family, "nan", {"": family.expected(reference.inverse_norms)})


def _lore(family: Family) -> Verdict:
    rule = reference.low_rank(_MU, reference.convolutions(family.base))
    return _merge(family, "lore", {"": family.expected(rule)}, mu=_MU)


def _flexmerge(family: Family) -> Verdict:
    shared = family.expected(reference.task_arithmetic)
    tasks = {}
    for task, model in zip(_TASKS, family.tuned, strict=True):
        own = {
            name: tensor
            for name, tensor in _state(model).items()
            if name.split(".")[0] in family.row.heads or not tensor.is_floating_point()
        }
        tasks[task] = shared | own
    return _merge(family, "flexmerge", tasks, target_size=1)


def _adapter_nan(family: Family) -> Verdict:
    return _merge(family, "nan", {"": family.with_adapter}, adapter=True)


def _adapter_linear(family: Family) -> Verdict:
    return _merge(family, "linear", {"": family.with_adapter}, adapter=True, weight=1.0)


COLUMNS: Mapping[str, Callable[[Family], Verdict]] = {
    "nan": _nan,
    "lore": _lore,
    "flexmerge": _flexmerge,
    "base+adapter, nan": _adapter_nan,
    "base+adapter, linear": _adapter_linear,
}


def judge(family: Family, column: str) -> Verdict:
    """Run `check` and the merge of one column, and compare what it gives with the reference."""
    return COLUMNS[column](family)


def _merge(
    family: Family,
    method: str,
    expected: Mapping[str, Mapping[str, Tensor]],
    *,
    adapter: bool = False,
    **parameters: Any,
) -> Verdict:
    """Merge, and compare each folder of the output with its tensors in `expected`."""
    folder = family.folder
    place = f"{method}{'_adapter' if adapter else ''}"
    base = folder / "base"
    models = [Path(f"{base}+{folder / 'adapter'}")] if adapter else [folder / t for t in _TASKS]
    content = config(method, models, None if method == "linear" else base, parameters)
    file, out = write_yaml(folder / f"{place}.yml", content), folder / place
    checked = CliRunner().invoke(mergekit_ext, ["check", str(file)])
    before = set(folder.iterdir())
    done = CliRunner().invoke(mergekit_yaml, [str(file), str(out), "--quiet"])
    for result in (checked, done):
        if result.exception and not isinstance(result.exception, SystemExit):
            trace = "".join(traceback.format_exception(result.exception)[-3:])
            return Verdict(WRONG, f"a traceback: {trace}")
    if done.exit_code:
        verdict = _refused(done.output, set(folder.iterdir()) - before)
    else:
        faults = [
            f"{task or 'output'}: {fault}"
            for task, tensors in expected.items()
            for fault in _faults(family, out / task, tensors)
        ]
        verdict = Verdict(WRONG, "; ".join(faults)) if faults else Verdict(RIGHT)
    if bool(checked.exit_code) != bool(done.exit_code):
        why = f"the merge is {verdict.outcome}, and check says: {checked.output} {verdict.why}"
        return Verdict(WRONG, why)
    return verdict


def _refused(message: str, left: Collection[Path]) -> Verdict:
    if left:
        return Verdict(WRONG, f"refused, but left {left}: {message}")
    if "Traceback" in message or not message.strip():
        return Verdict(WRONG, f"no message: {message}")
    return Verdict(REFUSED, message.strip())


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
    for name in expected.keys() & state.keys():
        wanted, found = expected[name].double(), state[name].double()
        change = (wanted - start[name]).abs().max() if wanted.numel() else wanted.sum()
        bound = _TOLERANCE * change + _ROUNDING * wanted.abs().max()
        far = (wanted - found).abs().max()
        if state[name].dtype != start[name].dtype or not far <= bound:
            wrong.append(f"{name} {state[name].dtype} by {far:.2g} of a change of {change:.2g}")
    if wrong:
        faults.append(f"{len(wrong)} of {len(expected)} tensors differ: {sorted(wrong)[:8]}")
    return faults
