"""Checkpoints that bitsandbytes quantised, read as the weights they stand for."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from cases import rewrite_weights, weights_in
from quantized_models import KINDS, load, quantize_folder, read_all, wide
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from largemerge import CheckpointError
from largemerge.checkpoint.index import open_checkpoint
from largemerge.checkpoint.quantized import quantize, quantized_tensor
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.checkpoint.tensor_info import Quantization

Tensors = dict[str, torch.Tensor]
WEIGHT = "model.layers.1.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(kind: str, name: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
        wide(name, dtype=dtype).save_pretrained(tmp_path / "model")
        quantize_folder(tmp_path / "model", kind, **settings)
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "bert", "opt", "gpt2"])
def test_weights_are_those_of_transformers(
    saved: Callable[..., Path], name: str, kind: str, dtype: torch.dtype
) -> None:
    folder = saved(kind, name, dtype)
    expected = load(type(wide(name)), folder).dequantize().state_dict()
    found = read_all(folder)
    linears = [key for key in found if f"{key}.absmax" in (raw := weights_in(folder)) or raw[key].dtype == torch.int8]
    assert open_checkpoint(folder, "m").quantized() == {kind: len(linears)} and linears
    for key, tensor in found.items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "t5"])
def test_rows_that_are_no_whole_blocks_have_the_right_scales(tmp_path: Path, name: str, kind: str) -> None:
    """By the definition: what a number stands for, times the scale of its block."""
    tiny_models.build(name).save_pretrained(tmp_path)
    quantize_folder(tmp_path, kind)
    raw, found = weights_in(tmp_path), read_all(tmp_path)
    quantized = [key for key in found if f"{key}.absmax" in raw]
    assert quantized
    for key in quantized:
        packed = raw[key].flatten()
        numbers = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
        values = raw[f"{key}.quant_map"][numbers] * raw[f"{key}.absmax"].repeat_interleave(64)[: len(numbers)]
        assert torch.equal(found[key], values.reshape(found[key].shape)), key


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_read_are_those_on_disk(saved: Callable[..., Path], kind: str) -> None:
    folder = saved(kind)
    on_disk = sum(tensor.nbytes for tensor in weights_in(folder).values())
    checkpoint = open_checkpoint(folder, "m")
    with CheckpointReader(checkpoint) as reader:
        for name in checkpoint.tensors:
            reader.read(name)
        assert reader.bytes_read == checkpoint.num_bytes == on_disk


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_some_rows_are_those_of_the_whole(saved: Callable[..., Path], kind: str) -> None:
    folder = saved(kind)
    with CheckpointReader(open_checkpoint(folder, "m")) as reader:
        assert torch.equal(reader.read(WEIGHT, slice(3, 9)), reader.read(WEIGHT)[3:9])


@pytest.mark.parametrize("skip", [["down_proj"], [], ["lm_head", "model.layers.1"]], ids=str)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_skipped_modules_and_heads(saved: Callable[..., Path], kind: str, skip: list[str]) -> None:
    folder = saved(kind, llm_int8_skip_modules=skip)
    expected = load(AutoModelForCausalLM, folder).dequantize().state_dict()
    tensors = open_checkpoint(folder, "m").tensors
    assert tensors["model.embed_tokens.weight"].quantization is None
    assert (tensors["lm_head.weight"].quantization is None) == ("lm_head" in skip)
    assert (tensors["model.layers.0.mlp.down_proj.weight"].quantization is None) == ("down_proj" in skip)
    assert (tensors["model.layers.1.self_attn.q_proj.weight"].quantization is None) == ("model.layers.1" in skip)
    for key, tensor in read_all(folder).items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_packed_numbers_stored_as_another_dtype(saved: Callable[..., Path], storage: str) -> None:
    plain = read_all(saved("nf4"))
    folder = saved("nf4", bnb_4bit_quant_storage=storage)
    assert weights_in(folder)[WEIGHT].dtype == getattr(torch, storage)
    for key, tensor in read_all(folder).items():
        assert torch.equal(tensor, plain[key]), key


@pytest.mark.parametrize("kind", ["int8", "nf4, double quantised"])
def test_pickles_and_several_files(saved: Callable[..., Path], kind: str) -> None:
    folder = saved(kind)
    expected = read_all(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    for key, tensor in read_all(folder).items():
        assert torch.equal(tensor, expected[key]), key
    half = len(tensors) // 2  # which cuts a weight from its scales
    files = {"model-1.safetensors": list(tensors)[:half], "model-2.safetensors": list(tensors)[half:]}
    (folder / "pytorch_model.bin").unlink()
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for key, tensor in read_all(folder).items():
        assert torch.equal(tensor, expected[key]), key


def test_a_config_without_the_name_of_the_method(saved: Callable[..., Path]) -> None:
    folder = saved("int8")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder, "m").quantized() == {"int8": 14}


# What is wrong with a checkpoint


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_state(**changes: Any) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        state = {key: value for key, value in state.items() if value is not None}
        return tensors | {STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    return change


MODULE = WEIGHT.removesuffix(".weight")
BROKEN: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "no absmax": ("nf4", without(f"{WEIGHT}.absmax"), f"lacks {WEIGHT}.absmax"),
    "no quant_map": ("nf4", without(f"{WEIGHT}.quant_map"), f"lacks {WEIGHT}.quant_map"),
    "no state": ("nf4", without(STATE), "quantisation state (….quant_state.bitsandbytes__nf4 or fp4) is missing"),
    "no weight": ("nf4", without(WEIGHT), f"lacks {WEIGHT}"),
    "no nested scales": ("nf4, double quantised", without(f"{WEIGHT}.nested_absmax"), "nested_absmax"),
    "not JSON": ("nf4", lambda tensors: tensors | {STATE: torch.full((9,), 255, dtype=torch.uint8)}, "is not JSON"),
    "no shape": ("nf4", with_state(shape=None), "the quantisation state has no 'shape'"),
    "other shape": ("nf4", with_state(shape=[4096, 4096]), "[4096, 4096] in blocks of 64 needs 8388608"),
    "other blocks": ("nf4", with_state(blocksize=32), "needs 256"),
    "no blocks": ("nf4", with_state(blocksize=0), "0]; expected whole numbers above 0"),
    "other type": ("nf4", with_state(quant_type="fp4"), "quantised as 'fp4'"),
    "other dtype": ("nf4", with_state(dtype="float64"), "dequantises to 'float64'"),
    "no scales": ("int8", without(f"{MODULE}.SCB"), "an int8 weight without its scales"),
    "no int8 weight": ("int8", without(WEIGHT), "scales without their weight"),
    "few scales": ("int8", lambda t: t | {f"{MODULE}.SCB": torch.ones(3)}, "3 scales for the 128 rows"),
    "float weight": ("int8", lambda t: t | {WEIGHT: t[WEIGHT].float()}, "expected int8"),
    "turing": ("int8", lambda t: t | {f"{MODULE}.weight_format": torch.tensor(2, dtype=torch.uint8)}, "by rows"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_told_with_the_tensor(saved: Callable[..., Path], case: str) -> None:
    kind, change, message = BROKEN[case]
    folder = saved(kind)
    rewrite_weights(folder, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, "maths")
    assert message in str(caught.value)
    assert all(problem.startswith("maths: ") and MODULE in problem for problem in caught.value.problems)


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"bits": 4}, {"quant_method": "fp8"}])
def test_other_methods_are_refused(saved: Callable[..., Path], settings: dict[str, Any]) -> None:
    folder = saved("int8")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    reason = {"gptq": r" \(gptq\)", "fp8": ", as quantization_config.*no tensor is float8"}
    expected = reason.get(settings.get("quant_method", ""), r" \(unknown method\)")
    with pytest.raises(CheckpointError, match=rf"^maths: quantized{expected}; expected bitsandbytes"):
        open_checkpoint(folder, "maths")


def test_a_missing_package_is_told_with_what_to_install(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CheckpointError, match=r"^maths: .* needs bitsandbytes, .*pip install 'largemerge\[bitsandb"):
        open_checkpoint(folder, "maths")


# Writing


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(16, 24), (3, 5), (128, 64), (65, 33), (300, 200)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 0.0])
def test_sizes_are_known_beforehand(shape: tuple[int, int], double_quant: bool, transposed: bool, scale: float) -> None:
    for method in ("nf4", "fp4") if not double_quant or scale < 1e30 else ("nf4",):
        how = Quantization(method, double_quant, transposed)
        expected = quantized_tensor("a.weight", torch.float32, shape, how)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
        parts = quantize("a.weight", weight, expected)
        assert {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()} == {
            key: (part.dtype, part.shape) for key, part in expected.parts.items()
        }
        state = json.loads(bytes(parts[f"a.weight.quant_state.bitsandbytes__{method}"].tolist()))
        assert tuple(state["shape"]) == (shape[::-1] if transposed else shape)
        assert expected.num_bytes == sum(part.nbytes for part in parts.values())
        assert math.prod(expected.shape) == weight.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_transformers_would_have(tmp_path: Path, kind: str) -> None:
    model = wide("llama")
    model.save_pretrained(tmp_path / "model")
    quantize_folder(tmp_path / "model", kind)
    raw = weights_in(tmp_path / "model")
    method, double_quant = kind[:4].strip(","), "double" in kind
    weight = model.state_dict()[WEIGHT]
    expected = quantized_tensor(WEIGHT, weight.dtype, tuple(weight.shape), Quantization(method, double_quant))
    parts = quantize(WEIGHT, weight, expected)
    assert set(parts) == {key for key in raw if key.startswith(f"{MODULE}.")}
    for key, part in parts.items():
        if "quant_state" in key:
            assert json.loads(bytes(part.tolist())) == json.loads(bytes(raw[key].tolist()))
        else:
            assert torch.equal(part, raw[key]), key
