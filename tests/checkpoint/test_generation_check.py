"""Types and ranges of a `generation_config.json`, and what a merge says of a wrong one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenized import ENGLISH, linear, train, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import largemerge
from largemerge.checkpoint.generation_check import generation_problems
from largemerge.errors import LargemergeError

WRONG: list[tuple[str, Any, str]] = [
    ("num_beams", 0, "expected 1 or more, found 0"),
    ("num_beams", True, "expected a whole number, found True"),
    ("max_length", "x", "expected a whole number, found 'x'"),
    ("max_new_tokens", 2.5, "expected a whole number, found 2.5"),
    ("top_k", -1, "expected 0 or more, found -1"),
    ("temperature", "x", "expected a finite number, found 'x'"),
    ("temperature", float("nan"), "expected a finite number, found nan"),
    ("temperature", -0.5, "expected 0 or more, found -0.5"),
    ("top_p", 1.5, "expected a number from 0 to 1, found 1.5"),
    ("repetition_penalty", 0, "expected a number above 0, found 0"),
    ("do_sample", "x", "expected true or false, found 'x'"),
    ("early_stopping", [1], "expected true, false or 'never', found [1]"),
    ("eos_token_id", "x", "expected the number of a token, or a list of them, found 'x'"),
    ("eos_token_id", [2, "x"], "expected the number of a token, or a list of them, found [2, 'x']"),
    ("pad_token_id", [1], "expected the number of a token, found [1]"),
    ("suppress_tokens", "x", "expected a list of the numbers of tokens, found 'x'"),
    ("suppress_tokens", 5, "expected a list of the numbers of tokens, found 5"),
    ("bad_words_ids", [5], "expected a list of words, each a list of the numbers of its tokens, found [5]"),
    ("stop_strings", [1], "expected a text, or a list of texts, found [1]"),
    ("exponential_decay_length_penalty", [1], "the first token and the factor, found [1]"),
    ("watermarking_config", "x", "expected keys and values, found 'x'"),
    ("compile_config", 5, "expected keys and values, found 5"),
    ("cache_implementation", 5, "expected a text, found 5"),
]


@pytest.mark.parametrize(("key", "value", "told"), WRONG)
def test_a_wrong_value_is_told_by_its_key(key: str, value: Any, told: str) -> None:
    (problem,) = generation_problems({key: value, "use_cache": True})
    assert problem.startswith(f"{key}: expected ") and problem.endswith(told)
    assert generation_problems({key: None}) == []


def test_what_models_have_is_right() -> None:
    whisper = {"suppress_tokens": [], "begin_suppress_tokens": [220, 50257], "forced_decoder_ids": [[1, None]]}
    llama = {"eos_token_id": [1, 2], "pad_token_id": -1, "temperature": 0.6, "top_p": 1, "top_k": 0, "do_sample": True}
    bart = {"early_stopping": True, "num_beams": 4, "forced_eos_token_id": 2, "length_penalty": -1.0, "unknown": "x"}
    beams = {"early_stopping": "never", "bad_words_ids": [[1, 2]], "force_words_ids": [[[1], [2, 3]], [[4]]]}
    for config in (whisper, llama, bart, beams, GenerationConfig().to_dict()):
        assert generation_problems(config) == []


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed in range(2):
        write_model(tmp_path / f"m{seed}", seed, train("BPE", ENGLISH))
    return tmp_path


def test_all_mistakes_are_told_at_once_before_the_work(models: Path) -> None:
    path = models / "m0" / "generation_config.json"
    path.write_text(json.dumps({"num_beams": 0, "eos_token_id": "x", "temperature": float("nan")}))
    with pytest.raises(LargemergeError) as caught:
        largemerge.merge(linear(models, ["m0", "m1"], [0.5, 0.5]), models / "out", quiet=True)
    assert [problem.split(": expected")[0] for problem in caught.value.problems] == [
        f"{path}: num_beams",
        f"{path}: temperature",
        f"{path}: eos_token_id",
    ]
    assert not (models / "out").exists()


def test_what_only_transformers_checks_is_told_and_its_log_is_silent(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = models / "m0" / "generation_config.json"
    path.write_text(json.dumps({"cache_implementation": "nowhere"}))
    config = linear(models, ["m0", "m1"], [0.5, 0.5])
    (problem,) = [each for each in largemerge.plan(config).problems if "generation_config" in each]
    assert f"{path}: Transformers does not understand it: ValueError: Invalid `cache_implementation`" in problem
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.1, "eos_token_id": 2, "max_new_tokens": 3}))
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    try:
        assert largemerge.plan(config).problems == []
    finally:
        log.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "generation" in record.name]
    largemerge.merge(config, models / "out", quiet=True)
    model, tokenizer = (each.from_pretrained(models / "out") for each in (AutoModelForCausalLM, AutoTokenizer))
    assert model.generate(**tokenizer("the end", return_tensors="pt")).shape[0] == 1
