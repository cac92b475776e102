"""LoRA adapters as inputs: applied while reading, as their merged copies would be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from adapters import merged_by_peft, shapes_of, train_with_peft, write_adapter
from cases import weights_in
from rich.console import Console
from tokenized import ENGLISH, train, write_model
from transformers import AutoTokenizer, LlamaForCausalLM

import largemerge
from largemerge import LargemergeError
from largemerge.cli import main
from largemerge.data_free.methods import base
from largemerge.data_free.plan import DataFreePlan

Q, DOWN, NORM = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.norm"


def passthrough(folder: Path, reference: Any = None) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": reference or f"{folder / 'm'}+{folder / 'lora'}"}]}


def told(plan: DataFreePlan) -> str:
    console = Console(file=io.StringIO(), width=300)
    plan.print(console)
    return console.file.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_weight_is_what_its_merged_copy_would_be(tmp_path: Path, dtype: torch.dtype, use_rslora: bool) -> None:
    tiny_models.perturbed("llama", 0).to(dtype).save_pretrained(tmp_path / "m")
    shapes = shapes_of(tmp_path / "m", Q, DOWN)
    adapter = write_adapter(tmp_path / "lora", shapes, use_rslora=use_rslora, alpha_pattern={"down_proj": 2})
    report = largemerge.merge(passthrough(tmp_path), tmp_path / "out")
    before, out = weights_in(tmp_path / "m"), weights_in(tmp_path / "out")
    for name, tensor in out.items():
        module = name.removesuffix(".weight")
        expected = before[name]
        if module in shapes:
            alpha = 2 if module == DOWN else 6
            delta = adapter[f"{module}.lora_B.weight"].double() @ adapter[f"{module}.lora_A.weight"].double()
            expected = (before[name].double() + alpha / (2 if use_rslora else 4) * delta).to(dtype)
        assert torch.allclose(tensor, expected, rtol=1e-6 if dtype is torch.float32 else 0.0, atol=1e-6), name
    LlamaForCausalLM.from_pretrained(tmp_path / "out")
    (adapters,) = report.to_json()["plan"]["adapters"].values()
    assert adapters == {"adapted": 2, "replaced": []}
    assert report.bytes_read == report.plan.bytes_read and "2 weights adapted" in told(report.plan)
    assert not list(tmp_path.glob("**/*merged*")), "no copy on disk"


def test_pieces_change_nothing_and_methods_see_adapted_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        tiny_models.perturbed("llama", seed).save_pretrained(tmp_path / f"m{seed}")
        write_adapter(tmp_path / f"lora{seed}", shapes_of(tmp_path / "m0", Q, DOWN), seed)
    models = [f"{tmp_path / f'm{seed}'}+{tmp_path / f'lora{seed}'}" for seed in range(2)]
    config = {"merge_method": "ties", "base_model": str(tmp_path / "m0"), "parameters": {"weight": 0.5, "density": 0.4}}
    config["models"] = [{"model": model} for model in models]
    for seed, model in enumerate(models):
        largemerge.merge(passthrough(tmp_path, model), tmp_path / f"copy{seed}")
    largemerge.merge(config, tmp_path / "out")
    copies = [{"model": str(tmp_path / f"copy{seed}")} for seed in range(2)]
    largemerge.merge(config | {"models": copies}, tmp_path / "of-copies")
    monkeypatch.setattr(base, "PIECE_ELEMENTS", 300)
    largemerge.merge(config, tmp_path / "cut")
    out, of_copies, cut = (weights_in(tmp_path / name) for name in ("out", "of-copies", "cut"))
    for name, tensor in out.items():
        assert torch.equal(tensor, of_copies[name]), name
        assert torch.allclose(tensor, cut[name], atol=1e-6), name


def test_dora_scales_rows(tmp_path: Path) -> None:
    tiny_models.perturbed("llama", 0).save_pretrained(tmp_path / "m")
    shapes = shapes_of(tmp_path / "m", Q)
    magnitude = torch.rand(shapes[Q][0]) + 0.5
    adapter = write_adapter(tmp_path / "lora", shapes, whole={f"{Q}.lora_magnitude_vector": magnitude}, use_dora=True)
    largemerge.merge(passthrough(tmp_path), tmp_path / "out")
    weight = weights_in(tmp_path / "m")[f"{Q}.weight"].double()
    weight = weight + 1.5 * adapter[f"{Q}.lora_B.weight"].double() @ adapter[f"{Q}.lora_A.weight"].double()
    expected = magnitude.double().unsqueeze(1) * weight / weight.norm(dim=1, keepdim=True)
    assert torch.allclose(weights_in(tmp_path / "out")[f"{Q}.weight"].double(), expected, atol=1e-6)


def test_conv1d_and_names_without_prefix(tmp_path: Path) -> None:
    tiny_models.perturbed("gpt2", 0).save_pretrained(tmp_path / "m")
    before = weights_in(tmp_path / "m")
    name = next(key for key in before if key.endswith("h.0.attn.c_attn.weight"))
    inner, out = before[name].shape
    adapter = write_adapter(tmp_path / "lora", {"transformer.h.0.attn.c_attn": (out, inner)}, fan_in_fan_out=True)
    largemerge.merge(passthrough(tmp_path), tmp_path / "out")
    up, down = (adapter[f"transformer.h.0.attn.c_attn.lora_{letter}.weight"] for letter in "BA")
    assert torch.allclose(weights_in(tmp_path / "out")[name], before[name] + 1.5 * (up @ down).T, atol=1e-5)


def test_embeddings_and_modules_to_save(tmp_path: Path) -> None:
    tokenizer = train("BPE", ENGLISH)
    write_model(tmp_path / "m", 0, tokenizer)
    ids = write_model(tmp_path / "lora", 1, tokenizer, ["<new>"])
    grown = weights_in(tmp_path / "lora")
    for leftover in ("model.safetensors", "config.json", "generation_config.json"):
        (tmp_path / "lora" / leftover).unlink()
    whole = {name: grown[name] for name in ("model.embed_tokens.weight", "lm_head.weight", f"{NORM}.weight")}
    whole = {name.replace(NORM, f"{NORM}.modules_to_save"): tensor for name, tensor in whole.items()}
    write_adapter(tmp_path / "lora", shapes_of(tmp_path / "m", Q), whole=whole, modules_to_save=[NORM])
    largemerge.merge(passthrough(tmp_path), tmp_path / "out")
    out = weights_in(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight", f"{NORM}.weight"):
        assert torch.equal(out[name], grown[name])
    model, tokenizer_out = (
        LlamaForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert model.config.vocab_size == len(tokenizer_out) == ids["<new>"] + 1

    torch.manual_seed(3)
    embedding = {
        "model.embed_tokens.lora_embedding_A": torch.randn(4, 300),
        "model.embed_tokens.lora_embedding_B": torch.randn(tiny_models.LLM["hidden_size"], 4),
    }
    write_adapter(tmp_path / "embedding", {}, whole=embedding, target_modules=["embed_tokens"])
    union = {"merge_method": "linear", "parameters": {"weight": 1.0}, "tokenizer_source": "union"}
    union["models"] = [{"model": f"{tmp_path / 'm'}+{tmp_path / name}"} for name in ("embedding", "lora")]
    largemerge.merge(union, tmp_path / "union")
    delta = (
        1.5 * (embedding["model.embed_tokens.lora_embedding_B"] @ embedding["model.embed_tokens.lora_embedding_A"]).T
    )
    adapted = weights_in(tmp_path / "m")["model.embed_tokens.weight"] + delta
    merged = weights_in(tmp_path / "union")["model.embed_tokens.weight"]
    assert torch.allclose(merged[:300], (adapted + grown["model.embed_tokens.weight"][:300]) / 2, atol=1e-5)
    assert torch.equal(merged[300], grown["model.embed_tokens.weight"][300]), "the only one that has it"


def test_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models.perturbed("llama", 0).save_pretrained(tmp_path / "m+x")
    write_adapter(tmp_path / "lora", shapes_of(tmp_path / "m+x", Q))
    monkeypatch.chdir("/")
    plans = []
    for reference in (
        "./m+x+lora",
        {"model": "m+x", "lora": "./lora"},
        {"model": {"path": "m+x"}, "lora": {"path": "lora"}, "override_architecture": None},
        "m+x",
    ):
        (tmp_path / "merge.yml").write_text(yaml.safe_dump(passthrough(tmp_path, reference)))
        plans.append(largemerge.plan(tmp_path / "merge.yml"))
    assert [len(plan.adapters) for plan in plans] == [1, 1, 1, 0] and not any(plan.problems for plan in plans)


def test_the_folder_of_an_adapter_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models.perturbed("llama", 0).save_pretrained(tmp_path / "m")
    shapes = shapes_of(tmp_path / "m", Q, DOWN)
    for seed, named in enumerate(("m", "./m", "gone/base")):
        write_adapter(tmp_path / f"lora{seed}", shapes, seed, base_model_name_or_path=named)
    monkeypatch.chdir("/")
    outputs = []
    for number, model in enumerate(("./lora0", "./m+./lora0", "./lora0+lora1", "m+./lora0+./lora1", "./lora2")):
        (tmp_path / "merge.yml").write_text(yaml.safe_dump(passthrough(tmp_path, model)))
        if model == "./lora2":
            with pytest.raises(
                LargemergeError, match=r"its base_model_name_or_path is 'gone/base', which is neither here"
            ):
                largemerge.plan(tmp_path / "merge.yml")
            continue
        report = largemerge.merge(tmp_path / "merge.yml", tmp_path / f"out{number}")
        outputs.append(weights_in(tmp_path / f"out{number}"))
        assert all(f"{tmp_path / 'm'}+{tmp_path / 'lora0'}" in name for name in report.plan.adapters)
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    assert all(torch.equal(outputs[2][name], outputs[3][name]) for name in outputs[0])
    assert not torch.equal(outputs[0][f"{Q}.weight"], outputs[2][f"{Q}.weight"]), "the second adapter must show"


def test_other_kinds_of_adapters_and_experts_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(base, "PIECE_ELEMENTS", 100)
    model = tiny_models.perturbed("mixtral", 0)
    model.save_pretrained(tmp_path / "m")
    experts = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "init_lora_weights": False}
    for number, config in enumerate(
        (peft.LoHaConfig(r=2, target_modules=["q_proj", "o_proj"]), peft.LoraConfig(r=2, target_modules=[], **experts))
    ):
        train_with_peft(model, config, tmp_path / f"lora{number}")
        merged_by_peft(model, tmp_path / f"lora{number}").save_pretrained(tmp_path / f"copy{number}")
    config = {"merge_method": "ties", "base_model": str(tmp_path / "m"), "parameters": {"weight": 0.5, "density": 0.4}}
    for name in ("lora", "copy"):
        models = [str(tmp_path / f"{name}{number}") for number in range(2)]
        models = [f"{tmp_path / 'm'}+{model}" if name == "lora" else model for model in models]
        report = largemerge.merge(config | {"models": [{"model": model} for model in models]}, tmp_path / f"out-{name}")
        if name == "lora":
            assert report.bytes_read == report.plan.bytes_read, "each tensor of an adapter is read once"
    out, of_copies = weights_in(tmp_path / "out-lora"), weights_in(tmp_path / "out-copy")
    assert out.keys() == of_copies.keys() and any("experts.2.w1" in name for name in out)
    assert all(torch.equal(out[name], of_copies[name]) for name in out)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "PEFTY"}, "peft_type is 'PEFTY', which this peft does not know; expected one of"),
    ({"peft_type": None}, "peft_type is None; expected the kind of the adapter, such as 'LORA'"),
    ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING', which adds to a model's inputs"),
    ({"peft_type": "UNILORA"}, "peft_type is 'UNILORA', whose layers cannot be merged one by one"),
    ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]], which is not supported"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ({"r": None}, "r is None; expected a number"),
    ({"r": 0}, "r is 0; expected a whole number above 0"),
    ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern['q_proj'] is 1.5; expected a whole number above 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a finite number"),
    ({"r": 8}, "A and B are of rank 4 and 4, adapter_config.json says 8"),
    ({"use_dora": True}, "use_dora is True, but found ['lora_A', 'lora_B']"),
]


@pytest.mark.parametrize(("more", "text"), MISTAKES)
def test_mistakes(tmp_path: Path, more: dict[str, Any], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.perturbed("llama", 0).save_pretrained(tmp_path / "m")
    write_adapter(tmp_path / "lora", shapes_of(tmp_path / "m", DOWN), **more)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(passthrough(tmp_path)))
    with pytest.raises(SystemExit) as done:
        main(["merge", str(tmp_path / "merge.yml"), str(tmp_path / "out")])
    assert done.value.code == 2 and text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_the_model(tmp_path: Path) -> None:
    tiny_models.perturbed("llama", 0).save_pretrained(tmp_path / "m")
    odd = {"model.layers.0.mlp.gate.weight": torch.ones(3), f"{Q}.lora_C.weight": torch.ones(3)}
    write_adapter(tmp_path / "lora", {Q: (3, 5), "model.layers.9.self_attn.q_proj": (4, 4)}, whole=odd)
    with pytest.raises(LargemergeError) as error:
        largemerge.merge(passthrough(tmp_path), tmp_path / "out")
    assert "3 problems" in str(error.value) and str(error.value).count("has no tensor") == 2
    write_adapter(tmp_path / "lora", {Q: (3, 5)})
    with pytest.raises(LargemergeError, match=r"A \[4, 5\] and B \[3, 4\] do not fit it"):
        largemerge.merge(passthrough(tmp_path), tmp_path / "out")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(LargemergeError, match=r"no weights in .*; expected adapter_model.safetensors"):
        largemerge.merge(passthrough(tmp_path), tmp_path / "out")
