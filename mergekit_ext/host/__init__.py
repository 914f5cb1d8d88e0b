"""What works with mergekit.

mergekit's methods are loaded before any module in here: loading them imports ours (see
`mergekit_ext.autoload`), which would otherwise be found half loaded.
"""

import mergekit.merge_methods  # noqa: F401
