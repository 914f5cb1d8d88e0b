"""An ordinary LoRA of one full fine-tune of a known base."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator
from torch import Tensor

from mergekit_ext.core.memory import count_or_bytes
from mergekit_ext.core.parameters import Count, Parameter, Share, choice
from mergekit_ext.errors import ConfigError, MergeError, Problem, shown
from mergekit_ext.events import Dispatcher, MergeBegin, MergeEnd, TensorMerged
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.io.staging import place_problems
from mergekit_ext.kernels.numerics import all_finite, compute_dtype
from mergekit_ext.kernels.ranks import allocate
from mergekit_ext.kernels.truncated import leading
from peft_merge.adapter import Adapter, Update, cast, finite
from peft_merge.config.check import DEVICE, DTYPE
from peft_merge.extraction.inputs import FullModel
from peft_merge.extraction.plan import Plan, Unit, planned
from peft_merge.extraction.report import card, report
from peft_merge.io.merged import adapter_of
from peft_merge.io.write import save_adapter

OWN, BASE = "own", "base"
_SIZE = 'a number of models above 0 (0.05), or bytes ("50MB")'
_OPTIONS = (
    Parameter("rank", Count | None, None),
    Parameter("energy", Share | None, None),
    Parameter(
        "size",
        Annotated[Any, BeforeValidator(partial(count_or_bytes, expected=_SIZE))] | None,
        None,
    ),
    Parameter("vectors", choice(OWN, BASE), BASE),
    DTYPE,
    DEVICE,
)
# Ranks are computed this far beyond the mean one that the size allows; where all triplets of a
# matrix are taken, as far again.
_DEPTH, _LEAST_DEPTH = 2, 8


@dataclass(frozen=True)
class ExtractedAdapter:
    """A fine-tune as an adapter of its base.

    Attributes:
        adapter: as data.
        report: what `merge_report.json` holds: ranks and errors by module, and what is left out.
        card: the text of README.md.
    """

    adapter: Adapter
    report: dict[str, Any]
    card: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PEFT folder, which must not exist or be empty. It appears when it is complete.

        Raises:
            ConfigError: there is something at `path`, or it cannot be written.
        """
        save_adapter(self.adapter, path, report=self.report, card=self.card)


def extract(
    base: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size: float | str | None = None,
    vectors: str = BASE,
    dtype: Any = None,
    device: Any = "cpu",
    callbacks: Iterable[object] = (),
    allow_pickle: bool = False,
) -> ExtractedAdapter:
    r"""Make a LoRA of a full fine-tune: the truncated SVD of :math:`W - W_0` of each matrix.

    Exactly one of `rank`, `energy` and `size` is given. Ranks by energy and size leave the least
    squared error (`mergekit_ext.kernels.ranks`); `rank_pattern` and `alpha_pattern` name them.

    Args:
        base, model: folders, or names on the Hub (``name@revision``).
        out: a folder to write; it must not exist or be empty.
        rank: of every matrix.
        energy: the share of the squared Frobenius norm of all differences that is kept.
        size: of the adapter's tensors: models (0.05 is a twentieth of `model`) or bytes.
        vectors: "own": norms, biases and other small tensors that changed are kept, as
            `modules_to_save`, `lora_bias`, or trained biases; "base": those of the base.
        dtype: of the factors; default: that of the model's matrices.
        device: where is computed.
        callbacks: see `mergekit_ext.events`.
        allow_pickle: read pytorch_model.bin (tensors only, by torch's restricted unpickler).

    Raises:
        ConfigError: something is wrong with arguments or models; it lists everything.
        NonFiniteError: a model holds NaN or infinity.
        MergeError: the models are the same, or a value leaves the range of `dtype`.
    """
    given: dict[str, Any] = {"rank": rank, "energy": energy, "size": size}
    chosen = [name for name, value in given.items() if value is not None]
    problems, options = list[Problem](), dict[str, Any]()
    if len(chosen) != 1:
        found = " and ".join(chosen) or "none of them"
        problems.append(Problem(", ".join(given), found, "one: how much of the change is kept"))
    given |= {"vectors": vectors, "dtype": dtype, "device": device}
    for option in _OPTIONS:
        value = given[option.name]
        if (wrong := option.problem(value)) is None:
            options[option.name] = option.read(value)
        else:
            problems.append(Problem(option.name, shown(value), *wrong))
    if out is not None:
        problems += place_problems(os.path.expanduser(out), str(out), empty=True)
    models = [
        opened for source in (base, model) if (opened := _opened(source, allow_pickle, problems))
    ]
    if problems:
        raise ConfigError(problems, "this extraction")
    plan, events, started = planned(*models), Dispatcher(callbacks), time.perf_counter()
    place = "" if out is None else os.fspath(out)
    try:
        events.emit(MergeBegin("extract", place, (plan.model.name,), len(plan.units), "module"))
        result = _Extraction(plan, options, events).run(Path(place or plan.model.name).name)
        if out is not None:
            result.save(out)
        events.emit(MergeEnd(place, time.perf_counter() - started))
    finally:
        events.close()
    return result


def _opened(source: Any, allow_pickle: bool, problems: list[Problem]) -> FullModel | None:
    try:
        return FullModel.open(source, allow_pickle)
    except ConfigError as error:
        problems += error.problems
        return None


class _Factors(NamedTuple):
    """Leading triplets of the matrices of a unit, sigma shared out evenly between B and A."""

    updates: Mapping[str, Update]
    squares: Tensor  # (k,), squared singular values, summed over its matrices
    whole: float  # squared norm


class _Extraction:
    def __init__(self, plan: Plan, options: Mapping[str, Any], events: Dispatcher):
        self._plan, self._options, self._events = plan, options, events
        headers = [plan.model.headers[name] for u in plan.units for name, _ in u.modules.values()]
        found = reduce(torch.promote_types, (FLOATING[header.dtype] for header in headers))
        self._dtype: torch.dtype = options["dtype"] or found
        self._factors: dict[str, _Factors] = {}

    def run(self, name: str) -> ExtractedAdapter:
        plan, changed = self._plan, self._changed()
        if self._options["vectors"] == OWN:
            small = [tensor for tensor in changed if tensor not in plan.biases]
            for owner in dict.fromkeys(tensor.rpartition(".")[0] for tensor in small):
                if plan.may_save(owner):
                    plan.save(owner)
        saved = [tensor for tensors in plan.whole.values() for tensor in tensors]
        biases = [t for t in changed if t in plan.biases] if self._options["vectors"] == OWN else []
        left = {t: square for t, square in changed.items() if t not in {*saved, *biases}}
        ranks = self._ranks({plan.biases[tensor].name for tensor in biases}, saved)
        units = [unit for unit in plan.units if ranks[unit.name]]
        if not units:
            raise MergeError(f"{plan.model.name}: every matrix is as in {plan.base.name}.")
        infos = {module: layer.info for unit in units for module, layer in unit.layers.items()}
        # One choice for all modules; merging into the base needs a bias in each.
        lora_bias = all(layer.bias for unit in units for layer in unit.layers.values())
        values: dict[str, Update] = {}
        for unit in units:
            bias = None
            if lora_bias and unit.bias is not None and unit.bias in biases:
                bias = cast(self._difference(unit.bias), self._dtype, unit.bias)
            for module, update in self._factors[unit.name].updates.items():
                k = ranks[unit.name]
                values[module] = Update(update.a[:, :k], update.b[..., :k], 1.0, bias)
        whole = [*saved, *([] if lora_bias else biases)]
        tensors = {t: finite(plan.model.tensor(t), t, plan.model.name) for t in whole}
        config = plan.configuration | {"bias": "none" if lora_bias or not biases else "lora_only"}
        adapter = adapter_of(name, values, infos, config, tensors)
        if any(unit.tied for unit in units):
            adapter = replace(adapter, config={**adapter.config, "ensure_weight_tying": True})
        spectra = {u.name: self._factors[u.name] for u in plan.units}
        found = {n: (ranks[n], f.squares, f.whole) for n, f in spectra.items() if f.whole}
        entries = report(plan, self._options, found, left, adapter)
        return ExtractedAdapter(adapter, entries, card(adapter, entries))

    def _changed(self) -> dict[str, float]:
        """Return the squared norms of the changes of small tensors and biases."""
        found = {}
        for name in (*self._plan.small, *self._plan.biases):
            if square := float(self._difference(name).square().sum()):
                found[name] = square
        return found

    def _difference(self, name: str) -> Tensor:
        """Return model - base, in float32 at least."""
        models = (self._plan.model, self._plan.base)
        one, other = (model.tensor(name).to(self._options["device"]) for model in models)
        difference = one.to(compute_dtype([one, other])) - other
        if not all_finite(difference):
            for model, tensor in zip(models, (one, other), strict=True):
                finite(tensor, name, model.name)
            raise MergeError(f"{name}: the difference leaves the range of {difference.dtype}.")
        return difference

    def _ranks(self, biased: Collection[str], saved: Sequence[str]) -> dict[str, int]:
        """Decompose what is adapted, and return its ranks; modules of changed biases have one."""
        units, rank = self._plan.units, self._options["rank"]
        costs = [unit.numbers * self._dtype.itemsize for unit in units]
        least = [int(unit.name in biased) for unit in units]
        forced = sum(c for c, n in zip(costs, least, strict=True) if n)
        if biased:  # each adapted module has one then
            biases = [math.prod(self._plan.model.headers[n].shape) for n in self._plan.biases]
            forced += sum(biases) * self._dtype.itemsize
        budget = self._budget(saved, forced)
        mean = 0 if budget == math.inf else int(budget // sum(costs))
        first = rank or max(_DEPTH * mean, _LEAST_DEPTH)
        depths = [min(unit.largest_rank, first) for unit in units]
        wanted = [*range(len(units))]
        while wanted:
            for k in wanted:
                self._decompose(units[k], depths[k])
            found = [self._factors[unit.name] for unit in units]
            if rank:
                ranks = [d if f.whole else n for d, f, n in zip(depths, found, least, strict=True)]
                break
            gains = [f.squares[n:] for f, n in zip(found, least, strict=True)]
            goal = math.inf
            if self._options["energy"]:
                goal = self._options["energy"] * math.fsum(f.whole for f in found)
                goal -= sum(float(f.squares[:n].sum()) for f, n in zip(found, least, strict=True))
            taken = allocate(gains, costs, budget=budget, goal=goal)
            ranks = [n + k for n, k in zip(least, taken, strict=True)]
            wanted = [
                k for k, unit in enumerate(units) if ranks[k] == depths[k] < unit.largest_rank
            ]
            for k in wanted:
                depths[k] = min(units[k].largest_rank, _DEPTH * depths[k])
        return dict(zip((unit.name for unit in units), ranks, strict=True))

    def _budget(self, saved: Sequence[str], forced: int) -> float:
        """Return the bytes that are left for ranks; `ConfigError` if there are none."""
        size = self._options["size"]
        if size is None:
            return math.inf
        headers = self._plan.model.headers
        models, count = size
        if count is None:
            count = math.floor(models * sum(header.nbytes for header in headers.values()))
        least = forced + sum(headers[name].nbytes for name in saved)
        if count <= least:
            found = f"{count:,} bytes, while what is saved whole takes {least:,}"
            raise ConfigError([Problem("size", found, "more than that")], "this extraction")
        return count - least

    def _decompose(self, unit: Unit, depth: int) -> None:
        """Find `depth` leading triplets of each matrix of a unit."""
        clock, updates = time.perf_counter(), dict[str, Update]()
        squares, whole, known = torch.zeros(depth, dtype=torch.float64), 0.0, dict[str, Update]()
        for module, (name, layer) in unit.modules.items():
            if name in known:  # a head is the transpose of the embedding that it is tied to
                updates[module] = Update(known[name].b.mT, known[name].a.mT, 1.0)
                continue
            stack = layer.matrices(self._difference(name))
            parts = [leading(matrix, depth, exact=False) for matrix in stack]
            sigma = torch.stack([part.sigma for part in parts])
            root = sigma.sqrt()[:, None, :]
            b = torch.stack([part.u for part in parts]) * root
            a = (torch.stack([part.v for part in parts]) * root).mT
            known[name] = updates[module] = Update(a, b, 1.0).cast(self._dtype, name)
            squares[: sigma.shape[1]] += sigma.square().sum(dim=0).cpu()
            whole += math.fsum(part.whole**2 for part in parts)
        first = unit.name not in self._factors
        self._factors[unit.name] = _Factors(updates, squares.cummin(dim=0).values, whole)
        if first:  # a deeper one is the same module to a bar
            seconds = time.perf_counter() - clock
            self._events.emit(TensorMerged(unit.name, tuple(stack.shape), {}, seconds))
