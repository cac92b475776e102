"""Weights in FP8: dequantised as float(w) · scale, whatever the config says; all other formats refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from cases import weights_in
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import largemerge
from largemerge.checkpoint.index import Checkpoint, open_checkpoint
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.errors import CheckpointError

FP8 = torch.float8_e4m3fn
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek": ("_scale_inv", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}),
    "compressed": (
        "_scale",
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
    ),
    "compression": ("_scale", {"compression_config": {"format": "float-quantized", "ignore": ["lm_head"]}}),
    "nested": (  # of a class that this Transformers does not know
        "_scale",
        {"text_config": {"quantization_config": {"quant_method": "fbgemm_fp8"}}, "model_type": "vision_of_tomorrow"},
    ),
    "silent": ("_scale", {}),
    "comfy": (".scale_weight", {}),
}
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tensor": ((8, 12), ()),
    "tensor of one": ((8, 12), (1,)),
    "output": ((8, 12), (8,)),
    "output column": ((8, 12), (8, 1)),
    "input": ((8, 12), (1, 12)),
    "blocks": ((8, 12), (2, 3)),
    "blocks cut off": ((7, 10), (2, 3)),
    "experts": ((3, 8, 12), (3, 2, 3)),
    "expert": ((3, 8, 12), (3, 1, 1)),
    "experts' outputs": ((3, 8, 12), (3, 8, 1)),
}


def write(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16", **config}))
    save_file(dict(tensors), folder / "model.safetensors")
    return open_checkpoint(folder, "maths")


def expanded(scale: torch.Tensor, shape: tuple[int, ...], block: int) -> torch.Tensor:
    """The scale of every single number, by a loop over all of them."""
    full = torch.empty(shape, dtype=torch.float64)
    scale = scale.double().reshape(*scale.shape, *[1] * (len(shape) - scale.dim()))
    for place in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        index = [
            0 if size == 1 else number if size == length else number // block
            for number, size, length in zip(place, scale.shape, shape, strict=True)
        ]
        full[tuple(place)] = scale[tuple(index)]
    return full


@pytest.mark.parametrize("kind", SHAPES)
def test_scales_of_every_shape(tmp_path: Path, kind: str) -> None:
    shape, scale_shape = SHAPES[kind]
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 50).to(FP8)
    scale = torch.rand(scale_shape, generator=generator) + 0.1
    config = FORMATS["deepseek"][1]
    checkpoint = write(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, config)
    info = checkpoint.tensors["a.weight"]
    assert list(checkpoint.tensors) == ["a.weight"] and (info.shape, info.dtype) == (shape, torch.bfloat16)
    assert checkpoint.quantized() == {"fp8": 1}
    expected = (weight.double() * expanded(scale, shape, 4)).float().to(torch.bfloat16)
    with CheckpointReader(checkpoint) as reader:
        assert torch.equal(reader.read("a.weight"), expected)
        assert torch.equal(reader.read("a.weight", slice(1, 3)), expected[1:3])
        assert torch.equal(reader.read("a.weight", torch.tensor([2, 0])), expected[[2, 0]])


def test_rows_are_read_alone(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"a.weight": torch.ones(64, 8).to(FP8), "a.weight_scale": torch.ones(64)}, {})
    with CheckpointReader(checkpoint) as reader:
        reader.read("a.weight", slice(0, 2))
        assert reader.bytes_read == 2 * 8 + 64 * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Llamas in every format, and their copies in bfloat16 with the numbers that the formula gives."""
    root = tmp_path_factory.mktemp("fp8")
    for seed in (0, 1):
        model = tiny_models.perturbed("llama", seed).to(torch.bfloat16)
        model.save_pretrained(root / f"plain{seed}")
        stored, config = weights_in(root / f"plain{seed}"), json.loads((root / f"plain{seed}/config.json").read_text())
        for name, (ending, settings) in FORMATS.items():
            made, numbers = dict(stored), dict(stored)
            for key in [key for key in stored if "_proj.weight" in key]:
                blocks = (-(-stored[key].shape[0] // 4), -(-stored[key].shape[1] // 4)) if name == "deepseek" else (1,)
                scale = stored[key].float().abs().max().reshape(*[1] * len(blocks)).expand(blocks).contiguous() / 448
                made[key] = (stored[key].float() / scale.reshape(-1)[0]).to(FP8)
                made[key.removesuffix(".weight") + ending if "." in ending else key + ending] = scale
                made[key.removesuffix(".weight") + ".input_scale"] = torch.ones(1)
                numbers[key] = (made[key].float() * scale.reshape(-1)[0]).to(torch.bfloat16)
            for folder, tensors, more in ((f"{name}{seed}", made, settings), (f"{name}{seed}-numbers", numbers, {})):
                (root / folder).mkdir()
                (root / folder / "config.json").write_text(json.dumps({**config, **more}))
                save_file(tensors, root / folder / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_merges_as_its_numbers_and_the_output_is_plain(folders: Path, tmp_path: Path, name: str) -> None:
    def merged(ending: str) -> Path:
        models = [
            {"model": str(folders / f"{name}{seed}{ending}"), "parameters": {"weight": seed + 1}} for seed in (0, 1)
        ]
        report = largemerge.merge({"merge_method": "linear", "models": models}, tmp_path / f"out{ending}", quiet=True)
        notes = [note for note in report.plan.notes if "FP8" in note]
        assert len(notes) == (0 if ending else 2) and all("to bfloat16" in note for note in notes)
        assert ending or ("input_scale" in notes[0] and "are left out" in notes[0])
        return tmp_path / f"out{ending}"

    found, expected = weights_in(merged("")), weights_in(merged("-numbers"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in json.dumps(config) and "compression_config" not in config
    if name != "nested":
        _, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_float8_without_scales_is_taken_as_numbers_and_told(folders: Path, tmp_path: Path) -> None:
    models = []
    for seed in (0, 1):
        stored = weights_in(folders / f"plain{seed}")
        cast = {key: value.to(torch.float8_e5m2) if value.dim() > 1 else value for key, value in stored.items()}
        config = json.loads((folders / f"plain{seed}" / "config.json").read_text())
        assert write(tmp_path / f"cast{seed}", cast, config).quantized().keys() == {"fp8 without scales"}
        models.append({"model": str(tmp_path / f"cast{seed}"), "parameters": {"weight": 1.0}})
    report = largemerge.merge({"merge_method": "linear", "models": models}, tmp_path / "out", quiet=True)
    assert sum("float8 tensors without scales" in note for note in report.plan.notes) == 2
    merged = weights_in(tmp_path / "out")
    parts = [weights_in(tmp_path / f"cast{seed}") for seed in (0, 1)]
    for key, value in merged.items():
        expected = sum(part[key].double() for part in parts) / 2
        assert value.dtype == torch.bfloat16
        assert torch.allclose(value.double(), expected, rtol=2**-8, atol=0), key


ONE, BYTES = torch.ones(1), torch.ones(2, 4, dtype=torch.uint8)
FOREIGN: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "gptq": ({"a.qweight": torch.ones(2, 4, dtype=torch.int32), "a.scales": torch.ones(1, 4)}, "GPTQ or AWQ"),
    "packed": ({"a.weight_packed": torch.ones(2, 4, dtype=torch.int32), "a.weight_scale": torch.ones(1)}, "compressed"),
    "mxfp4": (
        {"a.down_proj_blocks": torch.ones(2, 4, dtype=torch.uint8), "a.down_proj_scales": torch.ones(1).byte()},
        "MXFP4",
    ),
    "nvfp4": (
        {"a.weight": BYTES, "a.weight_scale": torch.ones(2, 1).to(FP8), "a.weight_scale_2": ONE},
        "NVFP4",
    ),
    "integers": ({"a.weight": torch.ones(2, 4).char(), "a.weight_scale": torch.ones(1)}, "a weight in int8"),
    "mxfp8": ({"a.weight": torch.ones(2, 4).to(FP8), "a.weight_scale": torch.ones(2, 1).byte()}, "MXFP8"),
    "misfit": ({"a.weight": torch.ones(5, 4).to(FP8), "a.weight_scale": torch.ones(3, 2)}, "[5, 4] neither"),
    "lonely": ({"a.weight": torch.ones(2, 4), "a.weight_scale": torch.ones(1)}, "a scale without a weight in float8"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_other_formats_are_refused_by_name_without_a_word_in_the_config(tmp_path: Path, case: str) -> None:
    tensors, expected = FOREIGN[case]
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path, tensors, {})
    assert expected in str(caught.value) and "maths: " in str(caught.value)
    assert "take the checkpoint in 16 bits" in str(caught.value) or case == "misfit"


def test_masks_positions_and_counters_are_no_weights(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "position_ids": torch.arange(4)[None],
        "relative_position_index": torch.ones(4, 4, dtype=torch.int64),
        "norm.num_batches_tracked": torch.tensor(3),
        "attn.k_scale": torch.ones(1),
        "blocks": torch.ones(2, dtype=torch.uint8),
    }
    checkpoint = write(tmp_path, tensors, {"quantization_config": None})
    assert set(checkpoint.tensors) == set(tensors) and checkpoint.notes == ()
