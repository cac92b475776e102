"""Files with tensors: one small protocol, one implementation for each format.

    TensorFile      tensors()          lists the tensors of a file, from its header alone
                    read(info, rows)   reads one of them, or some of its rows

A safetensors file starts with eight bytes (the header's length, little endian), a JSON header (name → dtype, shape,
byte range) and then the bytes of all tensors. Reading headers costs kilobytes, whatever the size of the model. Pickle
files are unpickled onto the meta device with `weights_only=True`; where training programs wrap the weights
(`{"state_dict": …, "epoch": 3}`), the only dictionary of tensors is taken. Another format is one more class, and a line
in `open_tensor_file`.

Merges see models, not files: `reader.py` puts the files of a checkpoint together and dequantises, `lora.py` adds an
adapter. Both kinds of merge read through these two.
"""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from largemerge.checkpoint.direct_io import Buffers, DataFile
from largemerge.checkpoint.tensor_info import SAFETENSORS_DTYPES, TensorInfo
from largemerge.errors import CheckpointError

Rows = slice | torch.Tensor | None
"""Rows of a tensor (its first dimension): a slice without a step, numbers in any order, or `None` for all."""

_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_MAX_GAP_BYTES = 32 << 10  # between two rows: reading it in vain costs less than another call


class TensorFile(Protocol):
    """One file with tensors. Safe to use from several threads."""

    @property
    def header(self) -> bytes | None:
        """Bytes that tell this file from another of the same size; `None` where the format has no header."""

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, those between rows that were read in vain included."""

    @property
    def bytes_past_cache(self) -> int:
        """Bytes read so far that did not go through the system's cache."""

    def tensors(self) -> dict[str, TensorInfo]:
        """Lists the tensors of the file by name, from its header alone.

        Raises:
            CheckpointError: If the file is cut short, broken, or holds no weights.
        """

    def read(self, info: TensorInfo, rows: Rows = None, *, past_cache: bool = False) -> torch.Tensor:
        """Reads a tensor as it is stored, into memory of its own on the CPU.

        Args:
            info: A tensor of this file.
            rows: Rows to read; `None` for all.
            past_cache: Leave nothing in the system's cache, where that can be done.

        Raises:
            CheckpointError: If the file has become shorter since its header was read.
        """

    def close(self) -> None:
        """Closes the file."""


def open_tensor_file(path: Path, buffers: Buffers | None = None) -> TensorFile:
    """Opens a file by the format that its name says; nothing is read yet.

    Args:
        path: The file.
        buffers: Buffers for tensors; `None`: their memory is allocated.
    """
    return PickleFile(path) if path.suffix == ".bin" else SafetensorsFile(path, buffers)


class SafetensorsFile:
    """A safetensors file, read at byte positions (see `TensorFile`).

    It is not mapped but read by `pread` into buffers: the system's cache still helps, but no mapped pages pile up in
    the process, and a helper thread can read while this one computes.
    """

    def __init__(self, path: Path, buffers: Buffers | None = None) -> None:
        self.bytes_read = 0
        self._path, self._buffers = path, buffers
        self._header: tuple[dict[str, Any], bytes] | None = None
        self._file: DataFile | None = None
        self._lock = threading.Lock()

    @property
    def header(self) -> bytes:
        """The JSON header as it stands in the file."""
        return self._read_header()[1]

    @property
    def bytes_past_cache(self) -> int:
        """Bytes read so far that did not go through the system's cache."""
        return self._file.bytes_past_cache if self._file is not None else 0

    def tensors(self) -> dict[str, TensorInfo]:
        """Lists the tensors of the file by name, with their byte positions."""
        header, raw = self._read_header()
        return {info.name: info for info in _infos(self._path, header, 8 + len(raw))}

    def read(self, info: TensorInfo, rows: Rows = None, *, past_cache: bool = False) -> torch.Tensor:
        """Reads a tensor, or some of its rows; those that lie near each other are read at once."""
        if not isinstance(rows, torch.Tensor):
            return self._read_range(info, rows, past_cache=past_cache)
        if not len(rows):
            return torch.empty((0, *info.shape[1:]), dtype=info.dtype)
        wanted, places = torch.unique(rows, return_inverse=True)
        gap = 1 + _MAX_GAP_BYTES // max(1, info.num_bytes // max(1, info.shape[0]))
        starts = torch.cat([torch.tensor([0]), 1 + torch.nonzero(wanted.diff() > gap).view(-1)]).tolist()
        parts = []
        for start, stop in zip(starts, [*starts[1:], len(wanted)], strict=True):
            first = int(wanted[start])
            read = self._read_range(info, slice(first, int(wanted[stop - 1]) + 1), past_cache=past_cache)
            parts.append(read if len(read) == stop - start else read[wanted[start:stop] - first])
        return torch.cat(parts)[places]

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read_range(self, info: TensorInfo, rows: slice | None, *, past_cache: bool) -> torch.Tensor:
        assert info.offset is not None
        offset, shape = info.offset, info.shape
        if rows is not None:
            offset += rows.start * (info.num_bytes // max(1, shape[0]))
            shape = (rows.stop - rows.start, *shape[1:])
        try:
            tensor = self._open().read_tensor(offset, info.dtype, shape, past_cache=past_cache)
        except EOFError:
            raise CheckpointError(
                f"{info.file}: ended in the middle of {info.name}; was it changed meanwhile?"
            ) from None
        with self._lock:
            self.bytes_read += tensor.nbytes
        return tensor

    def _open(self) -> DataFile:
        with self._lock:
            if self._file is None:
                self._file = DataFile(self._path, buffers=self._buffers)
            return self._file

    def _read_header(self) -> tuple[dict[str, Any], bytes]:
        if self._header is None:
            self._header = _read_safetensors_header(self._path)
        return self._header


class PickleFile:
    """A file that `torch.save` has written (see `TensorFile`); one of before 2020 can be read only as a whole."""

    header = None
    bytes_past_cache = 0

    def __init__(self, path: Path) -> None:
        self.bytes_read = 0
        self.wrapper = ""  # the key under which the weights lie, once they have been looked at
        self.left_out: tuple[str, ...] = ()  # other keys beside it
        self._path = path
        self._whole: Mapping[str, torch.Tensor] | None = None
        self._lock = threading.Lock()

    def tensors(self) -> dict[str, TensorInfo]:
        """Lists the tensors of the file by name."""
        file = self._path
        try:
            state = torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # what a broken or malicious pickle may raise, nobody has listed
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{file}: cannot be read with weights_only=True: {first_line}") from None
        state = self._unwrapped(state)
        return {name: TensorInfo(name, tuple(each.shape), each.dtype, file, None) for name, each in state.items()}

    def _unwrapped(self, state: Any) -> Mapping[str, torch.Tensor]:
        """Returns the tensors by name: all that was saved, or the only dictionary of tensors in it.

        Raises:
            CheckpointError: If there is none, or more than one.
        """
        expected = "expected tensors by name"
        if _is_state(state):
            found: Mapping[str, torch.Tensor] = state
            return found
        if not isinstance(state, Mapping):
            kind = type(state).__name__
            raise CheckpointError(f"{self._path}: holds something else than a model's weights ({kind}); {expected}")
        inner = [key for key, value in state.items() if isinstance(key, str) and _is_state(value) and len(value)]
        loose = [key for key, value in state.items() if isinstance(value, torch.Tensor)]
        if len(inner) != 1 or len(loose) > 1:
            keys = [str(key) for key in state if key not in loose] or [f"{key!r}" for key in state]
            holds = f"weights under several keys, {', '.join(inner)}" if len(inner) > 1 else f"keys such as {keys[0]}"
            raise CheckpointError(
                f"{self._path}: holds something else than a model's weights: {holds}; {expected}. Write the weights "
                f"into a file of their own: saved = torch.load('{self._path.name}'); "
                f"torch.save(saved[{(inner or ['KEY'])[0]!r}], '{self._path.name}')"
            )
        self.wrapper = inner[0]
        self.left_out = tuple(str(key) for key in state if key != self.wrapper)
        unwrapped: Mapping[str, torch.Tensor] = state[self.wrapper]
        return unwrapped

    def read(self, info: TensorInfo, rows: Rows = None, *, past_cache: bool = False) -> torch.Tensor:
        """Reads a tensor, or some of its rows, from the mapped file."""
        with self._lock:
            state = self._whole
            if state is None:
                mapped = zipfile.is_zipfile(self._path)
                state = torch.load(self._path, map_location="cpu", weights_only=True, mmap=mapped)
                if not mapped:
                    self._whole = state
        tensor = self._unwrapped(state)[info.name]
        tensor = (tensor if rows is None else tensor[rows]).clone(memory_format=torch.contiguous_format)
        with self._lock:
            self.bytes_read += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Drops the tensors, where the file was read as a whole."""
        self._whole = None


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items()
    )


def _read_safetensors_header(file: Path) -> tuple[dict[str, Any], bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: not a safetensors file, or cut short ({size} bytes, header {length}); fetch it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise CheckpointError(f"{file}: the safetensors header is not JSON; fetch the file again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is a {type(header).__name__}, expected an object")
    return header, raw


def _infos(file: Path, header: dict[str, Any], start: int) -> Iterator[TensorInfo]:
    size = file.stat().st_size
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            if not all(type(number) is int for number in (begin, end, *shape)) or min(shape, default=0) < 0:
                raise TypeError
        except KeyError as error:
            raise CheckpointError(
                f"{file}: {name}: dtype or field {error} is not supported; expected one of {list(SAFETENSORS_DTYPES)}"
            ) from None
        except (TypeError, ValueError):
            raise CheckpointError(f"{file}: {name}: broken header entry {entry!r}") from None
        info = TensorInfo(name, shape, dtype, file, start + begin)
        if end - begin != info.num_bytes or start + end > size or begin < 0:
            raise CheckpointError(
                f"{file}: {name}: bytes {begin}..{end} do not hold {entry['dtype']} {list(shape)} "
                f"in a file of {size} bytes; the file is cut short or broken: fetch it again"
            )
        yield info
