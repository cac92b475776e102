"""What lies beside the weights: config, model card, tokenizer and processor files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import touch
from safetensors.torch import save_file

from largemerge.checkpoint.index import Checkpoint, open_checkpoint
from largemerge.checkpoint.side_files import copy_side_files, find_processor, find_tokenizer, model_card, output_config


def checkpoint_with(folder: Path, config: dict[str, Any]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    return open_checkpoint(folder, "reference")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"hidden_size": 4}, {"hidden_size": 4, "dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32", "x": 1}, "vision_config": {"x": 2}},
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "x": 1}, "vision_config": {"x": 2}},
        ),
        ({"_name_or_path": "/home/somebody", "dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
def test_the_config_names_the_dtype_of_the_output(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert json.loads(output_config(config, torch.bfloat16)) == expected


def card(*models: str, base: str | None) -> tuple[dict[str, Any], str]:
    entries = [{"name": f"m{index}", "model": model, "weight": 1.0, "data": "d"} for index, model in enumerate(models)]
    text = model_card(
        method="regmean", class_name="BertModel", models=entries, base=base, config_yaml="a: 1\n", version="9.9"
    )
    _, front, body = text.split("---\n", 2)
    metadata: dict[str, Any] = yaml.safe_load(front)
    return metadata, body


def test_the_model_card_names_models_of_the_hub() -> None:
    metadata, body = card("owner/maths@v1", "/a/folder", "./x/y", "owner/code", "owner/maths@v2", base="owner/base")
    assert metadata["base_model"] == ["owner/maths", "owner/code", "owner/base"]
    assert metadata["tags"] == ["merge", "largemerge"]
    assert "A merge of 5 models" in body and "largemerge 9.9" in body and "`regmean`" in body
    assert "BertModel.from_pretrained" in body and "```yaml\na: 1\n```" in body


def test_the_model_card_tells_no_folders_of_this_machine_in_its_head() -> None:
    metadata, body = card("/a/folder", "./x/y", base=None)
    assert "base_model" not in metadata
    assert "| m0 | `folder` |" in body


def test_files_come_from_where_they_should(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("config", "tokenizer", "processor")]
    for folder in folders:
        touch(folder, "generation_config.json", "tokenizer.json", "merges.txt", "preprocessor_config.json", "code.py")
        touch(folder, "model.safetensors", "training_args.bin", "additional_chat_templates/a.jinja")
    out = tmp_path / "out"
    out.mkdir()
    copied = copy_side_files(out, *folders, with_code=True)
    expected = {
        "generation_config.json": "config",
        "code.py": "config",
        "tokenizer.json": "tokenizer",
        "merges.txt": "tokenizer",
        "additional_chat_templates/a.jinja": "tokenizer",
        "preprocessor_config.json": "processor",
    }
    found = {str(path.relative_to(out)): path.read_text().split()[0] for path in out.rglob("*") if path.is_file()}
    assert found == expected
    assert set(copied) == {name.partition("/")[0] for name in expected}


def test_the_first_folder_with_such_files(tmp_path: Path) -> None:
    empty, tokenizer, both = (tmp_path / name for name in ("empty", "tokenizer", "both"))
    touch(empty, "config.json")
    touch(tokenizer, "spiece.model")
    touch(both, "tokenizer.json", "processor_config.json")
    assert find_tokenizer(empty, tokenizer, both) == tokenizer
    assert find_processor(empty, tokenizer, both) == both
    assert find_tokenizer(empty) == find_processor(empty) == empty


def test_a_sentence_encoder_keeps_what_comes_after_the_transformer(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "1_Pooling").mkdir(parents=True)
    out.mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (source / "modules.json").write_text("[]")
    copied = copy_side_files(out, source, source, source, with_code=False)
    assert set(copied) == {"modules.json", "1_Pooling"}
    assert (out / "1_Pooling" / "config.json").read_text() == '{"pooling_mode_mean_tokens": true}'
