"""Processes that were started together merge the same, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.ranks import Ranks

_REMEDY = (
    "Start all processes with the same command and versions. Inputs that were copied to several "
    "machines need the same times of change (rsync -t, cp -p)."
)


def require_same(together: Ranks, given: Mapping[str, str]) -> None:
    """Compare what all processes were given; each of them calls this.

    Args:
        together: the processes.
        given: what decides the output, by names that a user understands.

    Raises:
        ConfigError: in the main process, naming what differs in which others.
        RankError: in the others, then.
    """
    everywhere = together.gather(dict(given))
    if problems := list(_differences(everywhere)):

        def refuse() -> None:
            raise ConfigError(problems)

        together.from_main(refuse)


def _differences(everywhere: Sequence[Mapping[str, str]]) -> Iterator[Problem]:
    first = everywhere[0]
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank, found in enumerate(everywhere):
        names = tuple(name for name in {**first, **found} if found.get(name) != first.get(name))
        if names:
            alike.setdefault(names, []).append(rank)
    for names, ranks in alike.items():
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        yield Problem(who, f"another {', '.join(names)}", "what rank 0 was given", _REMEDY)
