"""Calibration data: a candidate's files become the batches that its model's forward takes.

Regression methods ask each candidate to show, on a little of its own data, which directions its
linears use. `load_calibration` reads that data; `outline_calibration` says beforehand, without
reading it, how large it will be.

    load.py           the two functions, as a list of steps
    batches.py        what comes out: batches, and their fingerprint
    sources.py        a file, a folder or a Hub id becomes a table
    fields.py         which columns are text, target, image and mask
    draw.py           which rows of it are drawn, and whether they hold what they should
    tokenizer.py      the checkpoint's tokenizer
    text.py           tokens (chat.py: of conversations)
    images.py         pixels
    tensors.py        .safetensors files, used as they are
    assumed.py        the size of data that is not at hand

What becomes of them in a merge: `rows.py` (which tokens count), `hidden_states.py` (where they wait).
"""

from largemerge.calibration.batches import Batch, CalibrationOutline, CalibrationSet, ForwardSignature
from largemerge.calibration.load import load_calibration, outline_calibration, outline_from_config

__all__ = [
    "Batch",
    "CalibrationOutline",
    "CalibrationSet",
    "ForwardSignature",
    "load_calibration",
    "outline_calibration",
    "outline_from_config",
]
