"""Real tokenizers and real files, built on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest

from largemerge.calibration import ForwardSignature
from largemerge.calibration.config import CalibrationConfig, CalibrationDefaults

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<user>", "<assistant>"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "hello", "world", "how", "are", "you", "fine", "thanks"]
IDS = {word: index for index, word in enumerate(SPECIAL + WORDS)}

CHAT_TEMPLATE = (
    "<s>{% for message in messages %} <{{ message['role'] }}> {{ message['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture
def ids() -> Callable[[str], list[int]]:
    """Words to the ids of the test tokenizer."""
    return lambda text: [IDS[word] for word in text.split()]


@pytest.fixture
def save_tokenizer() -> Callable[..., Path]:
    """Writes a word tokenizer into a folder; keywords as for `PreTrainedTokenizerFast`."""

    def save(folder: Path, *, frame: str | None = None, chat_template: str | None = None, **options: Any) -> Path:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if frame is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=frame, special_tokens=[(word, IDS[word]) for word in SPECIAL]
            )
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**special, **options})
        fast.chat_template = chat_template
        fast.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def checkpoint(tmp_path: Path, save_tokenizer: Callable[..., Path]) -> Path:
    """A checkpoint's folder with a tokenizer that adds nothing, and a chat template."""
    return save_tokenizer(tmp_path / "checkpoint", chat_template=CHAT_TEMPLATE)


@pytest.fixture
def text_signature() -> ForwardSignature:
    """A decoder-only language model."""
    return ForwardSignature(frozenset({"input_ids", "attention_mask", "position_ids"}), False, None, None)


@pytest.fixture
def seq2seq_signature() -> ForwardSignature:
    """An encoder-decoder such as T5."""
    arguments = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels"}
    return ForwardSignature(frozenset(arguments), True, IDS["<s>"], None)


@pytest.fixture
def vision_signature() -> ForwardSignature:
    """An image classifier."""
    return ForwardSignature(frozenset({"pixel_values"}), False, None, None)


@pytest.fixture
def clip_signature() -> ForwardSignature:
    """A model of two towers."""
    return ForwardSignature(frozenset({"input_ids", "attention_mask", "pixel_values"}), False, None, None)


@pytest.fixture
def make_config() -> Callable[..., CalibrationConfig]:
    """A configuration with every number set."""

    def make(data: Path | str, **settings: Any) -> CalibrationConfig:
        return CalibrationConfig(data=str(data), **settings).with_defaults(
            CalibrationDefaults(num_samples=4, max_length=16, batch_size=2, seed=0)
        )

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[Iterable[Any]], Path]:
    """Writes rows (dicts, or lines as they are) into a .jsonl file."""

    def write(rows: Iterable[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return path

    return write


@pytest.fixture
def save_image_processor() -> Callable[..., Path]:
    """Writes the preprocessor_config.json of a CLIP checkpoint, 8 pixels wide, into a folder."""

    def save(folder: Path, **changes: Any) -> Path:
        settings = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 8},
            "crop_size": {"height": 8, "width": 8},
            "do_resize": True,
            "do_center_crop": True,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **changes}))
        return folder

    return save
