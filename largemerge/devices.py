"""The device that a merge computes on, and work that runs beside the computing: streams, copies, threads.

On a GPU, a thread that works beside the computing one queues its work on a stream of its own (`SideStream`). Tensors
come from pinned memory on another (`Transfer`). What depends on them waits for an event, not for the whole device. On
a CPU, all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from largemerge.checkpoint.tensor_info import Tensors
from largemerge.errors import LargemergeError, shorten
from largemerge.text_files import first_line

CPU = torch.device("cpu")
_SIZE = 1024  # of the matrices that load a GPU's kernels
_cuda: Any = torch.cuda  # its streams and events carry no types


def choose_device(device: str) -> torch.device:
    """Returns the device of that name; `auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        LargemergeError: If torch knows no such device, or cannot use it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except Exception:  # torch lists twenty kinds of devices
        raise LargemergeError(f"--device {shorten(device, 200)}: not known; expected auto, cpu or cuda:0") from None
    try:
        torch.empty(1, device=chosen).item()  # the meta device has no numbers
    except Exception as error:  # backends that are not installed raise what they like
        raise LargemergeError(
            f"--device {shorten(device, 200)}: torch cannot use it here ({first_line(error, 200)}); "
            "expected auto, cpu or cuda:0"
        ) from None
    return chosen


def warm_up(device: torch.device, compute: Callable[[], None]) -> None:
    """Makes torch load its libraries and kernels for a GPU: they hold host memory, which a plan must count.

    Args:
        device: The device that will compute; nothing happens for a CPU.
        compute: Runs one small operation of every kind that will be needed.
    """
    if device.type != "cuda":
        return
    with suppress(torch.OutOfMemoryError):  # the plan will say what is missing
        compute()
    torch.cuda.empty_cache()


def compute_a_little(device: torch.device) -> None:
    """Runs one small operation of every kind in a regression merge: attention, products of Gram matrices, solves."""
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


class SideStream:
    """A CUDA stream for a thread that works beside the computing one; the two wait for each other by events.

    Args:
        device: The device of both; on a CPU there is no stream, and every event is `None`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _cuda.Stream(device) if device.type == "cuda" else None

    def record(self) -> Any:
        """Records an event on the computing stream, behind all that is queued there now."""
        return None if self._stream is None else _recorded(_cuda.current_stream(self._device))

    @contextmanager
    def wait_then_run(self, event: Any) -> Iterator[None]:
        """Queues what this thread does inside on the side stream, behind an event of the computing one."""
        if self._stream is None:
            yield
            return
        with _cuda.device(self._device), _cuda.stream(self._stream):
            self._stream.wait_event(event)
            yield

    def done(self) -> Any:
        """Records an event on the side stream, behind all that is queued there now."""
        return None if self._stream is None else _recorded(self._stream)

    def wait(self, event: Any) -> None:
        """Makes the computing stream wait for an event, before all that is queued there from now on."""
        if event is not None:
            _cuda.current_stream(self._device).wait_event(event)


def _recorded(stream: Any) -> Any:
    event = _cuda.Event()
    event.record(stream)
    return event


class Transfer:
    """Copies a candidate's tensors to the device while it computes.

    Args:
        device: The device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, tensors: Tensors) -> Callable[[], Tensors]:
        """Starts to copy tensors, from any thread.

        Returns:
            A function for the computing thread, to be called once: returns the tensors on the device, keeps none.
        """
        if self._stream is None:
            waiting = [{name: tensor.to(self._device) for name, tensor in tensors.items()}]
            return waiting.pop
        pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        with torch.cuda.stream(self._stream):
            waiting = [{name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}]
            event = _recorded(self._stream)

        def arrive() -> Tensors:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(event)
            moved = waiting.pop()
            for tensor in moved.values():
                tensor.record_stream(computing)  # its memory is not used again before this stream is done
            pinned.clear()
            return moved

        return arrive


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Makes every worker compute with a single thread meanwhile: there are workers enough, and their work is small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
