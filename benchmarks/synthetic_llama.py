"""Llama checkpoints that nobody trained: the right shapes and plausible numbers, made at the speed of the disk.

    python benchmarks/synthetic_llama.py DIR --geometry 7b --num-models 2 [--num-layers 2]
    largemerge merge DIR/merge.yaml OUT

Writes DIR/candidate-0, DIR/candidate-1, … (bfloat16, no tokenizer), one file of calibration tokens for each, and
the `merge.yaml` that merges them. A weight matrix of candidate i is

    W_i = 0.02 · (B + 0.05 · D_i)        B and D_i of variance 1; norms are ones

To be fast, B and D_i are not drawn number by number: they are stretches of a million numbers out of a pool of four
million normal ones, each stretch from an offset drawn for this tensor (and, for D_i, this candidate). Matrices so made
have full rank, and norms and differences like those of fine-tuned models; they know no language. A shard holds one
block, and only one is in memory at a time. The same seed gives the same bytes.

Calibration tokens follow Zipf's law with another exponent and another order of the vocabulary for each candidate,
so that the Gram matrices differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig

STD = 0.02
RELATIVE_DIFFERENCE = 0.05
DTYPE = torch.bfloat16
POOL_NUMBERS, STRETCH_NUMBERS = 1 << 22, 1 << 20
TOKENS_PER_BATCH = 2048

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Llama."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int

    def outside(self) -> Shapes:
        """Tensors of no block."""
        table = (self.vocabulary, self.hidden)
        return {"model.embed_tokens.weight": table, "model.norm.weight": (self.hidden,), "lm_head.weight": table}

    def block(self, layer: int) -> Shapes:
        """Tensors of one block."""
        h, i, kv = self.hidden, self.intermediate, self.hidden // self.num_heads * self.num_kv_heads
        shapes = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
        shapes |= {"self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
        norms = {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
        return {f"model.layers.{layer}.{name}.weight": shape for name, shape in (shapes | norms).items()}

    def shards(self) -> Iterator[Shapes]:
        """What each file holds, in order."""
        outside = self.outside()
        yield {"model.embed_tokens.weight": outside.pop("model.embed_tokens.weight")}
        yield from (self.block(layer) for layer in range(self.num_layers))
        yield outside

    def shapes(self) -> Shapes:
        """All tensors."""
        return {name: shape for shard in self.shards() for name, shape in shard.items()}

    @property
    def num_bytes(self) -> int:
        """Of one checkpoint."""
        return sum(map(math.prod, self.shapes().values())) * DTYPE.itemsize

    def config(self) -> LlamaConfig:
        """As Transformers wants it."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )


GEOMETRIES = {
    "tiny": Geometry(64, 176, 3, 4, 2, 512),
    "160m": Geometry(768, 3072, 12, 12, 12, 32000),
    "1.1b": Geometry(2048, 5632, 22, 32, 4, 32000),  # TinyLlama
    "7b": Geometry(4096, 11008, 32, 32, 32, 32000),  # Llama 2
}


@dataclass(frozen=True)
class Inputs:
    """Everything that a merge wants, and how much of it."""

    geometry: Geometry
    num_models: int = 2
    num_samples: int = 8
    """Per candidate."""
    length: int = 256
    """Tokens of a sample."""
    method: str = "regmean_plusplus"
    batch_size: int | None = None
    """Samples of a forward pass; default: as many as have 2048 tokens."""
    seed: int = 0

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return self.num_models * (self.geometry.num_bytes + 8 * self.num_samples * self.length)


def write_inputs(folder: Path, inputs: Inputs) -> Path:
    """Writes checkpoints, calibration tokens and the configuration of the merge.

    Args:
        folder: For all of it; made if it is missing, files in it are replaced.
        inputs: What to write.

    Returns:
        The path of the YAML.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pool = torch.randn(POOL_NUMBERS, generator=torch.Generator().manual_seed(inputs.seed)).to(DTYPE)
    models = []
    for index in range(inputs.num_models):
        name = f"candidate-{index}"
        _write_checkpoint(folder / name, inputs.geometry, pool, inputs.seed, index)
        _write_synced({"input_ids": calibration_tokens(inputs, index)}, folder / f"{name}.safetensors")
        models.append({"model": f"./{name}", "calibration": {"data": f"{name}.safetensors"}})
    batch_size = inputs.batch_size or max(1, TOKENS_PER_BATCH // inputs.length)
    calibration = {"num_samples": inputs.num_samples, "max_length": inputs.length, "batch_size": batch_size}
    config = {"merge_method": inputs.method, "models": models, "calibration": calibration}
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def calibration_tokens(inputs: Inputs, candidate: int) -> torch.Tensor:
    """Token ids `[num_samples, length]`, int64; the r-th most frequent has a share like `1 / (r + 3)^exponent`."""
    generator = _generator(inputs.seed, f"tokens {candidate}")
    exponent = 0.8 + 0.1 * (candidate % 5)
    shares = (torch.arange(inputs.geometry.vocabulary, dtype=torch.float64) + 3) ** -exponent
    ranks = torch.multinomial(shares, inputs.num_samples * inputs.length, replacement=True, generator=generator)
    order = torch.randperm(inputs.geometry.vocabulary, generator=generator)
    return order[ranks].view(inputs.num_samples, inputs.length)


def _write_checkpoint(folder: Path, geometry: Geometry, pool: torch.Tensor, seed: int, candidate: int) -> None:
    folder.mkdir(exist_ok=True)
    shards = list(geometry.shards())
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _weight(name, shape, pool, seed, candidate) for name, shape in shapes.items()}
        _write_synced(tensors, folder / file_name)
        weight_map |= dict.fromkeys(tensors, file_name)
    index = {"metadata": {"total_size": geometry.num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    geometry.config().save_pretrained(folder)


def _weight(name: str, shape: tuple[int, ...], pool: torch.Tensor, seed: int, candidate: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=DTYPE)
    weight = torch.empty(math.prod(shape), dtype=DTYPE)
    stretches = weight.split(STRETCH_NUMBERS)
    base = _offsets(len(stretches), _generator(seed, name))
    difference = _offsets(len(stretches), _generator(seed, f"{name} {candidate}"))
    for stretch, b, d in zip(stretches, base, difference, strict=True):
        size = len(stretch)
        torch.add(pool[b : b + size], pool[d : d + size], alpha=RELATIVE_DIFFERENCE, out=stretch).mul_(STD)
    return weight.view(shape)


def _offsets(count: int, generator: torch.Generator) -> list[int]:
    offsets: list[int] = torch.randint(POOL_NUMBERS - STRETCH_NUMBERS, (count,), generator=generator).tolist()
    return offsets


def _generator(seed: int, what: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _write_synced(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Forces the file onto the disk, so that no merge that is timed afterwards pays for it."""
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that describe `Inputs`."""
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny", help="sizes of the model (%(default)s)")
    parser.add_argument("--num-layers", type=int, help="fewer blocks than the geometry has")
    parser.add_argument("--num-models", type=int, default=2, metavar="K", help="candidates (%(default)s)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="calibration samples each (%(default)s)")
    parser.add_argument("--length", type=int, default=256, metavar="T", help="tokens of a sample (%(default)s)")
    parser.add_argument("--batch-size", type=int, help="samples of a forward pass (as many as have 2048 tokens)")
    parser.add_argument("--method", default="regmean_plusplus", help="merge_method (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (%(default)s)")


def from_arguments(arguments: argparse.Namespace) -> Inputs:
    """What the options of `add_arguments` ask for."""
    geometry = GEOMETRIES[arguments.geometry]
    return Inputs(
        geometry=dataclasses.replace(geometry, num_layers=arguments.num_layers or geometry.num_layers),
        num_models=arguments.num_models,
        num_samples=arguments.samples,
        length=arguments.length,
        method=arguments.method,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )


def main() -> None:
    """Writes what the command line asks for."""
    parser = argparse.ArgumentParser(description="Write Llama checkpoints of random numbers; see the top of this file.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder for checkpoints, tokens and merge.yaml")
    add_arguments(parser)
    arguments = parser.parse_args()
    inputs = from_arguments(arguments)
    path = write_inputs(arguments.folder, inputs)
    print(f"{inputs.num_bytes / 1e9:.2f} GB; merge them with: largemerge merge {path} OUT")


if __name__ == "__main__":
    main()
