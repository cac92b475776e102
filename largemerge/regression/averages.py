"""Running averages of the tensors of a block that are not solved.

    Σ c_i W_i / Σ c_i  =  W_1 + Σ_i (c_i / Σ c) (W_i - W_1)

The second form gives identical candidates back as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from largemerge.regression.gram import GRAM_DTYPE
from largemerge.treatment import TensorPlan, Treatment


class RunningAverages:
    """Takes candidates one after another; holds one float32 sum per tensor.

    Args:
        plans: Tensors of a block; those that are neither averaged nor copied are passed over.
        weights: c_i / Σ c.
    """

    def __init__(self, plans: Sequence[TensorPlan], weights: Sequence[float]) -> None:
        self._plans = [plan for plan in plans if plan.treatment in (Treatment.AVERAGED, Treatment.COPIED)]
        self._weights = weights
        self._anchors: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Adds candidate `index`; the first one is the anchor."""
        for plan in self._plans:
            tensor = tensors[plan.name]
            if index == 0:
                self._anchors[plan.name] = tensor
                if plan.treatment is Treatment.AVERAGED:
                    self._sums[plan.name] = torch.zeros_like(tensor, dtype=GRAM_DTYPE)
            elif plan.treatment is Treatment.AVERAGED:
                difference = tensor.to(GRAM_DTYPE) - self._anchors[plan.name].to(GRAM_DTYPE)
                self._sums[plan.name].add_(difference, alpha=self._weights[index])

    def views(self) -> list[torch.Tensor]:
        """All that is added up over candidates."""
        return list(self._sums.values())

    def finish(self) -> dict[str, torch.Tensor]:
        """The averages, and the copies, in the dtypes of the output."""
        return {
            plan.name: (
                self._sums[plan.name].add_(self._anchors[plan.name])
                if plan.treatment is Treatment.AVERAGED
                else self._anchors[plan.name]
            ).to(plan.dtype)
            for plan in self._plans
        }
