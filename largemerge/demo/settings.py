"""How large the demo is: texts, model, training, merge."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Everything that decides what the demo's models become; changing any of it trains them anew.

    The defaults take about a minute on two CPU cores.
    """

    seed: int = 0
    """Of the split of the texts, the initial weights and the order of training."""
    train_chars: int = 150_000
    """Training text of each kind."""
    calibration_chars: int = 36_000
    """Calibration text of each kind."""
    held_out_chars: int = 24_000
    """Text of each kind that no model is trained or calibrated on."""
    vocabulary_size: int = 2048
    """Of the byte-level BPE tokenizer, trained on all training texts."""
    hidden_size: int = 96
    """Width of the model."""
    num_layers: int = 4
    """Blocks of the model."""
    sequence_length: int = 64
    """Tokens of a training or calibration sample."""
    batch_size: int = 8
    """Samples of a training step."""
    base_steps: int = 400
    """Training steps on all kinds."""
    base_learning_rate: float = 6e-3
    """Peak, for the base."""
    expert_steps: int = 150
    """Further training steps of each expert, on its own kind."""
    expert_learning_rate: float = 2e-3
    """Peak, for the experts."""
