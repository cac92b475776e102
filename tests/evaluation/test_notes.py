"""What an evaluation says of its own accord: what was too long, and what one model has lent another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from task_models import (
    TEXTS,
    tokenizer,
    write_bert,
    write_clip,
    write_images,
    write_jsonl,
    write_language_model,
    write_texts,
)

import largemerge

LIMIT = 12


def notes(task: dict[str, Any], *models: Path, **more: Any) -> tuple[str, ...]:
    found = largemerge.evaluate({"tasks": [{"name": "task", **task}], **more}, list(models))
    assert not found.problems
    return tuple(found.notes)


def lengths(texts: list[str], kind: str = "BPE", **options: Any) -> list[int]:
    """Numbers of tokens of texts."""
    fast: Any = tokenizer(kind)
    return [len(fast(text, **options)["input_ids"]) for text in texts]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_language_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    write_bert(tmp_path / "bert", 2)
    return tmp_path / "bert"


def test_texts_that_are_cut_are_counted(tmp_path: Path, model: Path) -> None:
    task = {"kind": "language_model", "data": write_texts(tmp_path / "d.jsonl")}
    long = sum(length > LIMIT for length in lengths(TEXTS))
    assert 0 < long < len(TEXTS)
    said = f"task 'task': {long} of {len(TEXTS)} texts are longer than max_length (12 tokens); their ends are left out"
    assert notes(task | {"max_length": LIMIT}, model) == (said,)
    assert notes(task, model, max_length=LIMIT) == (said,)
    assert notes(task | {"max_length": max(lengths(TEXTS))}, model) == ()


def test_the_limit_is_named_where_nobody_has_set_one(tmp_path: Path, model: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "the end " * 3000}, {"text": "the end"}])
    (note,) = notes({"kind": "language_model", "data": data}, model)
    assert "1 of 2 texts are longer than max_length (2,048 tokens)" in note


def test_the_tokenizers_own_limit_is_told_as_such(tmp_path: Path, model: Path) -> None:
    fast: Any = tokenizer()
    fast.model_max_length = LIMIT
    fast.save_pretrained(model)
    (note,) = notes({"kind": "language_model", "data": write_texts(tmp_path / "d.jsonl")}, model)
    assert f"texts are longer than the {LIMIT} tokens that the tokenizer allows" in note


def test_the_target_of_an_encoder_decoder_is_cut_like_its_text(tmp_path: Path) -> None:
    write_language_model(tmp_path / "t5", "t5")
    rows = [{"text": "the end", "summary": text} for text in ("the end", "the end " * 20)]
    task = {"kind": "language_model", "data": write_jsonl(tmp_path / "d.jsonl", rows), "target_field": "summary"}
    (note,) = notes(task | {"max_length": LIMIT}, tmp_path / "t5")
    assert "1 of 2 texts or targets are longer than" in note


def test_what_fills_no_packed_sample_is_told(tmp_path: Path, model: Path) -> None:
    task = {"kind": "language_model", "data": write_texts(tmp_path / "d.jsonl"), "pack": True, "max_length": LIMIT}
    num_tokens = sum(lengths(TEXTS)) + len(TEXTS) - 1  # an end-of-text token between two of them
    assert num_tokens % LIMIT
    said = f"task 'task': {num_tokens % LIMIT} tokens at the end of the texts fill no sample, and are left out"
    assert notes(task, model) == (said,)
    assert notes(task | {"num_samples": 2}, model) == (), "as many as were asked for"


def test_texts_that_are_empty_are_told(tmp_path: Path, model: Path) -> None:
    data = write_texts(tmp_path / "d.jsonl", [*TEXTS[:3], " ", ""])
    said = "task 'task': 3 texts are measured in place of 5, as others are empty"
    assert notes({"kind": "language_model", "data": data}, model) == (said,)
    assert notes({"kind": "language_model", "data": data, "num_samples": 3}, model) == ()


def test_rows_with_an_empty_text_are_left_out(tmp_path: Path, bert: Path) -> None:
    pairs = list(zip(TEXTS[:4], TEXTS[4:], strict=True))
    holed = [("", "the end"), *pairs[:2], ("the end", " \n"), *pairs[2:]]
    columns = {
        "retrieval": ("query", "passage", {"pooling": "mean"}),
        "similarity": ("sentence1", "sentence2", {"pooling": "mean"}),
        "text_classification": ("text", "other", {"pair_field": "other"}),
    }
    for kind, (first, second, more) in columns.items():
        found = []
        for rows in (pairs, holed):
            table = [{first: a, second: b, "score": len(a), "label": len(a) % 2} for a, b in rows]
            data = write_jsonl(tmp_path / f"{kind} {len(rows)}.jsonl", table)
            task = {"name": "task", "kind": kind, "data": data, **more}
            found.append(largemerge.evaluate({"tasks": [task]}, bert))
        whole, rest = found
        said = "task 'task': 4 rows are measured in place of 6, as others have an empty text"
        assert whole.notes == () and rest.notes == (said,), kind
        assert rest.score("bert", "task").metrics == whole.score("bert", "task").metrics, kind
        assert rest.score("bert", "task").num_samples == 4
        assert notes({**task, "num_samples": 4}, bert) == (), "as many as were asked for"
        (note,) = notes({**task, "skip": 2}, bert)
        assert "2 rows are measured in place of 4," in note
        with pytest.raises(largemerge.LargemergeError, match="'skip: 4' passes over all of them"):
            notes({**task, "skip": 4}, bert)
    empty = write_jsonl(tmp_path / "e.jsonl", [{"query": "", "passage": "the end"}])
    with pytest.raises(largemerge.LargemergeError, match="all rows have an empty text; expected at least one with"):
        notes({"kind": "retrieval", "data": empty, "pooling": "mean"}, bert)


def test_prompts_lose_their_beginnings(tmp_path: Path, model: Path) -> None:
    rows = [{"text": text, "choices": ["a", "the end"], "answer": 0} for text in TEXTS]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    choice = {"kind": "multiple_choice", "data": data, "prompt": "{text}", "choices_field": "choices"}
    sequences = [f"{text} {answer}" for text in TEXTS for answer in ("a", "the end")]
    long = sum(length > LIMIT for length in lengths(sequences))
    assert 0 < long < len(sequences)
    (note,) = notes(choice | {"max_length": LIMIT}, model)
    assert note == (
        f"task 'task': {long} of {len(sequences)} prompts with their answers are longer than max_length ({LIMIT} "
        "tokens); the beginnings of the prompts are left out"
    )
    rows = [{"text": text, "answer": "a"} for text in TEXTS]
    generation = {"kind": "generation", "data": write_jsonl(tmp_path / "g.jsonl", rows), "prompt": "{text}"}
    found = notes(generation | {"max_length": LIMIT + 3, "max_new_tokens": 3}, model)
    assert found[0] == (
        f"task 'task': {sum(length > LIMIT for length in lengths(TEXTS))} of {len(TEXTS)} prompts are longer than "
        f"{LIMIT} tokens, which is max_length ({LIMIT + 3} tokens) less max_new_tokens; their beginnings are left out"
    )


@pytest.mark.parametrize("memory", [{}, {"host": 1}])
def test_answers_that_have_not_ended_are_counted(tmp_path: Path, model: Path, memory: dict[str, int]) -> None:
    task: dict[str, Any] = {"kind": "generation", "prompt": "{text}", "max_new_tokens": 6}
    task["data"] = write_jsonl(tmp_path / "d.jsonl", [{"text": text, "answer": "a"} for text in TEXTS[:3]])
    known = tf.AutoModelForCausalLM.from_pretrained(model)
    fast: Any = tokenizer()
    unfinished, written = 0, []
    for text in TEXTS[:3]:
        ids = fast(text, return_tensors="pt")["input_ids"]
        out = known.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        unfinished += 2 not in out[0, ids.shape[1] :].tolist()
        written.append(fast.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert unfinished and all(written)
    said = f"task 'task', model: {unfinished} of 3 answers have not ended after max_new_tokens (6)"
    of_limit = [note for note in notes(task, model, memory=memory) if note.startswith("memory.host is 1 byte")]
    assert len(of_limit) == len(memory)
    assert notes(task, model, memory=memory) == (*of_limit, said)
    assert notes(task | {"stop": written}, model, memory=memory) == (*of_limit,), "what ends at a text is not cut off"


def test_pairs_and_sentences_that_are_cut_are_counted(tmp_path: Path, bert: Path) -> None:
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    fast: Any = tokenizer("WordPiece")
    long = sum(len(fast(a, b)["input_ids"]) > 2 * LIMIT for a, b in pairs)
    assert 0 < long < len(pairs)
    rows = [{"text": a, "other": b, "label": 0} for a, b in pairs]
    task = {"kind": "text_classification", "data": write_jsonl(tmp_path / "c.jsonl", rows), "pair_field": "other"}
    (note,) = notes(task | {"max_length": 2 * LIMIT}, bert)
    assert note.startswith(f"task 'task': {long} of {len(pairs)} pairs of texts are longer than max_length (24 tokens)")
    half = len(TEXTS) // 2
    queries, passages = TEXTS[:half], TEXTS[half : 2 * half]
    long = sum(length > LIMIT for length in lengths(queries + passages, "WordPiece"))
    assert long
    rows = [{"query": a, "passage": b} for a, b in zip(queries, passages, strict=True)]
    retrieval = {"kind": "retrieval", "data": write_jsonl(tmp_path / "r.jsonl", rows), "pooling": "mean"}
    (note,) = notes(retrieval | {"max_length": LIMIT}, bert)
    assert f"{long} of {2 * half} texts are longer than" in note
    rows = [
        {"sentence1": a, "sentence2": b, "score": number}
        for number, (a, b) in enumerate(zip(queries, passages, strict=True))
    ]
    similarity = {"kind": "similarity", "data": write_jsonl(tmp_path / "s.jsonl", rows), "pooling": "mean"}
    (note,) = notes(similarity | {"max_length": LIMIT}, bert)
    assert f"{long} of {2 * half} texts are longer than" in note


def test_texts_that_name_classes_are_counted_once(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    positions = clip.config.text_config.max_position_embeddings
    data = write_images(tmp_path / "images", ["0", "1"], 1)
    classes = tmp_path / "classes.yaml"
    texts = {"class_names": ["the end", "models"], "templates": ["{}", "the end " * 40 + "{}"]}
    classes.write_text(json.dumps(texts), encoding="utf-8")
    task = {"kind": "zero_shot", "data": data, "classes": str(classes)}
    tokens = lengths(["the end the end", "the end models"])
    assert max(tokens) <= positions
    said = (
        f"task 'task': 2 of 4 texts that name classes are longer than the {positions} tokens that the text tower "
        "takes; their ends are left out"
    )
    assert notes(task, tmp_path / "clip") == (said,)


def test_models_are_named_where_only_some_have_cut(tmp_path: Path, model: Path) -> None:
    write_language_model(tmp_path / "other")
    fast: Any = tokenizer()
    fast.model_max_length = LIMIT
    fast.save_pretrained(tmp_path / "other")
    task = {"kind": "language_model", "data": write_texts(tmp_path / "d.jsonl")}
    (note,) = notes(task, model, tmp_path / "other")
    assert note.startswith("task 'task', other: ")


def without(folder: Path, *patterns: str) -> Path:
    """Takes files away from a model."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()
    return folder


def test_a_tokenizer_that_is_lent_is_told(tmp_path: Path, model: Path) -> None:
    for name in ("one", "two"):
        write_language_model(tmp_path / name)
        without(tmp_path / name, "*token*")
    data = write_texts(tmp_path / "d.jsonl")
    config = {"base": str(model), "tasks": [{"name": name, "kind": "language_model", "data": data} for name in "ab"]}
    found = largemerge.evaluate(config, [tmp_path / "one", tmp_path / "two"], out=tmp_path / "found")
    assert found.notes == ("one, two: no tokenizer; that of base is used",)
    assert found.notes[0] in (tmp_path / "found" / "evaluation.html").read_text(encoding="utf-8")
    with pytest.raises(largemerge.LargemergeError, match="no tokenizer in"):
        largemerge.evaluate({"tasks": config["tasks"]}, [tmp_path / "one"])


def test_an_image_processor_that_is_lent_is_told(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    clip.config.vision_config.projection_dim = clip.config.projection_dim
    vision: Any = tf.CLIPVisionModelWithProjection
    vision.from_pretrained(tmp_path / "clip", config=clip.config.vision_config).save_pretrained(tmp_path / "tower")
    data = write_images(tmp_path / "images", ["0", "1"], 1)
    classes = tmp_path / "classes.yaml"
    classes.write_text(json.dumps({"class_names": ["the end", "models"], "templates": ["{}"]}), encoding="utf-8")
    task = {"kind": "zero_shot", "data": data, "classes": str(classes), "text_model": str(tmp_path / "clip")}
    assert notes(task, tmp_path / "tower") == (f"tower: no image processor; that of {tmp_path / 'clip'} is used",)
