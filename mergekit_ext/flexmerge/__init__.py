"""FlexMerge checkpoints: several models that share weights, on disk and in memory.

docs/flexmerge-format.md specifies the format. Importing this package loads nothing heavy.
"""

from typing import TYPE_CHECKING

from mergekit_ext.late import exported

if TYPE_CHECKING:
    from mergekit_ext.flexmerge.manifest import Manifest, read_manifest
    from mergekit_ext.flexmerge.routing import Batched
    from mergekit_ext.flexmerge.runtime import load
else:
    __getattr__, __dir__ = exported(
        __name__,
        {"manifest": ("Manifest", "read_manifest"), "routing": ("Batched",), "runtime": ("load",)},
    )
__all__ = ["Batched", "Manifest", "load", "read_manifest"]
