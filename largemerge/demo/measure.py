"""Losses of all models on held-out text, by kind of text: measured, as a table, as a picture.

The plain average is made here, in memory: it is what the regression methods are to beat. The picture is plain SVG: a
panel for each kind of text, a row for each model, a dot where its loss is. It has no background, and colours that can
be read on white and on black.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from rich.table import Table
from rich.text import Text
from transformers import LlamaForCausalLM

from largemerge.checkpoint.side_files import auto_tokenizer
from largemerge.demo.corpora import Corpus, DemoSettings
from largemerge.demo.train import next_token_loss, pack

AVERAGE = "average"
MEAN = "mean"
TIE_NATS = 0.005
"""Merges closer than this count as equally good: the held-out text is too short to tell them apart."""

Losses = dict[str, dict[str, float]]
"""Nats per token by model and kind of text; the last kind is `MEAN`."""

# The picture, in pixels and colours
_LABEL_WIDTH = 124
_PANEL_WIDTH = 176
_PANEL_GAP = 18
_TOP = 84
_ROW_HEIGHT = 30
_PADDING = 12
_VALUE_WIDTH = 54

_TEXT = "#75808c"
_LINE = "#8c959f"
_OTHERS = "#8c959f"
_MERGES = ("#d9822b", "#3b82f6", "#16a37b", "#b565d9")


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
        experts: Folders by label.
        merges: Folders by label.
        corpora: Texts by kind.
        settings: Length of the samples.

    Returns:
        The losses of base, experts, their plain average and merges, in this order.
    """
    tokenizer = auto_tokenizer(base)
    samples = {kind: pack(tokenizer, corpus.held_out, settings.sequence_length) for kind, corpus in corpora.items()}
    losses: Losses = {"base": _losses(_load(base), samples)}
    loaded = {label: _load(folder) for label, folder in experts.items()}
    losses |= {label: _losses(model, samples) for label, model in loaded.items()}
    losses[AVERAGE] = _losses(_average(list(loaded.values())), samples)
    return losses | {label: _losses(_load(folder), samples) for label, folder in merges.items()}


def best(losses: Mapping[str, Mapping[str, float]], among: Sequence[str], kind: str) -> frozenset[str]:
    """Finds the models with the least loss on a kind of text; several where they tie."""
    least = min(losses[label][kind] for label in among)
    return frozenset(label for label in among if losses[label][kind] < least + TIE_NATS)


def losses_table(losses: Losses, merges: Sequence[str]) -> Table:
    """Makes the table for the terminal: a row for each model, the best merge or merges highlighted.

    Args:
        losses: The losses of all models.
        merges: Labels of the models that are merges.
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


def losses_svg(losses: Mapping[str, Mapping[str, float]], merges: Sequence[str]) -> str:
    """Draws the losses as an SVG document.

    Args:
        losses: Nats per token by model and kind of text; every model has the same kinds.
        merges: Labels of the models to show in colour; the best of them have their values in bold.
    """
    kinds = list(next(iter(losses.values())))
    width = _LABEL_WIDTH + len(kinds) * (_PANEL_WIDTH + _PANEL_GAP)
    height = _TOP + len(losses) * _ROW_HEIGHT + 2 * _PADDING
    colours = dict(zip(merges, _MERGES, strict=False))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13" fill="{_TEXT}">',
        "<title>Loss on held-out text</title>",
        _text(_PADDING, 26, "Loss on held-out text", size=17, bold=True),
        _text(_PADDING, 46, "nats per token; further left is better; every panel has its own scale"),
    ]
    for row, label in enumerate(losses):
        colour = colours.get(label, _TEXT)
        parts.append(_text(_PADDING, _row_y(row) + 4, label, colour=colour, bold=label in colours))
    for column, kind in enumerate(kinds):
        values = {label: row[kind] for label, row in losses.items()}
        parts += _panel(
            _LABEL_WIDTH + column * (_PANEL_WIDTH + _PANEL_GAP), kind, values, colours, best(losses, merges, kind)
        )
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    left: int, kind: str, values: Mapping[str, float], colours: Mapping[str, str], bold: Collection[str]
) -> list[str]:
    low, high = min(values.values()), max(values.values())
    inner = _PANEL_WIDTH - 2 * _PADDING
    bottom = _row_y(len(values) - 1) + _ROW_HEIGHT / 2 + _PADDING / 2
    parts = [
        _text(left + _PADDING, _TOP - 8, kind, bold=True),
        f'<rect x="{left}" y="{_TOP}" width="{_PANEL_WIDTH}" height="{bottom - _TOP:g}" rx="5" fill="none"'
        f' stroke="{_LINE}" stroke-opacity="0.45"/>',
    ]
    for row, (label, value) in enumerate(values.items()):
        x = left + _PADDING + inner * (value - low) / ((high - low) or 1.0)
        y = _row_y(row)
        colour = colours.get(label, _OTHERS)
        if row % 2 == 0:
            parts.append(
                f'<rect x="{left}" y="{y - _ROW_HEIGHT / 2:g}" width="{_PANEL_WIDTH}" height="{_ROW_HEIGHT}"'
                f' fill="{_LINE}" fill-opacity="0.13"/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{y:g}" r="5.5" fill="{colour}"/>')
        fits = x + _VALUE_WIDTH < left + _PANEL_WIDTH
        parts.append(
            _text(
                x + 10 if fits else x - 10,
                y + 4,
                f"{value:.3f}",
                colour=colours.get(label, _TEXT),
                size=12,
                bold=label in bold,
                anchor="start" if fits else "end",
            )
        )
    return parts


def _row_y(row: int) -> float:
    return _TOP + _PADDING / 2 + (row + 0.5) * _ROW_HEIGHT


def _text(
    x: float,
    y: float,
    text: str,
    *,
    colour: str = _TEXT,
    size: int = 13,
    bold: bool = False,
    anchor: str = "start",
) -> str:
    weight = ' font-weight="700"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{escape(text)}</text>"
    )
