"""The table of regression methods: one row each, all over the same few choices.

A regression method looks for the weight W of a linear that does, on what it will see, what the candidates' linears do:

    minimise over W    Σ_i c_i ‖ X_i Wᵀ − T_i ‖² / N_i  +  λ ‖ W − W_a ‖²

    X_i   inputs of the linear on candidate i's data      `inputs`, `granularity`
    T_i = (1-β)·X_i W_iᵀ + β·E_i W_iᵀ + γ·D_i             `target` β, `drift` γ
    N_i   number of tokens, or the norm ‖X_iᵀX_i‖_F        `normalization`
    W_a   what is kept where the data says nothing         `anchor`

E_i are the inputs of the same linear in the candidate itself, run on its own data. D_i is by how much the hidden states
of the merged model have drifted from the candidate's, at the place where the linear's output is added to them; it is
zero for all other linears. With β = γ = 0 a linear of the merged model imitates the candidates' linears on inputs that
have drifted already; with β = 1 it does what they do in the candidates, and with γ = 1 it pays back the drift as well.

One method takes the same Gram matrices another way: `esm` merges the task vectors in the subspaces in which they move
the outputs of their linears (see `essential.py`).

A new method is a row in `METHODS`. What a row says, the user may say otherwise, under `parameters` in the YAML, as far
as `RegressionMethod.parameters` names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Stream = Literal["candidate", "merged"]
"""Whose blocks make the hidden states: a candidate's own, or the merged ones."""

Granularity = Literal["block", "average", "linear"]
Normalization = Literal["tokens", "frobenius"]
Anchor = Literal["average", "base", "task_arithmetic"]
Part = Literal["blocks", "norms", "head", "embeddings"]
"""What is solved; everything else is averaged."""

_SUMS = frozenset(
    {"anchor", "anchor_scale", "embedding_prior", "normalization", "off_diagonal_scale", "ridge", "solve"}
)
_ALL = _SUMS | {"drift", "granularity", "inputs", "shrinkage", "target"}
_SUBSPACES = frozenset({"power", "scale", "scale_layers"})


@dataclass(frozen=True)
class RegressionMethod:
    """One row of the table, or what the user has made of it.

    Attributes:
        title: Name of the method in the literature.
        source: Publication.
        inputs: Whose hidden states enter a block.
        granularity: Inside a block, a linear's inputs come from the candidate's weights (`block`), from the weighted
            average of the candidates' (`average`), or from what has been merged so far (`linear`), so that a block
            takes a pass for every group of linears.
        target: β, between the candidate's weight on the inputs X_i (0) and the candidate's own features (1).
        drift: γ, the share of the drift that is paid back by linears whose output is added to the hidden states.
        shrinkage: Whether what target and drift add is scaled down as far as folds of the data disagree about it.
        anchor: W_a: the weighted average, the base, or the base plus the sum of the task vectors, scaled.
        anchor_scale: The scale of task arithmetic.
        normalization: What a candidate's sums are divided by: its number of tokens, or the Frobenius norm of its Gram,
            so that candidates with small activations count as much as the others.
        off_diagonal_scale: The factor s on a Gram's off-diagonal.
        ridge: λ as a fraction of the mean diagonal; with Frobenius norms, of the mean norm, which is 1/K.
        solve: What is solved: linears of the blocks; the scales of the norms in them, each element for itself (see
            `RunningScales` in `averages.py`); the head, with the embedding where they are tied; the rows of input
            embeddings, each for itself (see `embeddings.py`).
        embedding_prior: κ, the number of tokens that the average of the embeddings counts for.
        merges_subspaces: Whether linears are merged in the essential subspaces of their task vectors, and not by
            regression.
        scale: The factor of their merged task vectors.
        power: The exponent of the eigenvalues by which directions are weighted.
        scale_layers: Whether a merged task vector is multiplied by the square of its norm, relative to the mean norm of
            all layers of its kind.
        parameters: Names of the settings under `parameters` that the method takes, beside `include` and `exclude`.
    """

    title: str
    source: str
    inputs: Stream
    granularity: Granularity = "block"
    target: float = 0.0
    drift: float = 0.0
    shrinkage: bool = False
    anchor: Anchor = "average"
    anchor_scale: float = 0.3
    normalization: Normalization = "tokens"
    off_diagonal_scale: float = 0.95
    ridge: float = 1.0e-6
    solve: tuple[Part, ...] = ("blocks",)
    embedding_prior: float = 1.0
    merges_subspaces: bool = False
    scale: float = 2.0
    power: float = 0.15
    scale_layers: bool = True
    parameters: frozenset[str] = _ALL

    @property
    def follows_candidates(self) -> bool:
        """Whether the candidates' own hidden states are kept: their blocks are run on their own data."""
        return self.inputs == "candidate" or self.compares

    @property
    def sums_stand_alone(self) -> bool:
        """Whether a candidate's Gram matrices depend on itself alone, and tell all that the method asks of its data.

        Nothing that is merged is run on the data, and nothing is asked of norms.
        """
        alone = self.inputs == "candidate" and self.granularity == "block" and not self.compares
        return alone and not self.solves_norms

    @property
    def compares(self) -> bool:
        """Whether a linear is held against the candidate's own features, so that two streams run side by side."""
        return self.target > 0 or self.drift > 0

    @property
    def shrinks(self) -> bool:
        """Whether what the candidates' own features add is kept apart, and scaled (see `shrinkage.py`)."""
        return self.shrinkage and self.compares

    @property
    def by_norm(self) -> bool:
        """Whether a candidate's sums are divided by the norm of its whole Gram."""
        return self.normalization == "frobenius"

    @property
    def needs_whole_grams(self) -> bool:
        """Whether nothing can be made of a part of a candidate's data, but only of its whole Gram."""
        return self.by_norm or self.merges_subspaces

    @property
    def scales_layers(self) -> bool:
        """Whether no weight is known before all blocks are merged."""
        return self.merges_subspaces and self.scale_layers

    @property
    def forwards_merged(self) -> bool:
        """Whether every merged block is run on all hidden states to make the next ones."""
        return self.inputs == "merged"

    @property
    def reads_end(self) -> bool:
        """Whether the last block's output is wanted: by the head, and by the report of the drift."""
        return self.compares or self.solves_head

    @property
    def solves_head(self) -> bool:
        """Whether the head is solved."""
        return "head" in self.solve

    @property
    def solves_norms(self) -> bool:
        """Whether the scales of the norms in the blocks are solved."""
        return "norms" in self.solve

    @property
    def counts_tokens(self) -> bool:
        """Whether rows of the input embeddings are averaged by how often their tokens occur."""
        return "embeddings" in self.solve

    def anchor_step(self, num_models: int) -> float:
        """How far the anchor lies from the base, in steps to the average: W_0 + α·Σ Δ_i is α·K of them."""
        return self.anchor_scale * num_models if self.anchor == "task_arithmetic" else 0.0

    def mistakes(self) -> Iterator[str]:
        """Yields settings that contradict each other, each after its name."""
        if self.drift > 0 and self.granularity != "linear":
            yield (
                f"drift: is paid back one linear after the other, and is {self.drift:g}; expected "
                "'granularity: linear' with it, or 'drift: 0'"
            )
        if self.target > 0 and self.granularity == "block" and self.inputs == "candidate":
            yield (
                "target: changes nothing where the inputs are the candidate's own; expected 'inputs: merged' or "
                "another granularity than 'block' with it, or 'target: 0'"
            )
        if self.solves_norms and (self.granularity != "block" or self.by_norm):
            found = f"granularity: {self.granularity}" if self.granularity != "block" else "normalization: frobenius"
            yield (
                f"solve: norms are averaged while the candidates' own blocks run, and not with '{found}'; expected "
                "'granularity: block' and 'normalization: tokens' with them, or no 'norms'"
            )
        for part in sorted(set(self.solve)):
            if self.solve.count(part) > 1:
                yield f"solve: names {part!r} twice"


METHODS: dict[str, RegressionMethod] = {
    "regmean": RegressionMethod(
        title="RegMean",
        source="Jin et al., arXiv 2212.09849",
        inputs="candidate",
        parameters=_SUMS,
    ),
    "lot": RegressionMethod(
        title="LOT Merging",
        source="Sun et al., arXiv 2505.23859: RegMean of task vectors by pseudoinverse, and scales of norms",
        inputs="candidate",
        anchor="base",
        off_diagonal_scale=1.0,
        ridge=0.0,
        solve=("blocks", "norms"),
        parameters=_SUMS,
    ),
    "esm": RegressionMethod(
        title="Essential Subspace Merging",
        source="Li et al., arXiv 2602.20208: singular directions of what task vectors do to the outputs",
        inputs="candidate",
        anchor="base",
        merges_subspaces=True,
        parameters=_SUBSPACES,
    ),
    "regmean_plusplus": RegressionMethod(
        title="RegMean++",
        source="arXiv 2508.03121",
        inputs="merged",
        parameters=_SUMS,
    ),
    "chain": RegressionMethod(
        title="Chain of Merges",
        source="arXiv 2508.21421: every linear on the inputs that it will really see",
        inputs="merged",
        granularity="linear",
        off_diagonal_scale=1.0,
        ridge=1.0e-2,
    ),
    "calibrated": RegressionMethod(
        title="Calibrated regression",
        source="kin of FeatCal (arXiv 2605.13030), Chain of Merges (arXiv 2508.21421) and LOT (arXiv 2505.23859)",
        inputs="merged",
        granularity="linear",
        target=1.0,
        drift=1.0,
        shrinkage=True,
        off_diagonal_scale=1.0,
        ridge=1.0e-2,
        solve=("blocks", "head"),
    ),
    "featcal": RegressionMethod(
        title="FeatCal",
        source="arXiv 2605.13030; here inputs inside a block come from the average, and norms and biases are averaged",
        inputs="merged",
        granularity="average",
        target=0.25,
        anchor="task_arithmetic",
        anchor_scale=0.66,
        normalization="frobenius",
        off_diagonal_scale=1.0,
        ridge=0.05,
    ),
}
