"""What the singular vectors alone cost that TSV-M, Iso-C, Iso-CTS and OPCM need: no reading, no merging, no writing.

For every weight matrix of a geometry the decompositions of a method's formula are made of random numbers of the right
shapes, by as many workers as there are threads, one thread each, as in a merge. Two floors, both in float64 by way of
the smaller Gram matrix, which is cheaper than LAPACK's SVD and as exact as the merge promises:

    values    Gram matrix and `torch.linalg.eigh`: singular values and one side's vectors
    both      and the other side's vectors, by one product in float32: a thin SVD

and beside them LAPACK's own: `torch.linalg.svd` of the same matrices in float32, thin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from synthetic_llama import Geometry

WAYS = ("values", "both", "lapack")


def shapes_to_factor(method: str, rows: int, columns: int, num_models: int) -> Iterator[tuple[int, int, int]]:
    """Rows and columns of what is decomposed for one weight matrix, and how many vectors are wanted."""
    size = min(rows, columns)
    if method == "iso_c":
        yield rows, columns, size
    elif method == "opcm":
        yield from [(rows, columns, size)] * (num_models - 1)
    elif method == "tsv_m":
        rank = size // num_models
        yield from [(rows, columns, rank)] * num_models
        yield from ((side, rank * num_models, rank * num_models) for side in (rows, columns))
    elif method == "iso_cts":
        own = round((size - int(size * 0.8)) / num_models)
        yield rows, columns, size - own * num_models
        yield from [(rows, columns, own)] * num_models
        yield from ((side, size, size) for side in (rows, columns))


def bare_seconds(method: str, way: str, geometry: Geometry, num_models: int) -> float:
    """Of all weight matrices of all layers."""
    wanted = [
        one
        for layer in range(geometry.num_layers)
        for shape in geometry.block(layer).values()
        if len(shape) == 2
        for one in shapes_to_factor(method, *shape, num_models)
    ]
    distinct = {tuple(sorted((rows, columns), reverse=True)) for rows, columns, _ in wanted}
    matrices = {shape: torch.randn(shape) for shape in distinct}

    def work(one: tuple[int, int, int]) -> None:
        rows, columns, rank = one
        _FACTOR[way](matrices[max(rows, columns), min(rows, columns)], rank)

    return _timed(work, wanted)


def _timed(work: Callable[[tuple[int, int, int]], None], wanted: Sequence[tuple[int, int, int]]) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, wanted):
            pass
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return seconds


def _values(x_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x_OI.double()
    squares, vectors = torch.linalg.eigh(wide.T @ wide)
    return squares[-rank:].clamp(min=1e-30).sqrt(), vectors[:, -rank:]


def _both(x_OI: torch.Tensor, rank: int) -> torch.Tensor:
    values, vectors = _values(x_OI, rank)
    return x_OI @ (vectors / values).float()


def _lapack(x_OI: torch.Tensor, rank: int) -> torch.Tensor:
    left: torch.Tensor = torch.linalg.svd(x_OI, full_matrices=False)[0]
    return left[:, :rank]


_FACTOR: dict[str, Callable[[torch.Tensor, int], object]] = {"values": _values, "both": _both, "lapack": _lapack}
