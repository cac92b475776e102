"""Tiny models with tokenizers and image processors, and the data of tasks, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import tokenizers
import torch
import transformers as tf
from PIL import Image
from tokenized import CODE, ENGLISH, train
from transformers import PreTrainedTokenizerFast

TEXTS = [*ENGLISH, *CODE, "the models that were merged are the end of the merging", "print(sum(model.weight))"]
LABELS = ("cat", "dog", "bird", "fish", "cow")


def tokenizer(kind: str = "BPE") -> PreTrainedTokenizerFast:
    """A tokenizer of 300 tokens that begins texts with <s>."""
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(kind), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    return made


def _tokenizer(kind: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(_trained(kind))


@cache
def _trained(kind: str) -> str:
    """A trained tokenizer as JSON: trained anew, it would number tokens that are alike otherwise."""
    return str(train(kind, TEXTS).to_str())


def write_language_model(folder: Path, architecture: str = "llama", seed: int = 0) -> tf.PreTrainedModel:
    """Saves a language model with 300 tokens, and its tokenizer; returns the model."""
    known = tiny_models.build(architecture)
    config = known.config
    config.vocab_size = 300
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    torch.manual_seed(seed)
    model = type(known)(config).eval()
    enlarge(model)
    model.save_pretrained(folder)
    fast = tokenizer()
    if architecture == "t5":
        fast = tokenizer("Unigram")
    fast.save_pretrained(folder)
    return model


def enlarge(model: tf.PreTrainedModel) -> None:
    """Makes weights so large that every block matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Writes rows as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_texts(path: Path, texts: Sequence[str] = TEXTS) -> str:
    """Writes texts as JSON Lines."""
    return write_jsonl(path, [{"text": text} for text in texts])


def write_images(folder: Path, labels: Sequence[str], count: int, size: int = 8) -> str:
    """Writes images into a folder for each label; returns the folder."""
    generator = np.random.default_rng(0)
    for label in labels:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return str(folder)


def write_processor(folder: Path, size: int = 8) -> None:
    """Writes the settings of an image processor."""
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_clip(folder: Path, num_blocks: int = 3) -> Any:
    """Saves a tiny CLIP model of 300 tokens with all that belongs to it; `num_blocks` are those of the vision tower."""
    config: Any = tiny_models.build("clip").config
    config.text_config.vocab_size = 300
    config.vision_config.num_hidden_layers = num_blocks
    torch.manual_seed(0)
    clip = tf.CLIPModel(config).eval()
    enlarge(clip)
    clip.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    write_processor(folder, config.vision_config.image_size)
    return clip


def write_bert(folder: Path, num_labels: int, model_class: Any = tf.BertForSequenceClassification) -> Any:
    """Saves a tiny BERT of 300 tokens with its tokenizer."""
    sizes = tiny_models.TEXT | {"vocab_size": 300, "intermediate_size": 24, "max_position_embeddings": 64}
    torch.manual_seed(num_labels)
    model = model_class(tf.BertConfig(**sizes, num_labels=num_labels)).eval()
    enlarge(model)
    model.save_pretrained(folder)
    tokenizer("WordPiece").save_pretrained(folder)
    return model
