"""Candidates and calibration files on disk, made on the spot."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from cases import TOKENIZER, Case, MakeCase, touch, write_case
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_is_garbage() -> None:
    """Keeps the garbage collector away from what was imported, and from the thousands of tests.

    Every merge collects garbage before it measures memory. A look at all of it costs half a second each time.
    """
    gc.collect()
    gc.freeze()


def _is_open(file: Any) -> None:
    """Fails where `os.fsync` would."""
    os.fstat(file if isinstance(file, int) else file.fileno())


@pytest.fixture(scope="module", autouse=True)
def _writes_are_not_waited_for() -> Iterator[None]:
    """No machine loses its power here: what this process writes may reach the disk later.

    A merge waits for the disk a dozen times, some milliseconds each. Processes that tests start do wait.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _is_open)
        yield


@pytest.fixture
def make_case(tmp_path: Path) -> MakeCase:
    """Writes K candidates of an architecture and their data; more keywords are those of `write_case`."""

    def make(
        architecture: str = "llama",
        *,
        num_candidates: int = 2,
        num_samples: int = 24,
        padding: str = "right",
        dtype: torch.dtype = torch.float32,
        **more: Any,
    ) -> Case:
        kind = tiny_models.ARCHITECTURES[architecture].kind
        models = [tiny_models.perturbed(architecture, index).to(dtype) for index in range(num_candidates)]
        inputs = [tiny_models.inputs(kind, num_samples, index, padding) for index in range(num_candidates)]
        return write_case(tmp_path, models, inputs, **more)

    return make


@pytest.fixture
def base_case(make_case: MakeCase) -> Case:
    """Two llamas with a base, all with tokenizers; the base and the second have an image processor."""
    case = make_case(num_samples=4)
    tiny_models.build("llama", seed=7).save_pretrained(case.folder / "pretrained")
    case.config["base_model"] = str(case.folder / "pretrained")
    for name in ("model0", "model1", "pretrained"):
        touch(case.folder / name, *TOKENIZER)
    for name in ("pretrained", "model1"):
        touch(case.folder / name, "preprocessor_config.json")
    return case
