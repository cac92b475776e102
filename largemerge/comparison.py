"""What of the candidates is in a merge: measured on the finished tensors, from some rows of each.

    output, base, candidate ──► the same rows of every tensor ──► cosine of task vectors, relative distance, by block

The cosine of `W_i - W_base` and `W - W_base` says how much of a candidate's difference points the way that the merge
went: 1 for the candidate itself, about 1/√K for one of K unrelated ones in their average, 0 for what is lost. Without a
base there is only the distance, ‖W_i - W‖ / ‖W_i‖. The rows are a sample, the same for all, some 64 Ki numbers of each
tensor, so that the check costs next to nothing beside the merge. Of many tensors of one shape in a block, such as those
of a hundred experts, it is the first ones and some of the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_SAMPLE_ELEMENTS = 64 << 10  # of each tensor
_WHOLE_EVERY = 8  # of the tensors that can be read only as a whole, such as quantised ones, one in so many is read
_MAX_ALIKE = 16  # tensors of one shape in a block; of more than these, one in so many is read

ReadRows = Callable[[slice | None], torch.Tensor]
"""Reads some rows of a tensor, or all of it (`None`)."""


@dataclass(frozen=True)
class ComparedTensor:
    """One tensor of the output, and the same tensor of the models.

    Attributes:
        block: The block that it belongs to, or `outside`.
        shape: Its shape.
        output: Reads it from the output.
        candidates: Reads it from each candidate that has it, by name.
        base: Reads it from the base; `None` without one.
        by_rows: Whether rows can be read alone.
    """

    block: str
    shape: tuple[int, ...]
    output: ReadRows
    candidates: Mapping[str, ReadRows]
    base: ReadRows | None
    by_rows: bool = True


@dataclass
class _Sums:
    """Sums over elements: products of two differences, and their squares."""

    product: float = 0.0
    own: float = 0.0
    merged: float = 0.0
    apart: float = 0.0
    size: float = 0.0


@dataclass(frozen=True)
class Verification:
    """What was found on a finished merge.

    Attributes:
        cosines: Cosine of a candidate's and the merge's task vectors, by candidate and block; empty without a base.
        distances: Relative distance of the merge from a candidate, by candidate and block.
        means: The same over all blocks together, by candidate: cosine (`None` without a base) and distance.
        seconds: How long the check took.
        num_not_finite: Number of tensors in which the base holds NaN or infinity; they are left out of the cosines.
    """

    cosines: Mapping[str, Mapping[str, float]]
    distances: Mapping[str, Mapping[str, float]]
    means: Mapping[str, tuple[float | None, float]]
    seconds: float = 0.0
    num_not_finite: int = 0

    def to_json(self) -> dict[str, Any]:
        """The findings as plain JSON values."""
        return {
            "candidates": {
                name: {
                    "cosine_of_task_vectors": cosine,
                    "relative_distance": distance,
                    "by_block": {
                        block: {
                            **({"cosine": self.cosines[name][block]} if block in self.cosines.get(name, {}) else {}),
                            "distance": value,
                        }
                        for block, value in self.distances[name].items()
                    },
                }
                for name, (cosine, distance) in self.means.items()
            },
            **({"base_tensors_not_finite": self.num_not_finite} if self.num_not_finite else {}),
            "seconds": round(self.seconds, 3),
        }

    def rows(self, short: Callable[[str], str] = str) -> list[tuple[str, str]]:
        """Rows for a closing table: a title and a text; `short` shortens candidates' names."""
        has_base = any(cosine is not None for cosine, _ in self.means.values())
        parts, title = [], "task vectors kept" if has_base else "distance"
        for name, (cosine, distance) in self.means.items():
            if cosine is None:
                parts.append(f"{short(name)} " + ("has none: it is as the base" if has_base else f"{distance:.3f}"))
                continue
            lowest = min(self.cosines[name], key=lambda block: self.cosines[name][block])
            parts.append(f"{short(name)} {cosine:.2f} (lowest {self.cosines[name][lowest]:.2f}, {lowest})")
        if self.num_not_finite:
            parts.append(f"without {self.num_not_finite} tensors in which the base holds NaN or infinity")
        return [(title, "\n".join(parts))] if parts else []


@dataclass
class Comparison:
    """Adds up what is found tensor by tensor."""

    _sums: dict[str, dict[str, _Sums]] = field(default_factory=dict)
    _num_whole: int = 0
    _num_alike: Counter[tuple[str, tuple[int, ...]]] = field(default_factory=Counter)
    _not_finite: int = 0

    def add(self, tensor: ComparedTensor) -> None:
        """Reads a sample of a tensor from all models, and adds it up."""
        if not tensor.shape or not tensor.candidates or 0 in tensor.shape:
            return
        alike = (tensor.block, tensor.shape)
        self._num_alike[alike] += 1
        if self._num_alike[alike] > _MAX_ALIKE and self._num_alike[alike] % _MAX_ALIKE:
            return
        if not tensor.by_rows:
            self._num_whole += 1
            if (self._num_whole - 1) % _WHOLE_EVERY:
                return
        rows = _sampled_rows(tensor.shape)
        merged = _read(tensor.output, rows)
        origin = _read(tensor.base, rows) if tensor.base is not None else None
        if origin is not None and not torch.isfinite(origin).all():
            self._not_finite += 1
            origin = None
        difference = merged - origin if origin is not None else None
        for name, read in tensor.candidates.items():
            own = _read(read, rows)
            if own.shape != merged.shape:
                continue
            sums = self._sums.setdefault(name, {}).setdefault(tensor.block, _Sums())
            sums.apart += _dot(own - merged, own - merged)
            sums.size += _dot(own, own)
            if origin is not None and difference is not None and origin.shape == own.shape:
                own = own - origin
                sums.product += _dot(own, difference)
                sums.own += _dot(own, own)
                sums.merged += _dot(difference, difference)

    def finish(self, seconds: float = 0.0) -> Verification:
        """Returns cosines and distances, by candidate and block."""
        cosines: dict[str, dict[str, float]] = {}
        distances: dict[str, dict[str, float]] = {}
        means: dict[str, tuple[float | None, float]] = {}
        for name, blocks in self._sums.items():
            found = {block: _cosine(sums) for block, sums in blocks.items()}
            cosines[name] = {block: cosine for block, cosine in found.items() if cosine is not None}
            distances[name] = {block: _distance(sums) for block, sums in blocks.items()}
            total = _Sums()
            for sums in blocks.values():
                for key, value in vars(sums).items():
                    setattr(total, key, getattr(total, key) + value)
            means[name] = (_cosine(total), _distance(total))
        return Verification(cosines, distances, means, seconds, self._not_finite)


def _cosine(sums: _Sums) -> float | None:
    if not sums.own or not sums.merged:
        return None
    return round(sums.product / math.sqrt(sums.own * sums.merged), 4)


def _distance(sums: _Sums) -> float:
    return round(math.sqrt(sums.apart / sums.size), 5) if sums.size else 0.0


def _dot(left: torch.Tensor, right: torch.Tensor) -> float:
    return torch.dot(left.reshape(-1), right.reshape(-1)).item()


def _read(read: ReadRows, rows: slice | None) -> torch.Tensor:
    return read(rows).to(torch.float32)


def _sampled_rows(shape: tuple[int, ...]) -> slice | None:
    """Chooses rows from the middle of a tensor: a vocabulary begins and ends with special tokens, or padding."""
    wanted = max(1, _SAMPLE_ELEMENTS // max(1, math.prod(shape[1:])))
    if wanted >= shape[0]:
        return None
    start = (shape[0] - wanted) // 2
    return slice(start, start + wanted)
