"""Tiny real models: a tokenizer, a Llama trained on all kinds of text (the base), one expert per kind.

Plain next-token training (AdamW, warm-up, linear decay) on packed samples. An expert goes on from the
base with its own kind only and changes only its blocks, where merging methods differ: embeddings, final
norm and head stay the base's. Everything is saved as `from_pretrained` reads it.

Shapes: B samples, T tokens of a sample, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from largemerge.demo.corpora import Corpus, DemoSettings
from largemerge.progress import StepBar

_END_OF_TEXT = "<|end|>"
_HEAD_SIZE = 32


def train_all(folder: Path, corpora: Mapping[str, Corpus], settings: DemoSettings) -> None:
    """Trains base and experts and saves them as `folder/base` and `folder/experts/KIND`."""
    tokenizer = _train_tokenizer([text for corpus in corpora.values() for text in corpus.train], settings)
    samples = {kind: pack(tokenizer, corpus.train, settings.sequence_length) for kind, corpus in corpora.items()}
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(_model_config(tokenizer, settings))
    num_steps = settings.base_steps + len(samples) * settings.expert_steps
    with StepBar(num_steps, Console(stderr=True)) as bar:
        _train(model, "base", torch.cat(list(samples.values())), settings.base_steps, settings, bar)
        _save(model, tokenizer, folder / "base")
        for kind, own in samples.items():
            expert = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
            for name, parameter in expert.named_parameters():
                parameter.requires_grad_(name.startswith("model.layers."))
            _train(expert, f"{kind} expert", own, settings.expert_steps, settings, bar)
            _save(expert, tokenizer, folder / "experts" / kind)


def pack(tokenizer: Any, texts: Sequence[str], length: int) -> torch.Tensor:
    """Joins texts by the end-of-text token and cuts them into samples.

    Args:
        tokenizer: The demo's tokenizer.
        texts: Documents.
        length: T.

    Returns:
        Token ids `[B, T]`; what does not fill a last sample is left out.
    """
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.eos_token_id]
    num_samples = len(ids) // length
    return torch.tensor(ids[: num_samples * length]).reshape(num_samples, length)


def next_token_loss(model: LlamaForCausalLM, samples_BT: torch.Tensor) -> torch.Tensor:
    """Computes the mean cross-entropy of the next token, in nats."""
    logits_BTV = model(input_ids=samples_BT, use_cache=False).logits
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), samples_BT[:, 1:].flatten())


def _train_tokenizer(texts: Sequence[str], settings: DemoSettings) -> Any:
    # Of bytes, so that no text is unknown to it.
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
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=tokenizer, eos_token=_END_OF_TEXT, pad_token=_END_OF_TEXT)


def _model_config(tokenizer: Any, settings: DemoSettings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 8 // 3,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.hidden_size // _HEAD_SIZE,
        max_position_embeddings=settings.sequence_length,
        # The usual 0.02 suits a width of thousands; at this width nothing is learned for the first minute.
        initializer_range=settings.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(
    model: LlamaForCausalLM, what: str, samples_BT: torch.Tensor, num_steps: int, settings: DemoSettings, bar: StepBar
) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, num_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warmup, (num_steps - done) / max(1, num_steps - warmup))
    )
    batches = _batches(samples_BT, settings)
    model.train()
    for _ in range(num_steps):
        loss = next_token_loss(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.advance(f"training {what}, loss {loss.item():.2f}")


def _batches(samples_BT: torch.Tensor, settings: DemoSettings) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(len(samples_BT), generator=generator)
        for start in range(0, len(order), settings.batch_size):
            yield samples_BT[order[start : start + settings.batch_size]]


def _save(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
