"""`largemerge temperature`: what is written divides all logits of Transformers' own model by the temperature."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_models
import tiny_models
import torch
import transformers as tf
from cases import exit_code
from PIL import Image
from safetensors.torch import load_file
from task_models import (
    LABELS,
    TEXTS,
    write_clip,
    write_images,
    write_jsonl,
    write_language_model,
    write_processor,
    write_texts,
)

import largemerge
from largemerge import LargemergeError
from largemerge.data_free.config import evaluate
from largemerge.temperature.folding import scale_setting

BY_BLOCK = {"memory": {"host": 1}}


def language_task(tmp_path: Path, **more: Any) -> dict[str, Any]:
    data = write_texts(tmp_path / "texts.jsonl")
    return {"tasks": [{"name": "texts", "kind": "language_model", "data": data, **more}]}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {key for key in old if not torch.equal(old[key], new[key])}


def logits_of(folder: Path, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = tf.AutoModelForCausalLM.from_pretrained(folder)(**inputs).logits.double()
    return found


@pytest.fixture(scope="module")
def unsure(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Language models that have learned the texts a little, and are less sure of them than they could be, by name."""

    @cache
    def write(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture) / "model"
        model: Any = write_language_model(folder, architecture)
        encode = tf.AutoTokenizer.from_pretrained(folder)
        samples = [torch.tensor([encode(text)["input_ids"]]) for text in TEXTS[::2]]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(8.0 if parameter.dim() > 1 else 1.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(6):
            for ids in samples:
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            end = model.transformer.ln_f if model.config.tie_word_embeddings else model.lm_head
            for parameter in end.parameters():
                parameter.mul_(0.4)
        model.save_pretrained(folder)
        return folder

    return write


@pytest.mark.parametrize(
    ("architecture", "keys", "more"),
    [
        ("llama", {"lm_head.weight"}, {}),
        ("llama", {"lm_head.weight"}, BY_BLOCK),
        ("gpt2", {"transformer.ln_f.weight", "transformer.ln_f.bias"}, {}),
        pytest.param("gpt2", {"transformer.ln_f.weight", "transformer.ln_f.bias"}, BY_BLOCK, marks=pytest.mark.slow),
    ],
)
def test_logits_of_a_language_model_are_divided(
    architecture: str, keys: set[str], more: dict[str, Any], unsure: Callable[[str], Path], tmp_path: Path
) -> None:
    before, out = unsure(architecture), tmp_path / "out"
    report = largemerge.fit_temperature(language_task(tmp_path) | more, before, out)
    assert changed(before, out) == set(report.changed) == keys
    ids = torch.tensor([tf.AutoTokenizer.from_pretrained(before)(TEXTS[0])["input_ids"]])
    old, new = logits_of(before, input_ids=ids), logits_of(out, input_ids=ids)
    assert torch.allclose(new * report.temperature, old, atol=1e-4 * old.abs().max().item())
    task = report.tasks["texts"]
    assert report.losses == (task.before.loss, task.after.loss) and report.losses[1] < report.losses[0]
    assert task.num_changed == 0 and task.after.accuracy == task.before.accuracy
    # the losses are those that an evaluation measures, and no neighbouring temperature is better
    config = language_task(tmp_path)
    for folder, loss in ((before, task.before.loss), (out, task.after.loss)):
        score = largemerge.evaluate(config, folder).scores[0]
        assert score.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    if more:
        return
    again = largemerge.fit_temperature(config, out, tmp_path / "again")
    assert again.temperature == pytest.approx(1, abs=1e-4)
    written = json.loads((out / "temperature_report.json").read_text())
    assert written["temperature"] == report.temperature and written["tasks"]["texts"]["predictions_changed"] == 0
    assert largemerge.verify(out).problems == ()


def test_sixteen_bits(unsure: Callable[[str], Path], tmp_path: Path) -> None:
    before = Path(shutil.copytree(unsure("llama"), tmp_path / "model"))
    tf.AutoModelForCausalLM.from_pretrained(before).bfloat16().save_pretrained(before)
    report = largemerge.fit_temperature(language_task(tmp_path, num_samples=6), before, tmp_path / "out")
    assert report.losses[1] < report.losses[0] and report.tasks["texts"].after.accuracy > 0
    assert tensors(tmp_path / "out")["lm_head.weight"].dtype == torch.bfloat16
    assert "lm_head.weight ×" in str(report)


def as_predicted(folder: Path, chosen: list[int], names: list[str]) -> None:
    """Puts images into the folders of the classes that a model finds, two of three of them."""
    files = sorted(folder.glob("*/*.png"))
    places = {file: names[chosen[n] if n % 3 else (chosen[n] + 1) % len(names)] for n, file in enumerate(files)}
    for number, (file, name) in enumerate(places.items()):
        (folder / "sorted" / name).mkdir(parents=True, exist_ok=True)
        file.rename(folder / "sorted" / name / f"{number}.png")


def pixels_of(model: Path, folder: Path) -> torch.Tensor:
    processor = tf.AutoImageProcessor.from_pretrained(model, backend="pil")
    images = [Image.open(file).convert("RGB") for file in sorted(folder.glob("*/*.png"))]
    found: torch.Tensor = processor(images, return_tensors="pt")["pixel_values"]
    return found


def test_a_head_of_labels(tmp_path: Path) -> None:
    known = tiny_models.build("vit")
    known.config.id2label = dict(enumerate(LABELS))
    known.config.label2id = {label: number for number, label in enumerate(LABELS)}
    task_models.enlarge(known)
    with torch.no_grad():
        known.classifier.bias.normal_()
    known.save_pretrained(tmp_path / "vit")
    write_processor(tmp_path / "vit", known.config.image_size)
    images = Path(write_images(tmp_path / "images", LABELS, 6))
    with torch.no_grad():
        as_predicted(
            images, known(pixel_values=pixels_of(tmp_path / "vit", images)).logits.argmax(1).tolist(), [*LABELS]
        )
    tasks = [{"name": "a", "kind": "image_classification", "data": str(images / "sorted")}]
    report = largemerge.fit_temperature({"tasks": tasks}, tmp_path / "vit", tmp_path / "out")
    assert changed(tmp_path / "vit", tmp_path / "out") == {"classifier.weight", "classifier.bias"}
    task = report.tasks["a"]
    assert task.before.num_rows == 30 and task.num_changed == 0 and report.losses[1] < report.losses[0]
    assert task.before.accuracy == task.after.accuracy == pytest.approx(20 / 30)


def test_clip_changes_its_logit_scale(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    names = ["the end", "models", "print"]
    images = Path(write_images(tmp_path / "images", ["0", "1", "2"], 8))
    own = tmp_path / "classes.yaml"
    own.write_text(json.dumps({"class_names": names, "templates": ["the {}"]}), encoding="utf-8")
    tokens = task_models.tokenizer()([f"the {name}" for name in names], return_tensors="pt", padding=True)
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        cosines = clip(pixel_values=pixels_of(tmp_path / "clip", images), **tokens).logits_per_image
    as_predicted(images, cosines.argmax(1).tolist(), names)
    task = {"name": "zero", "kind": "zero_shot", "data": str(images / "sorted"), "classes": str(own)}
    report = largemerge.fit_temperature({"tasks": [task]}, tmp_path / "clip", tmp_path / "out")
    assert changed(tmp_path / "clip", tmp_path / "out") == {"logit_scale"}
    scale = tensors(tmp_path / "out")["logit_scale"].item()
    assert scale == pytest.approx(clip.logit_scale.item() - np.log(report.temperature), abs=1e-6)
    assert report.losses[1] < report.losses[0] and report.tasks["zero"].num_changed == 0
    with torch.no_grad():
        merged = tf.CLIPModel.from_pretrained(tmp_path / "out")
    assert merged.logit_scale.item() == pytest.approx(scale)


def test_what_is_left_out_is_told(unsure: Callable[[str], Path], tmp_path: Path) -> None:
    config = language_task(tmp_path)
    choice = {
        "name": "choice",
        "kind": "multiple_choice",
        "data": "nowhere.jsonl",
        "prompt": "{a}",
        "choices": ["b", "c"],
    }
    config["tasks"].append(choice)
    report = largemerge.fit_temperature(config, unsure("llama"), tmp_path / "out", limit=7)
    assert list(report.tasks) == ["texts"] and report.tasks["texts"].num_samples == 7
    assert any("task 'choice' is left out: multiple_choice has no likelihood" in note for note in report.notes)
    with pytest.raises(LargemergeError, match="tasks: none is left; expected one of kind language_model"):
        largemerge.fit_temperature({"tasks": [choice]}, unsure("llama"), tmp_path / "other")


def test_models_that_no_factor_tempers_are_refused(tmp_path: Path) -> None:
    write_language_model(tmp_path / "gemma2", "gemma2")
    config = tmp_path / "gemma2" / "config.json"
    with pytest.raises(LargemergeError, match="final_logit_softcapping is 30: logits pass through a tanh"):
        largemerge.fit_temperature(language_task(tmp_path), tmp_path / "gemma2", tmp_path / "out")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"final_logit_softcapping": None}))
    with pytest.raises(LargemergeError, match="multiplies by 1 \\+ its weight"):
        largemerge.fit_temperature(language_task(tmp_path), tmp_path / "gemma2", tmp_path / "out")
    write_language_model(tmp_path / "bart", "bart")  # whose last norm is inside its last block
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"text": text, "target": text} for text in TEXTS])
    task = {"name": "pairs", "kind": "language_model", "data": pairs, "target_field": "target"}
    with pytest.raises(LargemergeError, match="no norm runs between the blocks and it; untie the head first"):
        largemerge.fit_temperature({"tasks": [task]}, tmp_path / "bart", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_divided_are_noticed(
    unsure: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = tf.LlamaForCausalLM.forward

    def capped(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = 3 * (output.logits / 3).tanh()
        return output

    capped.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", capped)
    with pytest.raises(LargemergeError, match=r"logits are off by .*something else acts on them .*Nothing is written"):
        largemerge.fit_temperature(language_task(tmp_path), unsure("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_factors_are_for_single_tensors() -> None:
    keys = ["norm.weight", "layers.0.norm.weight", "norm.bias", "lm_head.weight"]
    setting = scale_setting({"norm.weight": 0.5, "norm.bias": 0.25}, dict.fromkeys(keys))
    assert [evaluate(setting, key, 0.0) for key in keys] == [0.5, 1.0, 0.25, 1.0]


def test_the_command_and_mistakes(
    unsure: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(unsure("llama"), tmp_path / "model")
    path = tmp_path / "held-out.yaml"
    path.write_text(json.dumps(language_task(tmp_path)))
    arguments = ("temperature", path, tmp_path / "model", tmp_path / "out")
    assert exit_code(*arguments, "--quiet", "--json", "--limit", "4") == 0
    assert set(json.loads(capsys.readouterr().out)["changed"]) == {"lm_head.weight"}
    assert exit_code(*arguments) == 2 and "is not empty" in capsys.readouterr().err
    assert exit_code(*arguments, "--force") == 0
    assert "temperature" in capsys.readouterr().err
    for wrong, expected in (
        ((path, tmp_path / "nowhere", tmp_path / "b"), "nowhere"),
        ((path, tmp_path / "model", tmp_path / "model"), "holds an input"),
        ((tmp_path / "none.yaml", tmp_path / "model", tmp_path / "b"), "none.yaml"),
        ((path, tmp_path / "model", tmp_path), "lies in the output folder"),
    ):
        assert exit_code("temperature", *wrong) == 2
        told = capsys.readouterr().err
        assert expected in told and "Traceback" not in told and not (tmp_path / "b").exists()
