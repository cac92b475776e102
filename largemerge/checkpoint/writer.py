"""A sharded safetensors checkpoint written as a stream, so that a crash at any moment loses one block.

All names, dtypes and shapes are known before the first tensor is, so every shard's header and every
tensor's byte position are too: files are laid out at the start, tensors are written in any order at
their places, and nothing is buffered. Until `finish`, shards lie in a working folder under the output
folder; what makes a folder a checkpoint (index, config) comes last, each by a rename.
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from largemerge.checkpoint.digests import TensorDigests, digest_of_bytes
from largemerge.checkpoint.direct_io import PAGE, PROBE_BYTES, PROBE_SECONDS, DataFile
from largemerge.checkpoint.locate import existing_folder
from largemerge.checkpoint.quantized import dequantize, quantize
from largemerge.checkpoint.room import free_bytes
from largemerge.checkpoint.sentence_modules import modules_of, split_name
from largemerge.checkpoint.tensor_info import SAFETENSORS_DTYPES, OutputTensor
from largemerge.errors import OutputError
from largemerge.units import gib

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One file of the output.

    Attributes:
        file_name: Name of the file, with its folder inside the output's, if it has one.
        header: Bytes of the file up to the first tensor.
        offsets: Byte position in the file of each tensor, or of each part of a quantised weight, by name.
        num_bytes: Size of the whole file, in bytes.
    """

    file_name: str
    header: bytes
    offsets: Mapping[str, int]
    num_bytes: int


def layout_shards(tensors: Mapping[str, OutputTensor], max_shard_bytes: int, folder: str = "") -> tuple[Shard, ...]:
    """Spreads tensors over shards in order, each at most `max_shard_bytes` unless one tensor is larger.

    Args:
        tensors: The tensors by name; those of modules beside the transformer get a file for each module.
        max_shard_bytes: The most bytes of a shard.
        folder: Folder of the transformer inside the output's, in sentence-transformers' old layout.
    """
    inside = f"{folder}/" if folder else ""
    own = {name: tensor for name, tensor in tensors.items() if not split_name(name)[0]}
    modules = (
        layout_file(
            f"{module}/model.safetensors", {key: each for key, each in tensors.items() if split_name(key)[0] == module}
        )
        for module in modules_of(tensors)
    )
    return (*(layout_file(inside + name, group) for name, group in _grouped(own, max_shard_bytes)), *modules)


def _grouped(tensors: Mapping[str, OutputTensor], max_shard_bytes: int) -> list[tuple[str, dict[str, OutputTensor]]]:
    """Groups tensors by the file that they go to."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.num_bytes
    total = len(groups)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    names = names if total > 1 else ["model.safetensors"]
    return [(name, {key: tensors[key] for key in keys}) for name, keys in zip(names, groups, strict=True)]


def stored_sizes(tensors: Mapping[str, OutputTensor]) -> dict[str, int]:
    """Returns the bytes of everything that really lies on disk, by name there."""
    return {name: tensor.num_bytes for name, tensor in _stored(tensors).items()}


def _stored(tensors: Mapping[str, OutputTensor]) -> dict[str, OutputTensor]:
    """Lists the tensors that really lie on disk: parts instead of quantised weights."""
    return {key: part for name, tensor in tensors.items() for key, part in (tensor.parts or {name: tensor}).items()}


def layout_file(file_name: str, logical: Mapping[str, OutputTensor]) -> Shard:
    """Lays out one file of tensors; `file_name` is its path in the output's folder."""
    tensors = _stored(logical)
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, int] = {}
    position = 0
    for name in ordered:
        tensor = tensors[name]
        end = position + tensor.num_bytes
        header[split_name(name)[1]] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [position, end],
        }
        relative[name] = position
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)  # so that most tensors begin at a page's start
    start = 8 + len(text)
    offsets = {name: start + offset for name, offset in relative.items()}
    return Shard(file_name, len(text).to_bytes(8, "little") + text, offsets, start + position)


class NotFiniteError(FloatingPointError):
    """A tensor that is to be written holds NaN or infinity; the message says which, without the tensor's name.

    Attributes:
        name: Name of the tensor on disk.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class ShardWriter:
    """Writes tensors at their places in the shards of a working folder, quantised where asked. A context manager.

    Every tensor is checked for NaN and infinity, and its digest is kept, while it is in the processor's cache.

    Args:
        folder: Working folder for the unfinished shards.
        tensors: All tensors that will be written, by name on disk.
        shards: Shards that `layout_shards` has laid out for them.
        checked: Whether NaN and infinity are refused, and digests kept; not for what is only passed on.

    Attributes:
        bytes_written: Bytes written so far.
        quantization_errors: Relative error ‖written - given‖ / ‖given‖ of every quantised weight written so far.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, OutputTensor],
        shards: tuple[Shard, ...],
        *,
        checked: bool = True,
    ) -> None:
        self.folder = folder
        self.tensors = tensors
        self.shards = shards
        self.bytes_written = 0
        self.quantization_errors: dict[str, float] = {}
        self._checked = checked
        self._stored = _stored(tensors)
        self._shard_of = {name: shard for shard in shards for name in shard.offsets}
        self._files: dict[str, DataFile] = {}
        self._dirty: set[str] = set()
        self._digests = TensorDigests()
        self._lock = threading.Lock()  # several threads may write

    @property
    def bytes_past_cache(self) -> int:
        """Bytes written or read back so far that did not go through the system's cache."""
        return sum(file.bytes_past_cache for file in self._files.values())

    def __enter__(self) -> ShardWriter:
        made: list[Path] = []
        try:
            _check_room(self.folder, self.shards)
            for shard in self.shards:
                path = self.folder / shard.file_name
                if not path.exists():
                    made.append(path)
                self._open(path, shard)
        except BaseException:
            self._close()
            for path in made:  # or they would hold all the room that was left
                path.unlink(missing_ok=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, path: Path, shard: Shard) -> None:
        if path.parent != self.folder:  # a module's
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = self._files[shard.file_name] = DataFile(path, size=shard.num_bytes)
        except OSError as error:
            room = f"; expected room for {gib(shard.num_bytes)}" if error.errno in _NO_ROOM else ""
            link = "it is a link; " if error.errno == errno.ELOOP else ""
            raise OutputError(f"{path}: {link}{error.strerror}{room}") from None
        # Each time: a crash may have come between these two lines.
        file.write(0, torch.frombuffer(bytearray(shard.header), dtype=torch.uint8))

    def write(self, name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
        """Writes a tensor in the dtype of the layout, or rows of it from `first_row` on, in order.

        Raises:
            NotFiniteError: If it holds NaN or infinity; it is not written then.
        """
        expected = self.tensors[name]
        assert tensor.dtype == expected.dtype, (name, tensor.dtype, expected.dtype)
        assert tensor.shape[1:] == expected.shape[1:] and tensor.dim() == len(expected.shape), (name, tensor.shape)
        assert tensor.dim() == 0 or first_row + tensor.shape[0] <= expected.shape[0], (name, tensor.shape, first_row)
        found = not_finite(tensor) if self._checked else None
        if found is not None and not _is_mask(name, expected.shape, tensor, found):
            raise NotFiniteError(name, f"would be written with {found}")
        if expected.quantization is None:
            self._write(name, tensor, first_row)
            return
        parts = quantize(name, tensor, expected)
        for part, value in parts.items():
            assert value.shape == self._stored[part].shape, (part, value.shape)
            self._write(part, value)
        difference = dequantize(name, parts, expected.quantization, torch.float32).sub_(tensor)
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float32).item()
        self.quantization_errors[name] = torch.linalg.vector_norm(difference).item() / (norm or 1.0)

    def _write(self, name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
        shard = self._shard_of[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        position = first_row * (data.numel() // max(1, tensor.shape[0]) if first_row else 0)
        if self._checked:
            self._digests.add(name, position, data)
        self._files[shard.file_name].write(shard.offsets[name] + position, data)
        with self._lock:
            self.bytes_written += data.numel()
            self._dirty.add(shard.file_name)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Reads back a tensor written earlier; a quantised one as any reader will see it.

        Args:
            name: Name on disk.
            rows: Rows to read, of a plain tensor; `None` for all.
        """
        expected = self.tensors[name]
        if expected.quantization is None:
            return self._read(name, rows)
        assert rows is None, f"{name}: rows of a quantised weight"
        parts = {part: self._read(part) for part in expected.parts}
        return dequantize(name, parts, expected.quantization, expected.dtype)

    def _read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        shard, stored = self._shard_of[name], self._stored[name]
        offset, shape = shard.offsets[name], stored.shape
        if rows is not None:
            offset += rows.start * (stored.num_bytes // max(1, shape[0]))
            shape = (rows.stop - rows.start, *shape[1:])
        return self._files[shard.file_name].read_tensor(offset, stored.dtype, shape)

    def flush(self) -> None:
        """Forces everything written so far onto the disk; not what other threads write meanwhile.

        Raises:
            OutputError: If a file has been taken away, or put in the place of another, since it was opened.
        """
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        for file_name in sorted(dirty):
            self._files[file_name].sync()
            if not self._files[file_name].is_at(self.folder / file_name):
                raise OutputError(
                    f"{self.folder / file_name} was deleted or replaced while it was being written; "
                    "--resume writes again what it held"
                )

    def take_digests(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Returns the digests of tensors written as a whole, by name on disk, and forgets them.

        Args:
            names: Names of tensors, a quantised one's by its own; `None` for all that have not been taken yet.
        """
        if names is None:
            wanted = self._digests.names()
        else:
            wanted = [part for name in names for part in (self.tensors[name].parts or (name,))]
        return {name: self._digest(name) for name in sorted(wanted)}

    def _digest(self, name: str) -> str:
        num_bytes = self._stored[name].num_bytes
        found = self._digests.take(name, num_bytes)
        if found is not None:
            return found
        shard = self._shard_of[name]
        read = digest_of_bytes(self.folder / shard.file_name, shard.offsets[name], num_bytes)
        assert read is not None, name
        return read


def not_finite(tensor: torch.Tensor) -> str | None:
    """Says what a tensor holds that is no number, `NaN` or `infinity`; `None` if nothing.

    One pass, twice as fast as a copy (`isfinite` is fifty times slower): a sum is finite only if all numbers are. One
    that is not may have overflowed, as those of float16 often would; then the least and the greatest number tell.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    numbers = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float32)
    if numbers.dtype is not torch.float16 and math.isfinite(numbers.sum().item()):
        return None
    lowest, highest = torch.aminmax(numbers)
    if math.isfinite(lowest.item()) and math.isfinite(highest.item()):  # NaN is both
        return None
    if math.isnan(lowest.item()) or math.isnan(highest.item()):
        return "NaN"
    return "infinity"


def largest_magnitude(tensor: torch.Tensor) -> float:
    """Returns the largest absolute value of a tensor's numbers, in float64; 0 if it has none."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    lowest, highest = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float32))
    return max(abs(lowest.item()), abs(highest.item()))


def why_unmergeable(model: str, key: str, tensor: torch.Tensor) -> str | None:
    """Says that a tensor of a model holds what cannot be merged, and what to do; `None` if it does not.

    That is NaN, infinity, and more than float32 holds.
    """
    found = not_finite(tensor)
    if found is not None:
        return f"{model} holds {found} in {key}; fetch or save that checkpoint again, or leave it out"
    largest, limit = largest_magnitude(tensor), torch.finfo(torch.float32).max
    if not largest > limit:
        return None
    return (
        f"{model}'s {key} goes up to {largest:.3g}, more than float32 holds, in which models are merged (up to "
        f"{limit:.3g}); save that checkpoint with smaller weights, or leave it out"
    )


def _is_mask(name: str, shape: Sequence[int], tensor: torch.Tensor, found: str) -> bool:
    """Whether a tensor is a stored attention mask, of zeros and negative infinities; nothing that is trained is one."""
    if found != "infinity" or len(shape) < 2 or name.endswith(("weight", "bias")):
        return False
    rest = tensor[~torch.isneginf(tensor)]
    return bool(rest.numel()) and not rest.any()


def _check_room(folder: Path, shards: Sequence[Shard]) -> None:
    """Checks that the disk has room for the shards before any of it is taken.

    Raises:
        OutputError: If it has not; what earlier runs have taken counts as there.
    """
    free = free_bytes(folder)  # first: another rank may be taking room just now
    if free is None:
        return
    paths = [folder / shard.file_name for shard in shards]
    needed = sum(shard.num_bytes for shard in shards)
    needed -= sum(path.stat().st_blocks * 512 for path in paths if path.exists())
    if needed > free:
        raise OutputError(
            f"{folder}: the disk has {gib(free)} free, and {gib(needed)} more are needed; "
            "make room, then go on with --resume"
        )


def weight_index(shards: tuple[Shard, ...]) -> str | None:
    """Makes the text of `model.safetensors.index.json`; `None` for a single shard, which needs none."""
    own = [shard for shard in shards if not any(split_name(name)[0] for name in shard.offsets)]
    if len(own) == 1:
        return None
    weight_map = {name: Path(shard.file_name).name for shard in own for name in shard.offsets}
    total = sum(shard.num_bytes - len(shard.header) for shard in own)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that it is there as a whole or not at all, even after a power cut."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Forces a file, or renames inside a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_rate(scratch: Path | None, *, num_workers: int = 1) -> float:
    """Measures how fast bytes are forced onto a disk, in bytes a second.

    Args:
        scratch: Folder on the disk, or one yet to be made; `None` for where temporary files go.
        num_workers: Number of threads that write.
    """
    folder = None if scratch is None else existing_folder(scratch)
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8))
    with tempfile.TemporaryDirectory(dir=folder) as made, DataFile(Path(made) / "probe", size=PROBE_BYTES) as file:
        start = time.perf_counter()

        def write(offset: int) -> int:
            if time.perf_counter() - start > 4 * PROBE_SECONDS:
                return 0
            file.write(offset, data)
            return data.numel()

        with ThreadPoolExecutor(num_workers) as pool:
            done = sum(pool.map(write, range(0, PROBE_BYTES, data.numel())))
        file.sync()
        return done / (time.perf_counter() - start)
