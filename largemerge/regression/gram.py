"""Gram matrices of a linear's inputs: the present candidate's, and the sum over candidates, in one matrix.

    G = XᵀX        X: one row per token, `[N, I]`

Gram matrices are float32 whatever the activations are: rows are cast before the product. A product of two
bfloat16 numbers is exact in float32, so on hardware with bfloat16 units those do the work and sum in float32: two to
three times faster, and nothing is rounded but the sums.

G is symmetric, so only one half of it is computed, a panel of rows at a time. The other half holds the sum over the
candidates that are done:

    ┌───────────────┐    on and above the diagonal panels    XᵀX of the present candidate
    │ C C C C C C C │    below them                          Σ G̃_i, whose diagonal panels are kept apart
    │ S C C C C C C │
    │ S S C C C C C │
    └───────────────┘

so that one matrix is held where two were.

Shapes: N tokens, I inputs of a linear, O outputs, P rows of a panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from largemerge.matmul import add_product_

GRAM_DTYPE = torch.float32
"""The precision of every sum and of every first try at a solve."""

PANEL = 256  # rows
_WIDE_PANEL = 512  # rows that are multiplied at once: several panels
_SMALL = 1024  # up to so many inputs, panels of half the rows make better use of the symmetry


def panels(num_inputs: int) -> list[slice]:
    """The panels of a matrix with `num_inputs` rows."""
    width = PANEL // 2 if num_inputs <= _SMALL else PANEL
    return [slice(start, min(start + width, num_inputs)) for start in range(0, num_inputs, width)]


def _wide_panels(num_inputs: int) -> Iterator[slice]:
    """Several panels together; all of them, where they are few."""
    width = _SMALL if num_inputs <= _SMALL else _WIDE_PANEL
    for start in range(0, num_inputs, width):
        yield slice(start, min(start + width, num_inputs))


class Scratch:
    """Memory for one float32 matrix at a time, which is used again instead of being allocated anew."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=GRAM_DTYPE)

    def empty(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Returns a matrix with arbitrary content, in the place of the one before it."""
        if self._memory.numel() < rows * columns or self._memory.device != device:
            self._memory = torch.empty(0, dtype=GRAM_DTYPE)  # frees the old one first
            self._memory = torch.empty(rows * columns, dtype=GRAM_DTYPE, device=device)
        return self._memory[: rows * columns].view(rows, columns)


class Gram:
    """Σ G̃_i over the candidates that are done, and XᵀX of the present one.

    G̃ = α·( s·G + (1-s)·diag(G) ), RegMean (arXiv 2212.09849, section 3.2).

    Args:
        num_inputs: Number of inputs I.
        device: Device of the matrix.
        scratch: Memory for rows in float32; may be shared with others that do not work at the same time.

    Attributes:
        halves_II: The present candidate's half, and the sum's.
    """

    def __init__(self, num_inputs: int, device: torch.device, scratch: Scratch | None = None) -> None:
        self._scratch = scratch or Scratch()
        self.halves_II = torch.zeros(num_inputs, num_inputs, dtype=GRAM_DTYPE, device=device)
        self._panels = panels(num_inputs)
        self._sum_blocks = [self.halves_II[rows, rows].clone() for rows in self._panels]
        self._empty = True  # the upper half is still to be overwritten by the present candidate's first rows
        self._lower_is_sum = True

    @property
    def num_inputs(self) -> int:
        """Number of inputs I."""
        return self.halves_II.shape[0]

    def add_rows(self, x_NI: torch.Tensor) -> None:
        """Adds inputs of the present candidate, one row per token, in any floating dtype."""
        beta, self._empty = 0.0 if self._empty else 1.0, False
        if _device_sums_in_float32(x_NI):
            for rows in self._panels:
                product_PI = torch.mm(x_NI[:, rows].T, x_NI[:, rows.start :], out_dtype=GRAM_DTYPE)
                upper_PI = self.halves_II[rows, rows.start :]
                upper_PI.copy_(product_PI) if beta == 0 else upper_PI.add_(product_PI)
            return
        if x_NI.dtype is torch.bfloat16 and x_NI.device.type == "cpu":
            x_NI = self._scratch.empty(x_NI.shape[0], x_NI.shape[1], x_NI.device).copy_(x_NI)
            with _bfloat16_units():
                for rows in self._panels:
                    upper_PI = self.halves_II[rows, rows.start :]
                    upper_PI.addmm_(x_NI[:, rows].T, x_NI[:, rows.start :], beta=beta)
            return
        x_IN = self._scratch.empty(x_NI.shape[1], x_NI.shape[0], x_NI.device).copy_(x_NI.T)
        for rows in self._panels:
            add_product_(self.halves_II[rows, rows.start :], x_IN[rows], x_IN[rows.start :], beta=beta)

    def candidate_diagonal(self) -> torch.Tensor:
        """Copy of diag(XᵀX) of the present candidate `[I]`."""
        return torch.zeros_like(self.halves_II[0]) if self._empty else self.halves_II.diagonal().clone()

    def candidate_norm(self) -> float:
        """‖XᵀX‖_F of the present candidate."""
        if self._empty:
            return 0.0
        squares = torch.zeros((), dtype=torch.float64, device=self.halves_II.device)
        for rows in self._panels:
            squares += self.halves_II[rows, rows].square().sum(dtype=torch.float64)
            squares += 2 * self.halves_II[rows, rows.stop :].square().sum(dtype=torch.float64)
        return float(squares.sqrt())

    def add_candidate_product_(
        self, out_OI: torch.Tensor, rows_OI: torch.Tensor, alpha: float, off_diagonal_scale: float
    ) -> None:
        """Adds rows · G̃ of the present candidate to `out_OI`.

        Args:
            out_OI: Result, float32.
            rows_OI: Rows, float32.
            alpha: The factor α of G̃.
            off_diagonal_scale: s, from 0 (only the diagonal) to 1 (all of it). FusionBench calls it
                `reduce_non_diagonal_ratio`, MergeBench `reduction`.
        """
        if self._empty:
            return
        scale = alpha * off_diagonal_scale
        for rows in _wide_panels(self.num_inputs) if scale > 0 else ():
            whole_PP, right_PI = self._candidate_panel(rows)
            left_OP = rows_OI[:, rows].contiguous()
            add_product_(out_OI[:, rows], left_OP, whole_PP, alpha=scale)
            if rows.stop < self.num_inputs:  # once as it stands, once as its mirror image
                add_product_(out_OI[:, rows], rows_OI[:, rows.stop :], right_PI, alpha=scale)
                add_product_(out_OI[:, rows.stop :], left_OP, right_PI.T, alpha=scale)
        if off_diagonal_scale < 1:
            out_OI.addcmul_(rows_OI, self.halves_II.diagonal(), value=alpha * (1 - off_diagonal_scale))

    def _candidate_panel(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies some rows of XᵀX of the present candidate: the square on the diagonal, and what is right of it."""
        size, right = rows.stop - rows.start, self.num_inputs - rows.stop
        memory_PI = self._scratch.empty(size, size + right, self.halves_II.device).view(-1)
        whole_PP, right_PI = memory_PI[: size * size].view(size, size), memory_PI[size * size :].view(size, right)
        whole_PP.copy_(self.halves_II[rows, rows])
        for panel in self._panels:
            start, stop = panel.start - rows.start, panel.stop - rows.start
            if start >= 0 and stop < size:  # below the diagonal panels lies the sum
                whole_PP[stop:, start:stop] = whole_PP[start:stop, stop:].T
        return whole_PP, right_PI.copy_(self.halves_II[rows, rows.stop :])

    def finish_candidate(self, alpha: float, off_diagonal_scale: float) -> None:
        """Adds G̃ of the present candidate to the sum; the next one starts from zero."""
        self.add_candidate_of(self, alpha, off_diagonal_scale)
        self._empty = True

    def add_candidate_of(self, other: Gram, alpha: float, off_diagonal_scale: float) -> None:
        """Adds G̃ of the candidate that another matrix holds to the sum of this one."""
        if other._empty:
            return
        scale = alpha * off_diagonal_scale
        for rows, block_PP in zip(self._panels, self._sum_blocks, strict=True):
            block_PP.add_(other.halves_II[rows, rows], alpha=scale)
            own_P = other.halves_II[rows, rows].diagonal()
            block_PP.diagonal().add_(own_P, alpha=alpha * (1 - off_diagonal_scale))
            self.halves_II[rows.stop :, rows].add_(other.halves_II[rows, rows.stop :].T, alpha=scale)

    def candidate_views(self) -> list[torch.Tensor]:
        """XᵀX of the present candidate as views, which together are its upper half."""
        views = [self.halves_II[rows, rows.start :] for rows in self._panels]
        if self._empty:
            for view in views:
                view.zero_()
            self._empty = False
        return views

    def drop_candidate(self) -> None:
        """Forgets the present candidate, which another rank adds to the sum."""
        self._empty = True

    def sum_views(self) -> list[torch.Tensor]:
        """Σ G̃_i as views, which together are its lower half; between candidates only."""
        below = [self.halves_II[rows.stop :, rows] for rows in self._panels]
        return [view for both in zip(self._sum_blocks, below, strict=True) for view in both]

    def sum_rows(self) -> Iterator[torch.Tensor]:
        """Yields the lower triangle of Σ G̃_i on the CPU, some rows at a time, one number after the other.

        Before `full_sum` only.
        """
        for rows, block_PP in zip(self._panels, self._sum_blocks, strict=True):
            yield _packed(torch.cat([self.halves_II[rows, : rows.start], block_PP], dim=1), rows)

    def candidate_rows(self) -> Iterator[torch.Tensor]:
        """Yields the lower triangle of XᵀX of the present candidate, as `sum_rows` does."""
        for rows in self._panels:
            if self._empty:
                yield torch.zeros(triangle(rows.stop) - triangle(rows.start), dtype=GRAM_DTYPE)
            else:
                above_IP, corner_PP = self.halves_II[: rows.start, rows], self.halves_II[rows, rows]
                yield _packed(torch.cat([above_IP.T, corner_PP], dim=1), rows)

    def candidate_matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Copies XᵀX of the present candidate, both halves `[I, I]`."""
        whole_II = torch.zeros_like(self.halves_II, dtype=dtype)
        if not self._empty:
            for rows in self._panels:
                whole_II[rows, rows.start :] = self.halves_II[rows, rows.start :].to(dtype)
                whole_II[rows.stop :, rows] = self.halves_II[rows, rows.stop :].T.to(dtype)
                whole_II[rows, rows] = _symmetric(whole_II[rows, rows].T)
        return whole_II

    def set_candidate(self, read: Callable[[slice], torch.Tensor]) -> None:
        """Takes XᵀX of the present candidate as it was kept, in place of its rows.

        Args:
            read: Reads some numbers of its lower triangle, as `candidate_rows` yields them, float32, on the CPU.
        """
        self._empty = False
        for rows in self._panels:
            left_PI = _unpacked(read, rows).to(self.halves_II.device)
            self.halves_II[: rows.start, rows] = left_PI[:, : rows.start].T
            self.halves_II[rows, rows] = _symmetric(left_PI[:, rows.start :])

    def add_to_sum(self, read: Callable[[slice], torch.Tensor], scale: float) -> None:
        """Adds a symmetric matrix to Σ G̃_i, between candidates.

        Args:
            read: Reads some numbers of its lower triangle, as `sum_rows` yields them, float32, on the CPU.
            scale: What they are multiplied by.
        """
        for rows, block_PP in zip(self._panels, self._sum_blocks, strict=True):
            left_PI = _unpacked(read, rows).to(block_PP.device)
            self.halves_II[rows, : rows.start].add_(left_PI[:, : rows.start], alpha=scale)
            block_PP.add_(_symmetric(left_PI[:, rows.start :]), alpha=scale)

    def diagonal(self) -> torch.Tensor:
        """Copy of diag(Σ G̃_i) `[I]`."""
        return torch.cat([block_PP.diagonal() for block_PP in self._sum_blocks])

    def full_sum(self) -> torch.Tensor:
        """Fills both halves with Σ G̃_i `[I, I]`, in place; no candidate may follow.

        The lower half and the diagonal panels may be overwritten: another call restores them.
        """
        for rows, block_PP in zip(self._panels, self._sum_blocks, strict=True):
            if self._lower_is_sum:
                block_PP.copy_(_symmetric(block_PP))  # rounding may have made it unsymmetric
                self.halves_II[rows, rows.stop :] = self.halves_II[rows.stop :, rows].T
            else:
                self.halves_II[rows.stop :, rows] = self.halves_II[rows, rows.stop :].T
            self.halves_II[rows, rows] = block_PP
        self._lower_is_sum = False
        return self.halves_II

    def sum_product(self, rows_VI: torch.Tensor) -> torch.Tensor:
        """Multiplies rows `[V, I]` by Σ G̃_i, in the dtype of the rows, after `full_sum`."""
        product_VI = torch.zeros_like(rows_VI)
        for rows, block_PP in zip(self._panels, self._sum_blocks, strict=True):
            product_VI[:, rows].addmm_(rows_VI[:, rows], block_PP.to(rows_VI.dtype))
            if rows.stop < self.num_inputs:
                upper_PI = self.halves_II[rows, rows.stop :].to(rows_VI.dtype)
                product_VI[:, rows.stop :].addmm_(rows_VI[:, rows], upper_PI)
                product_VI[:, rows].addmm_(rows_VI[:, rows.stop :], upper_PI.T)
        return product_VI


def triangle(num_rows: int) -> int:
    """Number of elements of a lower triangle, its diagonal included."""
    return num_rows * (num_rows + 1) // 2


def triangle_buffer_bytes(num_inputs: int) -> int:
    """Bytes that are held while a sum goes to the disk or comes from there: some rows, as a matrix and as a vector."""
    return 3 * GRAM_DTYPE.itemsize * min(PANEL, num_inputs) * num_inputs


def _packed(left_PI: torch.Tensor, rows: slice) -> torch.Tensor:
    """Puts rows of a lower triangle one after the other, on the CPU; what is right of the diagonal is left out."""
    return torch.cat([row_I[:length] for row_I, length in zip(left_PI.cpu(), _lengths(rows), strict=True)])


def _unpacked(read: Callable[[slice], torch.Tensor], rows: slice) -> torch.Tensor:
    """Reads rows of a lower triangle, zero right of the diagonal, on the CPU."""
    numbers = read(slice(triangle(rows.start), triangle(rows.stop)))
    left_PI = torch.zeros(rows.stop - rows.start, rows.stop, dtype=GRAM_DTYPE)
    for row_I, own in zip(left_PI, torch.split(numbers, _lengths(rows)), strict=True):
        row_I[: len(own)] = own
    return left_PI


def _symmetric(block_PP: torch.Tensor) -> torch.Tensor:
    """Makes a symmetric matrix of its lower triangle."""
    return block_PP.tril() + block_PP.tril(-1).T


def _lengths(rows: slice) -> list[int]:
    """Number of elements of each of some rows of a lower triangle."""
    return list(range(rows.start + 1, rows.stop + 1))


def _device_sums_in_float32(x_NI: torch.Tensor) -> bool:
    """Whether a product of half-precision factors can be asked for in float32, without casting them."""
    return x_NI.device.type == "cuda" and x_NI.dtype in (torch.bfloat16, torch.float16)


@contextmanager
def _bfloat16_units() -> Iterator[None]:
    """Lets float32 products use bfloat16 units; nothing is lost where the factors are bfloat16 numbers."""
    backend: Any = torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def float32_means_float32() -> Iterator[None]:
    """Makes products of float32 numbers float32 products, whatever the process has set (TF32, bfloat16 units)."""
    units: Any = torch.backends
    backends = [units.mkldnn.matmul, units.cuda.matmul]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
