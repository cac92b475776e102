"""Linears of 16-bit numbers on the CPU: by torch, as merges and evaluations compute them, and in float32.

    python benchmarks/linears.py [--threads N]      # a minute; less with --quick, for a smoke test

Time of one product, the median of a few, and how far the results are from float64, as a share of their length. Ends
with one line of JSON.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F

from kernel_times import seconds_of
from largemerge.matmul import lacks_products, linear_product
from measure import machine

SHAPES = ((2048, 768, 3072), (2048, 3072, 768), (2048, 4096, 4096), (256, 768, 3072), (32, 768, 3072))
"""Rows, inputs, outputs."""


def main() -> None:
    """Measures all shapes and prints a table."""
    parser = argparse.ArgumentParser(description="Linears of 16-bit numbers; see the top of this file.")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print("| | rows × inputs × outputs | torch | largemerge | ratio | float32 | error of torch | error of largemerge |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        for shape in SHAPES[-1:] if arguments.quick else SHAPES:
            row = _measure(dtype, *shape)
            rows.append(row)
            print(
                f"| {str(dtype).removeprefix('torch.')} | {' × '.join(f'{size:,}' for size in shape)} "
                f"| {row['torch'] * 1e3:.1f} ms | {row['own'] * 1e3:.1f} ms | {row['own'] / row['torch']:.2f} "
                f"| {row['float32'] * 1e3:.1f} ms | {row['torch_error']:.1e} | {row['own_error']:.1e} |"
            )
    found = {"rows": rows, "threads": torch.get_num_threads(), "lacks_products": lacks_products(torch.bfloat16)}
    print(json.dumps({"benchmark": "linears", **found, "machine": machine()}))


def _measure(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> dict[str, float | str]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, inputs, generator=generator).to(dtype) for size in (rows, outputs))
    wide, wide_weight = x.float(), weight.float()
    exact = x.double() @ weight.double().T

    def error(found: torch.Tensor) -> float:
        return ((found.double() - exact).norm() / exact.norm()).item()

    return {
        "dtype": str(dtype),
        "shape": f"{rows}x{inputs}x{outputs}",
        "torch": seconds_of(lambda: F.linear(x, weight)),
        "own": seconds_of(lambda: linear_product(x, weight)),
        "float32": seconds_of(lambda: linear_product(wide, wide_weight)),
        "torch_error": error(F.linear(x, weight)),
        "own_error": error(linear_product(x, weight)),
    }


if __name__ == "__main__":
    main()
