"""How large calibration data will be, from the configuration alone: where neither data nor tokenizer is at hand."""

from __future__ import annotations

from pathlib import Path

import torch

from largemerge.calibration.batches import CalibrationOutline, ModelNeeds
from largemerge.calibration.fields import needs_target
from largemerge.config_calibration import CalibrationConfig
from largemerge.errors import CalibrationError


def assume_calibration(
    config: CalibrationConfig,
    name: str,
    checkpoint: Path,
    needs: ModelNeeds,
    *,
    base: Path | None = None,
    trust_remote_code: bool = False,
) -> CalibrationOutline:
    """`num_samples` texts of `max_length` tokens; it takes the arguments of `outline_calibration`.

    Raises:
        CalibrationError: The model takes something else than texts.
    """
    assert config.num_samples is not None and config.max_length is not None and config.batch_size is not None
    if "input_ids" not in needs.forward_arguments or "pixel_values" in needs.forward_arguments:
        raise CalibrationError(f"candidate {name!r}: only models of text can be planned from {checkpoint}/config.json")
    arguments = ["input_ids", "attention_mask"]
    if needs_target(needs):
        arguments += ["decoder_attention_mask", "decoder_input_ids"]
    shape: tuple[int, ...] = (config.max_length,)
    inputs = {name: (shape, torch.int64) for name in arguments if name in needs.forward_arguments}
    return CalibrationOutline(config.num_samples, config.batch_size, inputs)
