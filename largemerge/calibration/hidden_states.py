"""Where hidden states wait between blocks: one copy, overwritten in place.

For every candidate and batch, the last output of each stack that has run: what the next block needs, and
what a decoder needs of its encoder. Outputs are kept whole (T5's blocks return position biases too).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

Output = Any


class HiddenStates:
    """Outputs by (candidate, batch) and stack, on one device.

    Args:
        device: Where they wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._outputs: dict[tuple[int, int], dict[int, Output]] = {}

    def get(self, candidate: int, batch: int, device: torch.device) -> dict[int, Output]:
        """The stored outputs of every stack that has run, on `device`."""
        return {stack: _moved(output, device) for stack, output in self._outputs.get((candidate, batch), {}).items()}

    def put(self, candidate: int, batch: int, stack: int, output: Output) -> None:
        """Stores the output of a block of `stack`; that of the block before it is gone."""
        self._outputs.setdefault((candidate, batch), {})[stack] = _moved(output, self.device)

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        leaves = tree_flatten(list(self._outputs.values()))[0]
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def _moved(output: Output, device: torch.device) -> Output:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, output)
