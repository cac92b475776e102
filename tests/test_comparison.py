"""What of the candidates is in a merge, from a sample of its tensors."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

from largemerge.comparison import ComparedTensor, Comparison


@pytest.mark.parametrize(("alike", "read"), [(7, 7), (16, 16), (64, 19)])
def test_of_many_tensors_of_one_shape_some_are_read(alike: int, read: int) -> None:
    reads: Counter[str] = Counter()

    def rows(number: int, factor: float, name: str, part: slice | None) -> torch.Tensor:
        reads[name] += 1
        whole = factor * torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
        return whole if part is None else whole[part]

    comparison = Comparison()
    for block in ("layers.0", "layers.1"):
        for number in range(alike):
            candidates = {"A": partial(rows, number, 1.0, "A"), "B": partial(rows, number + 1000, 1.0, "B")}
            output, base = partial(rows, number, 0.5, "output"), partial(rows, number, 0.0, "base")
            comparison.add(ComparedTensor(block, (6, 4), output, candidates, base))
    assert reads == dict.fromkeys(("A", "B", "output", "base"), 2 * read)
    found = comparison.finish()
    assert found.cosines["A"] == {"layers.0": 1.0, "layers.1": 1.0} and abs(found.means["B"][0] or 1) < 0.2
    assert found.distances["A"] == {"layers.0": 0.5, "layers.1": 0.5}, "A is twice the output"
