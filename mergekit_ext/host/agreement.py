"""What several processes cannot do together, and what all of them must be given alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_ext import parallel
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.host.method import ExtMethod, is_stock
from mergekit_ext.parallel import Ranks, own_device

_REMEDY = (
    "Start all processes with the same command and versions. Inputs that were copied to several "
    "machines need the same times of change (rsync -t, cp -p)."
)


def sharing_problems(name: str, method: ExtMethod | None, options: Any) -> Iterator[Problem]:
    """Yield what keeps several processes from sharing a merge; nothing for one alone.

    Args:
        name: of the merge method.
        method: the method, if it is one of the project's.
        options: mergekit's.
    """
    size = parallel.current().size
    if size == 1:
        return
    if method is None and is_stock(name):  # an unknown name is another problem
        yield Problem(
            "merge_method",
            f"{name}, which is mergekit's own, in {size} processes",
            "a method of mergekit-ext",
            "Merge in one process; --multi-gpu shares the work out over its GPUs.",
        )
    if not options.safe_serialization:
        yield Problem(
            "--no-safe-serialization",
            f"it, in {size} processes",
            "safetensors, which several processes can write",
            "Leave it out.",
        )
    if options.multi_gpu:
        yield Problem(
            "--multi-gpu",
            "it (perhaps as --gpu-rich) together with several processes",
            "one of the two",
            "Leave it out, and give --cuda: every process takes a GPU of its own.",
        )
    kind, _, number = options.device.partition(":")
    if number:
        yield Problem(
            "--device",
            f"{options.device} for several processes",
            f"{kind}, of which every process takes its own",
        )


def own_options(options: Any) -> Any:
    """Return mergekit's options as this process has them: its own device, one progress bar."""
    together = parallel.current()
    if together.size == 1:
        return options
    quiet = options.quiet or not together.is_main
    return options.model_copy(update={"device": own_device(options.device), "quiet": quiet})


def require_same(together: Ranks, given: Mapping[str, str]) -> None:
    """Compare what all processes were given; each of them calls this.

    Args:
        together: the processes.
        given: what decides the output, by names that a user understands.

    Raises:
        ConfigError: in all of them, naming what differs in which.
    """
    if problems := list(_differences(together.gather(dict(given)))):
        raise ConfigError(problems)


def _differences(everywhere: Sequence[Mapping[str, str]]) -> Iterator[Problem]:
    first = everywhere[0]
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank, found in enumerate(everywhere):
        names = tuple(name for name in {**first, **found} if found.get(name) != first.get(name))
        if names:
            alike.setdefault(names, []).append(rank)
    for names, others in alike.items():
        where = f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}"
        yield Problem(where, f"another {', '.join(names)}", "what rank 0 was given", _REMEDY)
