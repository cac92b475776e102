"""Batches: grouped by length, padded on the right, known by a fingerprint."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import torch

from largemerge.calibration.batches import Batch, Sample, fingerprint_batches, group_samples, pad_samples


def test_groups_are_sorted_by_length_and_stable():
    lengths = [2, 3, 1, 3, 2]
    samples = [Sample(row, {"input_ids": [1] * length}) for row, length in enumerate(lengths)]

    groups = group_samples(samples, 2)

    assert [[sample.row for sample in group] for group in groups] == [[1, 3], [0, 4], [2]]


def test_samples_without_text_keep_their_order():
    samples = [Sample(row, {}) for row in range(3)]
    assert [[sample.row for sample in group] for group in group_samples(samples, 2)] == [[0, 1], [2]]


def test_padding_is_on_the_right_and_masked():
    samples = [
        Sample(0, {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, [0, 1, 1]),
        Sample(1, {"input_ids": [8], "attention_mask": [1]}, [1]),
    ]

    batch = pad_samples(samples, {"input_ids": 3})

    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.loss_mask is not None and batch.loss_mask.dtype == torch.bool
    assert batch.loss_mask.tolist() == [[False, True, True], [True, False, False]]
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch.inputs.values())


def test_fingerprint_sees_every_change():
    batch = Batch({"input_ids": torch.tensor([[1, 2], [3, 4]]), "scale": torch.ones(2, dtype=torch.bfloat16)}, None)
    changed = [
        replace(batch, inputs={**batch.inputs, "input_ids": torch.tensor([[1, 2], [3, 5]])}),
        replace(batch, inputs={**batch.inputs, "input_ids": torch.tensor([[1, 2, 3, 4]])}),
        replace(batch, inputs={**batch.inputs, "input_ids": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)}),
        replace(batch, inputs={"position_ids": batch.inputs["input_ids"], "scale": batch.inputs["scale"]}),
        replace(batch, loss_mask=torch.ones(2, 2, dtype=torch.bool)),
        replace(batch, loss_mask=torch.zeros(2, 2, dtype=torch.bool)),
    ]

    fingerprints = [fingerprint_batches([batch]), *(fingerprint_batches([other]) for other in changed)]

    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprint_batches([batch, changed[0]]) != fingerprint_batches([changed[0], batch])
    reordered = replace(batch, inputs=dict(reversed(batch.inputs.items())))
    assert fingerprint_batches([reordered]) == fingerprint_batches([batch])


def test_import_leaves_datasets_alone():
    code = "import sys, largemerge.calibration; print({'datasets', 'pyarrow'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
