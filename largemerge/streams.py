"""A stream of its own on a GPU, for a thread that works beside the one that computes; on a CPU nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_cuda: Any = torch.cuda  # its streams and events carry no types


class SideStream:
    """What another thread queues on a GPU, in order with what the computing one does.

    Args:
        device: Of both; on the CPU every moment is `None`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _cuda.Stream(device) if device.type == "cuda" else None

    def computed(self) -> Any:
        """The moment when all that the computing stream has been told is done."""
        return None if self._stream is None else _recorded(_cuda.current_stream(self._device))

    @contextmanager
    def after(self, computed: Any) -> Iterator[None]:
        """Meanwhile this thread's work is queued on the side stream, after that moment."""
        if self._stream is None:
            yield
            return
        with _cuda.device(self._device), _cuda.stream(self._stream):
            self._stream.wait_event(computed)
            yield

    def arrived(self) -> Any:
        """The moment when all that the side stream has been told is done."""
        return None if self._stream is None else _recorded(self._stream)

    def wait(self, arrived: Any) -> None:
        """What is computed from now on waits for that moment."""
        if arrived is not None:
            _cuda.current_stream(self._device).wait_event(arrived)


def _recorded(stream: Any) -> Any:
    event = _cuda.Event()
    event.record(stream)
    return event
