"""Calibration inputs that wait on disk: pixels and the like, which take more room than hidden states.

Floating-point inputs are written to a file that nobody sees and mapped into memory: the kernel reads what is used and
drops what is not, so they are no anonymous memory of the process.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from largemerge.calibration.batches import Batch, CalibrationSet
from largemerge.checkpoint.data_file import byte_view


def spooled(calibration: CalibrationSet, folder: Path) -> CalibrationSet:
    """The same data, its floating-point inputs mapped from a file in `folder`.

    The file has no name: it is gone when the process is, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return replace(calibration, batches=tuple(_spooled(batch, folder) for batch in calibration.batches))


def _spooled(batch: Batch, folder: Path) -> Batch:
    inputs = {name: _mapped(x, folder) if x.is_floating_point() else x for name, x in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def _mapped(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".calibration-") as stream:
        stream.write(byte_view(tensor.contiguous().reshape(-1).view(torch.uint8)))
        stream.flush()
        flat = torch.from_file(stream.name, shared=False, size=math.prod(tensor.shape), dtype=tensor.dtype)
    return flat.reshape(tensor.shape)
