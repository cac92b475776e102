"""Merged blocks on their way to the disk: one is written while the next one is merged.

    merge block 1 ─► merge block 2 ─► merge block 3
                └► write block 1 └► write block 2

A block is noted as finished when it is on the disk. From a GPU it comes on a stream of its own, a tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from largemerge.distributed import Ranks
from largemerge.regression.clock import Clock
from largemerge.streams import SideStream
from largemerge.weights import Tensors, Weights

JsonObject = dict[str, Any]


class WriteBehind:
    """Writes blocks, at once or behind, and says which are on the disk. A context manager.

    Args:
        weights: Of the merge.
        clock: Counts the seconds that are waited for the disk.
        ranks: Of which the first writes.
        done: Called on the first rank with each block's name and report, once it is on the disk.
    """

    def __init__(self, weights: Weights, clock: Clock, ranks: Ranks, done: Callable[[str, JsonObject], None]) -> None:
        self._weights, self._clock, self._ranks, self._done = weights, clock, ranks, done
        self._stream = SideStream(weights.device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="largemerge-write")
        self._writing: Future[int] | None = None
        self._merged: tuple[str, JsonObject] | None = None
        self._num_bytes = 0

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._settle()
        finally:
            self._pool.shutdown()

    def write(self, tensors: Tensors, *, behind: bool) -> None:
        """Writes parameters of a block; on other ranks than the first nothing happens.

        Args:
            tensors: Of the output, on the device. Nobody may change them before the next call.
            behind: Come back at once. They are not to be read from the disk before the next call.
        """
        self._settle()
        on_disk = self._weights.laid_out(tensors)
        if not on_disk:
            return
        if behind:
            self._writing = self._pool.submit(self._write_later, on_disk, self._stream.computed())
            return
        with self._clock.stage("write"), self._ranks.waits():
            self._num_bytes += self._weights.write(on_disk)

    def merged(self, block: str, report: JsonObject) -> None:
        """A block is merged; all of it has been given to `write`."""
        if not self._ranks.is_first:
            return
        self._merged = block, report | {"seconds": self._clock.seconds()}
        if self._writing is None:
            self._settle()

    def _write_later(self, on_disk: Tensors, computed: Any) -> int:
        with self._stream.after(computed):
            return self._weights.write(on_disk)

    def _settle(self) -> None:
        """Waits until all that was given is on the disk, and says so."""
        if self._writing is not None:
            with self._clock.stage("write"), self._ranks.waits():
                self._num_bytes += self._writing.result()
            self._writing = None
        if self._merged is not None:
            block, report = self._merged
            self._done(block, report | {"bytes_written": self._num_bytes})
            self._merged, self._num_bytes = None, 0
