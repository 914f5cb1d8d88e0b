"""An ordinary LoRA of one full fine-tune of a known base."""

import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator
from torch import Tensor

from mergekit_ext.core import memory
from mergekit_ext.core.parameters import Count, Parameter, Share, choice, read_all
from mergekit_ext.errors import MergeError, MergeWarning, Problem, attempted, listing, require, warn
from mergekit_ext.events import Dispatcher, MergeBegin, MergeEnd, TensorMerged
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.flexmerge.residual import Kept, total
from mergekit_ext.io.class_model import empty_model
from mergekit_ext.io.staging import place_problems
from mergekit_ext.kernels.numerics import all_finite, compute_dtype, finite
from mergekit_ext.kernels.ranks import allocate, deepened, mean_rank
from mergekit_ext.kernels.truncated import factors
from peft_merge.adapter import Adapter, Update, cast
from peft_merge.config.check import DEVICE
from peft_merge.extraction.plan import FullModel, Plan, planned
from peft_merge.io.merged import adapter_of
from peft_merge.io.write import notes_of, state_dict
from peft_merge.layers import Unit, config_of
from peft_merge.merge import MergedAdapter
from peft_merge.report import FORMAT_VERSION, summary

OWN, BASE = "own", "base"
_SIZE = 'a number of models above 0 (0.05), or bytes ("50MB")'
_BYTES = Annotated[Any, BeforeValidator(partial(memory.count_or_bytes, expected=_SIZE))]
_OPTIONS = (
    Parameter("rank", Count | None),
    Parameter("energy", Share | None),
    Parameter("size", _BYTES | None),
    Parameter("vectors", choice(OWN, BASE)),
    DEVICE,
)


def extract(
    base: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size: float | str | None = None,
    vectors: str = BASE,
    device: Any = "cpu",
    callbacks: Iterable[object] = (),
) -> MergedAdapter:
    """Make a LoRA of a full fine-tune: the truncated SVD of W - W_0 of each matrix.

    Exactly one of `rank`, `energy` and `size` is given. Ranks by energy and size leave the least
    squared error (`mergekit_ext.kernels.ranks`); `rank_pattern` and `alpha_pattern` name them.
    Factors have the dtype of the model's matrices.

    Args:
        base, model: folders, or names on the Hub (``name@revision``).
        out: a folder to write; it must not exist or be empty.
        rank: of every matrix.
        energy: the share of the squared Frobenius norm of all differences that is kept.
        size: of the adapter's tensors: models (0.05 is a twentieth of `model`) or bytes.
        vectors: "own": norms, biases and other small tensors that changed are kept, as
            `modules_to_save`, `lora_bias`, or trained biases; "base": those of the base.
        device: where is computed.
        callbacks: see `mergekit_ext.events`.

    Returns:
        The adapter; its report has ranks and errors by module, and what is left out.

    Raises:
        ConfigError: something is wrong with arguments or models; it lists everything.
        NonFiniteError: a model holds NaN or infinity.
        MergeError: the models are the same, or a value leaves the range of the factors' dtype.

    Example:
        >>> peft_merge.extract("base", "tuned", "lora", rank=64)
    """
    given = {"rank": rank, "energy": energy, "size": size}
    options, problems = read_all(_OPTIONS, given | {"vectors": vectors, "device": device})
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        found = " and ".join(chosen) or "none of them"
        problems.append(Problem(", ".join(given), found, "one: how much of the change is kept"))
    if out is not None:
        problems += place_problems(os.path.expanduser(out), str(out), empty=True)
    models, wrong = attempted(FullModel.open, (base, model))
    require([*problems, *wrong], "this extraction")
    plan, started = planned(*models), time.perf_counter()
    for note in plan.notes:
        warn(MergeWarning(note))
    place = "" if out is None else os.fspath(out)
    with closing(Dispatcher(callbacks)) as events:
        events.emit(MergeBegin("extract", place, (plan.model.name,), len(plan.units), "module"))
        result = _Extraction(plan, options, events).run(Path(place or plan.model.name).name)
        if out is not None:
            result.save(out)
        events.emit(MergeEnd(place, time.perf_counter() - started))
    return result


class _Factors(NamedTuple):
    """Leading triplets of the matrices of a unit, sigma shared out evenly between B and A."""

    updates: Mapping[str, Update]
    squares: Tensor  # (k,), squared singular values, summed over its matrices
    whole: float  # squared norm


class _Extraction:
    def __init__(self, plan: Plan, options: Mapping[str, Any], events: Dispatcher):
        self._plan, self._options, self._events = plan, options, events
        headers = [plan.model.headers[name] for u in plan.units for name, _ in u.modules.values()]
        self._dtype = reduce(torch.promote_types, (FLOATING[header.dtype] for header in headers))
        # Bytes of one rank.
        self._costs = {unit.name: unit.numbers * self._dtype.itemsize for unit in plan.units}
        self._factors: dict[str, _Factors] = {}

    def run(self, name: str) -> MergedAdapter:
        plan, model, left = self._plan, self._plan.model, self._changed()
        biases = plan.keep(left) if self._options["vectors"] == OWN else []
        saved = [tensor for tensors in plan.whole.values() for tensor in tensors]
        left = {t: square for t, square in left.items() if t not in {*saved, *biases}}
        ranks = self._ranks({plan.biases[tensor].name for tensor in biases}, saved)
        units = [unit for unit in plan.units if ranks[unit.name]]
        if not units:
            changed = any(found.whole for found in self._factors.values())
            same = f"every matrix is as in {plan.base.name}."
            raise MergeError(f"{model.name}: {'`size` is too small.' if changed else same}")
        # One choice for all modules; merging into the base needs a bias in each.
        lora_bias = bool(biases) and all(layer.bias for unit in units for layer in unit.layers)
        infos, values = {}, dict[str, Update]()
        for unit in units:
            k, bias = ranks[unit.name], None
            if lora_bias:
                bias = cast(self._difference(str(unit.bias)), self._dtype, str(unit.bias))
            for module, (_, layer) in unit.modules.items():
                found = self._factors[unit.name].updates[module]
                values[module] = Update(found.a[:, :k], found.b[..., :k], 1.0, bias).filled(k)
                infos[module] = replace(layer.info, rank=k, bias=lora_bias, dtype=self._dtype)
        trained = [] if lora_bias else biases  # biases of the base
        tensors = {t: finite(model.headers[t].load(), t, model.name) for t in (*saved, *trained)}
        kind = empty_model(model.config)
        config = config_of(kind, plan.units, plan.base.name, [*plan.whole])
        config |= {"revision": plan.base.revision, "bias": "lora_only" if trained else "none"}
        loads = {t: partial(tensors.__getitem__, t) for t in tensors}
        adapter = adapter_of(name, infos, values.__getitem__, config, loads)
        report = self._report(adapter, ranks, left)
        notes = [*plan.notes, *_notes(report), *notes_of(adapter)]
        return MergedAdapter(adapter, report | {"notes": notes}, None)

    def _changed(self) -> dict[str, float]:
        """Return the squared norms of the changes of small tensors and biases."""
        names = (*self._plan.small, *self._plan.biases)
        found = {name: float(self._difference(name).square().sum()) for name in names}
        return {name: square for name, square in found.items() if square}

    def _difference(self, name: str) -> Tensor:
        models = (self._plan.model, self._plan.base)
        one, other = (each.headers[name].load().to(self._options["device"]) for each in models)
        difference = one.to(compute_dtype([one, other])) - other
        if not all_finite(difference):
            for model, tensor in zip(models, (one, other), strict=True):
                finite(tensor, name, model.name)
            raise MergeError(f"{name}: the difference leaves the range of {difference.dtype}.")
        return difference

    def _ranks(self, biased: Collection[str], saved: Sequence[str]) -> dict[str, int]:
        """Decompose what is adapted, and return its ranks; modules of changed biases have one."""
        units, headers = self._plan.units, self._plan.model.headers
        rank, share = self._options["rank"], self._options["energy"]
        costs = [self._costs[unit.name] for unit in units]
        least = [int(unit.name in biased) for unit in units]
        forced = sum(headers[name].nbytes for name in saved)
        if biased:  # each adapted module has one then
            biases = [math.prod(headers[name].shape) for name in self._plan.biases]
            forced += sum(biases) * self._dtype.itemsize
        budget = self._budget(forced, sum(c for c, n in zip(costs, least, strict=True) if n))
        most = [min(unit.largest_rank, rank or unit.largest_rank) for unit in units]

        def chosen(like: Sequence[int]) -> Sequence[int]:
            found = [self._factors[units[k].name] for k in like]
            goal = share * math.fsum(f.whole for f in found) if share else math.inf
            gains = [f.squares for f in found]
            return allocate(gains, costs, budget=budget, goal=goal, least=least)

        def decompose(wanted: Iterable[int], depths: Sequence[int]) -> None:
            for k in wanted:
                self._decompose(units[k], depths[k])

        names, first = [unit.name for unit in units], rank or mean_rank(budget, costs)
        ranks = deepened(most, first, names, decompose, chosen)
        return dict(zip(names, ranks, strict=True))

    def _budget(self, forced: int, held: int) -> float:
        """Return the bytes that are left for ranks; `ConfigError` if there are none."""
        if self._options["size"] is None:
            return math.inf
        models, count = self._options["size"]
        if count is None:
            stored = sum(header.nbytes for header in self._plan.model.headers.values())
            count = math.floor(models * stored)
        if models is not None and models > 1:
            remedy = "Bytes have a unit, such as `50MB`."
            require([Problem("size", f"{models:g} models", "at most 1", remedy)], "this extraction")
        least = forced + held + min(self._costs.values())
        if count < least:
            found = f"{count:,} bytes, of which what is saved whole takes {forced + held:,}"
            expected = f"at least {least:,}, for one rank of a module"
            require([Problem("size", found, expected)], "this extraction")
        return float(count - forced)

    def _decompose(self, unit: Unit, depth: int) -> None:
        """Find `depth` leading triplets of each matrix of a unit."""
        clock, updates = time.perf_counter(), dict[str, Update]()
        squares, whole, known = torch.zeros(depth, dtype=torch.float64), 0.0, dict[str, Update]()
        for module, (name, layer) in unit.modules.items():
            if name in known:  # a head is the transpose of the embedding that it is tied to
                updates[module] = Update(known[name].b.mT, known[name].a.mT, 1.0)
                continue
            stack = layer.matrices(self._difference(name))
            b, a, own, norm = factors(stack, depth)
            known[name] = updates[module] = Update(a, b, 1.0).cast(self._dtype, name)
            squares[: len(own)] += own
            whole += norm
        first = unit.name not in self._factors
        self._factors[unit.name] = _Factors(updates, squares, whole)
        if first:  # a deeper one is the same module to a bar
            seconds = time.perf_counter() - clock
            self._events.emit(TensorMerged(unit.name, tuple(stack.shape), {}, seconds))

    def _report(
        self, adapter: Adapter, ranks: Mapping[str, int], left: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return what was kept and what was not, as JSON values; `left` are squared norms."""
        plan = self._plan
        kept = {
            name: Kept.of(found.squares, found.whole, rank, rank * self._costs[name])
            for name, rank in ranks.items()
            if (found := self._factors[name]).whole
        }
        modules = {name: each.entry for name, each in kept.items()}
        missing, whole = math.fsum(left.values()), math.fsum(each.whole for each in kept.values())
        return {
            "format_version": FORMAT_VERSION,
            "method": "extract",
            "base": plan.base.name,
            "model": plan.model.name,
            **{name: self._options[name] for name in ("rank", "energy", "vectors")},
            "summary": {
                **summary(len(adapter.infos), modules.items()),
                "bytes": sum(tensor.nbytes for tensor in state_dict(adapter).values()),
                "error": total([*kept.values()])["error"],
                "left": missing / (whole + missing) if missing else 0.0,
            },
            "modules": modules,
            "whole_tensors": sorted(adapter.saved),
            "reshaped": plan.reshaped,
            "left": {name: math.sqrt(square) for name, square in left.items()},
        }


def _notes(report: Mapping[str, Any]) -> Iterator[str]:
    found, left = report["summary"], report["left"]
    yield (
        f"The relative error of the changes of all matrices is {found['error']:.3g}; the adapter "
        f"takes {memory.size(found['bytes'])}."
    )
    if report["whole_tensors"]:
        yield f"Saved whole: {listing(report['whole_tensors'])}."
    if report["reshaped"]:
        yield (
            f"Before loading, give the base the shape of {listing(report['reshaped'])} "
            "(`resize_token_embeddings`, `num_labels`)."
        )
    if left:
        way = "" if report["vectors"] == OWN else " (`vectors: own` keeps what PEFT can)"
        yield (
            f"Left as in the base{way}: {listing(sorted(left))}, {found['left']:.2%} of the "
            "squared norm of all changes."
        )
