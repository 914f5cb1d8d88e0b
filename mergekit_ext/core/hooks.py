"""Whether an object can be called as a callback; said before the work, not at its end."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any


def takes(function: Any, *arguments: str) -> bool:
    """Return whether a function can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # some built-in functions do not say what they take
        return callable(function)
    return True


def require_hooks(
    callback: object, hooks: Mapping[str, Sequence[str]], where: str, remark: str = ""
) -> None:
    """Refuse what would never be called, or could not be.

    Args:
        callback: any object.
        hooks: the names of the methods that are called, with their arguments.
        where: the user gave it, for the message.
        remark: what is known about an object without any of them.

    Raises:
        TypeError: it is a class, has none of the methods, or one that does not take its arguments.
    """
    if isinstance(callback, type):
        name = callback.__name__
        raise TypeError(f"{where}: found the class {name}; expected an object of it: {name}().")
    if not any(hasattr(callback, hook) for hook in hooks):
        wanted = ", ".join(hooks)
        raise TypeError(
            f"{where}: found {callback!r}{remark}; expected some of the methods {wanted}."
        )
    for hook, arguments in hooks.items():
        if hasattr(callback, hook) and not takes(getattr(callback, hook), *arguments):
            found = f"{type(callback).__name__}.{hook} with other arguments"
            raise TypeError(f"{where}: found {found}; expected {hook}({', '.join(arguments)}).")
