"""Task vectors merged in the subspaces in which they move a linear's outputs: Essential Subspace Merging.

Li et al., arXiv 2602.20208; the numbers are those of the authors' program for vision transformers (kiddo127/ESM). Of
each of K models, with the inputs X_i that the linear has in the model itself, on the model's own data,

    Δ_i = W_i - W_0          G_i = X_iᵀX_i          E_i Λ_i E_iᵀ = Δ_i G_i Δ_iᵀ

where the columns of E_i `[O, k]` are the k = max(1, O // K) directions in which the outputs X_i Δ_iᵀ are largest. Each
direction is weighted by e = (λ / mean λ)^power, divided by the mean of e over the k directions; each model by the norm
of its task vector; each input by how much all models together say of it:

    U = [E_1 diag(e_1) … E_K diag(e_K)]                                             [O, K·k]
    V = [diag(e_i) E_iᵀ Δ_i · (‖Δ_i‖ / mean ‖Δ‖)²], one below the other             [K·k, I]
    V ← V diag((c / mean c)²), c_j the norm of column j of V
    M = scale · mean(s_U) · mean(s_V) · polar(U) polar(V)

s_U and s_V are singular values, and polar(X) = P Qᵀ where X = P S Qᵀ. The published scale is 2, the power 0.15. At the
end each M is multiplied by (‖M‖ / mean ‖M‖)², the mean over all layers of its kind (see `layer_scales.py`).

    Gram of a candidate ──► directions ──► EssentialSums ──► merged: M, what the report says of it
    W_i - W_0 ─────────────────┘

What G_i is divided by does not matter. An eigenvalue below a millionth of the largest counts as 0: it is the rounding
noise of a float32 Gram. Where fewer than k are left, the program fills up with arbitrary directions, of weight 0, which
the polar factor makes as large as all others; here there are none in their place, and the report says how many there
were. The means are over all k in any case.

Everything that is not a single product is float64. Where O > I, the directions come from the I × I side: with G = L Lᵀ,
the left singular vectors of Δ L are the eigenvectors of Δ G Δᵀ, and its squared singular values their eigenvalues.

Shapes: I inputs, O outputs of one linear, K models, k directions of each, R rank of a Gram, B and S as in `Sketcher`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from largemerge.regression.gram import GRAM_DTYPE, PANEL, Gram, Scratch
from largemerge.regression.group_sums import Differences, Features, GroupSums, RankPart, Sketcher
from largemerge.regression.methods import RegressionMethod
from largemerge.regression.tensor_plan import LinearGroup
from largemerge.singular import FACTOR_DTYPE, polar_factor
from largemerge.units import counted

SMALLEST_EIGENVALUE = 1e-6
"""Of the largest: smaller ones count as 0."""

SOLVER = "essential_subspaces_float64"
"""What the report calls the way in which these linears are merged."""


def directions(
    delta_OI: torch.Tensor, gram_II: torch.Tensor, count: int, root_IR: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the directions in which a task vector moves the outputs most, E `[O, k]`, and their λ `[k]`, float64.

    Args:
        delta_OI: The task vector Δ, float32 or better.
        gram_II: Gram matrix G of the inputs, float64.
        count: The most directions to return; fewer come back where the other eigenvalues count as 0.
        root_IR: What `root` makes of G; default: made here where it is needed.
    """
    if delta_OI.shape[0] > delta_OI.shape[1]:
        moved_OR = delta_OI.to(FACTOR_DTYPE) @ (root(gram_II) if root_IR is None else root_IR)
        values, right = torch.linalg.eigh(moved_OR.T @ moved_OR)
        values, right = _largest(values, right, count)
        return moved_OR @ (right / values.sqrt()), values
    wide_OI = delta_OI.to(FACTOR_DTYPE)
    values, vectors = torch.linalg.eigh((wide_OI @ gram_II) @ wide_OI.T)
    values, vectors = _largest(values, vectors, count)
    return vectors, values


def root(gram_II: torch.Tensor) -> torch.Tensor:
    """Computes L `[I, R]` with L Lᵀ = G, float64, without what counts as 0."""
    values, vectors = torch.linalg.eigh(gram_II)
    values, vectors = _largest(values, vectors, len(values), smallest=torch.finfo(FACTOR_DTYPE).eps)
    return vectors * values.sqrt()


def _largest(
    values: torch.Tensor, vectors: torch.Tensor, count: int, smallest: float = SMALLEST_EIGENVALUE
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest eigenvalues, largest first, that do not count as 0, and their vectors."""
    values, vectors = values.flip(0), vectors.flip(1)
    kept = min(count, int((values > (smallest * values[:1]).clamp_min(0)).sum()))
    return values[:kept], vectors[:, :kept]


def direction_weights(values: torch.Tensor, count: int, power: float) -> torch.Tensor:
    """Computes e of the directions that there are, from their eigenvalues; means are over all `count`."""
    weights = (values / (values.sum() / count)) ** power
    return weights / (weights.sum() / count)


def merge_factors(
    left_OC: torch.Tensor, right_CI: torch.Tensor, norms_K: torch.Tensor, scale: float, num_directions: int
) -> torch.Tensor:
    """Merges the factors of all models, M `[O, I]`, float32.

    Args:
        left_OC: E_i diag(e_i), side by side, as many columns of each model; columns of zeros where there is none.
        right_CI: diag(e_i) E_iᵀ Δ_i, one below the other, likewise; overwritten.
        norms_K: ‖Δ_i‖, float64.
        scale: The factor of the whole.
        num_directions: K·k, the number of columns of U with all directions: means of singular values are over as many.
    """
    outputs, inputs = left_OC.shape[0], right_CI.shape[1]
    mean = norms_K.mean()
    if mean == 0:
        return torch.zeros(outputs, inputs, dtype=GRAM_DTYPE, device=left_OC.device)
    of_models = (norms_K / mean).square().repeat_interleave(len(right_CI) // len(norms_K))
    right_CI.mul_(of_models.to(right_CI)[:, None])
    columns_I = torch.linalg.vector_norm(right_CI, dim=0, dtype=FACTOR_DTYPE)
    if columns_I.max() == 0:
        return torch.zeros(outputs, inputs, dtype=GRAM_DTYPE, device=left_OC.device)
    right_CI.mul_((columns_I / columns_I.mean()).square().to(right_CI))
    left, left_values = polar_factor(left_OC)
    right, right_values = polar_factor(right_CI)
    means = (left_values.sum() / min(outputs, num_directions)) * (right_values.sum() / min(num_directions, inputs))
    return (left @ right).mul_(scale * means.item())


@dataclass
class MergedLinear:
    """The merged task vector of one linear.

    Attributes:
        delta_OI: M, float32, before the scale of its layer.
        report: What is known of it; `finished_report` makes an entry of the report of it.
    """

    delta_OI: torch.Tensor
    report: dict[str, Any]


@dataclass
class EssentialSums:
    """Factors of the task vectors of the linears that read one tensor, by model, as they come.

    Attributes:
        outputs: Linear → its number of outputs.
        gram: XᵀX of the present candidate.
        num_models: K.
        power: The exponent of eigenvalues.
        sketcher: Makes sketches of the task vectors.
        lefts: Linear → E_i diag(e_i) of all models, side by side, float32; zeros where a model has fewer directions.
        rights: Linear → diag(e_i) E_iᵀ Δ_i, one below the other, likewise.
        norms_KL: ‖Δ_i‖ by model and linear, float64.
        found_KL: Number of directions by model and linear.
        activity_I: Σ diag(XᵀX) over all models: 0 where an input has never fired.
        sketches_BS: Sketches of Δ_i, by candidate.
        tokens: Number of rows of each candidate, on all ranks together.
    """

    outputs: Mapping[str, int]
    gram: Gram
    num_models: int
    power: float
    sketcher: Sketcher
    lefts: dict[str, torch.Tensor]
    rights: dict[str, torch.Tensor]
    norms_KL: torch.Tensor
    found_KL: torch.Tensor
    activity_I: torch.Tensor
    sketches_BS: list[torch.Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    _differences: Differences | None = None
    _part: RankPart = field(default_factory=lambda: RankPart(0))

    def start_candidate(
        self,
        share: float,
        tokens: int,
        differences: Differences | None,
        part: RankPart | None = None,
        features: Features | None = None,
        *,
        has_rows: bool = True,
    ) -> None:
        """Begins the next candidate; arguments as in `GroupSums`, `differences` being those to the base."""
        assert features is None
        self.tokens.append(tokens)
        self._differences = differences
        self._part = part if part is not None else RankPart(tokens)

    @property
    def needs_all_reduce(self) -> bool:
        """Whether the present candidate's Gram must be all-reduced in its group of ranks before `finish_candidate`."""
        return self._part.group_size > 1

    def skip_candidate(self, tokens: int) -> None:
        """Counts the next candidate, whose rows are all on other ranks."""
        self.tokens.append(tokens)
        self.sketches_BS.append(self.sketcher.empty())

    def views(self) -> list[torch.Tensor]:
        """All factors and sums, after the last candidate, which ranks add up: each is zero on all ranks but one."""
        sketches_KBS = torch.stack(self.sketches_BS)
        self.sketches_BS = list(sketches_KBS)
        sums = [self.norms_KL, self.found_KL, self.activity_I, sketches_KBS]
        return [*self.lefts.values(), *self.rights.values(), *sums]

    def add_rows(self, x_NI: torch.Tensor) -> None:
        """Adds inputs of the present candidate, one row per token."""
        self.gram.add_rows(x_NI)

    def finish_candidate(self) -> None:
        """Keeps the factors of the present candidate's task vectors.

        Ranks that have parts of its data do some of the linears each.

        Raises:
            FloatingPointError: If the candidate's Gram matrix, or a task vector, is not finite.
        """
        diagonal_I = self.gram.candidate_diagonal()
        if not torch.isfinite(diagonal_I).all():
            raise FloatingPointError("activations are not finite")
        assert self._differences is not None
        model, sketch_BS, start = len(self.sketches_BS), self.sketcher.empty(), 0
        gram_II = self.gram.candidate_matrix(FACTOR_DTYPE)
        own = [path for number, path in enumerate(self.outputs) if number % self._part.group_size == self._part.index]
        root_IR = root(gram_II) if any(self.outputs[path] > len(gram_II) for path in own) else None
        for number, (path, outputs) in enumerate(self.outputs.items()):
            rows = slice(start, start + outputs)
            start += outputs
            if path not in own:
                continue
            delta_OI = self._differences(rows)
            norm = torch.linalg.vector_norm(delta_OI, dtype=FACTOR_DTYPE)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the task vector of {path} is not finite")
            self.sketcher.add_(sketch_BS, rows, delta_OI)
            self.norms_KL[model, number] = norm
            try:
                self._keep(model, number, path, delta_OI, gram_II, root_IR)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise FloatingPointError(f"{path}: no eigenvectors are found: {error}") from None
        if self._part.index == 0:
            self.activity_I.add_(diagonal_I)
        self.sketches_BS.append(sketch_BS)
        self.gram.drop_candidate()
        self._differences = None

    def _keep(
        self,
        model: int,
        number: int,
        path: str,
        delta_OI: torch.Tensor,
        gram_II: torch.Tensor,
        root_IR: torch.Tensor | None,
    ) -> None:
        """Keeps the factors of one task vector."""
        count = num_directions(self.outputs[path], self.num_models)
        found_OR, values_R = directions(delta_OI, gram_II, count, root_IR)
        if len(values_R) == 0:
            return
        weights_R = direction_weights(values_R, count, self.power)
        first = model * (self.lefts[path].shape[1] // self.num_models)
        kept = slice(first, first + len(values_R))
        self.found_KL[model, number] = len(values_R)
        found_OR = found_OR * weights_R
        self.lefts[path][:, kept] = found_OR.to(GRAM_DTYPE)
        self.rights[path][kept] = found_OR.T.to(GRAM_DTYPE) @ delta_OI

    def merged(
        self, path: str, scale: float, leader: str, names: Sequence[str], shares: Sequence[float]
    ) -> MergedLinear:
        """Merges one linear; its factors are gone afterwards.

        Args:
            path: Path of the linear in its block.
            scale: The factor of the whole.
            leader: Path of the group's leader, for the report.
            names: Names of the candidates.
            shares: c_i / Σ c.

        Raises:
            FloatingPointError: If the factors are not finite.
        """
        number, outputs = list(self.outputs).index(path), self.outputs[path]
        start = sum(list(self.outputs.values())[:number])
        count = num_directions(outputs, self.num_models)
        left_OC, right_CI = self.lefts.pop(path), self.rights.pop(path)
        if not torch.isfinite(left_OC.sum() + right_CI.sum()):
            raise FloatingPointError("factors are not finite")
        norms_K = self.norms_KL[:, number]
        delta_OI = merge_factors(left_OC, right_CI, norms_K, scale, count * self.num_models)
        sketch_BS = self.sketcher.empty()
        self.sketcher.add_(sketch_BS, slice(start, start + outputs), delta_OI)
        average_BS = torch.stack([s * own for s, own in zip(shares, self.sketches_BS, strict=True)]).sum(0)
        inner = self.sketcher.inner
        own = {name: other for name, other in zip(names, self.sketches_BS, strict=True)}
        return MergedLinear(
            delta_OI,
            {
                "shape": list(delta_OI.shape),
                "shares_gram_with": leader,
                "tokens": dict(zip(names, self.tokens, strict=True)),
                "solver": SOLVER,
                "condition": None,
                "residual": None,
                "fallbacks": [],
                "num_dead_features": int((self.activity_I == 0).sum()),
                "directions_wanted": count,
                "directions": dict(zip(names, (int(found) for found in self.found_KL[:, number]), strict=True)),
                "task_vector_norms": dict(zip(names, norms_K.tolist(), strict=True)),
                "norm": torch.linalg.vector_norm(delta_OI, dtype=FACTOR_DTYPE).item(),
                "products": {
                    "merged": inner(sketch_BS, sketch_BS, number),
                    "average": [inner(sketch_BS, average_BS, number), inner(average_BS, average_BS, number)],
                    "candidates": {
                        name: [inner(sketch_BS, other, number), inner(other, other, number)]
                        for name, other in own.items()
                    },
                },
            },
        )


Sums = GroupSums | EssentialSums
"""What is summed of the linears that read one tensor: for a regression, or to merge their task vectors' subspaces."""


def finished_report(report: Mapping[str, Any], layer_scale: float, weight_norm: float) -> dict[str, Any]:
    """Makes the report of a linear whose weight is W_0 + layer_scale · M, from that of M.

    Distances to the average and to the candidates are estimated by sketches, relative to ‖W‖.
    """
    found = {key: value for key, value in report.items() if key not in ("norm", "products")}
    products, norm = report["products"], weight_norm or 1.0

    def distance(inner: Sequence[float]) -> float:
        square = layer_scale**2 * products["merged"] - 2 * layer_scale * inner[0] + inner[1]
        return float(max(square, 0.0) ** 0.5 / norm)

    return found | {
        "layer_scale": layer_scale,
        "merged_task_vector_norm": layer_scale * report["norm"],
        "relative_distance_to_average": distance(products["average"]),
        "relative_distance_to_candidates": {name: distance(each) for name, each in products["candidates"].items()},
    }


def moved_weight(
    base: torch.Tensor, delta: torch.Tensor, layer_scale: float, dtype: torch.dtype, report: Mapping[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Makes the merged weight W_0 + layer_scale · M, and its report.

    Args:
        base: W_0, in the module's layout.
        delta: M, float32, in the module's layout; becomes the weight in float32.
        layer_scale: The scale of the layer.
        dtype: Dtype in which the weight is written.
        report: What is known of M, from `EssentialSums.merged`.
    """
    exact = delta.mul_(layer_scale).add_(base)
    norm = torch.linalg.vector_norm(exact, dtype=FACTOR_DTYPE).item()
    return exact.to(dtype), finished_report(report, layer_scale, norm)


def new_essential_sums(
    group: LinearGroup, method: RegressionMethod, num_models: int, device: torch.device, scratch: Scratch
) -> EssentialSums:
    """Makes empty sums for a group of linears; all groups share `scratch`."""
    outputs, inputs = group.outputs, group.num_inputs
    kept = {path: num_models * kept_directions(size, inputs, num_models) for path, size in outputs.items()}
    of_linears = (num_models, len(outputs))
    return EssentialSums(
        outputs=outputs,
        gram=Gram(inputs, device, scratch),
        num_models=num_models,
        power=method.power,
        sketcher=Sketcher(list(outputs.values()), inputs, device),
        lefts={path: torch.zeros(outputs[path], size, dtype=GRAM_DTYPE, device=device) for path, size in kept.items()},
        rights={path: torch.zeros(size, inputs, dtype=GRAM_DTYPE, device=device) for path, size in kept.items()},
        norms_KL=torch.zeros(of_linears, dtype=FACTOR_DTYPE, device=device),
        found_KL=torch.zeros(of_linears, dtype=GRAM_DTYPE, device=device),
        activity_I=torch.zeros(inputs, dtype=GRAM_DTYPE, device=device),
    )


def num_directions(num_outputs: int, num_models: int) -> int:
    """Number k of directions of each model."""
    return max(1, num_outputs // num_models)


def kept_directions(num_outputs: int, num_inputs: int, num_models: int) -> int:
    """Number of directions of each model that there can be."""
    return min(num_directions(num_outputs, num_models), num_inputs)


def subspace_rows(linears: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Rows of the closing table on directions and scales of layers, from the reports of all linears."""
    wanted = sum(entry["directions_wanted"] * len(entry["directions"]) for entry in linears.values())
    found = sum(sum(entry["directions"].values()) for entry in linears.values())
    few = [name for name, each in linears.items() if min(each["directions"].values()) < each["directions_wanted"]]
    text = f"{found:,} of {wanted:,}"
    if few:
        text += (
            f": fewer in {counted(len(few), 'linear')}, in which data or task vectors have no more, such as {few[0]}"
        )
    yield "directions", text
    scales = {name: entry["layer_scale"] for name, entry in linears.items()}
    least, most = min(scales, key=lambda name: scales[name]), max(scales, key=lambda name: scales[name])
    if scales[least] != 1 or scales[most] != 1:
        yield "scale of layers", f"{scales[least]:.3g} ({least}) to {scales[most]:.3g} ({most})"


# What it takes


def essential_sums_bytes(group: LinearGroup, num_models: int) -> int:
    """Bytes of the sums of a group, without the sketches."""
    gram = group.num_inputs**2 + group.num_inputs * min(PANEL, group.num_inputs)
    return GRAM_DTYPE.itemsize * (gram + factor_elements(group, num_models))


def factor_elements(group: LinearGroup, num_models: int) -> int:
    """Number of elements of the factors of all models."""
    inputs = group.num_inputs
    return sum(
        num_models * kept_directions(size, inputs, num_models) * (size + inputs) for size in group.outputs.values()
    )


def candidate_bytes(group: LinearGroup) -> int:
    """Bytes that keeping the factors of a candidate takes, at most: float64 copies, and eigenvectors."""
    inputs, widest = group.num_inputs, max(group.outputs.values())
    side = max((min(size, inputs) for size in group.outputs.values()), default=inputs)
    roots = 2 * inputs**2 if widest > inputs else 0
    matrices = 2 * inputs**2 + roots + 5 * side**2 + 3 * widest * inputs
    return FACTOR_DTYPE.itemsize * matrices + 2 * GRAM_DTYPE.itemsize * widest * inputs


def merge_bytes(group: LinearGroup, num_models: int) -> int:
    """Bytes that merging one linear takes, at most, beside its factors."""
    inputs, most = group.num_inputs, 0
    for size in group.outputs.values():
        columns = num_models * kept_directions(size, inputs, num_models)
        side = max(min(size, columns), min(columns, inputs))
        most = max(
            most,
            5 * FACTOR_DTYPE.itemsize * side**2
            + GRAM_DTYPE.itemsize * (2 * columns * (size + inputs) + 2 * size * inputs),
        )
    return most


def essential_operations(group: LinearGroup, num_models: int) -> float:
    """Multiplications and additions for all models of a group, as float32 products that take as long."""
    inputs, total = group.num_inputs, 0.0
    for size in group.outputs.values():
        side, columns = min(size, inputs), num_models * kept_directions(size, inputs, num_models)
        products = _FLOAT64 * 2 * size * inputs * (inputs + side) + 2 * size * inputs * columns / num_models
        total += num_models * (products + _EIGENVECTORS * side**3)
        for wide, narrow in ((max(size, columns), min(size, columns)), (max(columns, inputs), min(columns, inputs))):
            total += _EIGENVECTORS * narrow**3 + (_FLOAT64 + 1) * 2 * wide * narrow**2
    if max(group.outputs.values()) > inputs:
        total += num_models * _EIGENVECTORS * inputs**3
    return total


_FLOAT64 = 2  # float32 products in the time of one in float64
_EIGENVECTORS = 25  # of a symmetric float64 matrix: so many cubes of its side, measured on a CPU
