"""How large the demo is: texts, model, training, calibration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Everything that decides what the demo's models become; after a change they are trained anew.

    With the defaults the training takes about a minute on one CPU core.
    """

    seed: int = 0
    """Of the split of the texts, the initial weights and the order of training."""
    train_chars: int = 300_000
    """Training text of each kind, or what there is, if that is half of it."""
    calibration_chars: int = 32_000
    """Calibration text of each kind, for the merges."""
    held_out_chars: int = 24_000
    """Text of each kind that no model is trained or calibrated on."""
    vocabulary_size: int = 2048
    """Of the tokenizer, which is trained on all training texts."""
    hidden_size: int = 96
    """Width of the model; a multiple of 32."""
    num_layers: int = 4
    """Blocks of the model."""
    sequence_length: int = 64
    """Tokens of a training, calibration or held-out sample."""
    batch_size: int = 8
    """Samples of a training step."""
    base_steps: int = 600
    """Training steps on all kinds."""
    expert_steps: int = 150
    """Further training steps of each expert, on its own kind."""
    learning_rate: float = 6e-3
    """Peak, of base and experts."""
    calibration_samples: int = 128
    """Samples of each kind that a merge looks at."""
