"""Calibration data: a candidate's files become the batches that its model's forward takes.

Regression methods run each candidate on a little of its own data, to see which directions its linears use.
`load_calibration` reads that data; `outline_calibration` says beforehand, without reading it, how large it will be.

    load.py           the ways in, as lists of steps: read, outline, outline from the configuration alone
    survey.py         what the data will be, found out in bounded time, for plans
    config.py         settings
    sources.py        a file, a folder or a Hub id becomes a table
    columns.py        columns and rows of the table become samples
    tokenizer.py      the checkpoint's tokenizer and chat template
    text.py           texts become tokens and loss masks
    images.py         images become pixels
    pretokenized.py   .safetensors files, used as they are
    batches.py        the result: batches of samples, and their fingerprint
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
