"""Adapters as inputs of regression merges: the same as their merged copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import merged_by_peft, shapes_of, train_with_peft, write_adapter
from cases import MakeCase, load_merged, report_of, weights_in
from safetensors.torch import load_file

import largemerge
from largemerge import LargemergeError
from largemerge.cli import main

LINEARS = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_proj"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
    "bert": ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"),
    "t5": ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.2.DenseReluDense.wo"),
}


def adapted_case(make_case: MakeCase, architecture: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A case whose candidates are one model with adapters, and the configuration of their merged copies."""
    case = make_case(architecture, num_samples=8, **more)
    copies = json.loads(json.dumps(case.config))
    for index, entry in enumerate(case.config["models"]):
        folder = case.folder / f"model{index}"
        modules = LINEARS[architecture]
        if architecture == "gpt2":
            shapes = {module: shape[::-1] for module, shape in shapes_of(folder, *modules).items()}
        else:
            shapes = shapes_of(folder, *modules)
        write_adapter(case.folder / f"lora{index}", shapes, index, fan_in_fan_out=architecture == "gpt2")
        entry["model"] = f"{folder}+{case.folder / f'lora{index}'}"
        entry["name"] = copies["models"][index]["name"] = f"expert{index}"
        passthrough = {"merge_method": "passthrough", "models": [{"model": entry["model"]}]}
        largemerge.merge(passthrough, case.folder / f"copy{index}")
        copies["models"][index]["model"] = str(case.folder / f"copy{index}")
    return case, copies


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *((architecture, "regmean") for architecture in sorted(LINEARS)),
        *(pytest.param(architecture, "regmean_plusplus", marks=pytest.mark.slow) for architecture in sorted(LINEARS)),
        *((architecture, "calibrated") for architecture in sorted(LINEARS)[::2]),
        *(pytest.param(architecture, "calibrated", marks=pytest.mark.slow) for architecture in sorted(LINEARS)[1::2]),
    ],
)
def test_adapters_merge_as_their_merged_copies(make_case: MakeCase, architecture: str, method: str) -> None:
    case, copies = adapted_case(make_case, architecture, method=method)
    report = largemerge.merge(case.config, case.folder / "merged")
    of_copies = largemerge.merge(copies, case.folder / "of-copies")
    merged, expected = weights_in(case.folder / "merged"), weights_in(case.folder / "of-copies")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    load_merged(case, case.folder / "merged")
    plain = weights_in(case.folder / "model0")
    assert any(not torch.equal(merged[name], plain[name]) for name in plain), "the adapters must show"
    written = report_of(case.folder / "merged")
    num_linears = len(LINEARS[architecture])
    assert written["plan"]["adapters"] == {f"expert{i}": {"adapted": num_linears, "replaced": []} for i in range(2)}
    lora = [weights_in(case.folder / f"lora{index}").values() for index in range(2)]
    added = sum(tensor.nbytes for tensors in lora for tensor in tensors)
    assert report.bytes_read == of_copies.bytes_read + added, "adapters are counted, each once"
    assert report.plan.bytes_read == of_copies.plan.bytes_read + added
    files = written["inputs"]["expert0"]["files"]
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files.keys()


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus"])
def test_adapters_that_bring_tokens(make_case: MakeCase, method: str) -> None:
    case, copies = adapted_case(make_case, "llama", method=method)
    for index, entry in enumerate(case.config["models"]):
        plain = weights_in(case.folder / f"model{index}")
        names = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in plain]
        grown = {name: torch.cat([plain[name], torch.randn(3, plain[name].shape[1]) / 9]) for name in names}
        shapes = shapes_of(case.folder / f"model{index}", *LINEARS["llama"])
        write_adapter(case.folder / f"lora{index}", shapes, index, whole=grown)
        shutil.rmtree(case.folder / f"copy{index}")
        passthrough = {"merge_method": "passthrough", "models": [{"model": entry["model"]}]}
        largemerge.merge(passthrough, case.folder / f"copy{index}")
    largemerge.merge(case.config, case.folder / "merged")
    largemerge.merge(copies, case.folder / "of-copies")
    merged, expected = weights_in(case.folder / "merged"), weights_in(case.folder / "of-copies")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    before = weights_in(case.folder / "model0")["model.embed_tokens.weight"].shape[0]
    assert load_merged(case, case.folder / "merged").config.vocab_size == before + 3


@pytest.mark.parametrize("kind", ["ia3", "experts"])
def test_adapters_of_other_kinds(make_case: MakeCase, kind: str) -> None:
    peft = pytest.importorskip("peft")
    case = make_case("bert" if kind == "ia3" else "mixtral", num_samples=8)
    for index, entry in enumerate(case.config["models"]):
        if kind == "ia3":
            config = peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])
        else:
            experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
            config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
        train_with_peft(case.models[index], config, case.folder / f"lora{index}")
        merged_by_peft(case.models[index], case.folder / f"lora{index}").save_pretrained(case.folder / f"copy{index}")
        entry["name"] = f"expert{index}"
    for name in ("copy", "lora"):
        for index, entry in enumerate(case.config["models"]):
            folder = case.folder / f"{name}{index}"
            entry["model"] = f"{case.folder / f'model{index}'}+{folder}" if name == "lora" else str(folder)
        largemerge.merge(case.config, case.folder / f"of-{name}")
    merged, expected = weights_in(case.folder / "of-lora"), weights_in(case.folder / "of-copy")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    load_merged(case, case.folder / "of-lora")


def test_an_adapter_stands_on_both_sides_of_the_plus(make_case: MakeCase) -> None:
    case, _ = adapted_case(make_case, "llama")
    model, _, lora = case.config["models"][0]["model"].partition("+")
    for reference, where in {
        f"{model}+": "after the last",
        f"+{lora}": "before the first",
        f"{model}++{lora}": "between two",
        f"{model}+{lora}+": "after the last",
        f"{model}+ +{lora}": "between two",
    }.items():
        case.config["models"][0]["model"] = reference
        with pytest.raises(LargemergeError, match=rf"nothing stands {where} '\+'; expected a model and adapters, with"):
            largemerge.merge(case.config, case.folder / "merged")


def test_a_plan_from_configs_says_that_it_has_seen_no_adapter(make_case: MakeCase) -> None:
    case, _ = adapted_case(make_case, "llama")
    notes = largemerge.plan(case.config, from_config=True).to_json()["notes"]
    assert any("adapters have not been looked at" in note for note in notes)


def test_several_passes_and_hidden_states_on_disk_change_nothing(make_case: MakeCase, tmp_path: Path) -> None:
    case, _ = adapted_case(make_case, "llama")
    largemerge.merge(case.config, case.folder / "plain")
    held = largemerge.plan(case.config, probe=False).footprint
    assert held.parts["adapters"] > 0
    case.config["memory"] = {"disk": str(tmp_path / "scratch"), "host": "4GiB"}
    largemerge.merge(case.config, case.folder / "limited")
    plain, limited = weights_in(case.folder / "plain"), weights_in(case.folder / "limited")
    assert all(torch.equal(plain[name], limited[name]) for name in plain)


def test_a_base_with_an_adapter(make_case: MakeCase) -> None:
    case, copies = adapted_case(make_case, "llama")
    for config, base in ((case.config, case.config["models"][0]["model"]), (copies, copies["models"][0]["model"])):
        config["base_model"] = base
        config["parameters"] = {"exclude": ["q_proj"]}
    largemerge.merge(case.config, case.folder / "merged")
    largemerge.merge(copies, case.folder / "of-copies")
    merged, expected = weights_in(case.folder / "merged"), weights_in(case.folder / "of-copies")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged[name], weights_in(case.folder / "copy0")[name]), "taken from the base, adapted"


def test_the_yaml_names_them_as_for_data_free_methods(make_case: MakeCase) -> None:
    case, copies = adapted_case(make_case, "llama")
    for entry in case.config["models"]:
        model, _, lora = entry["model"].partition("+")
        entry["model"] = {"model": {"path": model}, "lora": {"path": lora}}
    largemerge.merge(case.write_yaml(), case.folder / "merged")
    largemerge.merge(copies, case.folder / "of-copies")
    merged, expected = weights_in(case.folder / "merged"), weights_in(case.folder / "of-copies")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_what_is_wrong_with_an_adapter_is_told_before_the_work(
    make_case: MakeCase, capsys: pytest.CaptureFixture[str]
) -> None:
    case, _ = adapted_case(make_case, "llama")
    tensors = load_file(case.folder / "lora0" / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 16)
    write_adapter(case.folder / "lora1", {"model.layers.0.self_attn.q_proj": (7, 16)}, peft_type="LORA")
    with pytest.raises(LargemergeError, match=r"expert1: model\.layers\.0\.self_attn\.q_proj\.weight .* do not fit"):
        largemerge.merge(case.config, case.folder / "merged")
    case.config["models"][1]["model"] = str(case.folder / "lora1")  # without its model
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(case.write_yaml()), str(case.folder / "merged")])
    assert ended.value.code == 2
    assert (
        "is an adapter; its base_model_name_or_path is ''; write its model before it: model+lora1"
        in capsys.readouterr().err
    )
    assert not (case.folder / "merged").exists()


def test_the_output_may_not_be_an_adapter(make_case: MakeCase) -> None:
    case, _ = adapted_case(make_case, "llama")
    with pytest.raises(LargemergeError, match="holds an input"):
        largemerge.merge(case.config, case.folder / "lora0", force=True)
    assert (case.folder / "lora0" / "adapter_model.safetensors").exists()


def test_an_adapter_on_a_quantised_model(make_case: MakeCase) -> None:
    pytest.importorskip("bitsandbytes")
    case = make_case("llama", num_samples=8, dtype=torch.bfloat16)
    shapes = shapes_of(case.folder / "model0", *LINEARS["llama"])
    largemerge.merge(case.config | {"output": {"quantization": "nf4"}}, case.folder / "nf4")
    copies = json.loads(json.dumps(case.config))
    for index, entry in enumerate(case.config["models"]):
        write_adapter(case.folder / f"lora{index}", shapes, index)
        entry["model"], entry["name"] = f"{case.folder / 'nf4'}+{case.folder / f'lora{index}'}", f"expert{index}"
        passthrough = {"merge_method": "passthrough", "models": [{"model": entry["model"]}]}
        largemerge.merge(passthrough, case.folder / f"copy{index}")
        copies["models"][index] |= {"model": str(case.folder / f"copy{index}"), "name": f"expert{index}"}
    largemerge.merge(case.config, case.folder / "merged")
    largemerge.merge(copies, case.folder / "of-copies")
    merged, expected = weights_in(case.folder / "merged"), weights_in(case.folder / "of-copies")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
