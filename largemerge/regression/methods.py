"""The table of regression methods: one row each.

A regression method looks for the weight W of a linear that imitates the candidates' linears on their own data:

    minimise over W    Σ_i c_i ‖ X_i Wᵀ − T_i ‖² / tokens_i  +  λ ‖ W − W_a ‖²

Methods differ in where the inputs X_i come from (`inputs`, `granularity`), what they are to be mapped to (`target`),
and which weight is kept where the data says nothing (`anchor`). Everything else, from the Gram matrices to the solve,
is common to all of them.

A new method is a row in `METHODS`; its settings are fields of `MethodParameters` in `config.py`. What a row asks for
beyond what the engine can do is refused by `RegressionMethod.not_built`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Stream = Literal["candidate", "merged"]
"""Whose blocks make the hidden states: a candidate's own, or the merged ones."""


@dataclass(frozen=True)
class RegressionMethod:
    """One row of the table.

    Attributes:
        title: Name of the method in the literature.
        source: Publication.
        inputs: Whose hidden states enter a block.
        granularity: Inside a block, a linear's inputs come from the candidate's weights (`block`), or from what has
            been merged so far (`linear`), so that a block takes a pass for every group of linears.
        target: T_i, between the candidate's weight on the inputs X_i (0) and the candidate's own features (1).
        anchor: W_a: the weighted average, the base, task arithmetic at a scale, or a checkpoint that the user names.
        parameters: Names of the method's settings under `parameters`, beside `include` and `exclude`.
    """

    title: str
    source: str
    inputs: Stream
    granularity: Literal["block", "linear"] = "block"
    target: float = 0.0
    anchor: Literal["average", "base", "task_arithmetic", "checkpoint"] = "average"
    parameters: frozenset[str] = frozenset({"off_diagonal_scale", "ridge"})

    @property
    def advances_while_collecting(self) -> bool:
        """Whether the pass that collects statistics also makes the next hidden states: the candidate's own."""
        return self.inputs == "candidate"

    @property
    def forwards_merged(self) -> bool:
        """Whether every merged block is run on all hidden states to make the next ones."""
        return self.inputs == "merged"

    def not_built(self) -> Iterator[str]:
        """Says what the row asks for that the engine cannot do."""
        if self.granularity != "block":
            yield f"{self.title}: granularity {self.granularity!r} is not built; expected 'block'"
        if self.target != 0:
            yield f"{self.title}: target {self.target} is not built; expected 0"
        if self.anchor != "average":
            yield f"{self.title}: anchor {self.anchor!r} is not built; expected 'average'"


METHODS: dict[str, RegressionMethod] = {
    "regmean": RegressionMethod(
        title="RegMean",
        source="Jin et al., arXiv 2212.09849",
        inputs="candidate",
    ),
    "regmean_plusplus": RegressionMethod(
        title="RegMean++",
        source="arXiv 2508.03121",
        inputs="merged",
    ),
}
