"""What users have on disk, and what came out wrong or late: labels in another order, ties, heads, lengths, splits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from task_models import (
    TEXTS,
    enlarge,
    tokenizer,
    write_bert,
    write_clip,
    write_images,
    write_jsonl,
    write_language_model,
    write_texts,
)

import largemerge


def evaluate(task: dict[str, Any], *models: Path, **more: Any) -> Any:
    return largemerge.evaluate({"tasks": [{"name": "task", **task}], **more}, list(models))


def bert_with_labels(folder: Path, labels: tuple[str, ...]) -> list[int]:
    """Saves a classifier with named labels; returns what it predicts for the texts."""
    model = write_bert(folder, len(labels))
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}
    model.save_pretrained(folder)
    fast = tf.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [int(model(**fast(text, return_tensors="pt")).logits.argmax()) for text in TEXTS]


def class_labels(path: Path, names: tuple[str, ...], labels: list[str]) -> str:
    """Writes texts whose labels are numbers of these names."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
    rows = {"text": TEXTS, "label": [names.index(label) for label in labels]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return str(path)


def test_labels_mean_their_names_whatever_their_order(tmp_path: Path) -> None:
    own = ("negative", "neutral", "positive")
    found = bert_with_labels(tmp_path / "bert", own)
    truth = [own[(number + (place == 0)) % 3] for place, number in enumerate(found)]  # the first is wrong
    data = class_labels(tmp_path / "d.parquet", ("positive", "negative", "neutral"), truth)
    score = evaluate({"kind": "text_classification", "data": data}, tmp_path / "bert").score("bert", "task")
    assert score.value == pytest.approx(1 - 1 / len(TEXTS))
    half = class_labels(tmp_path / "h.parquet", ("positive", "negative", "mixed"), ["positive"] * len(TEXTS))
    with pytest.raises(largemerge.LargemergeError, match="label 0 of 'label' is 'positive', which is class 2 of"):
        evaluate({"kind": "text_classification", "data": half}, tmp_path / "bert")


def test_a_name_that_two_classes_have_tells_none(tmp_path: Path) -> None:
    bert_with_labels(tmp_path / "bert", ("a", "crane", "crane"))
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": text, "label": "crane"} for text in TEXTS])
    with pytest.raises(largemerge.LargemergeError, match="has 'crane' twice"):
        evaluate({"kind": "text_classification", "data": data}, tmp_path / "bert")


def test_a_collapsed_model_finds_nothing(tmp_path: Path) -> None:
    write_language_model(tmp_path / "model")  # all texts begin with <s>, whose state nothing before it changes
    rows = [{"query": a, "passage": b} for a, b in zip(TEXTS[:4], TEXTS[4:], strict=True)]
    task = {"kind": "retrieval", "data": write_jsonl(tmp_path / "d.jsonl", rows), "pooling": "cls"}
    score = evaluate(task, tmp_path / "model").score("model", "task")
    assert score.metrics["recall@1"] == 0 and score.metrics["mrr@10"] == pytest.approx(0.25)


def test_a_head_is_left_out_where_vectors_are_made(tmp_path: Path) -> None:
    write_bert(tmp_path / "whole", 2)
    write_bert(tmp_path / "body", 2, tf.BertModel)
    tf.AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "body")
    rows = [{"query": a, "passage": b} for a, b in zip(TEXTS[:4], TEXTS[4:], strict=True)]
    task = {"kind": "retrieval", "data": write_jsonl(tmp_path / "d.jsonl", rows), "pooling": "mean"}
    found = evaluate(task, tmp_path / "whole", tmp_path / "body")
    assert found.score("whole", "task").metrics == found.score("body", "task").metrics


def test_heads_are_measured_with_the_models_that_have_them(tmp_path: Path) -> None:
    tasks = []
    write_bert(tmp_path / "body", 2, tf.BertModel)
    for name, count in {"sst2": 2, "mnli": 3}.items():
        write_bert(tmp_path / name, count)
        rows = [{"text": text, "label": number % count} for number, text in enumerate(TEXTS)]
        tasks.append(
            {
                "name": f"{name} task",
                "kind": "text_classification",
                "head": name,
                "expert": str(tmp_path / name),
                "data": write_jsonl(tmp_path / f"{name}.jsonl", rows),
            }
        )
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("sst2", "mnli")]
    seen: list[Any] = []
    config = {"merge_method": "task_arithmetic", "models": models, "base_model": str(tmp_path / "body")}
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"query": text, "passage": text} for text in TEXTS])
    tasks.append({"name": "vectors", "kind": "retrieval", "data": pairs, "pooling": "mean"})
    (tmp_path / "eval.json.yaml").write_text(json.dumps({"tasks": tasks}))  # beside folders called like the heads
    largemerge.merge(config, tmp_path / "merged", evaluate=tmp_path / "eval.json.yaml", evaluated=seen.append)
    (found,) = seen
    assert not found.problems
    assert {(score.model, score.task) for score in found.scores} == {
        ("sst2", "sst2 task"),
        ("mnli", "mnli task"),
        ("merged", "sst2 task"),
        ("merged", "mnli task"),
        *((model, "vectors") for model in ("base", "sst2", "mnli", "merged")),
    }
    assert set(found.notes) == {
        "task 'sst2 task': base has no head 'sst2'; it is not measured there",
        "task 'mnli task': base has no head 'mnli'; it is not measured there",
        "task 'mnli task': sst2 has a head of its own, not the one that is named; it is not measured there",
        "task 'sst2 task': mnli has a head of its own, not the one that is named; it is not measured there",
    }
    assert found.rows()[1][0][:3] == ["base (base)", "", ""]
    assert found.score("merged", "mnli task").normalized is not None
    evaluation = {"tasks": tasks[:1], "base": str(tmp_path / "merged")}  # a base that has heads, but not this one
    (tmp_path / "merged" / "heads" / "sst2.safetensors").unlink()
    found = largemerge.evaluate(evaluation, tmp_path / "sst2")
    assert found.notes == ("task 'sst2 task': base has no head 'sst2'; it is not measured there",)
    alone = {"tasks": [{**tasks[0], "expert": None}]}
    with pytest.raises(largemerge.LargemergeError, match=r"no model has the head 'sst2'; expected a merge that has"):
        largemerge.evaluate(alone, tmp_path / "body")
    alone["tasks"][0]["expert"] = str(tmp_path / "body")
    with pytest.raises(largemerge.LargemergeError, match=r"body: no head 'sst2': it is not .*no merge has kept heads"):
        largemerge.evaluate(alone, tmp_path / "body")


@pytest.mark.parametrize("kind", ["language_model", "generation"])
def test_texts_beyond_the_models_positions_are_told_before(tmp_path: Path, kind: str) -> None:
    write_language_model(tmp_path / "model", "gpt2")
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": " ".join(TEXTS * 3), "answer": "a"}])
    task = {"kind": kind, "data": data} | ({"prompt": "{text}"} if kind == "generation" else {})
    with pytest.raises(largemerge.LargemergeError, match="model has 64 positions; expected 'max_length: 64' or less"):
        evaluate(task, tmp_path / "model")
    if kind == "language_model":
        assert evaluate(task, tmp_path / "model", max_length=64).score("model", "task").value > 0


def test_a_sample_without_tokens_that_count_spoils_no_interval(tmp_path: Path) -> None:
    write_language_model(tmp_path / "model")
    fast = tokenizer()
    rows = [
        {"text": text, "mask": [int(number > 0)] * len(fast(text)["input_ids"])}
        for number, text in enumerate(TEXTS[:2])
    ]
    task = {"kind": "language_model", "data": write_jsonl(tmp_path / "d.jsonl", rows), "loss_mask_field": "mask"}
    score = evaluate(task | {"text_field": "text"}, tmp_path / "model").score("model", "task")
    assert all(math.isfinite(end) for end in score.interval)


def test_one_folder_under_two_names_is_measured_twice_or_refused(tmp_path: Path) -> None:
    write_language_model(tmp_path / "model")
    task = {"kind": "language_model", "data": write_texts(tmp_path / "d.jsonl")}
    config = {"tasks": [{"name": "task", **task}], "base": str(tmp_path / "model")}
    found = largemerge.evaluate(config, {"a": tmp_path / "model", "b": tmp_path / "model"})
    assert found.score("a", "task").metrics == found.score("b", "task").metrics
    with pytest.raises(largemerge.LargemergeError, match="stands twice"):
        largemerge.evaluate(config, [tmp_path / "model", f"{tmp_path}/./model"])


def test_a_text_tower_that_fails_loses_its_own_task_only(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 300
    broken = tf.CLIPModel.from_pretrained(tmp_path / "clip")
    with torch.no_grad():
        broken.text_projection.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "broken" / name).write_bytes((tmp_path / "clip" / name).read_bytes())
    own = tmp_path / "classes.yaml"
    own.write_text(json.dumps({"class_names": ["the end", "models"], "templates": ["{}"]}))
    task = {"kind": "zero_shot", "data": write_images(tmp_path / "images", ["0", "1"], 2), "classes": str(own)}
    tasks = [{"name": "bad", "text_model": str(tmp_path / "broken"), **task}, {"name": "good", **task}]
    tf.CLIPModel.from_pretrained(tmp_path / "clip").save_pretrained(tmp_path / "twin")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "twin" / name).write_bytes((tmp_path / "clip" / name).read_bytes())
    found = largemerge.evaluate({"tasks": tasks}, [tmp_path / "clip", tmp_path / "twin"])
    assert all(found.score(model, "bad").error for model in ("clip", "twin"))
    assert all(found.score(model, "good").value is not None for model in ("clip", "twin"))


def test_splits_are_found_or_asked_for(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert", 2)
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 5), ("test", 3)):
        write_jsonl(folder / f"{split}.jsonl", [{"text": text, "label": 0} for text in TEXTS[:count]])
    task = {"kind": "text_classification", "data": str(folder)}
    assert evaluate(task, tmp_path / "bert").score("bert", "task").num_samples == 3
    (folder / "test.jsonl").unlink()
    assert evaluate(task, tmp_path / "bert").score("bert", "task").num_samples == 5
    write_clip(tmp_path / "clip")
    for split in ("train", "test"):
        write_images(tmp_path / "images" / split, ["0", "1"], 1)
    task = {"kind": "zero_shot", "data": str(tmp_path / "images"), "classes": "cifar10"}
    with pytest.raises(largemerge.LargemergeError, match=r"holds test and train, of which .*, or 'split: test'"):
        evaluate(task, tmp_path / "clip")
    (tmp_path / "images" / "train" / "extra.png").write_bytes(b"no image, but of another split")
    found = evaluate({**task, "split": "test"}, tmp_path / "clip")
    assert not found.problems and found.score("clip", "task").num_samples == 2
    write_images(tmp_path / "beside" / "test", ["0", "1"], 1)
    write_images(tmp_path / "beside" / "extra", ["0", "1"], 1)
    beside = evaluate({**task, "data": str(tmp_path / "beside"), "split": "test"}, tmp_path / "clip")
    assert not beside.problems and beside.score("clip", "task").num_samples == 2
    (tmp_path / "images" / "extra").mkdir()
    for split, said in {"extra": f"and name the folder {tmp_path / 'images' / 'extra'}", "val": "test, train$"}.items():
        with pytest.raises(largemerge.LargemergeError, match=f"'{split}' is none of the folder's splits; .*{said}"):
            evaluate({**task, "split": split}, tmp_path / "clip")


def test_shares_are_of_experts_alone_and_above_zero(tmp_path: Path) -> None:
    write_language_model(tmp_path / "a")
    write_language_model(tmp_path / "b", seed=1)
    data = write_texts(tmp_path / "d.jsonl")
    tasks = [
        {"name": "with", "kind": "language_model", "data": data, "expert": str(tmp_path / "a")},
        {"name": "without", "kind": "language_model", "data": data},
    ]
    found = largemerge.evaluate({"tasks": tasks}, [tmp_path / "a", tmp_path / "b"])
    assert found.score("b", "with").normalized is not None and found.average("b") is None
    write_bert(tmp_path / "bert", 1)
    write_bert(tmp_path / "other", 1)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    fast = tf.AutoTokenizer.from_pretrained(tmp_path / "bert")
    with torch.no_grad():
        outputs = [float(model(**fast(text, return_tensors="pt")).logits) for text in TEXTS]
    rows = [{"text": text, "label": -value} for text, value in zip(TEXTS, outputs, strict=True)]
    task = {"kind": "text_classification", "metric": "spearman", "data": write_jsonl(tmp_path / "s.jsonl", rows)}
    enlarge(model)
    model.save_pretrained(tmp_path / "other")
    found = evaluate(task | {"expert": str(tmp_path / "bert")}, tmp_path / "bert", tmp_path / "other")
    assert found.score("bert", "task").value == pytest.approx(-1)
    assert found.score("other", "task").normalized is None and found.average("other") is None


MISTAKES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "no room for the prompt": (
        {"kind": "generation", "prompt": "{text}", "max_new_tokens": 16, "max_length": 10},
        [{"text": "a", "answer": "b"}],
        "leaves nothing of max_length",
    ),
    "an empty stop": (
        {"kind": "generation", "prompt": "{text}", "stop": [""]},
        [{"text": "a", "answer": "b"}],
        r"tasks\[0\]\.stop",
    ),
    "no answer": ({"kind": "generation", "prompt": "{text}"}, [{"text": "a", "answer": []}], "'answer' is empty"),
    "no conversation": (
        {"kind": "generation", "messages_field": "chat"},
        [{"chat": ["x"], "answer": "b"}],
        "no chat template|expected a list",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_questions(tmp_path: Path, mistake: str) -> None:
    task, rows, said = MISTAKES[mistake]
    write_language_model(tmp_path / "model")
    with pytest.raises(largemerge.LargemergeError, match=said):
        evaluate(task | {"data": write_jsonl(tmp_path / "d.jsonl", rows)}, tmp_path / "model")


def test_mistakes_of_models_and_of_data_are_told_at_once(tmp_path: Path) -> None:
    write_language_model(tmp_path / "model")
    with pytest.raises(largemerge.LargemergeError) as raised:
        evaluate({"kind": "language_model", "data": "nowhere.jsonl"}, tmp_path / "model", tmp_path / "missing")
    assert "nowhere.jsonl" in str(raised.value) and "missing" in str(raised.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(largemerge.LargemergeError, match=r"--out .*file.*: expected a folder"):
        largemerge.evaluate({"tasks": []}, [tmp_path / "model"], out=tmp_path / "file")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(largemerge.LargemergeError, match="expected keys such as 'tasks'"):
        largemerge.evaluate(tmp_path / "empty.yaml", [tmp_path / "model"])


def test_scores_must_be_numbers_and_several(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert", 2, tf.BertModel)
    rows = [{"sentence1": a, "sentence2": a, "score": score} for a, score in zip(TEXTS, [0.5, None, 0.1], strict=False)]
    task = {"kind": "similarity", "pooling": "mean", "data": write_jsonl(tmp_path / "d.jsonl", rows)}
    with pytest.raises(largemerge.LargemergeError, match="row 1: 'score': expected a"):
        evaluate(task, tmp_path / "bert")
    with pytest.raises(largemerge.LargemergeError, match="has one sample"):
        evaluate(task | {"num_samples": 1, "data": write_jsonl(tmp_path / "e.jsonl", rows[:1])}, tmp_path / "bert")


def test_a_correlation_with_constant_scores_fails_alone(tmp_path: Path) -> None:
    for name in ("fine", "flat"):
        model = write_bert(tmp_path / name, 1)
        if name == "flat":
            with torch.no_grad():
                model.classifier.weight.zero_()
                model.classifier.bias.fill_(0.25)
            model.save_pretrained(tmp_path / name)
    rows = [{"text": text, "label": float(number)} for number, text in enumerate(TEXTS)]
    common = {"kind": "text_classification", "data": write_jsonl(tmp_path / "d.jsonl", rows)}
    tasks = [common | {"name": metric, "metric": metric} for metric in ("pearson", "spearman")]
    pairs = [{"sentence1": text, "sentence2": text, "score": number} for number, text in enumerate(TEXTS)]
    data = write_jsonl(tmp_path / "p.jsonl", pairs)
    tasks.append({"name": "same", "kind": "similarity", "pooling": "mean", "data": data})
    found = largemerge.evaluate({"tasks": tasks}, [tmp_path / "fine", tmp_path / "flat"])
    count = len(TEXTS)
    for metric in ("pearson", "spearman"):
        score = found.score("flat", metric)
        assert score.value is None and score.interval is None
        assert score.error == (
            f"there is no {metric} correlation: the model's scores are constant, 0.25 for all {count} samples"
        )
        assert found.score("fine", metric).value != 0
    for name in ("fine", "flat"):  # the cosine of a text and itself
        assert found.score(name, "same").error.endswith(f"are constant, 1 for all {count} samples")
    assert len(found.problems) == 4


def test_draws_without_a_correlation_are_left_out_of_its_interval(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert", 1)
    rows = [{"text": text, "label": number} for number, text in enumerate(TEXTS[:2])]
    task = {"kind": "text_classification", "metric": "pearson", "data": write_jsonl(tmp_path / "d.jsonl", rows)}
    score = evaluate(task, tmp_path / "bert").score("bert", "task")
    assert abs(score.value) == pytest.approx(1)
    assert score.interval == pytest.approx((score.value, score.value)), "a draw of one sample twice has none"


@pytest.mark.parametrize("kind", ["text_classification", "similarity"])
def test_constant_labels_are_told_before_any_model_is_read(tmp_path: Path, kind: str) -> None:
    write_bert(tmp_path / "bert", 1)
    rows = [{"text": text, "sentence1": text, "sentence2": "a", "label": 2, "score": 2} for text in TEXTS]
    task = {"kind": kind, "data": write_jsonl(tmp_path / "d.jsonl", rows)}
    task |= {"metric": "pearson"} if kind == "text_classification" else {"pooling": "mean"}
    with pytest.raises(largemerge.ConfigError, match=f"is 2 in all {len(TEXTS)} samples.*values that differ"):
        evaluate(task, tmp_path / "bert")
