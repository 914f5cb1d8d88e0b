"""NAN, LoRE-Merging and FlexMerge for mergekit.

After installation mergekit's own commands know the methods. Importing this package loads neither
torch nor mergekit.
"""

# Every Python process of the environment imports this file (see autoload.py): it imports
# nothing, not even `typing` or `__future__`, and its annotations are strings.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "merge", "register"]


def register() -> None:
    """Make the methods known to mergekit, now and for modules of it that are imported later.

    The installed package does this by itself for every process that imports mergekit, unless
    ``MERGEKIT_EXT_AUTOLOAD=0``. Calling it again does no harm, and picks up methods that others
    have registered in the meantime.

    Raises:
        HostVersionError: the installed mergekit is not one that this version works with.
    """
    from mergekit_ext.autoload import install

    install()


def merge(
    config: "Any",
    out_path: "str | Path",
    options: "Any" = None,
    *,
    callbacks: "Iterable[object]" = (),
    restart: bool = False,
    max_memory: "int | str | None" = None,
    allow_pickle: bool = False,
) -> None:
    """Merge as ``mergekit-yaml`` does, checked first and with callbacks.

    Args:
        config: path of a YAML file, YAML text with more than one line, or a
            ``mergekit.config.MergeConfiguration``; any merge method.
        out_path: folder of the result; it appears when the result is complete.
        options: a ``mergekit.options.MergeOptions``; by default mergekit's defaults.
        callbacks: objects with methods of `mergekit_ext.events.MergeCallback`, beside the
            progress bar, which `options.quiet` switches off.
        restart: start over where an earlier merge into `out_path` was stopped, instead of going
            on with what it had finished.
        max_memory: bytes, or text such as "8GB", that the process and each GPU may hold; a merge
            that needs more is refused. See docs/limits.md.
        allow_pickle: also read pickles (pytorch_model.bin, adapter_model.bin), which can run
            code, from people you trust: by torch's unpickler of tensors only.

    Raises:
        ConfigError: something is wrong with the configuration or the inputs; nothing was read
            but configurations and headers, nothing was written.
        NonFiniteError: an input holds NaN or infinity; nothing was written.
        StoppedError: a full disk, an input that is gone, no memory; what is finished is kept.
        TypeError: a callback is a class, or has none of those methods; nothing was written.
    """
    from mergekit_ext.core.memory import limited
    from mergekit_ext.host.run import merge as run
    from mergekit_ext.io.headers import allowing_pickles

    register()
    with limited(max_memory, "max_memory"), allowing_pickles(allow_pickle):
        run(config, out_path, options, callbacks=callbacks, restart=restart)
