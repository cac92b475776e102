"""What else has a closed form, and what is it worth? Biases, norms, patches and a second sweep beside `calibrated`.

    python benchmarks/quality_options.py --work DIR [--seeds 0 1 2]     # the experts of quality.py; some minutes
    python benchmarks/quality_options.py --quick                        # a smoke test: the numbers mean nothing

A plain dense implementation in float64, on the image experts of `quality.py`, with all calibration images: linear by
linear as `calibrated` solves them, without shrinkage, and

    biases    with the weight, by regression on [x, 1]
    norms     weight and bias of every layer norm, by a regression with two unknowns for each channel (FeatCal,
              arXiv 2605.13030), towards the outputs of the candidates' own
    patches   the convolution over patches, as a linear with its bias
    twice     a second sweep over all blocks, whose inputs have changed
    shares    not solved, but chosen: of every linear, each task counts by 1 / (what the average leaves of its targets)

What counts is the share of the gap between average and experts that is closed, on held-out images. Ends with one line
of JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import ViTForImageClassification
from transformers.utils import logging

import quality_images
from measure import machine
from quality_cases import Case

RIDGE = 1e-2
OPTIONS = ("", "biases", "norms", "patches", "biases norms patches", "twice", "shares")


@dataclass
class Merge:
    """A merge of image models that is under way."""

    experts: Sequence[ViTForImageClassification]
    pixels: Sequence[torch.Tensor]
    average: ViTForImageClassification
    merged: ViTForImageClassification
    chooses_shares: bool = False

    @classmethod
    def begin(cls, case: Case, *, chooses_shares: bool) -> Merge:
        """Starts from the average."""
        experts = [ViTForImageClassification.from_pretrained(path).double().eval() for path in case.experts.values()]
        pixels = [load_file(path)["pixel_values"].double() for path in case.calibration.values()]
        average = copy.deepcopy(experts[0])
        with torch.no_grad():
            for name, parameter in average.named_parameters():
                parameter.copy_(sum(expert.get_parameter(name) for expert in experts) / len(experts))
        return cls(experts, pixels, average, copy.deepcopy(average), chooses_shares)

    def solve(self, names: Sequence[str], residual: str | None = None, *, biases: bool = False) -> None:
        """Solves linears that read the same tensor.

        Args:
            names: Their paths.
            residual: Path of a module whose input their output is added to.
            biases: Solve their biases, too.
        """
        wanted = [*names, *([residual] if residual else [])]
        merged = [_inputs(self.merged, x, wanted) for x in self.pixels]
        own = [_inputs(expert, x, wanted) for expert, x in zip(self.experts, self.pixels, strict=True)]
        for name in names:
            rows, targets = [], []
            for expert, seen, felt in zip(self.experts, merged, own, strict=True):
                linear = expert.get_submodule(name)
                target = F.linear(felt[name], linear.weight, linear.bias if biases else None)
                rows.append(seen[name])
                targets.append(target + (felt[residual] - seen[residual] if residual else 0))
            self._regress(name, rows, targets, biases=biases)

    def _regress(
        self, name: str, rows: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], *, biases: bool
    ) -> None:
        """Puts the solution of a regression in its place; each bias has a ridge of its own, that of a mean of 1."""
        kept = self.average.get_submodule(name)
        anchor = kept.weight.flatten(1)
        if biases:
            rows = [F.pad(x, (0, 1), value=1.0) for x in rows]
            anchor = torch.cat([anchor, kept.bias[:, None]], 1)
        left = [(t - x @ anchor.T, x) for x, t in zip(rows, targets, strict=True)]
        wanted = [1 / float(rest.square().mean()) if self.chooses_shares else 1.0 for rest, _ in left]
        shares = [each / sum(wanted) for each in wanted]
        gram = sum(share * x.T @ x / len(x) for share, x in zip(shares, rows, strict=True))
        right = sum(share * rest.T @ x / len(x) for share, (rest, x) in zip(shares, left, strict=True))
        ridges = torch.full((len(gram),), RIDGE * float(gram.diagonal()[: kept.weight[0].numel()].mean())).double()
        if biases:
            ridges[-1] = RIDGE
        solved = anchor + torch.linalg.solve(gram + ridges.diag(), right.T).T
        place = self.merged.get_submodule(name)
        place.weight.data = (solved[:, :-1] if biases else solved).reshape(place.weight.shape)
        if biases:
            place.bias.data = solved[:, -1]

    def solve_norm(self, name: str) -> None:
        """Solves weight and bias of a layer norm, channel by channel."""
        place, kept = self.merged.get_submodule(name), self.average.get_submodule(name)
        sums = [torch.zeros_like(kept.weight.data) for _ in range(4)]  # of z², z, z·y and y
        for expert, x in zip(self.experts, self.pixels, strict=True):
            own, seen = expert.get_submodule(name), _inputs(self.merged, x, [name])[name]
            target = own(_inputs(expert, x, [name])[name])
            z = F.layer_norm(seen, place.normalized_shape, None, None, place.eps)
            for total, value in zip(sums, (z * z, z, z * target, target), strict=True):
                total += value.mean(0) / len(self.experts)
        squares, means, products, targets = sums
        ridge = RIDGE * squares.mean()
        squares, products = squares + ridge, products + ridge * kept.weight.data
        ones, targets = 1 + RIDGE, targets + RIDGE * kept.bias.data
        determinant = squares * ones - means**2
        place.weight.data = (ones * products - means * targets) / determinant
        place.bias.data = (squares * targets - means * products) / determinant

    def solve_patches(self) -> None:
        """Solves the convolution over patches, which do not overlap."""
        name = next(name for name, module in self.merged.named_modules() if isinstance(module, nn.Conv2d))
        size = self.merged.get_submodule(name).kernel_size
        rows = [F.unfold(x, size, stride=size).transpose(1, 2).flatten(0, 1) for x in self.pixels]
        convolutions = [expert.get_submodule(name) for expert in self.experts]
        targets = [x @ own.weight.flatten(1).T + own.bias for x, own in zip(rows, convolutions, strict=True)]
        self._regress(name, rows, targets, biases=True)

    def sweep(self, *, biases: bool, norms: bool) -> None:
        """Solves all blocks, in the order in which they run."""
        norm: Callable[[str], None] = self.solve_norm if norms else lambda _: None
        for name, block in self.merged.named_modules():
            if type(block).__name__ != "ViTLayer":
                continue
            linears = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
            first, second = [f"{name}.{path}" for path, module in block.named_modules() if _is_norm(module)]
            *inner, attended, widened, narrowed = [f"{name}.{path}" for path in linears]
            norm(first)
            self.solve(inner, biases=biases)
            self.solve([attended], first, biases=biases)
            norm(second)
            self.solve([widened], biases=biases)
            self.solve([narrowed], second, biases=biases)


@torch.no_grad()
def _inputs(model: nn.Module, pixels: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Rows that modules of a model read first."""
    found: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, args: found.update({name: args[0].flatten(0, -2)})

    handles = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]
    model(pixels)
    for handle in handles:
        handle.remove()
    return found


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm)


@torch.no_grad()
def closed(case: Case, options: str, folder: Path) -> float:
    """The share of the gap that a merge with some options closes."""
    chosen = options.split()
    merge = Merge.begin(case, chooses_shares="shares" in chosen)
    if "patches" in chosen:
        merge.solve_patches()
    for _ in range(2 if "twice" in chosen else 1):
        merge.sweep(biases="biases" in chosen, norms="norms" in chosen)
    if "norms" in chosen:
        merge.solve_norm("vit.layernorm")
    merge.solve(["classifier"], biases="biases" in chosen)

    def loss(model: nn.Module) -> float:
        model.float().save_pretrained(folder)
        return mean(score.loss for score in case.measure(folder).values())

    experts = mean(case.measure(path)[task].loss for task, path in case.experts.items())
    average = loss(merge.average)
    return (average - loss(merge.merged)) / (average - experts)


def main() -> None:
    """Merges with every choice of options, prints."""
    parser = argparse.ArgumentParser(description="What else has a closed form; see the top of this file.")
    default = Path(__file__).parent / "runs" / "quality"
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--options", nargs="+", default=OPTIONS, metavar="OPTION", help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--work", type=Path, default=default, metavar="DIR", help="folder for all files (%(default)s)")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    shares: dict[str, list[float]] = {options: [] for options in arguments.options}
    for seed in arguments.seeds:
        folder = arguments.work.resolve() / ("quick" if arguments.quick else "") / "images" / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        case = quality_images.make_case(folder, seed, arguments.quick)
        for options, found in shares.items():
            found.append(closed(case, options, folder / "options"))
            print(f"seed {seed}, {options or 'weights alone'}: {found[-1]:.1%}", flush=True)
    print("\n| solved, too | share of the gap | lowest to highest |\n|---|---:|---:|")
    for options, found in shares.items():
        print(f"| {options or 'nothing'} | {mean(found):.1%} | {min(found):.1%} to {max(found):.1%} |")
    print(f"\nmachine: {', '.join(f'{name} {value}' for name, value in machine().items())}\n")
    print(json.dumps({"benchmark": "quality_options", "machine": machine(), "shares": shares}))


if __name__ == "__main__":
    main()
