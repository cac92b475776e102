"""Methods that weigh whole tensors: in 16 bits, what float32 gives, rounded once at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from largemerge.data_free.methods.base import Base
from largemerge.data_free.methods.table import METHODS, merge_tensors

HALVES = {"weight": [0.5, 0.5]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "slerp": ("slerp", {"t": 0.3}),
    "nuslerp": ("nuslerp", {"per_model": HALVES}),
    "nuslerp of rows": ("nuslerp", {"per_model": HALVES, "nuslerp_flatten": False}),
    "nuslerp of columns": ("nuslerp", {"per_model": HALVES, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp": ("multislerp", {"per_model": {"weight": [0.5, 0.2, 0.3]}}),
    "karcher": ("karcher", {}),
    "model_stock": ("model_stock", {}),
    "model_stock of rows": ("model_stock", {"filter_wise": True}),
}


def models(count: int) -> list[torch.Tensor]:
    """Makes a base and others near it, in bfloat16."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(200, 300, generator=generator)
    return [base.bfloat16()] + [
        (base + 0.2 * torch.randn(base.shape, generator=generator)).bfloat16() for _ in range(count)
    ]


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_rounded_once(case: str, based: bool) -> None:
    method, options = CASES[case]
    row = METHODS[method]
    if based != (row.base is Base.REQUIRED) and row.base is not Base.OPTIONAL:
        pytest.skip("the method has no such variant")
    base, *tensors = models(min(3, row.num_models[1]))
    found = merge_tensors(method, tensors, base if based else None, **options)
    exact = merge_tensors(method, [each.float() for each in tensors], base.float() if based else None, **options)
    assert found.dtype == torch.bfloat16
    same = (found == exact.bfloat16()).double().mean().item()
    # Not all: task vectors are rounded where their angles are measured.
    assert same > 0.998, f"{same:.2%} of the elements are the same"
