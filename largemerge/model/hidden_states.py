"""Hidden states between blocks: one copy, overwritten in place, on the device or offloaded to host memory or disk.

    block l ──► HiddenStates.put ──► Store: MemoryStore or DiskStore ──► HiddenStates.get ──► block l+1

For every candidate and batch, the last output of each stack that has run is kept: what the next block needs, and
what a decoder needs of its encoder. Outputs are kept whole (T5's blocks return position biases too).

Threads prefetch from the disk and write to it in the background, so that a run needs memory for a few batches, however
many there are. In 8 bits (bitsandbytes' blockwise quantisation, about 1 % relative error of a hidden state) they take
half of bfloat16's room; the merged weights then differ slightly, see benchmarks/README.md.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from largemerge.checkpoint.direct_io import byte_view, read_tensor
from largemerge.errors import MergeError
from largemerge.model.forward import Output

Key = tuple[str, int, int, int]
"""Stream, data set, batch, stack: two models may each have hidden states of their own on the same data.

What is kept inside a block, from linear to linear, is a stream of its own, under stack 0.
"""

_MAX_WRITES = 2  # under way to the disk at once
_BLOCK_SIZE = 64  # elements that share a scale in 8 bits; never of two tokens, or a padded one's NaN would spread


class Store(Protocol):
    """Keeps lists of tensors by key.

    Attributes:
        num_bytes: Bytes kept now.
    """

    num_bytes: int

    def put(self, key: Key, tensors: list[torch.Tensor]) -> None:
        """Keeps tensors in place of those that `key` had. Nobody else may change them any more."""

    def get(self, key: Key) -> list[torch.Tensor]:
        """Returns the tensors of `key`; they must not be changed."""

    def prefetch(self, key: Key) -> None:
        """Starts to read `key`, which will be asked for soon."""

    def forget(self, key: Key) -> None:
        """Frees the tensors of `key`, or gives their room to what is put there next."""

    def close(self) -> None:
        """Frees everything."""


class MemoryStore:
    """Keeps tensors on a device, or in host memory: pinned, where a GPU computes.

    Args:
        device: The device that keeps them.
        computes_on: The device that makes and uses them.
    """

    def __init__(self, device: torch.device, computes_on: torch.device) -> None:
        self.num_bytes = 0
        self._device = device
        self._pinned = computes_on.type == "cuda" and device.type == "cpu"
        self._kept: dict[Key, list[torch.Tensor]] = {}

    def put(self, key: Key, tensors: list[torch.Tensor]) -> None:
        """See `Store`."""
        before = self._kept.get(key, [])
        if self._pinned:
            # Copies to and from pinned memory are queued on the stream that computes, so they cannot overtake it.
            tensors = [_pinned_copy(tensor, old) for tensor, old in _paired(tensors, before)]
        else:
            tensors = [tensor.to(self._device) for tensor in tensors]
        self.num_bytes += sum(tensor.nbytes for tensor in tensors) - sum(tensor.nbytes for tensor in before)
        self._kept[key] = tensors

    def get(self, key: Key) -> list[torch.Tensor]:
        """See `Store`."""
        return self._kept[key]

    def prefetch(self, key: Key) -> None:
        """See `Store`; there is nothing to read."""

    def forget(self, key: Key) -> None:
        """See `Store`."""
        self.num_bytes -= sum(tensor.nbytes for tensor in self._kept.pop(key))

    def close(self) -> None:
        """See `Store`."""
        self._kept.clear()


def _paired(
    tensors: Sequence[torch.Tensor], before: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Pairs each tensor with the one in its place, if its memory can be used again."""
    fits = [a.shape == b.shape and a.dtype == b.dtype for a, b in zip(tensors, before, strict=False)]
    fits += [False] * (len(tensors) - len(fits))
    return [(tensor, before[i] if fits[i] else None) for i, tensor in enumerate(tensors)]


def _pinned_copy(tensor: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) if old is None else old
    return target.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class _FileRange:
    """Where a list of tensors lies in the file.

    Attributes:
        offset: First byte of the first tensor; the others follow.
        shapes: Shape of each tensor.
        dtypes: Dtype of each tensor.
        capacity: Number of bytes that may be written there.
    """

    offset: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    capacity: int

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]


class DiskStore:
    """Keeps tensors in one file without a name, which is gone when the process ends, however it ends.

    Args:
        folder: Folder on the disk that has the room.
    """

    def __init__(self, folder: Path) -> None:
        self.num_bytes = 0
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".hidden-states-", buffering=0)  # noqa: SIM115 (`close`)
        self._reads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="largemerge-hidden-read")
        self._writes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="largemerge-hidden-write")
        self._ranges: dict[Key, _FileRange] = {}
        self._free: list[tuple[int, int]] = []  # first byte, and the one after the last, in order
        self._reading: dict[Key, Future[list[torch.Tensor]]] = {}
        self._writing: dict[Key, tuple[Future[None], list[torch.Tensor]]] = {}

    def put(self, key: Key, tensors: list[torch.Tensor]) -> None:
        """See `Store`; returns before the tensors are on disk."""
        tensors = [tensor.cpu().contiguous() for tensor in tensors]
        shapes, dtypes = tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors)
        before = self._ranges.get(key)
        size = sum(tensor.nbytes for tensor in tensors)
        if before is None or size > before.capacity:
            if before is not None:
                self._release(before)
            place = _FileRange(self._room(size), shapes, dtypes, size)
        else:
            place = _FileRange(before.offset, shapes, dtypes, before.capacity)
        self._reading.pop(key, None)
        while len(self._writing) >= _MAX_WRITES or key in self._writing:
            self._writing.pop(next(iter(self._writing)))[0].result()
        self._ranges[key] = place
        self._writing[key] = (self._writes.submit(self._write, place, tensors), tensors)

    def get(self, key: Key) -> list[torch.Tensor]:
        """See `Store`."""
        if key in self._writing:
            return self._writing[key][1]
        self.prefetch(key)
        return self._reading.pop(key).result()

    def prefetch(self, key: Key) -> None:
        """See `Store`."""
        if key in self._ranges and key not in self._writing and key not in self._reading:
            self._reading[key] = self._reads.submit(self._read, self._ranges[key])

    def forget(self, key: Key) -> None:
        """See `Store`."""
        self._reading.pop(key, None)
        if key in self._writing:
            self._writing.pop(key)[0].result()
        self._release(self._ranges.pop(key))

    def _room(self, size: int) -> int:
        """Finds the first free range that is large enough, else the end of the file; returns its first byte."""
        for start, end in self._free:
            if end - start >= size:
                self._free.remove((start, end))
                if end - start > size:
                    self._free = sorted([*self._free, (start + size, end)])
                return start
        start = self.num_bytes
        self.num_bytes += size
        return start

    def _release(self, place: _FileRange) -> None:
        """Gives a range back, joined to free ones beside it: what takes its place may be larger."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted([*self._free, (place.offset, place.offset + place.capacity)]):
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self._free = joined

    def close(self) -> None:
        """See `Store`."""
        self._reads.shutdown(cancel_futures=True)
        self._writes.shutdown(cancel_futures=True)
        self._file.close()

    def _write(self, place: _FileRange, tensors: list[torch.Tensor]) -> None:
        offset = place.offset
        try:
            for tensor in tensors:
                data = byte_view(tensor.reshape(-1).view(torch.uint8))
                done = 0
                while done < len(data):
                    done += os.pwrite(self._file.fileno(), data[done : done + (1 << 30)], offset + done)
                offset += len(data)
        except OSError as error:
            raise MergeError(f"{self._folder}: hidden states cannot be written: {error}") from None

    def _read(self, place: _FileRange) -> list[torch.Tensor]:
        tensors, offset = [], place.offset
        for shape, dtype, size in zip(place.shapes, place.dtypes, place.sizes, strict=True):
            tensors.append(read_tensor(self._file.fileno(), offset, dtype, shape))
            offset += size
        return tensors


class HiddenStates:
    """The last output of every stack, by stream, data set and batch. A context manager.

    Args:
        store: Keeps the tensors.
        eight_bit: Whether floating-point tensors are kept in 8 bits.
    """

    def __init__(self, store: Store, *, eight_bit: bool = False) -> None:
        self._store = store
        self._eight_bit = eight_bit
        self._trees: dict[Key, tuple[list[Any], TreeSpec]] = {}
        self._stacks: list[int] = []

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    @property
    def num_bytes(self) -> int:
        """Bytes that the store keeps now."""
        return self._store.num_bytes

    def put(self, stream: str, dataset: int, batch: int, stack: int, output: Output) -> None:
        """Stores the output of a block of `stack` in place of that of the block before it."""
        leaves, spec = tree_flatten(output)
        tensors: list[torch.Tensor] = []
        kept: list[Any] = []  # for each leaf: what is no tensor, or a `_Stored`
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                kept.append(leaf)
                continue
            in_eight_bits = self._eight_bit and leaf.is_floating_point() and leaf.dim()
            # Laid out as they would come back from disk: on a GPU, strides choose between kernels that round otherwise.
            parts = _quantized(leaf) if in_eight_bits else [leaf.detach().contiguous()]
            kept.append(_Stored(len(parts), leaf.dtype, leaf.shape))
            tensors += parts
        key = (stream, dataset, batch, stack)
        self._trees[key] = (kept, spec)
        if stack not in self._stacks:
            self._stacks = sorted([*self._stacks, stack])
        self._store.put(key, tensors)

    def get(self, stream: str, dataset: int, batch: int, device: torch.device) -> dict[int, Output]:
        """Returns the stored output of every stack that has run, on `device`."""
        return {key[3]: self._output(key, device) for key in self._keys(stream, dataset, batch)}

    def prefetch(self, stream: str, dataset: int, batch: int) -> None:
        """Starts to read a batch that comes next."""
        for key in self._keys(stream, dataset, batch):
            self._store.prefetch(key)

    def forget(self, stream: str, dataset: int) -> None:
        """Forgets all that a stream has of a data set; the memory is freed, room on a disk is used again."""
        for key in [key for key in self._trees if key[:2] == (stream, dataset)]:
            del self._trees[key]
            self._store.forget(key)

    def _keys(self, stream: str, dataset: int, batch: int) -> list[Key]:
        return [key for stack in self._stacks if (key := (stream, dataset, batch, stack)) in self._trees]

    def _output(self, key: Key, device: torch.device) -> Output:
        kept, spec = self._trees[key]
        tensors = iter(self._store.get(key))
        leaves = []
        for leaf in kept:
            if isinstance(leaf, _Stored):
                parts = [next(tensors).to(device, non_blocking=True) for _ in range(leaf.parts)]
                leaves.append(_restored(parts, leaf) if leaf.parts > 1 else parts[0])
            else:
                leaves.append(leaf)
        return tree_unflatten(leaves, spec)


@dataclass(frozen=True)
class _Stored:
    """What a tensor in the store was.

    Attributes:
        parts: Number of stored tensors that make it: 2 in 8 bits, else 1.
        dtype: Dtype before it was stored.
        shape: Shape before it was stored.
    """

    parts: int
    dtype: torch.dtype
    shape: torch.Size


def _quantized(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Quantises to codes of one byte each, and a float32 scale for every 64 of them."""
    from bitsandbytes import functional

    flat = tensor.detach().float()
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % _BLOCK_SIZE)).contiguous()
    codes, state = functional.quantize_blockwise(flat, blocksize=_BLOCK_SIZE)
    # Quantised, a NaN would be a number like any other.
    state.absmax[flat.view(-1, _BLOCK_SIZE).isfinite().logical_not_().any(dim=1)] = float("nan")
    return [codes, state.absmax]


def _restored(parts: list[torch.Tensor], stored: _Stored) -> torch.Tensor:
    """Dequantises codes and scales."""
    from bitsandbytes import functional

    codes, scales = parts
    flat = functional.dequantize_blockwise(codes, absmax=scales, blocksize=_BLOCK_SIZE)
    return flat[..., : stored.shape[-1]].to(stored.dtype)
