"""Metrics of columns, and bootstrap intervals of them.

An interval is that of the percentiles of a metric on samples drawn anew, with replacement (Efron, 1979); the samples
of one task are drawn alike for all models, so that differences between models can be compared, too.
"""

from __future__ import annotations

import math

import numpy as np

from largemerge.evaluation.task import Columns, Metric, mean_of

ACCURACY = Metric("accuracy", mean_of("correct"))


def _loss(columns: Columns) -> float:
    return float(columns["loss"].sum() / columns["tokens"].sum())


LOSS = Metric("loss", _loss, "lower", is_share=False)
"""Mean negative log-likelihood of a token, in nats."""
PERPLEXITY = Metric("perplexity", lambda columns: math.exp(min(_loss(columns), 700.0)), "lower", is_share=False)
TOKEN_ACCURACY = Metric("token_accuracy", lambda columns: float(columns["correct"].sum() / columns["tokens"].sum()))


def _f1(columns: Columns) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(columns["label"], columns["predicted"], average="macro", zero_division=0.0))


def _matthews(columns: Columns) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(columns["label"], columns["predicted"]))


_ROUNDING = 1e-6
"""Share of their size by which numbers of float32 differ that would be equal but for the order of sums."""


def correlation(kind: str, found: str, given: str) -> Metric:
    """Makes the correlation of what a model finds with what the data gives; there is none where either is constant.

    Args:
        kind: `pearson` or `spearman`.
        found: Column of the model's scores.
        given: Column of the data's; `numbers_of` refuses constant ones.
    """

    def is_constant(values_N: np.ndarray) -> bool:
        return float(np.ptp(values_N)) <= _ROUNDING * float(np.abs(values_N).max())

    def compute(columns: Columns) -> float:
        from scipy import stats

        if is_constant(columns[found]) or np.ptp(columns[given]) == 0:  # as of some draws for an interval
            return math.nan
        return float(getattr(stats, f"{kind}r")(columns[found], columns[given]).statistic)

    def undefined(columns: Columns) -> str:
        values_N = columns[found]
        if not is_constant(values_N):
            return ""
        return (
            f"there is no {kind} correlation: the model's scores are constant, {values_N[0]:.6g} for all "
            f"{len(values_N):,} samples"
        )

    return Metric(kind, compute, is_share=False, undefined=undefined)


F1 = Metric("f1", _f1)
MATTHEWS = Metric("matthews", _matthews, is_share=False)


def interval(
    metric: Metric, columns: Columns, *, resamples: int, confidence: float, seed: int
) -> tuple[float, float] | None:
    """Computes the bootstrap interval of a metric.

    Args:
        metric: The metric.
        columns: What it is computed from, `[samples]` each.
        resamples: How often samples are drawn anew.
        confidence: Share of the resamples that the interval holds.
        seed: Seed of the draws.

    Returns:
        Lower and upper end; `None` where there are no resamples, or a single sample.
    """
    count = len(next(iter(columns.values())))
    if resamples == 0 or count < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.array([metric.compute({name: column[draw] for name, column in columns.items()}) for draw in draws])
    # A draw of samples without any token that counts has no loss, one of constant scores no correlation.
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
