"""Both libraries give the same products, whatever lies between the rows of the factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from largemerge import matmul as module
from largemerge.matmul import add_product_, faster_linear, product

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["torch", "onednn"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(module, "has_onednn", lambda: request.param)


def factors(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors `[90, 70]` and `[80, 70]`: with rows one after another, transposed, or out of larger matrices."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2 * rows, 140, generator=generator) for rows in (90, 80))
    if layout == "gaps":
        return left[:90, 30:100], right[40:120, :70]
    left, right = left[:90, :70].contiguous(), right[:80, :70].contiguous()
    return (left, right) if layout == "plain" else (left.T.contiguous().T, right.T.contiguous().T)


@pytest.mark.parametrize("layout", ["plain", "transposed", "gaps"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (-0.5, 1.0), (2.0, 0.0), (1.0, 0.25)])
def test_products_are_those_of_float64(layout: str, alpha: float, beta: float) -> None:
    left, right = factors(layout)
    exact = left.double() @ right.double().T
    torch.testing.assert_close(product(left, right).double(), exact, rtol=1e-5, atol=1e-4)
    whole = torch.full((100, 100), float("nan") if beta == 0 else 3.0)
    out = whole[5:95, 10:90]
    add_product_(out, left, right, alpha=alpha, beta=beta)
    expected = alpha * exact + (0 if beta == 0 else beta * 3.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-3)
    untouched = torch.ones_like(whole, dtype=torch.bool)
    untouched[5:95, 10:90] = False
    assert torch.equal(whole[untouched].isnan(), torch.full_like(whole[untouched], beta == 0, dtype=torch.bool))


@pytest.mark.parametrize("bias", [True, False])
def test_a_faster_linear_gives_the_same(bias: bool, library: None) -> None:
    linear = torch.nn.Linear(70, 80, bias=bias).requires_grad_(False)
    faster = faster_linear(linear, torch.float32, CPU)
    for tokens in (5, 500):
        x = torch.randn(2, tokens, 140)[..., ::2]
        if faster is not None:
            torch.testing.assert_close(faster(x), linear(x), rtol=1e-5, atol=1e-5)
    assert (faster is not None) == module.has_onednn()
    assert faster_linear(linear, torch.float64, CPU) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_linears_of_16_bits_go_through_float32(
    bias: bool, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "lacks_products", lambda each: each.itemsize == 2)
    monkeypatch.setattr(module, "_PART_ELEMENTS", 70 * 50)
    linear: Any = torch.nn.Linear(70, 80, bias=bias) if kind == "linear" else Conv1D(80, 70)
    torch.nn.init.normal_(linear.weight)
    linear.to(dtype).requires_grad_(False)
    faster = faster_linear(linear, dtype, CPU)
    assert faster is not None
    for tokens in (5, 500):
        x = torch.randn(2, tokens, 140)[..., ::2].to(dtype)
        weight_OI = linear.weight.double() if kind == "linear" else linear.weight.double().T
        exact = x.double() @ weight_OI.T + (linear.bias.double() if linear.bias is not None else 0.0)
        torch.testing.assert_close(faster(x), exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
        assert faster(x).shape == (2, tokens, 80)
    monkeypatch.setattr(module, "lacks_products", lambda _: False)
    assert faster_linear(linear, dtype, CPU) is None


def test_double_precision_and_subclasses_are_left_to_torch() -> None:
    class Other(torch.nn.Linear):
        """Computes something else."""

    assert faster_linear(Other(3, 4), torch.float32, CPU) is None
    left, right = (factor.double() for factor in factors("plain"))
    assert torch.equal(product(left, right), left @ right.T)
