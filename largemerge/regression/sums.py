"""What is accumulated for one block: two sums per Gram matrix, whatever the number of candidates.

    G = Σ_i G̃_i          G̃_i = c_i / tokens_i · ( s·XᵢᵀXᵢ + (1-s)·diag(XᵢᵀXᵢ) )
    R = Σ_i E_i G̃_i      E_i = W_i - A,  A = W of the first candidate

The first candidate is the anchor A, so its term of R is zero and costs nothing. Linears that read the same
tensor share G; their R lie below one another. Everything is linear in the tokens.

Shapes: N tokens, I inputs, O outputs of all linears of a group, S columns of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from largemerge.regression.gram import GRAM_DTYPE, add_gram_, mirror_, shrink_off_diagonal_
from largemerge.regression.solve import Solution, solve_anchored

SKETCH_COLUMNS = 32


@dataclass
class GroupSums:
    """Sums of the linears that read one tensor.

    Attributes:
        outputs: Linear → its number of outputs, in the order of the rows of R.
        num_inputs: I.
        gram_II: G; only its lower triangle until the last candidate is in.
        rhs_OI: R.
        mean_OI: Σ c_i E_i / Σ c_i.
        tokens: By candidate.
        whole_gram: Whether s is 1, so that the rank is bounded by the tokens.
    """

    outputs: Mapping[str, int]
    num_inputs: int
    gram_II: torch.Tensor
    rhs_OI: torch.Tensor
    mean_OI: torch.Tensor
    candidate_II: torch.Tensor
    sketch_IS: torch.Tensor
    sketches_OS: list[torch.Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    whole_gram: bool = False

    def add_rows(self, x_NI: torch.Tensor) -> None:
        """Adds inputs of the present candidate, one row per token."""
        add_gram_(self.candidate_II, x_NI)
        self.tokens[-1] += x_NI.shape[0]

    def start_candidate(self) -> None:
        """Begins the sums of the next candidate."""
        self.candidate_II.zero_()
        self.tokens.append(0)

    def finish_gram(self, weight: float, tokens: int, off_diagonal_scale: float) -> None:
        """Makes G̃ of the present candidate's XᵀX and adds it to the sum of all.

        Args:
            weight: c_i / Σ c, the candidate's share.
            tokens: That the Gram matrix is divided by.
            off_diagonal_scale: s.

        Raises:
            FloatingPointError: If the candidate's Gram matrix is not finite.
        """
        if not torch.isfinite(self.candidate_II.diagonal()).all():
            raise FloatingPointError("activations are not finite")
        self.whole_gram = off_diagonal_scale == 1
        shrink_off_diagonal_(self.candidate_II, off_diagonal_scale).mul_(weight / tokens)
        self.gram_II.add_(self.candidate_II)

    def add_anchor(self) -> None:
        """Notes that the present candidate is the anchor: its difference is zero."""
        self.sketches_OS.append(torch.zeros(self.rhs_OI.shape[0], SKETCH_COLUMNS, device=self.rhs_OI.device))

    def add_differences(self, differences: Iterable[tuple[str, torch.Tensor]], weight: float) -> None:
        """Adds E_i G̃_i, after `finish_gram`.

        Args:
            differences: E_i `[O, I]` of every linear of the group, float32; one at a time is held.
            weight: c_i / Σ c.
        """
        gram_II = mirror_(self.candidate_II)
        sketch_OS = torch.zeros(self.rhs_OI.shape[0], SKETCH_COLUMNS, device=self.rhs_OI.device)
        for linear, difference_OI in differences:
            rows = self.rows_of(linear)
            self.rhs_OI[rows].addmm_(difference_OI, gram_II)
            self.mean_OI[rows].add_(difference_OI, alpha=weight)
            sketch_OS[rows] = difference_OI @ self.sketch_IS
        self.sketches_OS.append(sketch_OS)

    def solve(self, ridge: float) -> Solution:
        """X for all linears of the group at once."""
        most_rank = sum(self.tokens) if self.whole_gram else None
        return solve_anchored(mirror_(self.gram_II), self.rhs_OI, self.mean_OI, ridge, most_rank)

    def distances(self, update_OI: torch.Tensor, linear: str) -> tuple[list[float], float]:
        """Estimates of ‖W* - W_i‖ for every candidate, and of ‖W* - W̄‖ exactly, for one linear.

        A candidate's difference is no longer in memory when W* is known; its product with a fixed random
        sign matrix is, and the norm of such a product, divided by the root of its columns, estimates the norm.
        """
        rows = self.rows_of(linear)
        update_OS = update_OI[rows] @ self.sketch_IS
        estimates = [
            (update_OS - sketch_OS[rows]).norm().item() / math.sqrt(SKETCH_COLUMNS) for sketch_OS in self.sketches_OS
        ]
        return estimates, (update_OI[rows] - self.mean_OI[rows]).norm().item()

    def rows_of(self, linear: str) -> slice:
        """Rows of R that belong to one linear."""
        start = 0
        for name, outputs in self.outputs.items():
            if name == linear:
                return slice(start, start + outputs)
            start += outputs
        raise KeyError(linear)


def new_sums(outputs: Mapping[str, int], num_inputs: int, device: torch.device) -> GroupSums:
    """Empty sums for the linears that read one tensor of `num_inputs` features."""
    total = sum(outputs.values())

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=GRAM_DTYPE, device=device)

    generator = torch.Generator().manual_seed(num_inputs)
    signs = torch.randint(0, 2, (num_inputs, SKETCH_COLUMNS), generator=generator) * 2.0 - 1
    return GroupSums(
        outputs=dict(outputs),
        num_inputs=num_inputs,
        gram_II=zeros(num_inputs, num_inputs),
        rhs_OI=zeros(total, num_inputs),
        mean_OI=zeros(total, num_inputs),
        candidate_II=zeros(num_inputs, num_inputs),
        sketch_IS=signs.to(device),
    )


def sums_bytes(outputs: Sequence[int], num_inputs: int) -> int:
    """Bytes that `new_sums` holds, without the sketches."""
    return GRAM_DTYPE.itemsize * (2 * num_inputs**2 + 2 * sum(outputs) * num_inputs)
