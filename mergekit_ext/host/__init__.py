"""The only package that touches mergekit.

The modules of mergekit that are extended are loaded before any module in here: loading them
imports ours (see `mergekit_ext.autoload`), which would otherwise be found half loaded.
"""

import mergekit.merge_methods
import mergekit.plan  # noqa: F401
