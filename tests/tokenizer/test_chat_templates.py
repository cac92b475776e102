"""Chat templates of the output: built in, written by the user, or the one that most models have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenized import ENGLISH, linear, train, write_model
from transformers import AutoTokenizer

import largemerge
from largemerge.tokenizer.chat_templates import BUILT_IN, template_problem

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": " hm "}]
SYSTEM = {"role": "system", "content": "be"}
EXPECTED = {
    "chatml": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n<|im_start|>user\n hm <|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    "\n\nho<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhm<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n",
    "alpaca": "### Instruction:\nhi\n\n### Response:\nho\n\n### Instruction:\nhm\n\n### Response:\n",
    "mistral": "<s> [INST] hi [/INST] ho</s> [INST]  hm  [/INST]",
    "exaone": "[|system|][|endofturn|]\n[|user|]hi\n[|assistant|]ho[|endofturn|]\n[|user|] hm \n[|assistant|]",
}
WITH_SYSTEM = {
    "chatml": "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nbe<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nhi<|eot_id|>",
    "alpaca": "be\n\n### Instruction:\nhi",
    "mistral": "<s> [INST] be\n\nhi [/INST]",
    "exaone": "[|system|]be[|endofturn|]\n[|user|]hi\n",
}


def merged(folder: Path, count: int = 2, **more: Any) -> Any:
    names = [f"m{number}" for number in range(count)]
    report = largemerge.merge(linear(folder, names, [1 / count] * count, **more), folder / "out")
    return AutoTokenizer.from_pretrained(folder / "out"), report


def write_models(folder: Path, templates: list[Any]) -> None:
    """Saves models whose tokenizers have these templates, in one of the places where they may be."""
    tokenizer = train("BPE", ENGLISH)
    for number, template in enumerate(templates):
        write_model(folder / f"m{number}", number, tokenizer, [f"<{number}>"])
        if isinstance(template, str):
            (folder / f"m{number}" / "chat_template.jinja").write_text(template)
        elif template is not None:
            path = folder / f"m{number}" / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_templates(tmp_path: Path, name: str) -> None:
    write_models(tmp_path, ["{{ 'mine' }}", None])
    tokenizer, _ = merged(tmp_path, chat_template=name, tokenizer_source="union")
    told = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert told == EXPECTED[name]
    assert tokenizer.apply_chat_template([SYSTEM, CHAT[0]], tokenize=False) == WITH_SYSTEM[name]
    if name in ("mistral", "alpaca"):
        wrong = [{"role": "narrator", "content": "once"}]
        with pytest.raises(Exception, match=r"Expected (user and|the roles)"):
            tokenizer.apply_chat_template(wrong, tokenize=False)


def test_auto_takes_what_most_models_have(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "{{ 'no' }}"}, {"name": "default", "template": "{{ 'two' }}\n"}]
    write_models(tmp_path, ["{{ 'one' }}", named, "{{ 'two' }}", None])
    tokenizer, report = merged(tmp_path, 4, chat_template="auto", tokenizer_source="union")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "two"
    assert "chat template: auto: that of 2 of the 3 models that have one" in report.plan.notes


def test_auto_without_any(tmp_path: Path) -> None:
    write_models(tmp_path, [None, None])
    tokenizer, report = merged(tmp_path, chat_template="auto", tokenizer_source="union")
    assert tokenizer.chat_template is None
    assert "chat template: auto: no model has one" in report.plan.notes


def test_a_template_of_one_s_own_replaces_a_copied_one(tmp_path: Path) -> None:
    tokenizer = train("BPE", ENGLISH)
    for seed in range(2):
        write_model(tmp_path / f"m{seed}", seed, tokenizer)
    path = tmp_path / "m0" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ 'old' }}"}))
    own = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}"
    made, _ = merged(tmp_path, chat_template=own)
    assert made.apply_chat_template(CHAT, tokenize=False) == "hi"
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_a_template_of_thousands_of_brackets_is_told() -> None:
    assert "brackets stand too deep" in str(template_problem("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}"))
    assert "brackets stand too deep" in str(template_problem("{" * 3000))
