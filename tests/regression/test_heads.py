"""Heads that differ: the body is merged, every head lies beside it, and one of them is chosen."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import reference
import tiny_models
import torch
import transformers as tf
import yaml
from cases import Case, files_in, report_of, weights_in, write_case
from safetensors import safe_open
from safetensors.torch import load_file
from tokenized import ENGLISH, train
from transformers import PreTrainedModel
from transformers.utils import logging

import largemerge
from largemerge import LargemergeError
from largemerge.output import OutputFolder

TEXT = tiny_models.TEXT | {"intermediate_size": 24, "max_position_embeddings": 64, "num_hidden_layers": 2}
VISION = tiny_models.VISION | {"num_hidden_layers": 2}


def _clip() -> tf.CLIPConfig:
    text = TEXT | {"max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    return tf.CLIPConfig(text_config=text, vision_config=dict(VISION), projection_dim=8)


CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "Bert": lambda: tf.BertConfig(**TEXT),
    "Roberta": lambda: tf.RobertaConfig(**TEXT, pad_token_id=0),
    "DistilBert": lambda: tf.DistilBertConfig(vocab_size=64, dim=16, hidden_dim=24, n_layers=2, n_heads=4),
    "Llama": lambda: tf.LlamaConfig(**(tiny_models.LLM | {"num_hidden_layers": 2})),
    "ViT": lambda: tf.ViTConfig(**VISION),
    "CLIP": _clip,
}


def classifier(class_name: str, labels: int | list[str], seed: int) -> PreTrainedModel:
    """A fine-tuned model: its body is near that of others, its head is its own."""
    model_class = getattr(tf, class_name)
    config = CONFIGS[class_name.split("For")[0].removesuffix("Model")]()
    names = [f"LABEL_{number}" for number in range(labels)] if isinstance(labels, int) else labels
    config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    torch.manual_seed(0)
    body = tf.AutoModel.from_config(config) if class_name[:4] != "CLIP" else tf.CLIPVisionModel(config.vision_config)
    torch.manual_seed(100 + seed)
    model = model_class(config).eval()
    inner = model.base_model if model.base_model is not model else getattr(model, "vision_model", model)
    inner.load_state_dict(body.state_dict(), strict=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def heads_case(folder: Path, *models: PreTrainedModel, base: PreTrainedModel | None = None, **config: Any) -> Case:
    kind = "vision" if hasattr(models[0].config, "vision_config") or hasattr(models[0].config, "image_size") else "text"
    inputs = [tiny_models.inputs(kind, 6, index, "none") for index in range(len(models))]
    case = write_case(folder, list(models), inputs, method=config.pop("method", "regmean"))
    if base is not None:
        base.save_pretrained(folder / "base")
        case.config["base_model"] = str(folder / "base")
    case.config |= config
    return case


def load_clean(out: Path, auto: Any = tf.AutoModel) -> PreTrainedModel:
    model, info = auto.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    return model.base_model if model.base_model is not model else getattr(model, "vision_model", model)


def expected_body(case: Case) -> dict[str, torch.Tensor]:
    """The bodies, merged by the dense reference."""
    bodies = [body_of(model) for model in case.models]
    merged = reference.merge(case.config["merge_method"], bodies, case.inputs, case.weights)
    return {name: tensor for name, tensor in merged.state_dict().items() if ".pooler." not in f".{name}"}


def assert_body(found: PreTrainedModel, expected: dict[str, torch.Tensor]) -> None:
    state = body_of(found).state_dict()
    for name, tensor in expected.items():
        error = (state[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-12)
        assert error < 1e-4, (name, error)


def card_code(out: Path, name: str) -> PreTrainedModel:
    """Runs what the model card says about loading one head."""
    card = (out / "README.md").read_text()
    (code,) = [text for text in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "heads" in text]
    code = code.replace("path/to/this/folder", str(out)).replace('name = "', 'name = "', 1)
    code = re.sub(r'(folder, name = "[^"]*"), "[^"]*"', rf'\1, "{name}"', code)
    script = out.with_name("from_the_card.py")
    script.write_text(code)
    logging.disable_progress_bar()
    model: PreTrainedModel = runpy.run_path(str(script))["model"]
    return model


KINDS = [
    ("BertForTokenClassification", "regmean"),
    ("RobertaForSequenceClassification", "regmean_plusplus"),
    ("DistilBertForSequenceClassification", "regmean"),
    ("LlamaForSequenceClassification", "regmean_plusplus"),
    ("ViTForImageClassification", "regmean"),
    ("CLIPForImageClassification", "regmean_plusplus"),
]


@pytest.mark.parametrize(("class_name", "method"), KINDS)
def test_bodies_of_models_with_other_numbers_of_labels_are_merged(tmp_path: Path, class_name: str, method: str) -> None:
    case = heads_case(tmp_path, classifier(class_name, 2, 1), classifier(class_name, ["a", "b", "c"], 2), method=method)
    largemerge.merge(case.config, tmp_path / "out")
    merged = load_clean(tmp_path / "out")
    assert type(merged) is type(body_of(case.models[0]))
    expected = expected_body(case)
    assert_body(merged, expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(merged).__name__] and not {"id2label", "num_labels"} & set(config)
    for name, model in zip(("model0", "model1"), case.models, strict=True):
        whole = card_code(tmp_path / "out", name)
        assert type(whole) is type(model) and whole.config.id2label == model.config.id2label
        assert_body(whole, expected)
        body = {id(tensor) for tensor in body_of(model).state_dict(keep_vars=True).values()}
        own = {key: value for key, value in model.state_dict(keep_vars=True).items() if id(value) not in body}
        assert own and set(load_file(tmp_path / "out" / "heads" / f"{name}.safetensors")) == set(own)
        assert all(torch.equal(whole.state_dict()[key], value) for key, value in own.items())
    report = report_of(tmp_path / "out")["plan"]["heads"]
    assert report["in_the_model"] == "none"
    assert [entry["labels"] for entry in report["beside_it"].values()] == [["LABEL_0", "LABEL_1"], ["a", "b", "c"]]


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "ViTForImageClassification"])
def test_bodies_are_calibrated_and_poolers_with_them(tmp_path: Path, class_name: str) -> None:
    """Heads with other labels stay beside the merge; what all bodies have after their blocks is solved."""
    two, three = classifier(class_name, 2, 1), classifier(class_name, ["a", "b", "c"], 2)
    case = heads_case(tmp_path, two, three, method="calibrated")
    report = largemerge.merge(case.config, tmp_path / "out")
    load_clean(tmp_path / "out")
    assert ("pooler.dense.weight" in report.linears) == class_name.startswith("Bert")
    assert report.plan.heads is not None and not any("classifier" in name for name in report.linears)
    for name in ("model0", "model1"):
        card_code(tmp_path / "out", name)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("method", ["calibrated", "regmean"])
@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "ViTForImageClassification"])
def test_one_head_goes_into_a_model_whose_pooler_is_solved(
    tmp_path: Path, class_name: str, method: str, with_base: bool
) -> None:
    """Other models' heads are not looked for where nobody reads them."""
    models = [classifier(class_name, 2, seed) for seed in (1, 2)]
    base = classifier(class_name, ["a", "b", "c"], 3) if with_base else None
    case = heads_case(tmp_path, *models, base=base, head="model1", method=method)
    case.config["parameters"] = {"solve": ["blocks", "head"], **({"anchor": "base"} if with_base else {})}
    report = largemerge.merge(case.config, tmp_path / "out")
    merged = load_clean(tmp_path / "out", type(case.models[1]))
    assert torch.equal(merged.classifier.weight, case.models[1].classifier.weight)
    assert ("bert.pooler.dense.weight" in report.linears) == class_name.startswith("Bert")


def test_a_base_without_the_head_that_is_pulled_to_it_is_refused(tmp_path: Path) -> None:
    models = [classifier("BertForSequenceClassification", 2, seed) for seed in (1, 2)]
    case = heads_case(tmp_path, *models, base=body_of(models[0]), method="calibrated")
    case.config["parameters"] = {"anchor": "base"}
    problems = largemerge.plan(case.config).problems
    assert len(problems) == 1 and "classifier.weight" in problems[0] and "'anchor: base' pulls" in problems[0], problems
    case.config["parameters"] = {"anchor": "base", "solve": ["blocks"]}
    largemerge.merge(case.config, tmp_path / "out")


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "CLIPForImageClassification"])
def test_one_head_goes_into_the_model(tmp_path: Path, class_name: str) -> None:
    case = heads_case(tmp_path, classifier(class_name, 2, 1), classifier(class_name, ["a", "b", "c"], 2), head="model1")
    largemerge.merge(case.config, tmp_path / "out")
    merged = load_clean(tmp_path / "out", type(case.models[1]))
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"} and merged.config.architectures == [class_name]
    assert_body(merged, expected_body(case))
    assert torch.equal(merged.classifier.weight, case.models[1].classifier.weight)
    assert torch.equal(card_code(tmp_path / "out", "model0").classifier.weight, case.models[0].classifier.weight)
    plan = largemerge.plan(case.config, probe=False)
    assert [each.rule.value for each in plan.non_block if each.name.startswith("classifier")] == ["head", "head"]  # type: ignore[union-attr]


def test_a_missing_pooler_comes_from_the_base_or_is_told(tmp_path: Path) -> None:
    """A RoBERTa classifier has no pooler, RobertaModel has: it must load, and nobody may take it for a trained one."""
    names = ("RobertaForSequenceClassification", "RobertaForTokenClassification")
    base = classifier("RobertaModel", 2, 3)
    models = [classifier(names[0], 2, 1), classifier(names[1], 5, 2)]
    case = heads_case(tmp_path, *models, base=base)
    largemerge.merge(case.config, tmp_path / "with")
    assert torch.equal(load_clean(tmp_path / "with").pooler.dense.weight, base.pooler.dense.weight)
    del case.config["base_model"]
    plan = largemerge.plan(case.config, probe=False)
    assert "not trained" in json.dumps(plan.to_json()["not_solved"]["pooler.dense.weight"])
    for out in ("without", "again"):
        largemerge.merge(case.config, tmp_path / out)
    assert load_clean(tmp_path / "without").pooler.dense.weight.std() > 0.005
    assert weights_in(tmp_path / "without").keys() == weights_in(tmp_path / "again").keys()
    assert (tmp_path / "without" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_heads_of_other_classes_share_a_body(tmp_path: Path) -> None:
    """The pooler is the body's; only one of the two classes has it."""
    models = [classifier("BertForTokenClassification", 5, 1), classifier("BertForSequenceClassification", 2, 2)]
    case = heads_case(tmp_path, *models)
    largemerge.merge(case.config, tmp_path / "none")
    merged = load_clean(tmp_path / "none")
    assert_body(merged, expected_body(heads_case(tmp_path / "same", *models)))
    assert torch.equal(merged.pooler.dense.weight, models[1].bert.pooler.dense.weight)
    reason = largemerge.plan(case.config, probe=False).to_json()["not_solved"]["pooler.dense.weight"]["reason"]
    assert "only model1 has it" in reason
    for index, model in enumerate(models):
        case.config["head"] = f"model{index}"
        out = tmp_path / f"head{index}"
        largemerge.merge(case.config, out)
        chosen = load_clean(out, type(model))
        assert torch.equal(chosen.classifier.weight, model.classifier.weight)
        other = card_code(out, f"model{1 - index}")
        assert torch.equal(other.classifier.weight, models[1 - index].classifier.weight)
        pooler = next(each for each in (chosen, other) if each.bert.pooler is not None).bert.pooler.dense.weight
        assert torch.equal(pooler, models[1].bert.pooler.dense.weight)


def test_labels_decide_where_shapes_are_equal(tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    same = heads_case(tmp_path / "same", classifier(name, ["no", "yes"], 1), classifier(name, ["no", "yes"], 2))
    largemerge.merge(same.config, tmp_path / "merged")
    merged = load_clean(tmp_path / "merged", tf.BertForSequenceClassification)
    mean = sum(model.classifier.weight for model in same.models) / 2
    assert torch.allclose(merged.classifier.weight, mean, atol=1e-6)
    assert not (tmp_path / "merged" / "heads").exists()
    other = heads_case(tmp_path / "other", classifier(name, ["no", "yes"], 1), classifier(name, ["yes", "no"], 2))
    plan = largemerge.plan(other.config, probe=False).to_json()["heads"]
    assert plan["in_the_model"] == "none" and "no, yes" in plan["reason"] and "yes, no" in plan["reason"]
    made_up = heads_case(tmp_path / "made_up", classifier(name, 2, 1), classifier(name, 2, 2))
    assert any("LABEL_0, LABEL_1" in note and "head: none" in note for note in largemerge.plan(made_up.config).notes)  # type: ignore[union-attr]


def test_the_base_has_the_head(tmp_path: Path) -> None:
    """Chosen, or where it fits all candidates, or where the heads are excluded and the base has one."""
    name = "BertForSequenceClassification"
    base = classifier(name, ["x", "y"], 3)
    fits = heads_case(tmp_path / "fits", classifier(name, ["n", "y"], 1), classifier(name, ["y", "n"], 2), base=base)
    largemerge.merge(fits.config, tmp_path / "out")
    merged = load_clean(tmp_path / "out", tf.BertForSequenceClassification)
    assert torch.equal(merged.classifier.weight, base.classifier.weight) and merged.config.id2label == {0: "x", 1: "y"}
    other = heads_case(tmp_path / "other", classifier(name, 2, 1), classifier(name, 3, 2), base=base)
    for settings, expected in (
        ({}, "none"),
        ({"head": "base"}, "base"),
        ({"parameters": {"exclude": ["classif"]}}, "base"),
    ):
        plan = largemerge.plan(other.config | settings, probe=False).to_json()
        assert plan["heads"]["in_the_model"] == expected, settings


def test_excluded_heads_do_not_lead_in_a_circle(tmp_path: Path) -> None:
    """Neither without a base, nor with one that has another head."""
    torch.manual_seed(0)
    base = tf.BertForMaskedLM(tf.BertConfig(**TEXT))
    name = "BertForSequenceClassification"
    case = heads_case(tmp_path, classifier(name, 2, 1), classifier(name, 3, 2), base=base)
    case.config["parameters"] = {"exclude": ["classifier"]}
    largemerge.merge(case.config, tmp_path / "with")
    load_clean(tmp_path / "with")
    plan = largemerge.plan(case.config | {"base_model": None}, probe=False)
    assert plan.problems == () and not any("matches no tensor" in note for note in plan.notes)  # type: ignore[union-attr]
    case.config["head"] = "base"
    largemerge.merge(case.config, tmp_path / "masked")
    merged = load_clean(tmp_path / "masked", tf.BertForMaskedLM)
    found = merged.cls.predictions.transform.dense.weight
    assert torch.equal(found, base.cls.predictions.transform.dense.weight)


@pytest.mark.parametrize(
    ("head", "mentions"),
    [("model9", "no candidate's name"), ("base", "needs a 'base_model'"), ("nonne", "did you mean 'none'")],
)
def test_heads_that_nobody_has_are_refused(tmp_path: Path, head: str, mentions: str) -> None:
    name = "BertForSequenceClassification"
    case = heads_case(tmp_path, classifier(name, 2, 1), classifier(name, 3, 2), head=head)
    with pytest.raises(LargemergeError, match=mentions):
        largemerge.merge(case.config, tmp_path / "out")


def test_bodies_under_other_names_are_refused(tmp_path: Path) -> None:
    models = [classifier("LlamaForSequenceClassification", 2, 1), classifier("LlamaForQuestionAnswering", 2, 2)]
    case = heads_case(tmp_path, *models)
    with pytest.raises(LargemergeError, match=r"keeps its body under 'transformer'.*LlamaModel") as caught:
        largemerge.plan(case.config, probe=False)
    assert len(caught.value.problems) == 1


def test_language_models_have_no_head_to_choose(tmp_path: Path) -> None:
    models = [tiny_models.perturbed("llama", index) for index in range(2)]
    case = write_case(tmp_path, models, [tiny_models.inputs("text", 4, index) for index in range(2)])
    with pytest.raises(LargemergeError, match="output embeddings"):
        largemerge.merge(case.config | {"head": "model0"}, tmp_path / "out")


def test_heads_are_written_after_a_crash_and_replaced_with_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an unbroken run writes, and nothing of an earlier merge."""
    name = "BertForSequenceClassification"
    case = heads_case(tmp_path, classifier(name, 2, 1), classifier(name, 3, 2))
    largemerge.merge(case.config, tmp_path / "whole", max_shard_bytes=20_000)

    def crash(self: OutputFolder, *args: Any) -> None:
        args[1](self.path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "finish", crash)
        with pytest.raises(KeyboardInterrupt):
            largemerge.merge(case.config, tmp_path / "out", max_shard_bytes=20_000)
    largemerge.merge(case.config, tmp_path / "out", max_shard_bytes=20_000, resume=True)
    whole, out = files_in(tmp_path / "whole"), files_in(tmp_path / "out")
    assert whole.keys() == out.keys() and len([file for file in whole if file.startswith("model-")]) > 1
    assert all(whole[file] == out[file] for file in whole if file.endswith(".safetensors"))
    case.config["models"][1]["name"] = "other"
    largemerge.merge(case.config, tmp_path / "out", force=True)
    assert {path.name for path in (tmp_path / "out" / "heads").iterdir()} == {"model0.safetensors", "other.safetensors"}
    with safe_open(tmp_path / "out" / "heads" / "other.safetensors", "pt") as file:
        about = file.metadata()
    assert about["class"] == name and json.loads(about["labels"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    case.config["head"] = "other"
    with pytest.raises(LargemergeError, match="head"):
        largemerge.merge(yaml.safe_load(yaml.safe_dump(case.config)), tmp_path / "whole", resume=True)


def test_glue_runs_as_it_is_shipped(tmp_path: Path) -> None:
    """Eight tasks with 1, 2 and 3 labels, a base with a language model's head, texts through a tokenizer."""
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / "glue-regmean.yaml").read_text())
    text = tf.PreTrainedTokenizerFast(
        tokenizer_object=train("WordPiece", ENGLISH, 60), pad_token="<unk>", unk_token="<unk>"
    )
    columns = ("sentence", "sentence1", "sentence2", "question", "question1", "question2", "premise", "hypothesis")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(dict.fromkeys(columns, line)) + "\n" for line in ENGLISH))
    torch.manual_seed(0)
    base = tf.BertForPreTraining(tf.BertConfig(**TEXT))
    base.save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings | {"architectures": ["BertForMaskedLM"]}))
    text.save_pretrained(tmp_path / "base")
    config["base_model"] = str(tmp_path / "base")
    labels = {"stsb": 1, "mnli": 3}
    for seed, entry in enumerate(config["models"]):
        folder = tmp_path / entry["name"]
        classifier("BertForSequenceClassification", labels.get(entry["name"], 2), seed).save_pretrained(folder)
        text.save_pretrained(folder)
        fields = {key: value for key, value in entry["calibration"].items() if key.startswith("text")}
        entry |= {"model": str(folder), "calibration": {"data": str(tmp_path / "data.jsonl"), **fields}}
    largemerge.merge(config, tmp_path / "out")
    load_clean(tmp_path / "out")
    heads = {path.stem: load_file(path) for path in (tmp_path / "out" / "heads").iterdir()}
    assert heads.keys() == {entry["name"] for entry in config["models"]}
    assert {name: len(head["classifier.bias"]) for name, head in heads.items()} == {
        name: labels.get(name, 2) for name in heads
    }


def test_an_adapter_brings_a_head_of_its_own(tmp_path: Path) -> None:
    """As PEFT saves it beside a LoRA: the model's config knows nothing of its number of labels."""
    name = "BertForSequenceClassification"
    model = classifier(name, 2, 1)
    case = heads_case(tmp_path, model, model, head="more")
    for label, size in (("less", 2), ("more", 3)):
        peft_model = peft.get_peft_model(
            classifier(name, size, size), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        )
        peft_model.save_pretrained(tmp_path / label)
    for entry, label in zip(case.config["models"], ("less", "more"), strict=True):
        entry |= {"model": f"{tmp_path / 'model0'}+{tmp_path / label}", "name": label}
    largemerge.merge(case.config, tmp_path / "out")
    merged = load_clean(tmp_path / "out", tf.BertForSequenceClassification)
    saved = load_file(tmp_path / "more" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert merged.config.num_labels == 3 and torch.equal(merged.classifier.weight, saved)
    assert len(load_file(tmp_path / "out" / "heads" / "less.safetensors")["classifier.weight"]) == 2
