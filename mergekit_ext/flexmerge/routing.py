"""Rows of several tasks in one forward pass, layer by layer.

`Batched` makes one module of those of all tasks. A layer whose parameters all tasks share stays as
it is; any other one has the rows of each set of parameters computed by the module of a task that
has them. Rows are sorted by task, in an order in which tasks that share much are neighbours, so
that layers take slices of the batch.
"""

import copy
import inspect
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mergekit_ext.errors import ConfigError, Problem, did_you_mean, listing, require, shown
from mergekit_ext.flexmerge.factored import Factored, Leaf
from mergekit_ext.flexmerge.placement import tensors_of

SUBJECT = "batching these models"
# Changes tensors, and those in containers; leaves anything else as it is.
_mapped = partial(tree_map_only, Tensor)
# Fields of configurations that may differ: they name things, or say the shape of a tensor.
_FREE = frozenset(
    {
        *("_name_or_path", "name_or_path", "architectures", "dtype", "transformers_version"),
        *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
        "vocab_size",
    }
)
# A table without rows of a batch, and methods of the module above that make what has them.
_TABLE, _MAKERS = "relative_attention_bias", ("compute_bias", "compute_position_bias")
# Arguments about positions of all rows, and with rows of its own; those that know rows by number.
_KEEP, _CACHE = "logits_to_keep", "past_key_values"
_COUNTING = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer")
# Tokens of a run up to which one product by the factors of all tasks takes less time than one for
# each, and up to which the rows of a group are brought together: small products take longer a row.
_FEW, _SMALL = 16, 256
# Tokens of each task from which one task after another takes less time on a CPU: what layers pass
# on stays in its cache. An image counts as one of patches of 32x32.
_LARGE, _PATCH = 256, 3 * 32 * 32


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
        self.stacked: dict[tuple[str, str], Tensor] = {}
        self.compute((), 1)

    def compute(self, numbers: Sequence[int], copies: int) -> None:
        """Take these rows for those of the batch, by the number of each one's task."""
        self.numbers, self.copies, self.rows = numbers, copies, len(numbers)
        self.runs = _runs(numbers)
        if torch.is_grad_enabled():  # parameters may be trained before the next batch
            self.stacked.clear()
        self._found: dict[tuple[int, ...], tuple[list[Run], Tensor]] = {}
        self._gathered: dict[tuple[Any, ...], tuple[list[Run], Tensor, Tensor]] = {}

    def by(self, chosen: tuple[int, ...]) -> tuple[list[Run], Tensor]:
        """Return the runs of sets of parameters, and each row's set; `chosen` has each task's."""
        if not self.runs:
            raise RuntimeError("no tasks: call `Batched` itself, with `tasks`, not its `model`")
        if chosen not in self._found:
            sets = [chosen[task] for task in self.numbers]
            self._found[chosen] = _runs(sets), torch.tensor(sets).to(self.device, non_blocking=True)
        return self._found[chosen]

    def gathered(self, chosen: tuple[int, ...], scale: int) -> tuple[list[Run], Tensor, Tensor]:
        """Return one run for each set of parameters, where its rows are, and the way back."""
        key = (chosen, scale)
        if key not in self._gathered:
            sets = [chosen[task] for task in self.numbers]
            there = torch.tensor(sets).repeat_interleave(scale).argsort(stable=True)
            places = torch.stack([there, there.argsort()]).to(self.device, non_blocking=True)
            self._gathered[key] = _runs(sorted(sets)), *places
        return self._gathered[key]

    def scale(self, x: Tensor, where: str) -> int:
        """Return how many rows `x` has for each of the batch; 0 for one that is for all of them."""
        rows, found = self.rows, x.shape[0]
        # A parameter, or what stands for one, is a table, whatever its length is.
        if type(x) is Tensor and x.dim() > 1 and found in (rows, rows * self.copies):
            return found // rows
        if found == 1:
            return 0
        raise _unmixed(f"{where} gets {[*x.shape]} for {rows} rows, whose tasks are not known")


def _runs(numbers: Sequence[int]) -> list[Run]:
    return [Run(number, len([*same])) for number, same in groupby(numbers)]


def _unmixed(found: str) -> RuntimeError:
    return RuntimeError(f"{found}. Run the tasks one after another.")


class _Several(Factored):
    """Parameters of several tasks in place of one; no operation can use them."""

    refusal = "a parameter of several tasks is used outside of its layer: use each task's own model"

    def formed(self) -> Tensor:
        raise RuntimeError(self.refusal)


class _Routed:
    """A method of a module that gives the rows of each task to its own `modules`.

    Those with the same tensors are one set, of which `modules` has the first. The whole model has
    no name, and a set for each task; so have those whose results are kept `apart`.
    """

    def __init__(
        self, routing: Routing, where: str, module: Any, modules: list[Any], method: str = "forward"
    ):
        self.routing, self.where, self.module, self.method = routing, where, module, method
        heads = isinstance(module, torch.nn.Linear) and len({m.weight.shape for m in modules}) > 1
        self.apart = heads or (not where and _compares(module))
        each = self.apart or not where
        keys = [n if each else _identity(module, other) for n, other in enumerate(modules)]
        self.modules = [modules[keys.index(key)] for key in dict.fromkeys(keys)]
        self.chosen = tuple(map([*dict.fromkeys(keys)].index, keys))

    def install(self) -> None:
        """Take the place of the method, and of the module's parameters."""
        for name, tensor in self.module._parameters.items():
            if tensor is not None:
                self.module._parameters[name] = torch.nn.Parameter(_Several.of(tensor.data), False)
        setattr(self.module, self.method, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runs, _ = self.routing.by(self.chosen)
        if len(runs) > 1 or self.apart:
            return self.mixed(runs, *args, **kwargs)
        return getattr(self.modules[runs[0].number], self.method)(*args, **kwargs)

    def mixed(self, runs: Sequence[Run], *args: Any, **kwargs: Any) -> Any:
        """Compute the rows of one set of parameters after those of another."""
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim())
        first = next(tensors, None)
        scale = 0 if first is None else self.routing.scale(first, self.where)
        rows = self.routing.rows * scale

        def made(module: Any, part: slice) -> Any:
            method = getattr(module, self.method)
            if not scale:
                # Made once, for each row that there is here.
                times = self.routing.copies if getattr(module, "is_decoder", False) else 1
                count = (part.stop - part.start) * times
                return _mapped(lambda t: t.expand(count, *t.shape[1:]), method(*args, **kwargs))
            own = _mapped(lambda t: t[part] if _has(t, rows) else t, (args, kwargs))
            return method(*own[0], **own[1])

        parts = [made(module, part) for module, part in self.slices(runs, scale or 1)]
        if self.apart:
            tasks = (self.routing.tasks[number] for number, _ in runs)
            return dict(zip(tasks, parts, strict=True))
        return tree_map(self.joined, *parts)

    def joined(self, *parts: Any) -> Any:
        """Return the rows of all parts."""
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        if parts[0] is None:
            return None
        raise _unmixed(f"{self.where or 'the model'} returns {type(parts[0]).__name__}")

    def slices(self, runs: Sequence[Run], scale: int) -> Iterator[tuple[Any, slice]]:
        """Yield each run's module and rows."""
        start = 0
        for number, rows in runs:
            yield self.modules[number], slice(start, start + rows * scale)
            start += rows * scale


class _OfRows(_Routed):
    """A layer of one input, whose rows it computes in a faster way."""

    @cached_property
    def bare(self) -> Any:
        """A module of the first set, in which other parameters can be put."""
        module = copy.copy(self.modules[0])
        module._parameters = dict(module._parameters)
        return module

    def mixed(self, runs: Sequence[Run], *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        scale = self.routing.scale(x, self.where)
        if not scale or x.dim() < 2:
            return super().mixed(runs, x)
        return self.computed(x, runs, scale)

    def computed(self, x: Tensor, runs: Sequence[Run], scale: int) -> Any:
        raise NotImplementedError

    def each(self, name: str, x: Tensor, scale: int, axis: int = -1) -> Tensor:
        """Return a vector for each row of `x`, along one of its axes."""
        stacked, key = self.routing.stacked, (self.where, name)
        if key not in stacked:
            stacked[key] = torch.stack([getattr(module, name) for module in self.modules])
        shape = [len(x), *[1] * (x.dim() - 1)]
        shape[axis] = -1
        return stacked[key].index_select(0, self.rows(scale)).view(shape)

    def rows(self, scale: int) -> Tensor:
        """Return the set of each row of a tensor."""
        _, sets = self.routing.by(self.chosen)
        return sets if scale == 1 else sets.repeat_interleave(scale)


class _Linear(_OfRows):
    def computed(self, x: Tensor, runs: Sequence[Run], scale: int) -> Any:
        if torch.is_grad_enabled():
            return _Routed.mixed(self, runs, x)
        if len(runs) > len(self.modules) and x.numel() <= _SMALL * len(runs) * x.shape[-1]:
            runs, there, back = self.routing.gathered(self.chosen, scale)
            return self.products(x.index_select(0, there), runs, scale).index_select(0, back)
        return self.products(x, runs, scale)

    def products(self, x: Tensor, runs: Sequence[Run], scale: int) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.module.out_features)
        for module, part in self.slices(runs, scale):
            given, made = x[part].reshape(-1, x.shape[-1]), out[part].view(-1, out.shape[-1])
            if module.bias is None:
                torch.mm(given, module.weight.T, out=made)
            else:
                torch.addmm(module.bias, given, module.weight.T, out=made)
        return out


class _Norm(_OfRows):
    """A norm whose weights are multiplied after it: those of each row."""

    def computed(self, x: Tensor, runs: Sequence[Run], scale: int) -> Tensor:
        weight = self.each("weight", x, scale)
        if not isinstance(self.module, torch.nn.LayerNorm):
            self.bare._parameters["weight"] = weight
            return self.bare(x)
        out = F.layer_norm(x, self.module.normalized_shape, None, None, self.module.eps) * weight
        return out if self.module.bias is None else out + self.each("bias", x, scale)


class _Residual(_OfRows):
    """A base for all rows, factors and biases by task."""

    def computed(self, x: Tensor, runs: Sequence[Run], scale: int) -> Tensor:
        self.bare._parameters["bias"] = None
        out: Tensor = self.bare.base(x)
        self.change(out, x, runs, scale)
        if getattr(self.module, "bias", None) is not None:
            out += self.each("bias", out, scale, self.module.axis)
        return out

    def change(self, out: Tensor, x: Tensor, runs: Sequence[Run], scale: int) -> None:
        """Add to `out` what the factors of each task make of its rows."""
        for module, part in self.slices(runs, scale):
            if module.lora_A.numel():
                out[part].add_(module.change(x[part], module.lora_B, module.lora_A))


class _LinearResidual(_Residual):
    """Linear layers: with few rows, one product by all tasks' factors, where only its own count."""

    def install(self) -> None:
        super().install()
        ranks = [len(module.lora_A) for module in self.modules]
        self.owners = torch.repeat_interleave(torch.tensor(ranks)).to(self.routing.device)
        self.factors = []
        for name, axis in (("lora_B", 1), ("lora_A", 0)):
            own = [getattr(module, name) for module in self.modules]
            whole = torch.cat([factor.detach() for factor in own], axis)
            self.factors.append(whole)
            # The tasks' own become parts of it, so that nothing is held twice.
            for factor, part in zip(own, whole.split(ranks, axis), strict=True):
                factor.data = part

    def change(self, out: Tensor, x: Tensor, runs: Sequence[Run], scale: int) -> None:
        if x[..., 0].numel() > _FEW * len(runs) or torch.is_grad_enabled():
            super().change(out, x, runs, scale)
            return
        b, a = self.factors
        mask = self.rows(scale)[:, None] == self.owners
        inner = F.linear(x, a) * mask.view(len(x), *[1] * (x.dim() - 2), -1)
        out.view(-1, len(b)).addmm_(inner.view(-1, len(a)), b.T)


def _kind(modules: Sequence[Any]) -> type[_Routed]:
    """Return the fastest way for modules; those with a forward of their own are only called."""
    module, forward = modules[0], type(modules[0]).forward
    if len({*map(type, modules)}) > 1:
        return _Routed
    if forward is Leaf.forward and len({other.theta_0.data_ptr() for other in modules}) == 1:
        return _LinearResidual if isinstance(module, torch.nn.Linear) else _Residual
    if forward is torch.nn.Linear.forward and len({other.weight.shape for other in modules}) == 1:
        return _Linear
    multiplies = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    multiplies &= [*tensors_of(module, False)] == ["weight"]
    multiplies &= not isinstance(module, torch.nn.RMSNorm)
    return _Norm if multiplies or forward is torch.nn.LayerNorm.forward else _Routed


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
        _check(models)
        self.tasks = tuple(models)
        first = next(iter(models.values()))
        shared = {id(t): t for t in (*first.parameters(), *first.buffers())}
        self.model = copy.deepcopy(first, shared)
        self.routing, self.lock = Routing(self.tasks, first.device), threading.RLock()
        modules = [dict(model.named_modules()) for model in models.values()]
        self.whole = _Routed(self.routing, "", self.model, [*models.values()])
        routed = []
        for path, module in self.model.named_modules():
            others = [parts[path] for parts in modules]
            differ = len({_identity(module, other, recurse=False) for other in others}) > 1
            if differ or (self.whole.apart and not path):
                given = self.routing, path, module, others
                routed.append(_kind(others)(*given) if path else self.whole)
        for made in routed:
            made.install()
            path, _, name = made.where.rpartition(".")
            for method in _MAKERS if name == _TABLE else ():
                above, others = self.model.get_submodule(path), [parts[path] for parts in modules]
                if hasattr(above, method):
                    _Routed(self.routing, path, above, others, method).install()
        self._apart = any(made.apart for made in routed)
        # Calls whose results were seen to be rows; those of heads of different shape never are.
        self._joined: set[Any] = set()
        self._parts = first.device.type == "cpu" and not self._apart
        # Rows stay where they are in a batch that no layer divides.
        order = _neighbours(len(models), routed)
        self._rank = {task: rank if routed else 0 for rank, task in enumerate(order)}

    @property
    def config(self) -> Any:
        return self.model.config

    def train(self, mode: bool = True) -> Any:
        for model in self.whole.modules:
            model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        found, expected = "a change of dtype or device", "models loaded with those: `dtype=`"
        require([Problem("Batched", found, expected, "Load and batch again.")], SUBJECT)

    def forward(self, *args: Any, tasks: Sequence[str], **kwargs: Any) -> Any:
        """Return what the model does; row i of the inputs is one of ``tasks[i]``.

        Rows of the result are those of the inputs; but where heads differ in shape, their result is
        a dictionary from tasks to the rows of each, and so is all of it where the model compares
        rows, as CLIP does. A cache has the rows in another order, the same for the same `tasks`.
        """
        return self._run(self._by_size, args, kwargs, tasks)

    def generate(self, *args: Any, tasks: Sequence[str], **kwargs: Any) -> Any:
        """Return what the model generates; settings that are not given are the first task's."""
        given = inspect.signature(self.model.generate).bind(*args, **kwargs).arguments
        chosen = given.get("generation_config") or self.model.generation_config
        numbers = ("num_beams", "num_return_sequences")
        copies = max(kwargs.get(n, getattr(chosen, n, None)) or 1 for n in numbers)
        moves = copies == 1 and all(given.get(name) is None for name in _COUNTING)
        return self._run(self.model.generate, args, kwargs, tasks, copies, moves)

    def _by_size(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the rows of all tasks together, or large parts one after another."""
        batch, given = self.routing, (*enumerate(args), *kwargs.items())
        # Not with a cache, and not where rows may be compared with those of another input.
        plain = all(isinstance(v, (Tensor, bool, int, float, str, type(None))) for _, v in given)
        x, *others = (value for _, value in given if _has(value, batch.rows))
        plain &= not others or all(value.dim() == 2 for value in (x, *others))
        tokens = x[0].numel() / _PATCH if x.dim() > 3 else x.shape[1:2].numel()
        large = min(run.rows for run in batch.runs) * tokens >= _LARGE and len(batch.runs) > 1
        if not (plain and large and self._parts) or torch.is_grad_enabled():
            return self.model(*args, **kwargs)
        alike = tuple((n, None if isinstance(v, Tensor) else v) for n, v in given)
        if alike in self._joined:
            return self.whole.mixed(batch.runs, *args, **kwargs)
        found = self.model(*args, **kwargs)
        if all(leaf is None or _has(leaf, batch.rows) for leaf in tree_leaves(found)):
            self._joined.add(alike)
        return found

    def _run(
        self, call: Any, args: Any, kwargs: Any, tasks: Any, copies: int = 1, moves: bool = True
    ) -> Any:
        named = isinstance(tasks, Collection) and not isinstance(tasks, str) and len(tasks)
        if not named or not all(isinstance(task, str) for task in tasks):
            expected = f"a list of names, one for each row, of {listing(self.tasks)}"
            raise ConfigError([Problem("tasks", shown(tasks), expected)], SUBJECT)
        count, given = len(tasks), [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        problems = []
        if unknown := sorted({*tasks} - {*self.tasks}):
            remedy = did_you_mean(unknown[0], self.tasks, listed=True, otherwise="")
            expected = f"some of {listing(self.tasks)}"
            problems.append(Problem("tasks", listing(unknown), expected, remedy))
        if self._apart and kwargs.get("labels") is not None:
            expected = "none, as heads differ in shape: compute each task's loss from its logits"
            problems.append(Problem("labels", "labels", expected))
        # The patches of all images in one tensor are not rows that could be sorted.
        images = [v for n, v in kwargs.items() if n.startswith("pixel_") and v is not None]
        unfit = sorted({*map(len, given[:1] + images)} - {count}) if given else [0]
        expected = "one for each row, images too"
        problems += [Problem("tasks", f"{count} for {n} rows", expected) for n in unfit]
        require(problems, SUBJECT)
        indices = [self.tasks.index(task) for task in tasks]
        order = sorted(range(count), key=lambda row: self._rank[indices[row]] if moves else row)
        there, numbers = torch.tensor(order), [indices[row] for row in order]
        if getattr(kwargs.get(_CACHE), "numbers", numbers) != numbers:
            expected = "a cache of the same tasks, from a call that sorted the rows alike"
            require([Problem(_CACHE, "a cache of other tasks", expected)], SUBJECT)

        def taken(rows: Tensor, value: Any) -> Any:
            return _mapped(lambda t: t[rows] if _has(t, count) else t, value)

        with self.lock:
            before = self.routing.numbers, self.routing.copies
            self.routing.compute(numbers, copies)
            try:
                moved = order != sorted(order)
                if moved:
                    args = taken(there, args)
                    kwargs = {n: v if n == _KEEP else taken(there, v) for n, v in kwargs.items()}
                found = call(*args, **kwargs)
                if (cache := getattr(found, _CACHE, None)) is not None:
                    cache.numbers = numbers
                return taken(there.argsort(), found) if moved else found
            finally:
                self.routing.compute(*before)


def _check(models: Any) -> None:
    known = isinstance(models, Mapping) and len(models) > 0
    if not known or not all(isinstance(model, torch.nn.Module) for model in models.values()):
        expected = "a mapping from tasks to models, as `load` returns without a task"
        raise ConfigError([Problem("models", type(models).__name__, expected)], SUBJECT)
    first, model = next(iter(models.items()))
    problems = []
    for task, other in models.items():
        if any(hasattr(m, "_hf_hook") for m in other.modules()):
            problems.append(Problem(task, "a module over several devices", "modules on one device"))
        if type(other) is not type(model):
            found, expected = type(other).__name__, type(model).__name__
            problems.append(Problem(task, found, f"{expected}, as {first}"))
            continue
        if other.dtype != model.dtype:
            expected = f"{model.dtype}, as {first}: load with `dtype=`"
            problems.append(Problem(task, f"{other.dtype}", expected))
        ours, theirs = model.config.to_dict(), other.config.to_dict()
        differ = {n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)} - _FREE
        if differ:
            expected = f"the configuration of {first}"
            problems.append(Problem(task, f"another {listing(sorted(differ))}", expected))
    require(problems, SUBJECT)


def _identity(module: Any, other: Any, recurse: bool = True) -> tuple[Any, ...]:
    """Return what is the same of modules that hold the same tensors."""
    # Equal buffers, which every module has its own copies of, are that of `module`.
    buffers, found = dict(module.named_buffers(recurse=recurse)), []
    for name, own in tensors_of(other, recurse).items():
        same = name in buffers and torch.equal(buffers[name], own)
        tensor = buffers[name] if same else own
        found.append((name, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
    return tuple(found)


def _neighbours(count: int, routed: Sequence[_Routed]) -> list[int]:
    """Return the tasks in an order in which those that share many parameters are neighbours."""
    # Of equal ones the first comes first.
    shared = torch.zeros(count, count)
    for made in routed:
        chosen = torch.tensor(made.chosen)
        size = sum(tensor.nbytes for tensor in tensors_of(made.modules[0], False).values())
        shared += size * (chosen[:, None] == chosen[None])
    chain = [0]
    while left := {*range(count)} - {*chain}:
        _, task, end = max((float(shared[chain[-e], t]), -t, e) for e in (0, 1) for t in left)
        chain.insert(end * len(chain), -task)
    return chain


def _compares(module: Any) -> bool:
    """Tell whether the model compares all rows of two inputs, as CLIP's `logits_per_image` do."""
    made = inspect.signature(module.forward).return_annotation
    kinds = (getattr(kind, "__annotations__", ()) for kind in (made, *get_args(made)))
    return any("logits_per_" in name for names in kinds for name in names)


def _has(tensor: Any, rows: int) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() > 0 and len(tensor) == rows
