"""Rows of several tasks in one forward pass, layer by layer.

`Batched` makes one module of those of all tasks. A layer whose parameters all tasks share stays as
it is; any other one computes the rows of each set of parameters together. Rows are sorted by task,
in an order in which tasks that share much are neighbours, so that layers take slices of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from mergekit_ext.errors import ConfigError, Problem, listing
from mergekit_ext.flexmerge.factored import Factored, Leaf

SUBJECT = "batching these models"
# Fields of configurations that may differ: they name things, or say the shape of a tensor.
_FREE = frozenset(
    {
        *("_name_or_path", "name_or_path", "architectures", "dtype", "transformers_version"),
        *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
        "vocab_size",
    }
)
# Tables without rows of a batch, and the method of the module above that makes what has them.
_TABLES = {"relative_attention_bias": "compute_bias"}
# Tokens of a task up to which one product for all tasks takes less time than one for each.
_FEW = 16


class Run(NamedTuple):
    """Neighbouring rows of one task, or of one set of parameters, by number."""

    number: int
    rows: int


class Routing:
    """Which rows of the batch that is being computed belong to which task.

    The rows of tensors are those of `runs`, or `copies` of each.
    """

    def __init__(self, tasks: Sequence[str], device: torch.device):
        self.tasks, self.device = tasks, device
        self.runs: list[Run] = []
        self.copies = 1
        self._found: dict[tuple[int, ...], tuple[list[Run], Tensor]] = {}

    @contextmanager
    def over(self, runs: Sequence[Run], copies: int) -> Iterator[None]:
        """Compute these rows for a while."""
        before = self.runs, self.copies, self._found
        self.runs, self.copies, self._found = list(runs), copies, {}
        try:
            yield
        finally:
            self.runs, self.copies, self._found = before

    def by(self, chosen: tuple[int, ...]) -> tuple[list[Run], Tensor]:
        """Return the runs of sets of parameters, and the set of each row.

        `chosen` has the set of each task.
        """
        if chosen not in self._found:
            runs: list[Run] = []
            for task, rows in self.runs:
                if runs and runs[-1].number == chosen[task]:
                    rows += runs.pop().rows
                runs.append(Run(chosen[task], rows))
            sets = torch.tensor([run.number for run in runs for _ in range(run.rows)])
            self._found[chosen] = runs, sets.to(self.device)
        return self._found[chosen]

    def scale(self, x: Tensor, where: str) -> int:
        """Return how many rows `x` has for each of the batch; 0 for one that is for all of them."""
        rows = sum(run.rows for run in self.runs)
        if len(x) in (rows, rows * self.copies):
            return len(x) // rows
        if len(x) == 1:
            return 0
        raise RuntimeError(
            f"{where} gets {len(x)} rows of a batch of {rows}: which task each belongs to is not "
            "known. Run the tasks one after another."
        )


class _Several(Factored):
    """Parameters of several tasks in place of one; no operation can use them."""

    def formed(self) -> Tensor:
        raise RuntimeError(
            "a parameter that differs between tasks is used outside of its layer. Run the tasks "
            "one after another."
        )


class _Routed:
    """The forward of a module with several sets of its own tensors, of which each task has one."""

    def __init__(self, routing: Routing, where: str, module: Any, modules: Sequence[Any]):
        self.routing, self.where, self.module = routing, where, module
        self.plain: Callable[..., Any] = module.forward
        first = _own(module)
        self.sets: list[dict[str, Tensor]] = []
        numbers: dict[tuple[Any, ...], int] = {}
        chosen = []
        for other in map(_own, modules):
            # Equal buffers, which every module has its own copies of, are one.
            same = {n for n in module._buffers if n in other and torch.equal(first[n], other[n])}
            tensors = {name: first[name] if name in same else t for name, t in other.items()}
            key = tuple(map(_identity, tensors.values()))
            if key not in numbers:
                numbers[key] = len(numbers)
                self.sets.append(tensors)
            chosen.append(numbers[key])
        self.chosen = tuple(chosen)
        self.stacked: dict[str, Tensor] = {}
        widths = {tuple(tensors["weight"].shape) for tensors in self.sets if "weight" in tensors}
        self.apart = len(widths) > 1 and isinstance(module, torch.nn.Linear)

    def install(self) -> None:
        """Take the place of the module's forward, and of its parameters."""
        for name, tensor in self.module._parameters.items():
            if tensor is not None:
                self.module._parameters[name] = torch.nn.Parameter(_Several.of(tensor.data), False)
        self.module.forward = self

    @contextmanager
    def using(self, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
        tables = self.module._parameters, self.module._buffers
        before = [dict(table) for table in tables]
        for table in tables:
            table.update({name: tensor for name, tensor in tensors.items() if name in table})
        try:
            yield
        finally:
            for table, values in zip(tables, before, strict=True):
                table.update(values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runs, _ = self.routing.by(self.chosen)
        if len(runs) > 1 or self.apart:
            return self.mixed(runs, *args, **kwargs)
        with self.using(self.sets[runs[0].number]):
            return self.plain(*args, **kwargs)

    def mixed(self, runs: Sequence[Run], *args: Any, **kwargs: Any) -> Any:
        """Compute the rows of one set of parameters after those of another."""
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        scale, copies = self.routing.scale(first, self.where), self.routing.copies
        parts, start = {}, 0
        by_set = groupby(self.routing.runs, lambda run: self.chosen[run.number])
        by_task = ((self.chosen[run.number], [run]) for run in self.routing.runs)
        for index, own in by_task if self.apart else by_set:
            within = list(own)
            rows = sum(run.rows for run in within)
            stop = start + rows * scale if scale else 1
            given = _mapped((args, kwargs), _sliced(len(first), start, stop))
            with self.using(self.sets[index]), self.routing.over(within, copies):
                made = self.plain(*given[0], **given[1])
            key = self.routing.tasks[within[0].number]
            parts[key] = made if scale else _mapped(made, _repeated(rows))
            start = stop if scale else 0
        return parts if self.apart else _joined([*parts.values()], self.where)


class _OfRows(_Routed):
    """A layer of one input, whose rows it computes in a faster way where it is `able`."""

    @property
    def able(self) -> bool:
        return True

    def mixed(self, runs: Sequence[Run], *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        scale = self.routing.scale(x, self.where)
        if not scale or x.dim() < 2 or not self.able:
            return super().mixed(runs, x)
        return self.computed(x, runs, scale)

    def computed(self, x: Tensor, runs: Sequence[Run], scale: int) -> Tensor:
        raise NotImplementedError

    def each(self, name: str, x: Tensor, scale: int, axis: int = -1) -> Tensor:
        """Return a vector for each row of `x`, along one of its axes."""
        if name not in self.stacked:
            self.stacked[name] = torch.stack([tensors[name] for tensors in self.sets])
        shape = [len(x), *[1] * (x.dim() - 1)]
        shape[axis] = -1
        return self.stacked[name][self.rows(scale)].view(shape)

    def rows(self, scale: int) -> Tensor:
        """Return the set of each row of a tensor."""
        _, sets = self.routing.by(self.chosen)
        return sets if scale == 1 else sets.repeat_interleave(scale)

    def slices(self, runs: Sequence[Run], scale: int) -> Iterator[tuple[dict[str, Tensor], slice]]:
        """Yield each run's parameters and rows."""
        start = 0
        for number, rows in runs:
            yield self.sets[number], slice(start, start + rows * scale)
            start += rows * scale


class _Linear(_OfRows):
    @property
    def able(self) -> bool:
        return not self.apart and not torch.is_grad_enabled()

    def computed(self, x: Tensor, runs: Sequence[Run], scale: int) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.module.out_features)
        for tensors, part in self.slices(runs, scale):
            given, made = x[part].reshape(-1, x.shape[-1]), out[part].view(-1, out.shape[-1])
            if "bias" in tensors:
                torch.addmm(tensors["bias"], given, tensors["weight"].T, out=made)
            else:
                torch.mm(given, tensors["weight"].T, out=made)
        return out


class _Norm(_OfRows):
    """A norm whose weights are multiplied after it: those of each row."""

    def computed(self, x: Tensor, runs: Sequence[Run], scale: int) -> Tensor:
        rows = {name: self.each(name, x, scale) for name in self.sets[0]}
        if not isinstance(self.module, torch.nn.LayerNorm):
            with self.using(rows):
                return self.plain(x)
        out = F.layer_norm(x, self.module.normalized_shape, None, None, self.module.eps)
        out = out * rows["weight"]
        return out + rows["bias"] if "bias" in rows else out


class _Residual(_OfRows):
    """A base for all rows, factors and biases by task."""

    @cached_property
    def able(self) -> bool:
        return len({_identity(tensors["theta_0"]) for tensors in self.sets}) == 1

    def computed(self, x: Tensor, runs: Sequence[Run], scale: int) -> Tensor:
        with self.using({**self.sets[0], "bias": None}):
            out = self.module.base(x)
            self.change(out, x, runs, scale)
        if "bias" in self.sets[0]:
            out += self.each("bias", out, scale, self.module.axis)
        return out

    def change(self, out: Tensor, x: Tensor, runs: Sequence[Run], scale: int) -> None:
        """Add to `out` what the factors of each task make of its rows."""
        for tensors, part in self.slices(runs, scale):
            if tensors["lora_A"].numel():
                out[part].add_(self.module.change(x[part], tensors["lora_B"], tensors["lora_A"]))


class _LinearResidual(_Residual):
    """Linear layers: with few rows, one product by all tasks' factors, where only its own count."""

    def install(self) -> None:
        super().install()
        ranks = [len(tensors["lora_A"]) for tensors in self.sets]
        self.owners = torch.repeat_interleave(torch.tensor(ranks)).to(self.routing.device)
        self.factors = []
        for name, axis in (("lora_B", 1), ("lora_A", 0)):
            whole = torch.cat([tensors[name].detach() for tensors in self.sets], axis)
            self.factors.append(whole)
            # The tasks' own become parts of it, so that nothing is held twice.
            for tensors, part in zip(self.sets, whole.split(ranks, axis), strict=True):
                tensors[name].data = part

    def change(self, out: Tensor, x: Tensor, runs: Sequence[Run], scale: int) -> None:
        if x[..., 0].numel() > _FEW * len(runs) or torch.is_grad_enabled():
            super().change(out, x, runs, scale)
            return
        b, a = self.factors
        mask = self.rows(scale)[:, None] == self.owners
        inner = F.linear(x, a) * mask.view(len(x), *[1] * (x.dim() - 2), -1)
        out.view(-1, len(b)).addmm_(inner.view(-1, len(a)), b.T)


class _Table:
    """A method that makes something for all rows of a table."""

    def __init__(self, routing: Routing, module: Any, method: str):
        self.routing, self.module, self.plain = routing, module, getattr(module, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parts, copies = [], self.routing.copies
        rows = copies if self.module.is_decoder else 1
        for run in self.routing.runs:
            with self.routing.over([run], copies):
                made = self.plain(*args, **kwargs)
            parts.append(made.expand(run.rows * rows, *made.shape[1:]))
        return torch.cat(parts)


def _kind(module: Any) -> type[_Routed]:
    """Return the fastest way for a module; one with a forward of its own is only called."""
    forward = type(module).forward
    if isinstance(module, Leaf):
        if forward is not Leaf.forward:
            return _Routed
        return _LinearResidual if isinstance(module, torch.nn.Linear) else _Residual
    if forward is torch.nn.Linear.forward:
        return _Linear
    multiplies = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    if forward is torch.nn.LayerNorm.forward or (multiplies and [*_own(module)] == ["weight"]):
        return _Routed if isinstance(module, torch.nn.RMSNorm) else _Norm
    return _Routed


class Batched(torch.nn.Module):
    """One module that computes rows of several tasks in one forward pass.

        model = Batched(load("out"))
        model(**inputs, tasks=["digit", "scene", "digit"]).logits
        model.generate(**inputs, tasks=["digit", "scene", "digit"])

    Args:
        models: what `load` returns for all tasks, on one device. Their tensors are used.

    Raises:
        ConfigError: the models differ in class or configuration, or are spread over devices.
    """

    def __init__(self, models: Mapping[str, Any]):
        super().__init__()
        self.tasks = tuple(models)
        _check(models)
        first = next(iter(models.values()))
        shared = {id(t): t for t in (*first.parameters(), *first.buffers())}
        self.model = copy.deepcopy(first, shared)
        self.routing = Routing(self.tasks, first.device)
        modules = [dict(model.named_modules()) for model in models.values()]
        routed = []
        for path, module in self.model.named_modules():
            if not _own(module):
                continue
            made = _kind(module)(self.routing, path, module, [parts[path] for parts in modules])
            if len(made.sets) > 1:
                routed.append(made)
        for made in routed:
            made.install()
            parent, _, name = made.where.rpartition(".")
            if name in _TABLES:
                above, method = self.model.get_submodule(parent), _TABLES[name]
                setattr(above, method, _Table(self.routing, above, method))
        # Rows stay where they are in a batch that no layer divides.
        order = _neighbours(len(models), routed)
        self._rank = {task: rank if routed else 0 for rank, task in enumerate(order)}

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, *args: Any, tasks: Sequence[str], **kwargs: Any) -> Any:
        """Return what the model does; row i of the inputs is one of ``tasks[i]``.

        Rows of the result are those of the inputs; but where heads differ in shape, their result is
        a dictionary from tasks to the rows of each. A cache has the rows in another order, which is
        always the same for the same `tasks`.
        """
        return self._run(self.model.__call__, args, kwargs, tasks, 1)

    def generate(self, *args: Any, tasks: Sequence[str], **kwargs: Any) -> Any:
        """Return what the model generates; settings that are not given are the first task's."""
        chosen = kwargs.get("generation_config") or self.model.generation_config
        numbers = ("num_beams", "num_return_sequences")
        copies = max(kwargs.get(n, getattr(chosen, n, None)) or 1 for n in numbers)
        return self._run(self.model.generate, args, kwargs, tasks, copies)

    def _run(
        self, call: Callable[..., Any], args: Any, kwargs: Any, tasks: Sequence[str], copies: int
    ) -> Any:
        count, given = len(tasks), [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        problems = []
        if unknown := sorted({*tasks} - {*self.tasks}):
            problems.append(Problem("tasks", listing(unknown), f"some of {listing(self.tasks)}"))
        if not given or len(given[0]) != count:
            rows = len(given[0]) if given else "no"
            problems.append(Problem("tasks", f"{count} for {rows} rows", "one for each row"))
        if problems:
            raise ConfigError(problems, SUBJECT)
        indices = [self.tasks.index(task) for task in tasks]
        order = sorted(range(count), key=lambda row: self._rank[indices[row]])
        runs = [Run(n, indices.count(n)) for n in dict.fromkeys(indices[row] for row in order)]
        if order == sorted(order):
            with self.routing.over(runs, copies):
                return call(*args, **kwargs)
        there = torch.tensor(order)
        back = there.argsort()

        def restored(tensor: Tensor) -> Tensor:
            times, left = divmod(len(tensor), count) if tensor.dim() else (0, 0)
            if left or times not in (1, copies):
                return tensor
            rows = tensor.view(count, times, *tensor.shape[1:])
            return rows[back.to(tensor.device)].flatten(0, 1)

        moved = _mapped((args, kwargs), lambda t: t[there.to(t.device)] if _has(t, count) else t)
        with self.routing.over(runs, copies):
            return _mapped(call(*moved[0], **moved[1]), restored)


def _check(models: Mapping[str, Any]) -> None:
    (first, model), *others = models.items()
    problems = []
    for task, other in models.items():
        if any(hasattr(m, "_hf_hook") for m in other.modules()):
            problems.append(Problem(task, "a module over several devices", "modules on one device"))
    for task, other in others:
        if type(other) is not type(model):
            found, expected = type(other).__name__, type(model).__name__
            problems.append(Problem(task, found, f"{expected}, as {first}"))
            continue
        ours, theirs = model.config.to_dict(), other.config.to_dict()
        differ = {n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)} - _FREE
        if differ:
            expected = f"the configuration of {first}"
            problems.append(Problem(task, f"another {listing(sorted(differ))}", expected))
    if problems:
        raise ConfigError(problems, SUBJECT)


def _own(module: Any) -> dict[str, Tensor]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _neighbours(count: int, routed: Sequence[_Routed]) -> list[int]:
    """Return the tasks in an order in which those that share many parameters are neighbours.

    Of equal ones the first comes first.
    """
    shared = torch.zeros(count, count)
    for made in routed:
        chosen = torch.tensor(made.chosen)
        size = sum(tensor.nbytes for tensor in made.sets[0].values())
        shared += size * (chosen[:, None] == chosen[None])
    chain = [0]
    while left := {*range(count)} - {*chain}:
        _, task, end = max((float(shared[chain[-e], t]), -t, e) for e in (0, 1) for t in left)
        chain.insert(end * len(chain), -task)
    return chain


def _has(tensor: Tensor, rows: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == rows


def _sliced(rows: int, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[start:stop] if _has(tensor, rows) else tensor


def _repeated(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.expand(rows, *tensor.shape[1:])


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return tensors, and tuples and dictionaries of them, changed; anything else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _mapped(own, change) for name, own in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_mapped(own, change) for own in value)
    if type(value) is dict:
        return {name: _mapped(own, change) for name, own in value.items()}
    return value


def _joined(parts: Sequence[Any], where: str) -> Any:
    """Return the rows of all parts, which are tensors or tuples of them."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if type(first) is tuple:
        return tuple(_joined(part, where) for part in zip(*parts, strict=True))
    if first is None:
        return None
    raise RuntimeError(f"{where} returns {type(first).__name__}. Run the tasks one after another.")
