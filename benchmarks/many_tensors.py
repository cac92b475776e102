"""What many small tensors cost: a mixture of 19,000 tensors, and an adapter of 37,000, beside the same bytes in 300.

    python benchmarks/many_tensors.py --work DIR [--repeats 3]    # 5 GB of disk, some minutes
    python benchmarks/many_tensors.py --work DIR --quick          # a smoke test: the numbers mean nothing

Checkpoints of random numbers in bfloat16 with the names that Qwen3-MoE has on disk (48 blocks of 128 experts, smaller
than real ones), and Llamas of 33 blocks with as many bytes; a LoRA for every expert's matrices, and one of as
many bytes for the Llama's. Whole processes by turns, all inputs in the system's cache. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from measure import machine, run_measured

SHARD_BYTES = 256 << 20
VOCABULARY = 1024
EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Geometry:
    """The sizes of both architectures.

    Attributes:
        hidden: Hidden size of the mixture.
        expert: Rows of an expert's first matrices.
        num_blocks: Blocks of the mixture.
        num_experts: Experts of each block.
        llama_hidden: Hidden size of the Llama, whose intermediate size makes up for the bytes.
        llama_blocks: Its blocks.
        rank: Rank of the experts' adapters; the Llama's make up for the bytes.
    """

    hidden: int = 256
    expert: int = 48
    num_blocks: int = 48
    num_experts: int = 128
    llama_hidden: int = 640
    llama_blocks: int = 33
    rank: int = 8


QUICK = Geometry(hidden=32, expert=16, num_blocks=2, num_experts=4, llama_hidden=32, llama_blocks=2, rank=2)


def main() -> None:
    """Measures every pair and prints a table."""
    arguments = _arguments()
    work: Path = arguments.work.resolve()
    shutil.rmtree(work / "inputs", ignore_errors=True)
    geometry = QUICK if arguments.quick else Geometry()
    pairs = make_inputs(work / "inputs", geometry)
    rows = []
    for what, (many, few) in pairs.items():
        for method in arguments.methods:
            rows.append({"what": what, "method": method} | _measure(method, many, few, work, arguments.repeats))
    print("| | method | tensors | as few tensors | time | as few tensors | ratio |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['what']} | `{row['method']}` | {row['num_many']:,} | {row['num_few']:,} "
            f"| {row['many_seconds']:.1f} s | {row['few_seconds']:.1f} s | {row['ratio']:.2f} |"
        )
    shutil.rmtree(work / "inputs")
    print(json.dumps({"benchmark": "many_tensors", "rows": rows, "machine": machine()}))


def make_inputs(folder: Path, geometry: Geometry) -> dict[str, tuple[list[str], list[str]]]:
    """Writes all checkpoints; returns the models of each merge, those of many tensors and those of few."""
    mixture, mixture_shapes = _mixture(geometry)
    num_elements = _num_elements(mixture_shapes)
    llama, llama_shapes = _llama(geometry, num_elements)
    for number in range(2):
        _write(folder / f"mixture-{number}", mixture, mixture_shapes, number)
        _write(folder / f"llama-{number}", llama, llama_shapes, number)
    loras = _loras(mixture_shapes, geometry.rank, ".experts.")
    wide = _loras(llama_shapes, 1, ".mlp.")
    rank = max(1, round(_num_elements(loras) / _num_elements(wide)))
    for number in range(2):
        _write_adapter(folder / f"lora-many-{number}", loras, geometry.rank, number)
        _write_adapter(folder / f"lora-few-{number}", _loras(llama_shapes, rank, ".mlp."), rank, number)
    return {
        "mixture of experts": (
            [str(folder / f"mixture-{number}") for number in range(2)],
            [str(folder / f"llama-{number}") for number in range(2)],
        ),
        "adapters of its experts": (
            [f"{folder / 'mixture-0'}+{folder / f'lora-many-{number}'}" for number in range(2)],
            [f"{folder / 'llama-0'}+{folder / f'lora-few-{number}'}" for number in range(2)],
        ),
    }


def _mixture(geometry: Geometry) -> tuple[PreTrainedConfig, Shapes]:
    hidden, heads = geometry.hidden, max(2, geometry.hidden // 64)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=geometry.expert,
        num_hidden_layers=geometry.num_blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        num_experts=geometry.num_experts,
        num_experts_per_tok=2,
        architectures=["Qwen3MoeForCausalLM"],
    )
    shapes = _outside(hidden)
    for block in range(geometry.num_blocks):
        shapes |= _attention(block, hidden)
        name = f"model.layers.{block}"
        shapes |= {f"{name}.self_attn.{which}_norm.weight": (hidden // heads,) for which in "qk"}
        shapes[f"{name}.mlp.gate.weight"] = (geometry.num_experts, hidden)
        for expert in range(geometry.num_experts):
            for matrix in EXPERT_MATRICES:
                size = (hidden, geometry.expert) if matrix == "down_proj" else (geometry.expert, hidden)
                shapes[f"{name}.mlp.experts.{expert}.{matrix}.weight"] = size
    return config, shapes


def _llama(geometry: Geometry, num_elements: int) -> tuple[PreTrainedConfig, Shapes]:
    hidden, blocks = geometry.llama_hidden, geometry.llama_blocks
    rest = num_elements - 2 * VOCABULARY * hidden - blocks * 4 * hidden**2
    intermediate = max(8, round(rest / (3 * blocks * hidden)))
    heads = max(2, hidden // 64)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        architectures=["LlamaForCausalLM"],
    )
    shapes = _outside(hidden)
    for block in range(blocks):
        shapes |= _attention(block, hidden)
        for matrix in EXPERT_MATRICES:
            size = (hidden, intermediate) if matrix == "down_proj" else (intermediate, hidden)
            shapes[f"model.layers.{block}.mlp.{matrix}.weight"] = size
    return config, shapes


def _outside(hidden: int) -> Shapes:
    table = (VOCABULARY, hidden)
    return {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,), "lm_head.weight": table}


def _attention(block: int, hidden: int) -> Shapes:
    name = f"model.layers.{block}"
    shapes: Shapes = {f"{name}.self_attn.{which}_proj.weight": (hidden, hidden) for which in "qkvo"}
    norms = ("input_layernorm", "post_attention_layernorm")
    return shapes | {f"{name}.{norm}.weight": (hidden,) for norm in norms}


def _loras(shapes: Mapping[str, tuple[int, ...]], rank: int, part: str) -> Shapes:
    """The tensors of an adapter for all matrices whose names have some part."""
    found: Shapes = {}
    for name, shape in shapes.items():
        if part in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            found |= {f"{module}.lora_A.weight": (rank, shape[1]), f"{module}.lora_B.weight": (shape[0], rank)}
    return found


def _num_elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _write(folder: Path, config: PreTrainedConfig, shapes: Shapes, seed: int) -> None:
    """Writes a checkpoint in shards."""
    folder.mkdir(parents=True)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size >= SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * torch.Size(shape).numel()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(_random(shard, 0.02, 1000 * seed + number), folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 2 * _num_elements(shapes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_adapter(folder: Path, shapes: Shapes, rank: int, seed: int) -> None:
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(EXPERT_MATRICES),
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(_random(shapes, 0.01, seed), folder / "adapter_model.safetensors", {"format": "pt"})


def _random(shapes: Shapes, std: float, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.randn(shape, generator=generator).mul_(std).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def _measure(method: str, many: list[str], few: list[str], work: Path, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"many": [], "few": []}
    counts = {}
    for _ in range(repeats):
        for which, models in (("many", many), ("few", few)):
            config, out = work / "merge.yaml", work / "out"
            entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
            base = {"base_model": models[0].partition("+")[0]} if method != "linear" else {}
            text = {"merge_method": method, "models": entries, "dtype": "bfloat16", **base}
            config.write_text(yaml.safe_dump(text), encoding="utf-8")
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-m", "largemerge", "merge", str(config), str(out), "--quiet"]
            seconds[which].append(run_measured(command, work / f"{which}.log").seconds)
            source = models[0].partition("+")[2] or models[0]
            counts[which] = _num_tensors(Path(source))
    medians = {which: statistics.median(of) for which, of in seconds.items()}
    return {
        "num_many": counts["many"],
        "num_few": counts["few"],
        "many_seconds": medians["many"],
        "few_seconds": medians["few"],
        "ratio": medians["many"] / medians["few"],
        "runs": seconds,
    }


def _num_tensors(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += len(header) - ("__metadata__" in header)
    return total


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What many small tensors cost; see the top of this file.")
    parser.add_argument("--methods", nargs="+", default=["linear", "ties"], metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for all files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
