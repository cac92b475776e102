"""Merges of quantised candidates, and merges that are written quantised."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from cases import Case, auto_device, files_in, load_merged, report_of, weights_in, write_case
from quantized_models import load, plain_copy, quantize_folder, read_all, wide
from rich.console import Console
from transformers import PreTrainedModel

import largemerge
from largemerge import CheckpointError, ConfigError, LargemergeError
from largemerge.checkpoint.index import open_checkpoint
from largemerge.output import OutputFolder

METHODS = ("regmean", "regmean_plusplus")
OUTPUTS: list[dict[str, Any]] = [
    {"quantization": "nf4"},
    {"quantization": "nf4", "double_quant": False},
    {"quantization": "fp4"},
    {"quantization": "int8"},
]
MakeQuantized = Callable[..., Case]


@pytest.fixture
def make(tmp_path: Path) -> MakeQuantized:
    """Candidates of `wide` models, each quantised as `kinds` says (None: not)."""

    def make_case(
        name: str = "llama", kinds: tuple[str | None, ...] = (None, None), dtype: torch.dtype = torch.bfloat16,
        **more: Any,
    ) -> Case:  # fmt: skip
        models: list[PreTrainedModel] = [wide(name, dtype=dtype) for _ in kinds]
        for index, model in enumerate(models):
            generator = torch.Generator().manual_seed(index)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.05)
        inputs = [tiny_models.inputs("text", 16, index) for index in range(len(kinds))]
        case = write_case(tmp_path, models, inputs, **more)
        for index, kind in enumerate(kinds):
            if kind is not None:
                quantize_folder(tmp_path / f"model{index}", kind)
        return case

    return make_case


def with_plain_copies(case: Case, *base: str) -> dict[str, Any]:
    """The case's configuration with dequantised copies in the place of all candidates."""
    config: dict[str, Any] = json.loads(json.dumps(case.config))
    for model in config["models"]:
        model["model"] = str(plain_copy(Path(model["model"]), Path(f"{model['model']}-plain")))
    for key in base:
        config[key] = str(plain_copy(Path(config[key]), Path(f"{config[key]}-plain")))
    return config


def assert_same_weights(left: Path, right: Path) -> None:
    first, second = weights_in(left), weights_in(right)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


# In


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", ("nf4", "nf4")),
        ("llama", ("int8", "fp4, double quantised")),
        ("llama", (None, "nf4, double quantised", "int8")),
        ("bert", ("nf4, double quantised", None)),
        ("opt", ("int8", "int8")),
        ("gpt2", (None, "nf4", "int8")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_merge_is_that_of_dequantised_copies(
    make: MakeQuantized, name: str, kinds: tuple[str | None, ...], method: str, dtype: torch.dtype
) -> None:
    """Bit for bit: a block is dequantised to what the copies hold before anything is computed with it."""
    case = make(name, kinds, dtype, method=method)
    largemerge.merge(case.config, case.folder / "merged")
    largemerge.merge(with_plain_copies(case), case.folder / "expected")
    assert_same_weights(case.folder / "merged", case.folder / "expected")
    config = json.loads((case.folder / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert load_merged(case, case.folder / "merged").dtype == dtype


def test_a_quantised_base_gives_what_is_excluded(make: MakeQuantized) -> None:
    case = make(kinds=("nf4", None), exclude=[r"down_proj", "norm"])
    wide("llama", seed=5).save_pretrained(case.folder / "base")
    quantize_folder(case.folder / "base", "int8")
    case.config["base_model"] = str(case.folder / "base")
    largemerge.merge(case.config, case.folder / "merged")
    merged, base = read_all(case.folder / "merged"), read_all(case.folder / "base")
    for key in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        assert torch.equal(merged[key], base[key])
    largemerge.merge(with_plain_copies(case, "base_model"), case.folder / "expected")
    assert_same_weights(case.folder / "merged", case.folder / "expected")


def test_plan_and_report_say_what_is_quantised(make: MakeQuantized) -> None:
    case = make(kinds=(None, "int8", "nf4, double quantised"))
    plan = largemerge.plan(case.config)
    expected: Mapping[str, Any] = {"model1": {"int8": 14}, "model2": {"nf4, double quantised": 14}}
    assert plan.to_json()["quantized"] == expected
    report = largemerge.merge(case.config, case.folder / "merged")
    on_disk = sum(t.nbytes for i in range(3) for t in weights_in(case.folder / f"model{i}").values())
    assert plan.bytes_read == report.bytes_read == on_disk
    assert sum(part["bytes_read"] for part in (report.non_block, *report.blocks.values())) == on_disk
    written = report_of(case.folder / "merged")
    assert written["quantization"]["inputs"] == expected and written["quantization"]["output"] == {}
    assert not any("quantization_config" in note for note in plan.notes)
    stream = io.StringIO()
    plan.print(Console(file=stream, width=200))
    report.print(Console(file=stream, width=200))
    assert stream.getvalue().count("model2: 14 × nf4, double quantised") == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": None}, torch.bfloat16),
        ({"dtype": None, "quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "float16"}},
         torch.float16),
    ],
)  # fmt: skip
def test_the_compute_dtype_is_what_the_config_says(
    make: MakeQuantized, changes: dict[str, Any], expected: torch.dtype
) -> None:
    case = make(kinds=("nf4", None))
    path = case.folder / "model0" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].pop("bnb_4bit_compute_dtype")
    path.write_text(json.dumps({key: value for key, value in (config | changes).items() if value is not None}))
    assert largemerge.plan(case.config).compute_dtype == expected
    assert largemerge.plan(case.config | {"compute_dtype": "float32"}).compute_dtype == torch.float32


# Out


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", "regmean_plusplus"),
        ("gpt2", "regmean_plusplus"),
        ("llama", "calibrated"),
        ("llama", "lot"),
        ("llama", "esm"),
        pytest.param("bert", "regmean_plusplus", marks=pytest.mark.slow),
        pytest.param("opt", "regmean_plusplus", marks=pytest.mark.slow),
        pytest.param("gpt2", "featcal", marks=pytest.mark.slow),
    ],
)
def test_a_quantised_output_loads_and_holds_what_was_read_back(
    make: MakeQuantized, name: str, method: str, output: dict[str, Any]
) -> None:
    case = make(name, method=method)
    if method in ("featcal", "lot", "esm"):
        case.config["base_model"] = case.config["models"][1]["model"]
    case.config["output"] = output
    plan = largemerge.plan(case.config)
    out = case.folder / "merged"
    report = largemerge.merge(case.config, out, max_shard_bytes=30_000)
    raw = weights_in(out)
    assert plan.bytes_written == sum(tensor.nbytes for tensor in raw.values())
    model = load_merged(case, out)  # no missing, no unexpected key
    quantized = load(type(model), case.folder / "model0", quantization_config=settings_of(model))
    assert {key: (value.dtype, value.shape) for key, value in model.state_dict().items() if "state" not in key} == {
        key: (value.dtype, value.shape) for key, value in quantized.state_dict().items() if "state" not in key
    }
    label = next(iter(open_checkpoint(out, "m").quantized()))
    assert label == output["quantization"] + (
        ", double quantised" if output["quantization"] != "int8" and output.get("double_quant", True) else ""
    )
    dequantized = model.dequantize().state_dict()
    for key, tensor in read_all(out).items():
        assert torch.equal(tensor, dequantized[key]), key
    kept = report_of(out)["verified"]["candidates"]
    assert all(entry["relative_distance"] < 0.5 for entry in kept.values()), "rows and columns are not mixed up"
    errors = report.quantization_errors
    assert len(errors) == report_of(out)["quantization"]["output"][label]
    assert report_of(out)["quantization"]["mean_relative_error"] == pytest.approx(sum(errors.values()) / len(errors))


def settings_of(model: PreTrainedModel) -> Any:
    assert model.config.quantization_config.quant_method == "bitsandbytes"
    return model.config.quantization_config


@pytest.mark.parametrize("device", sorted({"cpu", auto_device()}))
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_regmean_is_quantised_as_transformers_would(
    make: MakeQuantized, name: str, output: dict[str, Any], device: str
) -> None:
    """RegMean's blocks do not depend on each other: quantising its plain merge gives the same numbers."""
    case = make(name, method="regmean")
    largemerge.merge(case.config, case.folder / "plain", device=device)
    report = largemerge.merge(case.config | {"output": output}, case.folder / "merged", device=device)
    settings = settings_of(load_merged(case, case.folder / "merged"))
    expected = load(type(case.models[0]), case.folder / "plain", device, quantization_config=settings)
    plain, read = load_merged(case, case.folder / "plain").state_dict(), read_all(case.folder / "merged")
    for key, error in report.quantization_errors.items():
        stored = read[key].T if name == "gpt2" else read[key]  # a Conv1D is stored as a linear
        norm = plain[key].float().norm()
        assert error == pytest.approx(((stored.float() - plain[key].float()).norm() / norm).item(), rel=0.1), key
    expected.save_pretrained(case.folder / "expected")
    found, wanted = weights_in(case.folder / "merged"), weights_in(case.folder / "expected")
    assert set(found) == set(wanted)
    if device != "cpu":  # what is outside of the blocks is quantised on the CPU
        wanted = {key: tensor for key, tensor in wanted.items() if re.search(r"\.(layers|layer|h)\.\d", key)}
    for key, tensor in wanted.items():
        if "quant_state" in key:
            assert json.loads(bytes(found[key].tolist())) == json.loads(bytes(tensor.tolist())), key
        else:
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("architecture", ["mixtral", "t5", "clip_vision", "vit", "bart", "gpt_neox", "phi3"])
@pytest.mark.parametrize("output", ["nf4", "int8"])
def test_every_kind_of_model_loads(tmp_path: Path, architecture: str, output: str) -> None:
    """Weights of widths that are no whole blocks, too; what Transformers keeps plain (T5's wo, experts) is plain."""
    kind = tiny_models.ARCHITECTURES[architecture].kind
    models = [tiny_models.perturbed(architecture, index).to(torch.bfloat16) for index in range(2)]
    case = write_case(tmp_path, models, [tiny_models.inputs(kind, 4, index) for index in range(2)])
    quantize_folder(tmp_path / "model1", "int8" if output == "nf4" else "nf4")
    case.config["output"] = {"quantization": output}
    largemerge.merge(case.config, tmp_path / "merged")
    load_merged(case, tmp_path / "merged")
    label = "int8" if output == "int8" else "nf4, double quantised"
    (count,) = open_checkpoint(tmp_path / "model1", "m").quantized().values()
    assert open_checkpoint(tmp_path / "merged", "m").quantized() == {label: count}


def test_dtype_is_what_the_output_is_dequantised_to(make: MakeQuantized) -> None:
    case = make(kinds=("nf4", "int8"))
    case.config |= {"dtype": "float32", "output": {"quantization": "nf4"}}
    largemerge.merge(case.config, case.folder / "merged")
    assert load_merged(case, case.folder / "merged").dequantize().dtype == torch.float32
    assert {tensor.dtype for tensor in read_all(case.folder / "merged").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("output", [{"quantization": "nf4"}, {"quantization": "int8"}], ids=str)
@pytest.mark.parametrize("kinds", [(None, None), ("int8", "nf4, double quantised")])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_merge_is_the_unbroken_one(
    make: MakeQuantized, monkeypatch: pytest.MonkeyPatch, output: dict[str, Any], kinds: Any, method: str
) -> None:
    """RegMean++ replays the merged block from disk: what it went on with before must have been the same."""
    case = make("opt", kinds, method=method)
    case.config["output"] = output
    largemerge.merge(case.config, case.folder / "unbroken")
    record = OutputFolder.record

    def stop_after_the_first_block(self: OutputFolder, part: str, entry: Mapping[str, Any]) -> None:
        record(self, part, entry)
        if len(self.entries) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OutputFolder, "record", stop_after_the_first_block)
        largemerge.merge(case.config, case.folder / "out")
    report = largemerge.merge(case.config, case.folder / "out", resume=True)
    assert report.resumed_parts == 2
    weights = {name: data for name, data in files_in(case.folder / "out").items() if name.endswith(".safetensors")}
    assert weights == {name: files_in(case.folder / "unbroken")[name] for name in weights}
    unbroken = report_of(case.folder / "unbroken")["quantization"]
    assert report_of(case.folder / "out")["quantization"] == unbroken


def test_the_next_block_sees_the_quantised_one(make: MakeQuantized) -> None:
    """RegMean++ solves the second block on what the first one computes as it lies on disk."""
    case = make(method="regmean_plusplus")
    largemerge.merge(case.config, case.folder / "plain")
    largemerge.merge(case.config | {"output": {"quantization": "nf4"}}, case.folder / "merged")
    settings = settings_of(load_merged(case, case.folder / "merged"))
    model = load(type(case.models[0]), case.folder / "plain", auto_device(), quantization_config=settings)
    model.save_pretrained(case.folder / "expected")
    found, afterwards = read_all(case.folder / "merged"), read_all(case.folder / "expected")
    first = [torch.equal(found[key], afterwards[key]) for key in found if ".layers.0." in key and "proj" in key]
    second = [torch.equal(found[key], afterwards[key]) for key in found if ".layers.1." in key and "proj" in key]
    assert all(first) and not any(second)


# What is refused


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"quantization": "gptq"}, "output.quantization: expected 'nf4', 'fp4' or 'int8', found 'gptq'"),
        ({"quantisation": "nf4"}, "output.quantisation: unknown key; did you mean 'quantization'?"),
        ({"quantization": "int8", "double_quant": True}, "output.double_quant: is for nf4 and fp4, found"),
        ({"double_quant": False}, "output.double_quant: is for nf4 and fp4, found"),
    ],
)
def test_mistakes_in_the_configuration(make: MakeQuantized, output: dict[str, Any], message: str) -> None:
    case = make()
    with pytest.raises(ConfigError) as caught:
        largemerge.plan(case.config | {"output": output})
    assert message in str(caught.value)


def test_all_candidates_of_other_methods_are_told_at_once(make: MakeQuantized) -> None:
    case = make(kinds=(None, "int8", "nf4"))
    for index, method in ((1, "gptq"), (2, "awq")):
        path = case.folder / f"model{index}" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(CheckpointError) as caught:
        largemerge.plan(case.config)
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "model1: quantized (gptq)",
        "model2: quantized (awq)",
    ]


@pytest.mark.parametrize("output", [None, "nf4"])
def test_without_bitsandbytes(make: MakeQuantized, monkeypatch: pytest.MonkeyPatch, output: str | None) -> None:
    case = make(kinds=("nf4" if output is None else None, None))
    case.config["output"] = {"quantization": output}
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LargemergeError, match=r"pip install 'largemerge\[bitsandbytes\]'"):
        largemerge.merge(case.config, case.folder / "merged")
    assert not (case.folder / "merged").exists()


def test_plain_merges_do_not_need_bitsandbytes(make: MakeQuantized, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    largemerge.merge(case.config, case.folder / "merged")


def test_the_resolved_configuration_can_be_used_again(make: MakeQuantized) -> None:
    case = make()
    largemerge.merge(case.config | {"output": {"quantization": "int8"}}, case.folder / "merged")
    written = yaml.safe_load((case.folder / "merged" / "largemerge_config.yaml").read_text())
    assert written["output"] == {"quantization": "int8"}
    largemerge.plan(written)
