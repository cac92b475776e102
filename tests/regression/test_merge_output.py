"""What a merge leaves on disk: files, names, dtypes, report."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf
import yaml
from cases import (
    TOKENIZER,
    Case,
    MakeCase,
    assert_close,
    auto_device,
    average,
    load_merged,
    merge_and_load,
    names_in,
    origins,
    report_of,
    touch,
    weights_in,
    write_case,
)
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel

import largemerge
from largemerge import LargemergeError

METHODS = ("regmean", "regmean_plusplus")
SIDE_FILES = {"README.md", "config.json", "generation_config.json", "largemerge_config.yaml", "merge_report.json"}


# Files


def test_one_shard(make_case: MakeCase) -> None:
    case = make_case()
    merge_and_load(case)
    assert names_in(case.folder / "merged") == SIDE_FILES | {"model.safetensors"}


@pytest.mark.parametrize("limit", [1, 3000, 9000])
def test_several_shards(make_case: MakeCase, limit: int) -> None:
    case = make_case(num_samples=4)
    one = merge_and_load(case, "one")
    many = merge_and_load(case, "many", max_shard_bytes=limit)
    assert_close(many, one, tolerance=0)
    out = case.folder / "many"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    total = len(shards)
    assert total > 1
    assert shards == [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    assert names_in(out) == SIDE_FILES | {"model.safetensors.index.json", *shards}
    size = 0
    for shard in shards:
        with safe_open(out / shard, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert {name for name, where in index["weight_map"].items() if where == shard} == set(held)
        num_bytes = sum(tensor.nbytes for tensor in held.values())
        assert num_bytes <= limit or len(held) == 1
        size += num_bytes
    assert index["metadata"]["total_size"] == size == sum(tensor.nbytes for tensor in weights_in(out).values())


@pytest.mark.parametrize("architecture", ["llama_tied", "gemma2", "gpt2", "bert", "t5", "bart"])
def test_tied_weights_are_tied_and_written_once(make_case: MakeCase, architecture: str) -> None:
    case = make_case(architecture, num_samples=4)
    merged = merge_and_load(case)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    found = weights_in(case.folder / "merged")
    assert set(found) == set(weights_in(case.folder / "model0"))
    embedding = merged.get_input_embeddings().weight
    assert sum(tensor.shape == embedding.shape and torch.equal(tensor, embedding) for tensor in found.values()) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "pretrained"),
        ({"tokenizer_source": "base"}, "pretrained"),
        ({"tokenizer_source": "model1"}, "model1"),
        ({"base_model": None}, "model0"),
        ({"base_model": None, "tokenizer_source": "model1"}, "model1"),
    ],
)
def test_where_the_tokenizer_comes_from(base_case: Case, settings: dict[str, Any], expected: str) -> None:
    base_case.config |= settings
    out = base_case.folder / "merged"
    largemerge.merge(base_case.config, out)
    assert origins(out, *TOKENIZER) == [expected] * len(TOKENIZER)
    processor = "pretrained" if base_case.config["base_model"] else "model1"
    assert origins(out, "preprocessor_config.json") == [processor]


def test_a_base_without_a_tokenizer_leaves_it_to_the_candidates(base_case: Case) -> None:
    for name in TOKENIZER:
        (base_case.folder / "pretrained" / name).unlink()
    largemerge.merge(base_case.config, base_case.folder / "merged")
    assert origins(base_case.folder / "merged", *TOKENIZER) == ["model0"] * len(TOKENIZER)


def test_config_and_generation_config_are_the_references(base_case: Case) -> None:
    for name in ("model0", "model1", "pretrained"):
        path = base_case.folder / name / "config.json"
        config = json.loads(path.read_text()) | {"note": name, "_name_or_path": "/somewhere/else"}
        path.write_text(json.dumps(config))
        (base_case.folder / name / "generation_config.json").write_text(json.dumps({"note": name}))
    for out, expected in (("with", "pretrained"), ("without", "model0")):
        largemerge.merge(base_case.config, base_case.folder / out)
        config = json.loads((base_case.folder / out / "config.json").read_text())
        assert config["note"] == expected and "_name_or_path" not in config
        assert json.loads((base_case.folder / out / "generation_config.json").read_text())["note"] == expected
        base_case.config["base_model"] = None


def test_python_files_that_no_config_names_stay_where_they_are(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    touch(case.folder / "model0", "train.py")
    largemerge.merge(case.config, case.folder / "merged")
    assert not (case.folder / "merged" / "train.py").exists()


def test_a_model_with_code_of_its_own(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    case = make_case(num_samples=4)
    code = "from transformers import LlamaForCausalLM\n\n\nclass TunedLlama(LlamaForCausalLM):\n    pass\n"
    for index in range(2):
        folder = case.folder / f"model{index}"
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["TunedLlama"], "auto_map": {"AutoModelForCausalLM": "modeling_tuned.TunedLlama"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_tuned.py").write_text(code)
    with pytest.raises(LargemergeError, match=r"model0: .*'TunedLlama'.*trust_remote_code: true"):
        largemerge.plan(case.config)
    case.config["trust_remote_code"] = True
    largemerge.merge(case.config, case.folder / "merged")
    merged = tf.AutoModelForCausalLM.from_pretrained(case.folder / "merged", trust_remote_code=True)
    assert type(merged).__name__ == "TunedLlama"


def test_the_model_card(base_case: Case) -> None:
    base_case.config["models"][1]["parameters"]["weight"] = 2.5
    out = base_case.folder / "merged"
    largemerge.merge(base_case.config, out)
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert set(metadata["tags"]) >= {"merge", "largemerge"}
    assert metadata["library_name"] == "transformers"
    assert "base_model" not in metadata, "folders on this machine are no Hub models"
    assert "| model1 | `model1` | 2.5 | `data1.safetensors` |" in body
    assert "LlamaForCausalLM.from_pretrained" in body
    fenced = re.search(r"```yaml\n(.*?)```", body, re.DOTALL)
    assert fenced is not None
    resolved = yaml.safe_load((out / "largemerge_config.yaml").read_text())
    assert yaml.safe_load(fenced[1]) == resolved
    assert largemerge.load_config(resolved) == largemerge.load_config(base_case.config)


# Dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_of_the_output(make_case: MakeCase, dtype: str) -> None:
    wanted = getattr(torch, dtype)
    case = make_case(num_samples=4)
    case.config["dtype"] = dtype
    merged = merge_and_load(case)
    assert {tensor.dtype for tensor in weights_in(case.folder / "merged").values()} == {wanted}
    assert json.loads((case.folder / "merged" / "config.json").read_text())["dtype"] == dtype
    assert merged.dtype == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_candidates_in_16_bits_stay_so(make_case: MakeCase, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    merged = merge_and_load(case)
    assert {tensor.dtype for tensor in weights_in(case.folder / "merged").values()} == {dtype}
    assert merged.dtype == dtype
    plan = report_of(case.folder / "merged")["plan"]
    assert plan["compute_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("order", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_candidates_of_two_dtypes_lose_nothing(tmp_path: Path, order: tuple[torch.dtype, ...]) -> None:
    """The wider dtype wins, in the weights and in what `from_pretrained` makes of them."""
    models = [tiny_models.perturbed("llama", index).to(dtype) for index, dtype in enumerate(order)]
    case = write_case(tmp_path, models, [tiny_models.inputs("text", 4, index) for index in range(2)])
    merged = merge_and_load(case)
    assert {tensor.dtype for tensor in weights_in(tmp_path / "merged").values()} == {torch.float32}
    assert merged.dtype == torch.float32


def test_compute_dtype_changes_the_forward_only(make_case: MakeCase) -> None:
    case = make_case(ridge=1e-3)
    exact = merge_and_load(case, "exact")
    case.config["compute_dtype"] = "bfloat16"
    rough = merge_and_load(case, "rough")
    assert rough.dtype == torch.float32
    assert report_of(case.folder / "rough")["plan"]["compute_dtype"] == "bfloat16"
    assert_close(rough, exact, tolerance=0.05)
    with pytest.raises(AssertionError):
        assert_close(rough, exact, tolerance=1e-5)
    assert torch.equal(rough.lm_head.weight, exact.lm_head.weight)


# The report


@pytest.mark.parametrize("method", METHODS)
def test_the_report(make_case: MakeCase, method: str) -> None:
    case = make_case(method=method, weights=[1.0, 3.0], num_candidates=2)
    out = case.folder / "merged"
    returned = largemerge.merge(case.config, out)
    report = report_of(out)
    assert json.loads(json.dumps(returned.to_json()["blocks"])) == report["blocks"]
    assert report["versions"]["transformers"] == tf.__version__
    assert torch.__version__.startswith(report["versions"]["torch"])
    assert report["machine"]["device"] == auto_device() and report["machine"]["num_threads"] == torch.get_num_threads()
    assert report["config"]["merge_method"] == method
    assert [model["parameters"]["weight"] for model in report["config"]["models"]] == [1.0, 3.0]
    for index in range(2):
        folder = case.folder / f"model{index}"
        files = report["inputs"][f"model{index}"]["files"]
        assert set(files) == {"config.json", "model.safetensors"}
        assert files["model.safetensors"]["bytes"] == (folder / "model.safetensors").stat().st_size
        assert files["model.safetensors"]["modified_ns"] == (folder / "model.safetensors").stat().st_mtime_ns
        digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        assert files["config.json"]["header_sha256"] == digest
        assert report["calibration"][f"model{index}"]["num_samples"] == 24
    assert report["calibration"]["model0"]["sha256"] != report["calibration"]["model1"]["sha256"]
    assert report["seconds"]["total"] >= report["seconds"]["preparation"] > 0
    assert report["seconds"]["by_phase"]["solve"] > 0
    written = sum(tensor.nbytes for tensor in weights_in(out).values())
    assert report["bytes_written"] == report["plan"]["bytes_written"] == written
    assert report["bytes_read"] >= 2 * written
    assert report["peak_bytes"]["planned_host"] == report["plan"]["peak_bytes"]["host"]
    assert 0 < report["peak_bytes"]["host_anonymous"] <= report["peak_bytes"]["host_total"]
    assert report["resumed_parts"] == 0
    assert list(report["blocks"]) == [f"model.layers.{index}" for index in range(3)]


@pytest.mark.parametrize("method", METHODS)
def test_the_report_of_every_linear(make_case: MakeCase, method: str) -> None:
    case = make_case(method=method, weights=[1.0, 3.0, 0.5], num_candidates=3, ridge=1e-4)
    merged = merge_and_load(case)
    report = report_of(case.folder / "merged")
    linears = {name: entry for block in report["blocks"].values() for name, entry in block["linears"].items()}
    names = {name for name, module in merged.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert set(linears) == {f"{name}.weight" for name in names}
    tokens = {f"model{index}": int(inputs["attention_mask"].sum()) for index, inputs in enumerate(case.inputs)}
    for name, entry in linears.items():
        weight = merged.state_dict()[name].double()
        assert entry["shape"] == list(weight.shape)
        assert entry["tokens"] == tokens
        assert entry["solver"] in ("cholesky_float32", "cholesky_float64")
        assert bool(entry["fallbacks"]) == (entry["solver"] != "cholesky_float32")
        assert entry["condition"] >= 1 and 0 <= entry["residual"] < 1e-4
        assert entry["num_dead_features"] == 0
        exact = float((weight - average(case, name)).norm() / weight.norm())
        assert entry["relative_distance_to_average"] == pytest.approx(exact, rel=1e-3)
        for index, model in enumerate(case.models):
            exact = float((weight - model.state_dict()[name]).norm() / weight.norm())
            assert entry["relative_distance_to_candidates"][f"model{index}"] == pytest.approx(exact, rel=0.25)
    shared = {entry["shares_gram_with"] for name, entry in linears.items() if "q_proj" in name or "v_proj" in name}
    assert shared == {"self_attn.q_proj"}
    assert report["fallbacks"] == {name: entry["fallbacks"] for name, entry in linears.items() if entry["fallbacks"]}


def test_tokens_in_the_report_are_those_of_the_loss_mask(make_case: MakeCase) -> None:
    case = make_case()
    for index, inputs in enumerate(case.inputs):
        mask = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(index)) < 0.5
        save_file(inputs | {"loss_mask": mask}, case.folder / f"data{index}.safetensors")
        inputs["counted"] = mask * inputs["attention_mask"]
    report = largemerge.merge(case.config, case.folder / "merged")
    expected = {f"model{index}": int(inputs["counted"].sum()) for index, inputs in enumerate(case.inputs)}
    assert all(entry["tokens"] == expected for entry in report.linears.values())


def test_images_have_no_padding(make_case: MakeCase) -> None:
    report = largemerge.merge(make_case("vit", num_samples=5).config, make_case("vit").folder / "merged")
    tokens_of_an_image = (12 // 4) ** 2 + 1
    assert {count for entry in report.linears.values() for count in entry["tokens"].values()} == {
        24 * tokens_of_an_image
    }


def test_the_output_loads_with_auto_classes(make_case: MakeCase) -> None:
    case = make_case("clip_vision", num_samples=4)
    merged = merge_and_load(case)
    assert type(AutoModel.from_pretrained(case.folder / "merged")) is type(merged)
    load_merged(case, case.folder / "merged")
