"""From sums to weights: the differences that go in, the merged weight and its report that come out.

Weights are taken a few rows at a time: a linear of gigabytes in float32 is never held.

Shapes: I inputs, O outputs of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from largemerge.regression.gram import GRAM_DTYPE
from largemerge.regression.solve import Solution
from largemerge.regression.sums import Differences, GroupSums, row_chunks
from largemerge.treatment import BlockPlan, GroupPlan


def differences(
    block: BlockPlan, group: GroupPlan, tensors: Mapping[str, torch.Tensor], anchor: Mapping[str, torch.Tensor]
) -> Differences:
    """E = W - A of all linears of a group, below one another, any rows of it when they are asked for."""
    weights = []
    start = 0
    for path, outputs in group.outputs.items():
        name = f"{block.name}.{path}.weight"
        weights.append((start, start + outputs, _oriented(tensors[name], group), _oriented(anchor[name], group)))
        start += outputs

    def rows(wanted: slice) -> torch.Tensor:
        parts = []
        for first, last, weight_OI, anchor_OI in weights:
            own = slice(max(wanted.start, first) - first, min(wanted.stop, last) - first)
            if own.start < own.stop:
                parts.append(weight_OI[own].to(GRAM_DTYPE, copy=True).sub_(anchor_OI[own]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return rows


def finish_linear(
    group: GroupPlan,
    path: str,
    anchor: torch.Tensor,
    dtype: torch.dtype,
    sums: GroupSums,
    solution: Solution,
    names: Sequence[str],
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The merged weight A + X in the module's layout, and what the report says of it.

    Args:
        group: Of the linear.
        path: Of the linear in its block.
        anchor: A, in the module's layout.
        dtype: Of the output.
        sums: Of the group, solved.
        solution: How.
        names: Of the candidates.
    """
    rows = sums.rows_of(path)
    anchor_OI = _oriented(anchor, group)
    weight_OI = torch.empty(anchor_OI.shape, dtype=dtype, device=anchor.device)
    squares = 0.0
    for chunk in row_chunks(rows, group.num_inputs):
        own = slice(chunk.start - rows.start, chunk.stop - rows.start)
        exact_OI = sums.rhs_OI[chunk] + anchor_OI[own]
        squares += exact_OI.square().sum().item()
        weight_OI[own] = exact_OI.to(dtype)
    norm = squares**0.5 or 1.0
    to_candidates, to_average = sums.distances(path)
    report = {
        "shape": list(weight_OI.shape),
        "shares_gram_with": group.leader,
        "tokens": dict(zip(names, sums.tokens, strict=True)),
        "solver": solution.solver,
        "condition": solution.condition,
        "residual": solution.residual,
        "fallbacks": list(solution.fallbacks),
        "num_dead_features": solution.num_dead_features,
        "relative_distance_to_average": to_average / norm,
        "relative_distance_to_candidates": {
            name: distance / norm for name, distance in zip(names, to_candidates, strict=True)
        },
    }
    return _oriented(weight_OI, group).contiguous(), report


def _oriented(weight: torch.Tensor, group: GroupPlan) -> torch.Tensor:
    """`[out, in]` from the module's layout, or the other way round."""
    return weight.T if group.transposed else weight
