"""Evaluations of tiny models, held against Transformers: whole, and block by block."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers as tf
from adapters import merged_by_peft, train_with_peft
from peft import LoraConfig
from PIL import Image
from task_models import (
    LABELS,
    TEXTS,
    enlarge,
    tokenizer,
    write_bert,
    write_clip,
    write_images,
    write_jsonl,
    write_language_model,
    write_processor,
    write_texts,
)

import largemerge

WAYS = {"whole": {}, "by block": {"memory": {"host": 1}}}
"""Settings with which a model is run whole, and block by block with hidden states on disk."""


def run(task: dict[str, Any], model: Path, way: str = "whole", **more: Any) -> Any:
    """Evaluates one model in one task; returns its score, after a look at how it was run."""
    config = {"tasks": [{"name": "task", **task}], **WAYS[way], **more}
    found = largemerge.evaluate(config, [model])
    assert not found.problems
    score = found.score(model.name, "task")
    assert score is not None and score.way == way
    return score


def plain_loss(model: tf.PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> tuple[float, int, int]:
    """Sum of the losses by Transformers' own labels, number of tokens, and how many were the likeliest."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
    wanted = labels[1:]
    chosen = wanted != -100
    loss = torch.nn.functional.cross_entropy(logits[chosen], wanted[chosen], reduction="sum")
    return float(loss), int(chosen.sum()), int((logits.argmax(-1)[chosen] == wanted[chosen]).sum())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral", "opt"])
def test_the_loss_is_that_of_transformers(tmp_path: Path, architecture: str, way: str) -> None:
    model = write_language_model(tmp_path / "model", architecture)
    fast = tokenizer()
    sums = [plain_loss(model, ids, ids) for text in TEXTS for ids in [torch.tensor(fast(text)["input_ids"])]]
    loss, tokens, right = (sum(part) for part in zip(*sums, strict=True))
    data = write_texts(tmp_path / "data.jsonl")
    score = run({"kind": "language_model", "data": data, "batch_size": 3}, tmp_path / "model", way)
    assert score.metrics["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert score.metrics["perplexity"] == pytest.approx(np.exp(loss / tokens), rel=1e-4)
    assert score.metrics["token_accuracy"] == pytest.approx(right / tokens, abs=1e-9)
    assert score.num_samples == len(TEXTS)
    low, high = score.interval
    assert low < score.value < high


@pytest.mark.parametrize("way", WAYS)
def test_masks_and_packing_count_what_they_say(tmp_path: Path, way: str) -> None:
    model = write_language_model(tmp_path / "model")
    fast = tokenizer()
    rows, loss, tokens = [], 0.0, 0
    for text in TEXTS:
        ids = torch.tensor(fast(text)["input_ids"])
        mask = [number % 3 == 0 for number in range(len(ids))]
        labels = torch.where(torch.tensor(mask), ids, -100)
        added = plain_loss(model, ids, labels)
        loss, tokens = loss + added[0], tokens + added[1]
        rows.append({"text": text, "counts": [int(each) for each in mask]})
    task = {"kind": "language_model", "data": write_jsonl(tmp_path / "data.jsonl", rows), "loss_mask_field": "counts"}
    assert run(task | {"text_field": "text"}, tmp_path / "model", way).value == pytest.approx(loss / tokens, rel=1e-5)
    packed = run(
        {"kind": "language_model", "data": write_texts(tmp_path / "t.jsonl"), "pack": True, "max_length": 20},
        tmp_path / "model",
        way,
    )
    assert packed.num_samples > 1


@pytest.mark.parametrize("way", WAYS)
def test_an_encoder_decoder_is_measured_on_its_whole_target(tmp_path: Path, way: str) -> None:
    model = write_language_model(tmp_path / "model", "t5")
    fast = tf.AutoTokenizer.from_pretrained(tmp_path / "model")
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    loss = tokens = 0.0
    for source, target in pairs:
        labels = torch.tensor([fast(target)["input_ids"]])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([fast(source)["input_ids"]]), labels=labels)
        loss, tokens = loss + float(output.loss) * labels.numel(), tokens + labels.numel()
    rows = [{"text": source, "summary": target} for source, target in pairs]
    task = {"kind": "language_model", "data": write_jsonl(tmp_path / "d.jsonl", rows), "target_field": "summary"}
    score = run(task, tmp_path / "model", way)
    assert score.value == pytest.approx(loss / tokens, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["number", "letter", "text", "arc"])
def test_answers_are_chosen_by_likelihood(tmp_path: Path, way: str, form: str) -> None:
    model = write_language_model(tmp_path / "model")
    fast = tokenizer()
    prompts, choices = TEXTS[:4], [[TEXTS[5], "the end", "merging"], ["models", "print"]] * 2
    right: list[int] = []
    by_length: list[int] = []
    for prompt, own in zip(prompts, choices, strict=True):
        first = len(fast(prompt)["input_ids"])
        scores = []
        for choice in own:
            ids = torch.tensor(fast(f"{prompt} {choice}")["input_ids"])
            labels = torch.where(torch.arange(len(ids)) >= first, ids, -100)
            scores.append(-plain_loss(model, ids, labels)[0])
        right.append(int(np.argmax(scores)))
        by_length.append(int(np.argmax([s / len(f" {c}") for s, c in zip(scores, own, strict=True)])))
    answers = [right[0], right[1], (right[2] + 1) % len(choices[2]), right[3]]  # the third is wrong
    forms: dict[str, Any] = {
        "number": lambda number, own: number,
        "letter": lambda number, own: "ABC"[number],
        "text": lambda number, own: own[number],
        "arc": lambda number, own: str(number + 1),
    }
    rows = [
        {
            "question": prompt,
            "choices": {"text": own, "label": ["1", "2", "3"][: len(own)]} if form == "arc" else own,
            "answer": forms[form](answer, own),
        }
        for prompt, own, answer in zip(prompts, choices, answers, strict=True)
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    task = {"kind": "multiple_choice", "data": data, "prompt": "{question}", "choices_field": "choices"}
    score = run(task, tmp_path / "model", way)
    assert score.metrics["accuracy"] == 0.75
    expected = np.mean([a == b for a, b in zip(by_length, answers, strict=True)])
    assert score.metrics["accuracy_by_length"] == pytest.approx(expected)


def test_blanks_at_the_end_of_a_prompt_count_to_the_answer(tmp_path: Path) -> None:
    model = write_language_model(tmp_path / "model")
    fast = tokenizer()
    choices = ["models", "print", "the", "merging", "weights", "of"]

    def likeliest(prompt: str, between: str) -> int:
        first, scores = len(fast(prompt)["input_ids"]), []
        for choice in choices:
            ids = torch.tensor(fast(f"{prompt}{between}{choice}")["input_ids"])
            scores.append(-plain_loss(model, ids, torch.where(torch.arange(len(ids)) >= first, ids, -100))[0])
        return int(np.argmax(scores))

    right = [likeliest(text, "\n  ") for text in TEXTS]
    assert right != [likeliest(text, "") for text in TEXTS], "blanks matter to this model"
    data = write_jsonl(tmp_path / "d.jsonl", [{"q": text, "a": own} for text, own in zip(TEXTS, right, strict=True)])
    task = {"kind": "multiple_choice", "data": data, "prompt": "{q}\n  ", "choices": choices, "answer_field": "a"}
    assert run({**task, "separator": ""}, tmp_path / "model", "whole").value == 1.0


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_written_as_transformers_writes_them(tmp_path: Path, way: str) -> None:
    model = write_language_model(tmp_path / "model")
    fast = tokenizer()
    written = []
    for text in TEXTS:
        ids = torch.tensor([fast(text)["input_ids"]])
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        written.append(fast.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    rows = [{"text": text, "answer": answer} for text, answer in zip(TEXTS, written, strict=True)]
    rows[0]["answer"] = "something else"
    rows[1]["answer"] = ["something else", written[1]]  # one of several right ones
    task = {"kind": "generation", "data": write_jsonl(tmp_path / "d.jsonl", rows), "prompt": "{text}"}
    score = run(task | {"max_new_tokens": 6, "batch_size": 3}, tmp_path / "model", way)
    assert score.metrics == {"exact_match": pytest.approx(1 - 1 / len(TEXTS))}


@pytest.mark.parametrize("way", WAYS)
def test_answers_end_at_a_text_and_are_found_by_a_regex(tmp_path: Path, way: str) -> None:
    model = write_language_model(tmp_path / "model")
    fast = tokenizer()
    ids = torch.tensor([fast(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    text = fast.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    stop = text[len(text) // 2]
    before = text[: text.index(stop)]
    rows = [{"text": TEXTS[0], "answer": before}]
    base = {"kind": "generation", "data": write_jsonl(tmp_path / "a.jsonl", rows), "prompt": "{text}"}
    assert run(base | {"max_new_tokens": 12, "stop": [stop]}, tmp_path / "model", way).value == 1.0
    letter = text.strip()[-1]
    rows = [{"text": TEXTS[0], "answer": f"It is {letter}"}]
    found = {"data": write_jsonl(tmp_path / "b.jsonl", rows), "extract": re.escape(letter)}
    assert run(base | found | {"max_new_tokens": 12}, tmp_path / "model", way).value == 1.0


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, tf.PreTrainedModel]:
    """A vision transformer with five labels, and its image processor."""
    known = tiny_models.build("vit")
    known.config.id2label = dict(enumerate(LABELS))
    known.config.label2id = {label: number for number, label in enumerate(LABELS)}
    enlarge(known)
    known.save_pretrained(tmp_path / "vit")
    write_processor(tmp_path / "vit", known.config.image_size)
    return tmp_path / "vit", known


def pixels_of(folder: Path, model: Path) -> tuple[list[str], torch.Tensor]:
    """Labels and pixels of images in folders, by Transformers' own processor."""
    processor = tf.AutoImageProcessor.from_pretrained(model, backend="pil")
    files = sorted(folder.glob("*/*.png"))
    images = [Image.open(file).convert("RGB") for file in files]
    return [file.parent.name for file in files], processor(images, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("way", WAYS)
def test_images_are_classified_by_the_models_own_head(
    tmp_path: Path, classifier: tuple[Path, tf.PreTrainedModel], way: str
) -> None:
    folder, model = classifier
    data = Path(write_images(tmp_path / "images", LABELS, 6))
    names, pixels = pixels_of(data, folder)
    with torch.no_grad():
        found = model(pixel_values=pixels).logits.argmax(-1)
    expected = np.mean([LABELS[number] == name for number, name in zip(found.tolist(), names, strict=True)])
    score = run({"kind": "image_classification", "data": str(data), "batch_size": 7}, folder, way)
    assert score.metrics == {"accuracy": pytest.approx(expected)}
    assert 0 < expected < 1  # else anything would do


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tower", ["whole", "vision with projection", "vision alone"])
def test_zero_shot_is_clips_own_recipe(tmp_path: Path, way: str, tower: str) -> None:
    clip = write_clip(tmp_path / "clip")
    folder = tmp_path / "clip"
    if tower != "whole":
        folder = tmp_path / "tower"
        vision: Any = tf.CLIPVisionModelWithProjection if tower != "vision alone" else tf.CLIPVisionModel
        config = clip.config.vision_config
        config.projection_dim = clip.config.projection_dim
        vision.from_pretrained(tmp_path / "clip", config=config).save_pretrained(folder)
    classes, templates = ["the end", "models", "print"], ["merged {}", "the {} of models"]
    data = Path(write_images(tmp_path / "images", ["0", "1", "2"], 8))
    names, pixels = pixels_of(data, tmp_path / "clip")
    fast = tokenizer()
    prototypes = []
    with torch.no_grad():
        for name in classes:
            tokens = fast([template.format(name) for template in templates], return_tensors="pt", padding=True)
            tokens.pop("token_type_ids", None)
            texts = torch.nn.functional.normalize(_embeds(clip.get_text_features(**tokens)), dim=-1).mean(dim=0)
            prototypes.append(torch.nn.functional.normalize(texts, dim=-1))
        images = _embeds(clip.get_image_features(pixel_values=pixels))
    found = (images @ torch.stack(prototypes).T).argmax(-1)
    expected = np.mean([str(number) == name for number, name in zip(found.tolist(), names, strict=True)])
    own = tmp_path / "classes.yaml"
    own.write_text(json.dumps({"class_names": classes, "templates": templates}), encoding="utf-8")
    task = {"kind": "zero_shot", "data": str(data), "classes": str(own), "batch_size": 5}
    task |= {"text_model": str(tmp_path / "clip")} if tower != "whole" else {}
    score = run(task, folder, way)
    assert score.metrics == {"accuracy": pytest.approx(expected)}
    assert 0 < expected < 1
    assert len(set(found.tolist())) > 1


def _embeds(output: Any) -> torch.Tensor:
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "spearman"])
def test_texts_are_classified_with_the_metrics_of_scikit_learn(tmp_path: Path, way: str, metric: str) -> None:
    from scipy.stats import spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    one = metric == "spearman"
    model = write_bert(tmp_path / "bert", 1 if one else 3)
    fast = tf.AutoTokenizer.from_pretrained(tmp_path / "bert")
    pairs = [(TEXTS[number // 5], TEXTS[3 + number % 5]) for number in range(20)]
    with torch.no_grad():
        logits = torch.stack([model(**fast(a, b, return_tensors="pt")).logits[0] for a, b in pairs])
    generator = np.random.default_rng(0)
    if one:
        labels: Any = generator.normal(size=20)
        expected = spearmanr(labels, logits[:, 0].numpy()).statistic
    else:
        found = logits.argmax(-1).numpy()
        labels = np.where(generator.random(20) < 0.6, found, (found + 1) % 3)
        measure: Any = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}[metric]
        expected = measure(labels, found, **({"average": "macro"} if metric == "f1" else {}))
    rows = [{"text": a, "other": b, "label": value.item()} for (a, b), value in zip(pairs, labels, strict=True)]
    task = {"kind": "text_classification", "data": write_jsonl(tmp_path / "d.jsonl", rows), "pair_field": "other"}
    score = run(task | {"metric": metric}, tmp_path / "bert", way)
    assert score.value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_sentences_are_found_and_compared_by_their_vectors(tmp_path: Path, way: str, pooling: str) -> None:
    from scipy.stats import pearsonr, spearmanr

    model = write_bert(tmp_path / "bert", 2, tf.BertModel)
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "bert" / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (tmp_path / "bert" / "1_Pooling").mkdir()
    keys = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
    settings = {key: name == pooling for name, key in keys.items()}
    (tmp_path / "bert" / "1_Pooling" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    fast = tf.AutoTokenizer.from_pretrained(tmp_path / "bert")

    def vector(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = model(**fast(text, return_tensors="pt")).last_hidden_state[0]
        chosen = {"mean": states.mean(dim=0), "cls": states[0], "last": states[-1]}[pooling]
        return torch.nn.functional.normalize(chosen, dim=-1)

    queries, passages = TEXTS[:4], TEXTS[4:]
    similar = torch.stack([vector(text) for text in queries]) @ torch.stack([vector(text) for text in passages]).T
    ranks = [int((row > row[number]).sum()) + 1 for number, row in enumerate(similar)]
    rows = [{"query": a, "passage": b} for a, b in zip(queries, passages, strict=True)]
    found = run({"kind": "retrieval", "data": write_jsonl(tmp_path / "r.jsonl", rows)}, tmp_path / "bert", way)
    assert found.metrics["mrr@10"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert found.metrics["recall@1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert found.metrics["ndcg@10"] == pytest.approx(np.mean([1 / np.log2(1 + rank) for rank in ranks]))
    scores = [0.3, 0.9, 0.1, 0.5]
    cosines = [float(vector(a) @ vector(b)) for a, b in zip(queries, passages, strict=True)]
    rows = [
        {"sentence1": a, "sentence2": b, "score": score} for a, b, score in zip(queries, passages, scores, strict=True)
    ]
    found = run({"kind": "similarity", "data": write_jsonl(tmp_path / "s.jsonl", rows)}, tmp_path / "bert", way)
    assert found.metrics["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic)
    assert found.metrics["pearson"] == pytest.approx(pearsonr(cosines, scores).statistic, abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_kept_head_is_put_on_the_merged_body(tmp_path: Path, way: str) -> None:
    labels = {"sst2": 2, "mnli": 3}
    for name, count in labels.items():
        write_bert(tmp_path / name, count)
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in labels]
    largemerge.merge({"merge_method": "linear", "models": models}, tmp_path / "merged")
    fast = tf.AutoTokenizer.from_pretrained(tmp_path / "mnli")
    # The body of both, averaged, with the head of one of them.
    model, other = (tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("mnli", "sst2"))
    with torch.no_grad():
        state = other.state_dict()
        for name, parameter in model.named_parameters():
            if not name.startswith("classifier"):
                parameter.copy_((parameter + state[name]) / 2)
        found = torch.stack([model(**fast(text, return_tensors="pt")).logits[0] for text in TEXTS]).argmax(-1)
    wanted = [int(number) if place % 2 else (int(number) + 1) % 3 for place, number in enumerate(found)]
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, wanted, strict=True)]
    task = {"kind": "text_classification", "data": write_jsonl(tmp_path / "d.jsonl", rows)}
    assert run(task | {"head": "mnli"}, tmp_path / "merged", way).value == pytest.approx(0.5)
    file = tmp_path / "merged" / "heads" / "mnli.safetensors"
    assert run(task | {"head": str(file)}, tmp_path / "merged", way).value == pytest.approx(0.5)
    with pytest.raises(largemerge.LargemergeError, match=r"merged is a BertModel, which has no labels.*'head'"):
        run(task, tmp_path / "merged", way)
    with pytest.raises(largemerge.LargemergeError, match=r"no head 'qnli'.*holds mnli, sst2"):
        run(task | {"head": "qnli"}, tmp_path / "merged", way)


@pytest.mark.parametrize("way", WAYS)
def test_adapters_are_added_to_their_model(tmp_path: Path, way: str) -> None:
    model = write_language_model(tmp_path / "base")
    folder = tmp_path / "lora"
    targets = {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 64}
    train_with_peft(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(**targets), folder)
    merged = merged_by_peft(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    fast = tokenizer()
    sums = [plain_loss(merged, ids, ids) for text in TEXTS for ids in [torch.tensor(fast(text)["input_ids"])]]
    loss, tokens, _ = (sum(part) for part in zip(*sums, strict=True))
    data = write_texts(tmp_path / "data.jsonl")
    config = {"tasks": [{"name": "task", "kind": "language_model", "data": data}], **WAYS[way]}
    found = largemerge.evaluate(config, {"tuned": f"{tmp_path / 'base'}+{folder}", "base": tmp_path / "base"})
    assert found.score("tuned", "task").value == pytest.approx(loss / tokens, rel=1e-5)
    assert found.score("base", "task").value != pytest.approx(loss / tokens, rel=1e-3)
    assert model.config.vocab_size == 300
