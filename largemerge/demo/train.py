"""Tiny real models: a tokenizer, a Llama trained on all kinds of text (the base), one expert per kind.

Plain next-token training (AdamW, linear warm-up and decay) on packed sequences; an expert goes on
from the base with its own kind only. Everything is saved as `from_pretrained` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from largemerge.demo.corpora import Corpus
from largemerge.demo.settings import DemoSettings
from largemerge.demo.steps import Steps

_END_OF_TEXT = "<|end|>"
_HEAD_SIZE = 32
_CPU = torch.device("cpu")


def train_all(folder: Path, corpora: Mapping[str, Corpus], settings: DemoSettings, steps: Steps) -> None:
    """Trains base and experts, and saves them in `folder/base` and `folder/experts/KIND`."""
    tokenizer = train_tokenizer([text for corpus in corpora.values() for text in corpus.train], settings)
    tokens = {name: pack(tokenizer, corpus.train, settings.sequence_length) for name, corpus in corpora.items()}
    torch.manual_seed(settings.seed)
    base = LlamaForCausalLM(_model_config(tokenizer, settings))
    mixture = torch.cat(list(tokens.values()))
    _train(base, "base", mixture, settings.base_steps, settings.base_learning_rate, settings, steps)
    _save(base, tokenizer, folder / "base")
    for name, own in tokens.items():
        expert = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        _train(expert, name, own, settings.expert_steps, settings.expert_learning_rate, settings, steps)
        _save(expert, tokenizer, folder / "experts" / name)


def train_tokenizer(texts: Sequence[str], settings: DemoSettings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END_OF_TEXT, pad_token=_END_OF_TEXT)


def pack(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int) -> torch.Tensor:
    """Joins texts by the end-of-text token and cuts them into samples `[B, length]`, without the last rest."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.eos_token_id]
    samples = len(ids) // length
    return torch.tensor(ids[: samples * length]).reshape(samples, length)


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, samples_BT: torch.Tensor, batch_size: int) -> float:
    """Mean cross-entropy of the next token, in nats."""
    model.eval()
    total = sum(float(_loss(model, batch)) * len(batch) for batch in samples_BT.split(batch_size))
    return total / len(samples_BT)


def _loss(model: LlamaForCausalLM, samples_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=samples_BT, use_cache=False).logits
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), samples_BT[:, 1:].flatten())


def _model_config(tokenizer: PreTrainedTokenizerFast, settings: DemoSettings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 8 // 3,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.hidden_size // _HEAD_SIZE,
        max_position_embeddings=settings.sequence_length,
        initializer_range=settings.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(
    model: LlamaForCausalLM,
    name: str,
    samples_BT: torch.Tensor,
    num_steps: int,
    learning_rate: float,
    settings: DemoSettings,
    steps: Steps,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    warmup = max(1, num_steps // 10)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    batches = _batches(samples_BT, settings)
    for _ in range(num_steps):
        loss = _loss(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        steps.done(f"training {name}", f"loss {loss.item():.2f}")
        assert math.isfinite(loss.item()), "the demo's training diverged"


def _batches(samples_BT: torch.Tensor, settings: DemoSettings) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        yield from samples_BT[torch.randperm(len(samples_BT), generator=generator)].split(settings.batch_size)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
