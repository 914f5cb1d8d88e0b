"""NaN and infinity stop a FlexMerge, wherever they come from."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError, NonFiniteError
from mergekit_ext.kernels.numerics import all_finite, count_non_finite

# Tensors that are only copied may have dtypes without arithmetic.
EIGHT_BITS = {
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
}
COPIED = {**EIGHT_BITS, "C64": torch.complex64}


def require_finite(tensor: Tensor, name: str, task: str) -> None:
    """Raise `NonFiniteError` if a tensor of a task holds NaN or infinity; integers never do."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    wide = tensor.float() if tensor.dtype in EIGHT_BITS.values() else tensor
    if not all_finite(torch.view_as_real(wide) if wide.is_complex() else wide):
        raise NonFiniteError(name, task, count_non_finite(wide), wide.numel())


def require_in_range(tensor: Tensor, name: str) -> None:
    """Raise `MergeError` if a merged tensor left the range of its dtype."""
    if not all_finite(tensor):
        count = count_non_finite(tensor)
        raise MergeError(
            f"{name}: {count} of {tensor.numel()} merged values are not finite in {tensor.dtype}, "
            "although all inputs are; expected values inside of its range. Choose a wider "
            "`dtype`, or smaller `lambda` and `weight`."
        )
