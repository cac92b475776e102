"""Each product and solve that a merge is made of, alone: how long it takes on this machine's CPU right now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from floor import Kernel
from largemerge.matmul import add_product_, linear_product, product
from largemerge.regression.gram import Gram
from largemerge.regression.solve import Factor, cholesky_, solve_

ENOUGH_SECONDS = 0.3
MOST_REPEATS = 30


def seconds_of(call: Callable[[], object]) -> float:
    """Median of a few runs after one to warm up; one that takes seconds is run once."""
    times = [_seconds(call)]
    if times[0] > 2:
        return times[0]
    times.clear()
    while sum(times) < ENOUGH_SECONDS and len(times) < MOST_REPEATS:
        times.append(_seconds(call))
    return statistics.median(times)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def time_kernel(kernel: Kernel) -> dict[str, float]:
    """Seconds of every way to do it; the floor takes the fastest."""
    return {name: seconds_of(call) * share for name, (call, share) in KINDS[kernel.kind](kernel).items()}


def operations(kernel: Kernel) -> int:
    """Multiplications and additions; of what is symmetric or triangular, the half that is needed."""
    shape = kernel.shape
    if kernel.kind == "linear":
        return 2 * shape[0] * shape[1] * shape[2]
    if kernel.kind == "attention":
        samples, heads, length, features, causal = shape
        return 4 * samples * heads * length**2 * features // (2 if causal else 1)
    if kernel.kind == "gram":
        return shape[0] * shape[1] ** 2
    if kernel.kind == "right_hand_side_by_rows":
        return 4 * shape[0] * shape[1] * shape[2]
    if kernel.kind == "cholesky":
        return shape[0] ** 3 // 3
    return 2 * shape[0] ** 2 * shape[1]  # a right-hand side, or two triangular solves


Ways = dict[str, tuple[Callable[[], object], float]]
"""Name of a way → what to call, and the share of its time that is needed."""


def _linear(kernel: Kernel) -> Ways:
    rows, inputs, outputs = kernel.shape
    x, weight = _random(rows, inputs).to(kernel.dtype), _random(outputs, inputs).to(kernel.dtype)
    return {"linear": (lambda: F.linear(x, weight), 1.0), "product": (lambda: linear_product(x, weight), 1.0)}


def _attention(kernel: Kernel) -> Ways:
    samples, heads, length, features, causal = kernel.shape
    q, k, v = (_random(samples, heads, length, features).to(kernel.dtype) for _ in range(3))
    return {"attention": (lambda: F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal)), 1.0)}


def _gram(kernel: Kernel) -> Ways:
    """The package's panels; and half of a whole product, which is what a perfect symmetric product would take."""
    rows, inputs = kernel.shape
    x = _random(rows, inputs).to(kernel.dtype)
    exact, out = x.float(), torch.zeros(inputs, inputs)

    def whole() -> None:
        out.addmm_(exact.T, exact)

    def whole_on_bfloat16_units() -> None:
        with _bfloat16_units():
            out.addmm_(exact.T, exact)

    gram, columns = Gram(out.shape[0], out.device), exact.T.contiguous()
    ways: Ways = {"panels": (lambda: gram.add_rows(x), 1.0), "half of float32": (whole, 0.5)}
    ways["half of a product"] = (lambda: product(columns, columns), 0.5)
    if kernel.dtype is torch.bfloat16:
        ways["half of bfloat16 units"] = (whole_on_bfloat16_units, 0.5)
    return ways


@contextmanager
def _bfloat16_units() -> Iterator[None]:
    """Float32 products of bfloat16 numbers on the units for those; exact but for the sums."""
    backend: Any = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


def _right_hand_side(kernel: Kernel) -> Ways:
    inputs, outputs = kernel.shape
    difference, gram, out = _random(outputs, inputs), _random(inputs, inputs), torch.zeros(outputs, inputs)
    return {
        "D G": (lambda: out.addmm_(difference, gram), 1.0),
        "product": (lambda: add_product_(out, difference, gram), 1.0),
    }


def _right_hand_side_by_rows(kernel: Kernel) -> Ways:
    rows, inputs, outputs = kernel.shape
    x, difference, out = _random(rows, inputs), _random(outputs, inputs), torch.zeros(outputs, inputs)
    return {
        "(D Xᵀ) X": (lambda: out.addmm_(difference @ x.T, x), 1.0),
        "products": (lambda: add_product_(out, product(difference, x), x.T), 1.0),
    }


def _cholesky(kernel: Kernel) -> Ways:
    system = _definite(kernel.shape[0])
    return {
        "cholesky": (lambda: torch.linalg.cholesky_ex(system), 1.0),
        "in panels": (lambda: cholesky_(system.clone()), 1.0),
    }


def _triangular(kernel: Kernel) -> Ways:
    inputs, outputs = kernel.shape
    system, right = _definite(inputs), _random(inputs, outputs)
    factor, panels, rows = torch.linalg.cholesky(system), cholesky_(system.clone()), right.T.contiguous()
    assert isinstance(panels, Factor)
    return {
        "cholesky_solve": (lambda: torch.cholesky_solve(right, factor), 1.0),
        "in panels": (lambda: solve_(rows.clone(), panels), 1.0),
    }


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _definite(size: int) -> torch.Tensor:
    rows = _random(size + 8, size)
    return rows.T @ rows / size + torch.eye(size)


KINDS: dict[str, Callable[[Kernel], Ways]] = {
    "linear": _linear,
    "attention": _attention,
    "gram": _gram,
    "right_hand_side": _right_hand_side,
    "right_hand_side_by_rows": _right_hand_side_by_rows,
    "cholesky": _cholesky,
    "triangular": _triangular,
}
