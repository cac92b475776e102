"""What each model loses on text that none has seen, kind by kind, and the table of it.

The plain average is made here, in memory: it is what the regression methods are to beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, LlamaForCausalLM

from largemerge.demo.corpora import Corpus
from largemerge.demo.settings import DemoSettings
from largemerge.demo.train import next_token_loss, pack

AVERAGE = "average"
MEAN = "mean"
TIE_NATS = 0.005
"""Merges closer than this count as equally good: the held-out text is too short to tell them apart."""

Losses = dict[str, dict[str, float]]
"""Model to kind of text to nats per token; the last column is `MEAN`."""


def measure(
    base: Path,
    experts: Mapping[str, Path],
    merges: Mapping[str, Path],
    corpora: Mapping[str, Corpus],
    settings: DemoSettings,
) -> Losses:
    """Loads every model and measures it on the held-out text of every kind.

    Args:
        base: Folder of the base.
        experts: Label to folder.
        merges: Label to folder.
        corpora: Kind to its texts.
        settings: Length and number of the samples.

    Returns:
        The losses of base, experts, their plain average and merges, in this order.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = {kind: pack(tokenizer, corpus.held_out, settings.sequence_length) for kind, corpus in corpora.items()}
    losses: Losses = {"base": _losses(_load(base), samples)}
    loaded = {label: _load(folder) for label, folder in experts.items()}
    losses |= {label: _losses(model, samples) for label, model in loaded.items()}
    losses[AVERAGE] = _losses(_average(list(loaded.values())), samples)
    return losses | {label: _losses(_load(folder), samples) for label, folder in merges.items()}


def best(losses: Mapping[str, Mapping[str, float]], among: Sequence[str], kind: str) -> frozenset[str]:
    """The models with the least loss on a kind of text; several where they tie."""
    least = min(losses[label][kind] for label in among)
    return frozenset(label for label in among if losses[label][kind] < least + TIE_NATS)


def losses_table(losses: Losses, merges: Sequence[str]) -> Table:
    """The losses for the terminal: a row per model, the best merge or merges highlighted.

    Args:
        losses: Of all models.
        merges: Which of them are merges.
    """
    kinds = list(next(iter(losses.values())))
    winners = {kind: best(losses, merges, kind) for kind in kinds}
    table = Table(
        title="Loss on held-out text",
        caption=f"nats per token, less is better\n← the best merge; merges within {TIE_NATS} tie",
    )
    table.add_column("model")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for label, row in losses.items():
        if label == merges[0]:
            table.add_section()
        winner = label in winners[MEAN]
        cells = [Text(f"{value:.3f}", "bold" if label in winners[kind] else "") for kind, value in row.items()]
        table.add_row(f"{label} ←" if winner else label, *cells, style="green" if winner else None)
    return table


def _load(folder: Path) -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@torch.inference_mode()
def _losses(model: LlamaForCausalLM, samples: Mapping[str, torch.Tensor]) -> dict[str, float]:
    model.train(False)
    losses = {kind: float(next_token_loss(model, samples_BT)) for kind, samples_BT in samples.items()}
    return losses | {MEAN: sum(losses.values()) / len(losses)}


@torch.inference_mode()
def _average(models: Sequence[LlamaForCausalLM]) -> LlamaForCausalLM:
    states = [model.state_dict() for model in models]
    average = LlamaForCausalLM(models[0].config)
    average.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    return average
