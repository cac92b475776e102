"""Digests of what is written: by them a shard that was cut, swapped, zeroed or flipped since is told from a whole one.

    TensorDigests       of tensors, made on the way while they are written
    digest_of_bytes     of a part of a file, read again later
    digest_of_file      of a whole small file
    digest_of           of bytes at hand, such as a line of the journal

XXH3 with 128 bits (https://github.com/Cyan4973/xxHash): faster than memory, so that it costs a merge next to nothing.
It finds accidents, not forgeries.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
import xxhash

from largemerge.checkpoint.direct_io import byte_view

ALGORITHM = "xxh3_128"
"""Name of the algorithm, for reports."""
_CHUNK_BYTES = 4 << 20


class TensorDigests:
    """Digests of tensors whose bytes come piece by piece, in order. Safe to use from several threads."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[xxhash.xxh3_128, int]] = {}  # with the bytes so far
        self._lock = threading.Lock()

    def add(self, name: str, position: int, data: torch.Tensor) -> None:
        """Adds bytes of a tensor.

        Args:
            name: Name of the tensor on disk.
            position: Position of the first byte in the tensor; at 0 a tensor begins anew.
            data: The bytes: a vector of uint8 on the CPU.
        """
        with self._lock:
            digest, done = self._running.pop(name, (xxhash.xxh3_128(), 0))
        if position == 0:
            digest, done = xxhash.xxh3_128(), 0
        if position == done:  # else it is left out, and read again when it is asked for
            digest.update(byte_view(data))
            with self._lock:
                self._running[name] = digest, done + data.numel()

    def take(self, name: str, num_bytes: int) -> str | None:
        """Returns the digest of a tensor of so many bytes, and forgets it; `None` if not all came in order."""
        with self._lock:
            digest, done = self._running.pop(name, (xxhash.xxh3_128(), 0))
        return digest.hexdigest() if done == num_bytes else None

    def names(self) -> list[str]:
        """Lists the tensors of which some bytes have come, and which nobody has taken yet."""
        with self._lock:
            return list(self._running)


def digest_of_bytes(file: Path, offset: int, num_bytes: int) -> str | None:
    """Computes the digest of a part of a file; `None` if the file is not there, or ends before."""
    digest, view = xxhash.xxh3_128(), memoryview(bytearray(min(_CHUNK_BYTES, max(1, num_bytes))))
    try:
        with file.open("rb", buffering=0) as stream:
            done = 0
            while done < num_bytes:
                count = os.preadv(stream.fileno(), [view[: num_bytes - done]], offset + done)
                if count == 0:
                    return None
                digest.update(view[:count])
                done += count
    except FileNotFoundError:
        return None
    return digest.hexdigest()


def digest_of_file(file: Path) -> str:
    """Computes the digest of a whole file."""
    return digest_of_bytes(file, 0, file.stat().st_size) or ""


def digest_of(data: bytes) -> str:
    """Computes the digest of bytes at hand."""
    return xxhash.xxh3_128(data).hexdigest()
