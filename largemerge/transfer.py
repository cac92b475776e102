"""Bringing a candidate's tensors to the device that computes, while it is busy with something else.

On a GPU: through pinned memory, on a stream of their own; the stream that computes waits for them by an event.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from largemerge.weights import Tensors

_cuda: Any = torch.cuda  # its streams and events carry no types


class Transfer:
    """Moves tensors to a device.

    Args:
        device: That computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, tensors: Tensors) -> Callable[[], Tensors]:
        """Starts to move tensors, from any thread.

        Returns:
            To be called once, by the thread that computes: the tensors on the device. It keeps none of them.
        """
        if self._stream is None:
            waiting = [{name: tensor.to(self._device) for name, tensor in tensors.items()}]
            return waiting.pop
        pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        with torch.cuda.stream(self._stream):
            waiting = [{name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}]
            arrived = _cuda.Event()
            arrived.record(self._stream)

        def arrive() -> Tensors:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(arrived)
            moved = waiting.pop()
            for tensor in moved.values():
                tensor.record_stream(computing)  # its memory is not given to others before this stream is done
            pinned.clear()
            return moved

        return arrive
