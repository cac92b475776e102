"""The negative log-likelihood as a function of the temperature τ, from one pass over the logits.

    ℓ(β) = Σ_n [ log Σ_v exp(β z_nv) − β z_ny ]          β = 1/τ, y the right class, or the next token
    ℓ'   = Σ_n [ E_β z_n − z_ny ]        ℓ'' = Σ_n Var_β z_n ≥ 0         so that ℓ is convex in β

Guo et al. 2017, arXiv 1706.04599. Interpolated models are too unsure of what they find, which one τ sets right (Ito et
al., arXiv 2510.08023). Logits are large and are not kept: ℓ, ℓ' and ℓ'' are summed at β = 2^(k/3), and between these
ℓ' is the cubic that has both derivatives at both ends. On steps of a third of an octave its root is right to some
hundred-thousandths. A calibration error is that of the likeliest class in 15 bins of its probability (ibid., eq. 3):

    ECE = Σ_bins |Σ (right) − Σ (probability)| / N

Shapes: N rows of logits, V classes, K values of β.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from largemerge.errors import CalibrationError

STEPS_PER_OCTAVE, OCTAVES, NUM_BINS = 3, 4, 15
LOG_BETAS = np.log(2.0) * np.arange(-OCTAVES * STEPS_PER_OCTAVE, OCTAVES * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE
"""Natural logarithms of the values of β, `[K]`: τ from 1/16 to 16."""
_ELEMENTS_AT_ONCE = {"cpu": 1 << 17, "other": 1 << 24}
"""Logits that are looked at together: on a CPU as many as its cache holds."""


@dataclass(frozen=True)
class Measured:
    """What is known of some rows of logits; sums are float64.

    Attributes:
        losses: ℓ by β, `[K]`, in nats.
        slopes: ℓ' by β, `[K]`.
        curvatures: ℓ'' by β, `[K]`.
        bins: Number, Σ (right) and Σ (probability) of the likeliest class by bin of its probability, `[15, 3]`.
        chosen: The likeliest class of every row, `[N]`.
        spreads: Largest logit minus the mean of all, of every row, `[N]`: what β multiplies.
    """

    losses: np.ndarray
    slopes: np.ndarray
    curvatures: np.ndarray
    bins: np.ndarray
    chosen: np.ndarray
    spreads: np.ndarray

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.chosen)

    @property
    def loss(self) -> float:
        """Mean loss at τ = 1, in nats."""
        return float(self.losses[len(LOG_BETAS) // 2]) / self.num_rows

    @property
    def accuracy(self) -> float:
        """Share of rows whose likeliest class is right."""
        return float(self.bins[:, 1].sum()) / self.num_rows

    @property
    def calibration_error(self) -> float:
        """ECE at τ = 1."""
        return float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum()) / self.num_rows


def measure(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> Measured:
    """Measures rows of logits.

    Args:
        logits_NV: The logits, `[N, V]`.
        labels_N: The right class of every row, on the same device.
    """
    sums = np.zeros((3, len(LOG_BETAS)))
    bins, chosen, spreads = np.zeros((NUM_BINS, 3)), [], []
    at_once = _ELEMENTS_AT_ONCE["cpu" if logits_NV.device.type == "cpu" else "other"]
    height = max(1, at_once // logits_NV.shape[1])
    for rows, labels in zip(torch.split(logits_NV, height), torch.split(labels_N, height), strict=True):
        wide = rows.float()
        top_N, best_N = wide.max(dim=1)
        below_NV = wide - top_N[:, None]
        right_N = below_NV.gather(1, labels[:, None])[:, 0].double()
        of_all = []
        for beta in np.exp(LOG_BETAS).tolist():
            powers_NV = (below_NV * beta).exp_()
            total_N = powers_NV.sum(dim=1)
            mean_N = torch.linalg.vecdot(powers_NV, below_NV) / total_N
            spread_N = torch.linalg.vecdot(powers_NV.mul_(below_NV), below_NV) / total_N - mean_N.square()
            found = (total_N.double().log() - beta * right_N, mean_N.double() - right_N, spread_N.double())
            of_all.append(torch.stack([each.sum() for each in found]))
        sums += torch.stack(of_all, dim=1).cpu().numpy()
        probability_N = 1 / below_NV.exp().sum(dim=1)
        place_N = (probability_N * NUM_BINS).long().clamp(max=NUM_BINS - 1).cpu().numpy()
        columns = (torch.ones_like(probability_N), (best_N == labels).float(), probability_N)
        for column, values in enumerate(columns):
            np.add.at(bins[:, column], place_N, values.double().cpu().numpy())
        chosen.append(best_N.cpu().numpy())
        spreads.append((-below_NV.mean(dim=1)).double().cpu().numpy())
    return Measured(sums[0], sums[1], sums[2], bins, np.concatenate(chosen), np.concatenate(spreads))


def joined(parts: Sequence[Measured]) -> Measured:
    """Adds up what is known of several groups of rows, in order."""
    added = ("losses", "slopes", "curvatures", "bins")
    sums = {name: np.sum([getattr(part, name) for part in parts], axis=0) for name in added}
    rows = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("chosen", "spreads")}
    return Measured(**sums, **rows)


@dataclass(frozen=True)
class Fit:
    """The temperature that a model is likeliest with.

    Attributes:
        temperature: τ.
        loss: Mean over the tasks of their mean losses at τ, in nats, as the interpolation says.
    """

    temperature: float
    loss: float


def fit_temperature(tasks: Mapping[str, Measured]) -> Fit:
    """Finds the τ at which the mean over tasks of their mean losses is smallest.

    Args:
        tasks: What was measured by task.

    Raises:
        CalibrationError: If there is none from 1/16 to 16.
    """
    from scipy import interpolate, optimize

    make: Any = interpolate.CubicHermiteSpline
    betas = np.exp(LOG_BETAS)
    losses, slopes, curvatures = (
        np.mean([getattr(each, name) / each.num_rows for each in tasks.values()], axis=0)
        for name in ("losses", "slopes", "curvatures")
    )
    if not slopes[0] < 0:
        raise CalibrationError(
            "the loss falls for ever as the temperature rises, at 16 still: the model finds what is right no likelier "
            "than chance, or all logits are equal; no temperature mends that. Expected other data, or another model"
        )
    if not slopes[-1] > 0:
        raise CalibrationError(
            "the loss falls for ever as the temperature sinks, at 1/16 still: (nearly) all samples are predicted "
            "right; expected more samples, or harder ones, such as none that the model was made with"
        )
    slope, loss = make(LOG_BETAS, slopes, curvatures * betas), make(LOG_BETAS, losses, slopes * betas)
    found = float(optimize.brentq(slope, LOG_BETAS[0], LOG_BETAS[-1], xtol=1e-12))
    return Fit(float(np.exp(-found)), float(loss(found)))
