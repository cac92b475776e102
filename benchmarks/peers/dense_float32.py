"""RegMean++ in dense float32, plainly and sensibly: the same maths as largemerge, with none of its means.

    python benchmarks/peers/dense_float32.py --experts DIR … --tokens FILE … --out DIR

Whole models in memory in float32, one Gram matrix per linear by a forward hook, both sums as the formula says,

    (Σ G̃ᵢ + λI) W*ᵀ = Σ G̃ᵢ Wᵢᵀ + λ W̄ᵀ        G̃ = s·G + (1-s)·diag(G)        λ = ridge · mean(diag Σ G̃ᵢ)

solved by `torch.linalg.solve`. Stands on torch and Transformers alone. A merged block is rounded to the experts' dtype
before the next one sees its output, as it will be saved, so that results can be compared.

Prints one line of JSON at the end: seconds of loading, of the merge, and of its parts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

Batches = list[dict[str, Any]]
"""For every batch of a task the arguments of the next block; `hidden_states` moves on from block to block."""

seconds: dict[str, float] = {}


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Adds up the time of one part of the work."""
    start = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start


class Reached(Exception):
    """Stops a forward pass at the first block."""


def first_inputs(model: nn.Module, tokens: torch.Tensor, batch_size: int) -> Batches:
    """The arguments that the model gives to its first block."""
    batches: Batches = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append({"hidden_states": args[0], **kwargs} if args else dict(kwargs))
        raise Reached

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in tokens.split(batch_size):
        try:
            model(input_ids=batch, use_cache=False)
        except Reached:
            continue
    handle.remove()
    return batches


def run(block: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The block's hidden states, whether it returns them alone or first of several."""
    output = block(**batch)
    return output[0] if isinstance(output, tuple) else output


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """All linears of a block by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def collect_grams(block: nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
    """XᵀX / tokens per linear."""
    linears = linears_of(block)
    grams = {name: torch.zeros(linear.in_features, linear.in_features) for name, linear in linears.items()}

    def add(name: str, x: torch.Tensor) -> None:
        flat = x.flatten(0, -2)
        grams[name].addmm_(flat.T, flat)

    handles = [
        module.register_forward_hook(lambda _, args, __, name=name: add(name, args[0]))
        for name, module in linears.items()
    ]
    for batch in batches:
        run(block, batch)
    for handle in handles:
        handle.remove()
    tokens = sum(batch["hidden_states"][..., 0].numel() for batch in batches)
    return {name: gram / tokens for name, gram in grams.items()}


def solve(grams: list[torch.Tensor], weights: list[torch.Tensor], scale: float, ridge: float) -> torch.Tensor:
    """The merged weight of one linear, `[out, in]`."""
    gram_sum, product_sum = torch.zeros_like(grams[0]), torch.zeros_like(weights[0].T)
    for gram, weight in zip(grams, weights, strict=True):
        scaled = gram * scale + torch.diag(gram.diagonal() * (1 - scale))
        gram_sum += scaled
        product_sum += scaled @ weight.T
    shift = ridge * gram_sum.diagonal().mean()
    mean = torch.stack(weights).mean(0)
    return torch.linalg.solve(gram_sum + shift * torch.eye(len(gram_sum)), product_sum + shift * mean.T).T


def merge_block(target: nn.Module, blocks: list[nn.Module], tasks: list[Batches], options: Any) -> None:
    """Every linear by its Gram matrices, everything else by the mean."""
    with timed("forward_and_gram"):
        grams = [collect_grams(block, batches) for block, batches in zip(blocks, tasks, strict=True)]
    with timed("solve"):
        average(target, blocks, options.dtype)
        for name, linear in linears_of(target).items():
            weights = [block.get_submodule(name).weight for block in blocks]
            merged = solve([gram[name] for gram in grams], weights, options.scale, options.ridge)
            linear.weight.copy_(merged.to(options.dtype))


def average(target: nn.Module, sources: list[nn.Module], dtype: torch.dtype) -> None:
    """Sets every parameter to the mean, rounded as it will be saved."""
    for name, parameter in target.named_parameters():
        parameter.copy_(torch.stack([source.get_parameter(name) for source in sources]).mean(0).to(dtype))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="RegMean++ in dense float32; see the top of this file.")
    parser.add_argument("--experts", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=Path, nargs="+", required=True, help=".safetensors with input_ids, per expert")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=0.95, help="of what is off the diagonal (default: %(default)s)")
    parser.add_argument("--ridge", type=float, default=1e-6, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at once (default: %(default)s)")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Loads everything, merges block after block, saves."""
    options = parse()
    start = time.perf_counter()
    options.dtype = AutoConfig.from_pretrained(options.experts[0]).dtype
    experts = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in options.experts]
    merged = AutoModelForCausalLM.from_pretrained(options.experts[0], dtype=torch.float32)
    tokens = [load_file(path)["input_ids"] for path in options.tokens]
    loaded = time.perf_counter()
    with timed("average"):
        average(merged.model.embed_tokens, [expert.model.embed_tokens for expert in experts], options.dtype)
        average(merged.model.norm, [expert.model.norm for expert in experts], options.dtype)
        if not merged.config.tie_word_embeddings:
            average(merged.lm_head, [expert.lm_head for expert in experts], options.dtype)
    tasks = [first_inputs(merged, task, options.batch_size) for task in tokens]
    for index, target in enumerate(merged.model.layers):
        merge_block(target, [expert.model.layers[index] for expert in experts], tasks, options)
        with timed("forward"):
            for batch in (batch for batches in tasks for batch in batches):
                if index + 1 < len(merged.model.layers):
                    batch["hidden_states"] = run(target, batch)
        print(f"block {index + 1}/{len(merged.model.layers)}", flush=True)
    merged.to(options.dtype).save_pretrained(options.out)
    done = time.perf_counter()
    print(json.dumps({"load_seconds": loaded - start, "merge_seconds": done - loaded, "by_part": seconds}))


if __name__ == "__main__":
    main()
