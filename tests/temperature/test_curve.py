"""The loss as a function of the temperature, against float64 sums and a search by scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize

from largemerge import CalibrationError
from largemerge.temperature.curve import LOG_BETAS, Fit, Measured, fit_temperature, joined, measure


def rows(seed: int, count: int, classes: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `scale` times those by which the labels were drawn."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return logits * scale, labels


def loss(logits: torch.Tensor, labels: torch.Tensor, beta: float) -> float:
    return torch.nn.functional.cross_entropy(logits.double() * beta, labels).item()


def test_sums_are_those_of_float64_and_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = rows(0, 50, 11, 3.0)
    whole = measure(logits, labels)
    monkeypatch.setattr("largemerge.temperature.curve._ELEMENTS_AT_ONCE", {"cpu": 33})
    in_chunks = measure(logits, labels)
    parts = joined([measure(logits[:20], labels[:20]), measure(logits[20:], labels[20:])])
    for k in (0, 7, 12, 24):
        beta = torch.tensor(float(np.exp(LOG_BETAS[k])), dtype=torch.float64, requires_grad=True)
        value = torch.nn.functional.cross_entropy(logits.double() * beta, labels, reduction="sum")
        (slope,) = torch.autograd.grad(value, beta, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, beta)
        for found in (whole, in_chunks, parts):
            assert found.losses[k] == pytest.approx(value.item(), rel=1e-5, abs=1e-5)
            assert found.slopes[k] == pytest.approx(slope.item(), rel=1e-4, abs=1e-4)
            assert found.curvatures[k] == pytest.approx(curvature.item(), rel=1e-4, abs=1e-4)
    probabilities = logits.double().softmax(dim=1)
    top, best = probabilities.max(dim=1)
    error = 0.0
    for number in range(15):
        inside = (top * 15).long().clamp(max=14) == number
        error += abs((best == labels)[inside].double().sum().item() - top[inside].sum().item()) / len(labels)
    assert whole.calibration_error == pytest.approx(error, abs=1e-6)
    assert whole.accuracy == pytest.approx((best == labels).double().mean().item())
    assert whole.loss == pytest.approx(loss(logits, labels, 1.0), rel=1e-6)
    assert whole.chosen.tolist() == best.tolist()
    assert np.allclose(whole.spreads, (logits.max(dim=1).values - logits.mean(dim=1)).numpy(), atol=1e-5)


@pytest.mark.parametrize("scale", [0.2, 1.0, 1.37, 9.0])
def test_the_minimum_is_that_of_a_search(scale: float) -> None:
    tasks = {"many": rows(1, 900, 7, scale), "few": rows(2, 60, 31, scale)}
    found = fit_temperature({name: measure(*each) for name, each in tasks.items()})

    def mean(log_beta: float) -> float:
        return sum(loss(*each, float(np.exp(log_beta))) for each in tasks.values()) / 2  # each task counts alike

    best = optimize.minimize_scalar(mean, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    assert found.temperature == pytest.approx(float(np.exp(-best.x)), rel=1e-4)
    assert found.loss == pytest.approx(best.fun, rel=1e-5)
    assert found.temperature == pytest.approx(scale, rel=0.25)


def test_there_may_be_no_best_temperature() -> None:
    logits, _ = rows(3, 40, 5, 1.0)
    with pytest.raises(CalibrationError, match=r"at 1/16 still: \(nearly\) all samples are predicted right"):
        fit_temperature({"right": measure(logits, logits.argmax(dim=1))})
    for bad in (measure(logits, logits.argmin(dim=1)), measure(torch.ones(3, 4), torch.tensor([0, 1, 2]))):
        with pytest.raises(CalibrationError, match="no likelier than chance, or all logits are equal"):
            fit_temperature({"wrong": bad})
    one = measure(torch.tensor([[1000.0, 0.0], [0.0, 1000.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
    assert isinstance(one, Measured) and np.isfinite(one.losses).all()
    assert isinstance(fit_temperature({"a": measure(*rows(4, 99, 3, 1.0))}), Fit)
