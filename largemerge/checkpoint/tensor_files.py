"""Files with tensors: one small protocol, one implementation for each format.

    TensorFile      tensors()          lists the tensors of a file, from its header alone
                    read(info, rows)   reads one of them, or some of its rows

A safetensors file starts with eight bytes (the header's length, little endian), a JSON header (name → dtype, shape,
byte range) and then the bytes of all tensors. Reading headers costs kilobytes, whatever the size of the model. Pickle
files are mapped, and unpickled with `weights_only=True`; where training programs wrap the weights
(`{"state_dict": …, "epoch": 3}`), the only dictionary of tensors is taken. Another format is one more class, and a line
in `open_tensor_file`.

Merges see models, not files: `reader.py` puts the files of a checkpoint together and dequantises, `lora.py` adds an
adapter. Both kinds of merge read through these two.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
import re
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from largemerge.checkpoint.direct_io import Buffers, DataFile
from largemerge.checkpoint.tensor_info import MODULE_SEPARATOR, SAFETENSORS_DTYPES, TensorInfo, dtype_name
from largemerge.errors import CheckpointError, group_alike, shorten
from largemerge.text_files import file_problem, first_line, os_reason, parse_json

Rows = slice | torch.Tensor | None
"""Rows of a tensor (its first dimension): a slice without a step, numbers in any order, or `None` for all."""

_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_MAX_PROBLEMS = 20
_MAX_DIMENSIONS = 64  # as many as PyTorch computes with
_MAX_PICKLE_BYTES = 256 << 20  # without the tensors, which lie beside it
_MAX_EXPANDED_BYTES = 1 << 30  # of a tensor whose rows share memory
MAX_NAME_LENGTH = 1000
"""Number of characters that a tensor's name may have: those of models have a hundred."""
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
        problem = file_problem(file)
        if problem is not None:
            raise CheckpointError(f"{file} {problem}")
        zipped = zipfile.is_zipfile(file)
        problem = _zip_problem(file) if zipped else None
        if problem is not None:
            raise CheckpointError(f"{file}: {problem}")
        try:
            # Mapped, nothing is read, and views that lead out of their storage are refused, which meta tensors hide.
            state = _load(file, "cpu" if zipped else "meta", mapped=zipped)
        except Exception as error:  # what a broken or malicious pickle may raise, nobody has listed
            raise CheckpointError(
                f"{file} {_unpickling_problem(file, error)}; expected tensors by name, saved by torch.save: fetch it "
                "again, or take the checkpoint in safetensors"
            ) from None
        state = self._unwrapped(state)
        problems = [f"{file}: {each}" for name, tensor in state.items() for each in _pickled_problems(name, tensor)]
        if problems:
            raise CheckpointError(*group_alike(problems)[:_MAX_PROBLEMS])
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
            if not inner:
                raise CheckpointError(
                    f"{self._path}: holds something else than a model's weights: {_odd_entry(state)}; {expected}: "
                    f"torch.save(model.state_dict(), '{self._path.name}')"
                )
            if len(inner) > 1:
                holds = f"weights under several keys, {', '.join(map(shorten, inner))}"
            else:
                holds = f"weights under {_key(inner[0])}, and tensors beside them, such as {_key(loose[0])}"
            raise CheckpointError(
                f"{self._path}: holds something else than a model's weights: {holds}; {expected}. Write the weights "
                f"into a file of their own: saved = torch.load('{self._path.name}'); "
                f"torch.save(saved[{_key(inner[0])}], '{self._path.name}')"
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
                try:
                    state = _load(self._path, "cpu", mapped=mapped)
                except Exception as error:  # of a file that was exchanged it may be anything
                    raise CheckpointError(
                        f"{self._path}: cannot be read: {first_line(error, 200)}; was it changed meanwhile?"
                    ) from None
                if not mapped:
                    self._whole = state
        state = self._unwrapped(state)
        if info.name not in state:
            raise CheckpointError(f"{self._path}: no longer holds {info.name}; was it changed meanwhile?")
        tensor = state[info.name].detach()
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


def _odd_entry(state: Mapping[Any, Any]) -> str:
    """Says which entry of a dictionary is no tensor with a name."""
    for key, value in state.items():
        if not isinstance(key, str):
            return f"the key {_key(key)}, which is no text"
        if not isinstance(value, torch.Tensor):
            kind = "a text" if isinstance(value, str) else f"a {type(value).__name__}"
            return f"{_key(key)} is {kind}, no tensor"
    return "no tensor at all"


def _key(key: object) -> str:
    return shorten(repr(key))


def name_problem(name: str) -> str | None:
    """Says why a text cannot be a tensor's name here; `None` if it can."""
    if len(name) > MAX_NAME_LENGTH:
        return f"a tensor's name has {len(name):,} characters, expected {MAX_NAME_LENGTH} or fewer"
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"a tensor is called {shorten(name)!r}, which holds half of a character"
    if MODULE_SEPARATOR in name:
        return f"a tensor is called {shorten(name)!r}; expected no {MODULE_SEPARATOR!r}, which parts a module's folder"
    return None


def _dtype_problem(name: str, dtype: torch.dtype) -> str | None:
    """Says why a tensor of a dtype cannot be read here; `None` if it can."""
    if dtype in SAFETENSORS_DTYPES.values():
        return None
    return (
        f"{shorten(name)} is {dtype_name(dtype)}, which is not supported; expected real numbers of one of the dtypes "
        f"{', '.join(map(dtype_name, SAFETENSORS_DTYPES.values()))}"
    )


# Pickles


_STORAGE_BYTES = {
    **dict.fromkeys(("UntypedStorage", "ByteStorage", "CharStorage", "BoolStorage", "QInt8Storage"), 1),
    **dict.fromkeys(("QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
"""Bytes of an item, by the names of storages in pickles."""


class _Inert:
    """Stands for whatever a pickle would build: nothing of it is run."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None:
        """Takes an item of a list."""

    extend = add = append


class _Storages(pickle.Unpickler):
    """Lists the storages that a pickle of `torch.save` names: their bytes by the names of their entries."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self.num_bytes: dict[str, int] = {}
        self.names: set[str] = set()

    def find_class(self, module: str, name: str, /) -> Any:
        """Loads nothing: storages are known by their names, and all else is inert."""
        self.names.add(name)
        return name if name in _STORAGE_BYTES else _Inert

    def persistent_load(self, pid: Any, /) -> Any:
        """Takes down a storage."""
        _, kind, key, _, count = pid
        self.num_bytes[str(key)] = int(count) * _STORAGE_BYTES[kind]
        return _Inert()


def _zip_problem(file: Path) -> str | None:
    """Says why a zip file that `torch.load` opens would be mapped to other numbers than were saved; `None` if not.

    Tensors are mapped where their entries lie: these must be stored, not compressed, and as long as the pickle says.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            packed = [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]
            if packed:
                return (
                    f"{shorten(packed[0])} in it is compressed, which torch.save does not do and which cannot be "
                    "mapped; load it with torch.load, and save it again"
                )
            pickled = next((name for name in entries if name.endswith("data.pkl")), None)
            if pickled is None:
                return "has no data.pkl; expected what torch.save writes"
            order = next((archive.read(name) for name in entries if name.endswith("byteorder")), b"little")
            if order.strip().decode("latin-1") != sys.byteorder:
                # Numbers would be turned round in the mapped file itself, which ends the process.
                return f"was saved in the byte order {shorten(repr(order))}; expected {sys.byteorder}"
            if entries[pickled].file_size > _MAX_PICKLE_BYTES:
                return f"{shorten(pickled)} in it has {entries[pickled].file_size:,} bytes; expected a model's weights"
            storages = _Storages(archive.read(pickled))
            storages.load()
    except OSError as error:
        return f"cannot be read: {os_reason(error)}"
    except Exception:  # what a broken or malicious file may raise, nobody has listed
        return "what it should hold (data.pkl) is cut short or broken; fetch it again"
    if "_rebuild_meta_tensor_no_storage" in storages.names:
        return "holds tensors on the meta device, which have no numbers; save the model once its weights are loaded"
    root = pickled.removesuffix("data.pkl")
    for key, wanted in storages.num_bytes.items():
        entry = entries.get(f"{root}data/{key}")
        if entry is None:
            return (
                f"lacks the numbers of a tensor (storage {shorten(key)}, {wanted} bytes); it is broken: fetch it again"
            )
        if entry.file_size != wanted:
            return (
                f"the numbers of a tensor (storage {shorten(key)}) are {entry.file_size} bytes, expected {wanted}; it "
                "is broken: fetch it again"
            )
    return None


def _pickled_problems(name: str, tensor: torch.Tensor) -> Iterator[str]:
    """Yields what is wrong with one tensor of a pickle."""
    problem = name_problem(name)
    if problem is not None:
        yield problem
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        kind = (
            "nested"
            if tensor.is_nested
            else "quantized"
            if tensor.is_quantized
            else str(tensor.layout).removeprefix("torch.")
        )
        yield f"{shorten(name)} is {kind}; expected a dense tensor: tensor.to_dense() or .dequantize(), saved again"
        return
    problem = _dtype_problem(name, tensor.dtype)
    if problem is not None:
        yield problem
    elif tensor.numel() * tensor.itemsize > max(tensor.untyped_storage().nbytes(), _MAX_EXPANDED_BYTES):
        yield (
            f"{shorten(name)} is {list(tensor.shape)}, expanded from {tensor.untyped_storage().nbytes()} bytes; "
            "expected a tensor with memory of its own: tensor.contiguous(), saved again"
        )


_loading = threading.Lock()
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number with which files of `torch.save` begin that are no zip files."""
_GLOBAL = re.compile(r"(?:Unsupported global: GLOBAL|Unsupported class|Trying to call reduce for unrecognized) (\S+)")


def _load(file: Path, device: str, *, mapped: bool) -> Any:
    """Unpickles a file, without torch's advice to programmers: of protocols, of dtypes that are going out of use."""
    with _loading, warnings.catch_warnings():  # which is one for all threads
        warnings.simplefilter("ignore")
        return torch.load(file, map_location=device, weights_only=True, mmap=mapped)


def _unpickling_problem(file: Path, error: Exception) -> str:
    """Says why `torch.load` has not read a file: by what stands in it, rather than in torch's own words."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return f"cannot be read: {os_reason(error)}"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(64)
        is_whole_zip = zipfile.is_zipfile(file)
        if is_whole_zip:
            with zipfile.ZipFile(file) as archive:
                name = next(each for each in archive.namelist() if each.endswith("data.pkl"))
                with archive.open(name) as stream:
                    pickled = stream.read(2)
        else:
            pickled = start[:2]
    except OSError as failure:
        return f"cannot be read: {os_reason(failure)}"
    except (StopIteration, zipfile.BadZipFile):
        return "has changed while it was read"
    if not size:
        return "is empty"
    is_zip = start.startswith(b"PK\x03\x04")
    is_torch = is_zip or is_whole_zip or _MAGIC in start
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file that it stands for (git lfs pull)"
    if not is_torch and pickled[:1] != b"\x80":
        return f"is no file of torch.save: it begins with {shorten(repr(start[:16]), 60)}"
    found = _GLOBAL.search(str(error))
    if found is not None:
        kind = "numpy's arrays or numbers" if found[1].startswith("numpy") else f"an object, {shorten(found[1])}"
        return f"holds {kind}, which cannot be loaded without running code of the file's; only tensors are read"
    if pickled[:1] == b"\x80" and pickled[1:] > b"\x02":
        return f"is pickled by protocol {pickled[1]}, expected 2, which torch.save takes when it is told of no other"
    if not is_torch:
        return "is a pickle, but none of torch.save"
    if is_zip and not is_whole_zip:
        return f"is cut short ({size:,} bytes): its table of contents, which stands at the end, is not there"
    text = (str(error).strip().splitlines() or [""])[0]
    if "resize storage" in text or "out of bounds" in text:
        return "has a tensor that is larger than the numbers which the file holds for it: it is broken"
    if isinstance(error, EOFError | IndexError) or "EOF" in text or "end of file" in text.lower():
        return f"is cut short or broken ({size:,} bytes)"
    inner = re.search(r"WeightsUnpickler error: (.*)", str(error))
    text = (inner[1] if inner is not None else text).partition("Weights only load failed")[0].partition(" Please ")[0]
    return f"is broken, or holds more than tensors{f' ({shorten(text, 200)})' if text.strip() else ''}"


# Safetensors


def _read_safetensors_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """Reads a file's header, and makes sure that it is one: ours reads nothing that the safetensors library refuses."""
    problem = file_problem(file)
    if problem is not None:
        raise CheckpointError(f"{file} {problem}")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: not a safetensors file, or cut short ({size} bytes, header {length}); fetch it again"
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {os_reason(error)}") from None
    try:
        header = parse_json(raw.decode("utf-8"), strict=True)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: the safetensors header is not JSON ({first_line(error, 200)}); fetch the file again"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is a {type(header).__name__}, expected an object")
    return header, raw


def _infos(file: Path, header: dict[str, Any], start: int) -> Iterator[TensorInfo]:
    """Yields the tensors of a header; raises for all that the format does not allow."""
    size = file.stat().st_size
    problems: list[str] = []
    found: list[tuple[int, int, TensorInfo]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            found.append(_entry(file, name, entry, start))
        except ValueError as error:
            problems.append(f"{file}: {error}")
    cut = [(stop, info) for _, stop, info in found if start + stop > size]
    if cut and not problems:
        stop, info = max(cut, key=lambda each: each[0])
        problems.append(
            f"{file}: {shorten(info.name)}: bytes {start}..{start + stop} are not in a file of {size} bytes; the file "
            "is cut short or broken: fetch it again"
        )
    end = 0
    for begin, stop, info in sorted(found, key=lambda each: each[:2]) if not problems else ():
        if begin != end:
            what = "overlap another tensor's" if begin < end else f"leave a hole before them, from {end} on"
            problems.append(f"{file}: {shorten(info.name)}: bytes {begin}..{stop} {what}; it is broken: fetch it again")
        end = max(end, stop)
    if not problems and start + end != size:
        problems.append(
            f"{file}: {size - start - end} bytes after the last tensor belong to none; it is broken: fetch it again"
        )
    if not problems:
        try:
            # The library's own word on the header comes last: what it refuses, no program that reads the output takes.
            with safe_open(str(file), framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            problems.append(f"{file}: the safetensors library does not read it: {first_line(error, 200)}")
    if problems:
        raise CheckpointError(*group_alike(problems)[:_MAX_PROBLEMS])
    yield from (info for _, _, info in found)


def _entry(file: Path, name: str, entry: Any, start: int) -> tuple[int, int, TensorInfo]:
    """Checks one entry of a header; returns first byte, end and tensor.

    Raises:
        ValueError: If something in it is wrong.
    """
    problem = name_problem(name)
    if problem is not None:
        raise ValueError(problem)
    label = shorten(name)
    lacking = [key for key in ("dtype", "shape", "data_offsets") if not isinstance(entry, dict) or key not in entry]
    if lacking:
        found = f"lacks {', '.join(lacking)}" if isinstance(entry, dict) else f"{shorten(repr(entry))} is no object"
        raise ValueError(f"{label}: broken header entry: {found}; fetch the file again")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in SAFETENSORS_DTYPES:
        raise ValueError(f"{label}: dtype {shorten(repr(kind))} is not supported; expected {list(SAFETENSORS_DTYPES)}")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        is_right = isinstance(numbers, list) and all(type(number) is int for number in numbers)
        if not is_right or min(numbers, default=0) < 0 or max(numbers, default=0) >= 1 << 63:
            raise ValueError(f"{label}: broken header entry: {key} is {shorten(repr(numbers))}; expected whole numbers")
    if len(offsets) != 2:
        raise ValueError(f"{label}: broken header entry: data_offsets is {shorten(repr(offsets))}; expected two")
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(1, side) for side in shape) >= 1 << 60:
        raise ValueError(f"{label}: {shorten(repr(shape))} is no shape that a tensor can have")
    begin, end = offsets
    info = TensorInfo(name, tuple(shape), SAFETENSORS_DTYPES[kind], file, start + begin)
    if end - begin != info.num_bytes:
        raise ValueError(
            f"{label}: bytes {begin}..{end} do not hold {kind} {shorten(repr(shape))}, which has {info.num_bytes} "
            "bytes; the file is broken: fetch it again"
        )
    return begin, end, info
