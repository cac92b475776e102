"""Which device a merge computes on.

A stream of its own on a GPU, for a thread that works beside the one that computes; on a CPU nothing of it.

Bringing a candidate's tensors to the device that computes, while it is busy with something else.

On a GPU: through pinned memory, on a stream of their own; the stream that computes waits for them by an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from largemerge.checkpoint.tensor_info import Tensors
from largemerge.errors import LargemergeError

CPU = torch.device("cpu")
_SIZE = 1024


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        LargemergeError: If torch knows no such device, or cannot use it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise LargemergeError(f"--device {device}: {first_line}; expected auto, cpu or cuda:0") from None
    return chosen


def warm_up(device: torch.device, compute: Callable[[], None]) -> None:
    """Loads what torch loads late on a GPU: libraries and kernels hold host memory, of which a plan is to know.

    Args:
        device: That will compute; on the CPU nothing happens.
        compute: Something small of all that will be computed.
    """
    if device.type != "cuda":
        return
    with suppress(torch.OutOfMemoryError):  # the plan will say what is missing
        compute()
    torch.cuda.empty_cache()


def compute_a_little(device: torch.device) -> None:
    """What a regression merge does on a GPU: attention, the kinds of products in Gram matrices, solves."""
    x_NN = torch.rand(_SIZE, _SIZE, device=device)
    half_NN = x_NN.to(torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16)
    heads = half_NN.view(1, 8, _SIZE, -1)
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    torch.nn.functional.silu(half_NN).softmax(dim=-1)
    torch.mm(half_NN, half_NN)
    product_NN = torch.mm(half_NN, half_NN, out_dtype=torch.float32)
    gram_NN = product_NN @ product_NN.T
    gram_NN.diagonal().add_(gram_NN.trace())
    for exact_NN in (gram_NN, gram_NN.double()):
        lower_NN, _ = torch.linalg.cholesky_ex(exact_NN)
        torch.cholesky_solve(exact_NN, lower_NN).to(CPU)


_cuda: Any = torch.cuda  # its streams and events carry no types


class SideStream:
    """What another thread queues on a GPU, in order with what the computing one does.

    Args:
        device: Of both; on the CPU every moment is `None`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _cuda.Stream(device) if device.type == "cuda" else None

    def record(self) -> Any:
        """The moment when all that the computing stream has been told is done."""
        return None if self._stream is None else _recorded(_cuda.current_stream(self._device))

    @contextmanager
    def wait_then_run(self, record: Any) -> Iterator[None]:
        """Meanwhile this thread's work is queued on the side stream, after that moment."""
        if self._stream is None:
            yield
            return
        with _cuda.device(self._device), _cuda.stream(self._stream):
            self._stream.wait_event(record)
            yield

    def done(self) -> Any:
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


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Meanwhile every worker computes alone: pieces are small, and there are workers enough."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
