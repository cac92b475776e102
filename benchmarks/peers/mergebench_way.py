"""RegMean++ the way MergeBench does it: the cost of the plainest whole-model implementation.

    python benchmarks/peers/mergebench_way.py --base DIR --experts DIR … --tokens FILE … --out DIR

Written from what MergeBench's code does (github.com/uiuctml/MergeBench, state of February 2026), not from its lines;
stands on torch and Transformers alone. What it shares with it, and what makes up its cost:

- K + 1 whole models in memory, in bfloat16; sequences go through one at a time;
- a Gram matrix for every linear, also where linears read the same tensor, as a running mean in the models' dtype;
- every Gram, and every tensor of a block, is saved to disk and loaded again, block by block;
- for every linear the condition number by singular values; the inverse, or beyond 1e8 the pseudo-inverse, in
  float32, is rounded to the models' dtype and multiplied out;
- the garbage collector runs after every tensor that is dropped (told apart as `gc` in what it reports);
- embeddings stay the base's; the final norm is averaged.

Prints one line of JSON at the end: seconds of loading, of the merge, and of its parts.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

MOST_CONDITION = 1e8
Batches = list[dict[str, Any]]
"""For every sequence of a task the arguments of the next block; `hidden_states` moves on from block to block."""

seconds: dict[str, float] = {}


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Adds up the time of one part of the work."""
    start = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start


def collect_garbage() -> None:
    """What MergeBench does after every tensor that it drops; `--no-gc` leaves it out."""
    if "--no-gc" not in sys.argv:
        with timed("gc"):
            gc.collect()


class Reached(Exception):
    """Stops a forward pass at the first block."""


def first_inputs(model: nn.Module, tokens: torch.Tensor) -> Batches:
    """The arguments that the model gives to its first block, one sequence at a time."""
    batches: Batches = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append({"hidden_states": args[0], **kwargs} if args else dict(kwargs))
        raise Reached

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sequence in tokens.split(1):
        try:
            model(input_ids=sequence, use_cache=False)
        except Reached:
            continue
    handle.remove()
    return batches


def run(block: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The block's hidden states, whether it returns them alone or first of several."""
    output = block(**batch)
    return output[0] if isinstance(output, tuple) else output


def collect_grams(block: nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
    """A Gram matrix per linear, divided by tokens, in the dtype of the activations."""
    grams: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, x: torch.Tensor) -> None:
        flat = x.flatten(0, -2)
        product, before = flat.T @ flat, rows.get(name, 0)
        rows[name] = before + flat.shape[0]
        grams[name] = (grams[name] * before + product) / rows[name] if before else product / rows[name]

    handles = [
        module.register_forward_hook(lambda _, args, __, name=name: add(name, args[0]))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for batch in batches:
        run(block, batch)
    for handle in handles:
        handle.remove()
    return grams


def save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """One file per tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pt")


def load(path: Path) -> torch.Tensor:
    """One of these files."""
    with timed("disk"):
        return torch.load(path, map_location="cpu")


def merge_linear(grams: Sequence[Path], weights: Sequence[Path], scale: float) -> torch.Tensor:
    """(Σ G̃)⁻¹ Σ G̃ Wᵀ, transposed back."""
    gram_sum = product_sum = None
    for gram_path, weight_path in zip(grams, weights, strict=True):
        gram, weight = load(gram_path), load(weight_path)
        mask = torch.full_like(gram, scale)
        gram = gram * mask.fill_diagonal_(1)
        product = gram @ weight.T
        gram_sum = gram.clone() if gram_sum is None else gram_sum.add_(gram)
        product_sum = product.clone() if product_sum is None else product_sum.add_(product)
        del gram, weight, product
        collect_garbage()
    exact = gram_sum.float()
    with timed("condition"):
        ill = torch.linalg.cond(exact) > MOST_CONDITION or bool((exact.diagonal() == 0).any())
    with timed("pseudo_inverse" if ill else "inverse"):
        inverse = torch.linalg.pinv(exact) if ill else torch.linalg.inv(exact)
    return (inverse.to(product_sum.dtype) @ product_sum).T


def average(paths: Sequence[Path]) -> torch.Tensor:
    """The plain mean."""
    total = load(paths[0]).clone()
    for path in paths[1:]:
        total.add_(load(path))
        collect_garbage()
    return total / len(paths)


def merge_block(index: int, merged: nn.Module, experts: list[nn.Module], tasks: list[Batches], options: Any) -> None:
    """One block: Grams and weights to disk, back again, solved, loaded into the merged model."""
    folders = [options.scratch / str(number) for number in range(len(experts))]
    for expert, batches, folder in zip(experts, tasks, folders, strict=True):
        block = expert.model.layers[index]
        with timed("forward_and_gram"):
            grams = collect_grams(block, batches)
        with timed("disk"):
            save(grams, folder / "grams")
            save(block.state_dict(), folder / "weights")
        del grams
        collect_garbage()
    target = merged.model.layers[index]
    solved = {path.stem for path in (folders[0] / "grams").iterdir()}
    state = {}
    for name in target.state_dict():
        weights = [folder / "weights" / f"{name}.pt" for folder in folders]
        linear = name.removesuffix(".weight")
        if linear in solved:
            grams = [folder / "grams" / f"{linear}.pt" for folder in folders]
            state[name] = merge_linear(grams, weights, options.scale)
        else:
            state[name] = average(weights)
    target.load_state_dict(state)
    with timed("disk"):
        shutil.rmtree(options.scratch)
    if index + 1 == len(merged.model.layers):
        return
    for batches in tasks:
        with timed("forward"):
            for batch in batches:
                batch["hidden_states"] = run(target, batch)
        collect_garbage()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="RegMean++ the way MergeBench does it; see the top of this file.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=Path, nargs="+", required=True, help=".safetensors with input_ids, per expert")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=0.1, help="of what is off the diagonal (default: %(default)s)")
    parser.add_argument("--no-gc", action="store_true", help="do not call the garbage collector")
    options = parser.parse_args()
    options.scratch = options.out / "scratch"
    return options


@torch.no_grad()
def main() -> None:
    """Loads everything, merges block after block, saves."""
    options = parse()
    start = time.perf_counter()
    folders = (options.base, *options.experts)
    merged, *experts = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in folders)
    tokens = [load_file(path)["input_ids"] for path in options.tokens]
    loaded = time.perf_counter()
    norms = [expert.model.norm.weight for expert in experts]
    merged.model.norm.weight.copy_(torch.stack(norms).mean(0))
    tasks = [first_inputs(merged, task) for task in tokens]
    for index in range(len(merged.model.layers)):
        merge_block(index, merged, experts, tasks, options)
        print(f"block {index + 1}/{len(merged.model.layers)}", flush=True)
    merged.save_pretrained(options.out)
    done = time.perf_counter()
    print(json.dumps({"load_seconds": loaded - start, "merge_seconds": done - loaded, "by_part": seconds}))


if __name__ == "__main__":
    main()
