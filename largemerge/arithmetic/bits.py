"""Comparisons and masks in integers: torch makes these many times faster on the CPU than truth values of floats.

The bits of a number, read as an integer of the same width, without its sign: in the order of magnitudes. A mask is an
integer with all bits set (-1) where something holds, else 0; `and` with it keeps a number, or makes it 0.
"""

from __future__ import annotations

import numpy as np
import torch

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def integers(numbers: torch.Tensor) -> torch.Tensor:
    """The bits, in the same memory."""
    return numbers.view(_INTEGERS[numbers.dtype])


def magnitudes(numbers: torch.Tensor) -> torch.Tensor:
    """The bits without the sign, of the shape of `numbers`: integers in the order of |x|."""
    found = integers(numbers)
    return found & torch.iinfo(found.dtype).max


def above(patterns: torch.Tensor, limit: int) -> torch.Tensor:
    """Mask of the magnitudes (not negative) that are larger than a limit (-1 or larger)."""
    return _signs(limit - patterns)


def below(patterns: torch.Tensor, limit: int) -> torch.Tensor:
    """Mask of the magnitudes (not negative) that are smaller than a limit."""
    return _signs(patterns - limit)


def _signs(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.bitwise_right_shift_(8 * numbers.element_size() - 1)


def mask_of(truth: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Truth values as a mask for numbers of some dtype."""
    return torch.from_numpy(truth.view(np.int8)).to(_INTEGERS[dtype]).neg_()


def equal_places(patterns: torch.Tensor, pattern: int) -> np.ndarray:
    """Where a pattern stands, counted in the order of the elements."""
    places: np.ndarray = np.flatnonzero(patterns.numpy() == pattern)
    return places


def count_equal(patterns: torch.Tensor, pattern: int) -> int:
    """How often a pattern stands there."""
    return int(np.count_nonzero(patterns.numpy() == pattern))


def kept(numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The numbers, 0 where the mask leaves them out."""
    return (integers(numbers) & mask).view(numbers.dtype)


def keep_(numbers: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Makes 0 what the mask leaves out."""
    integers(numbers).bitwise_and_(mask)
    return numbers
