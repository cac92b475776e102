"""Reading ahead: the next item is loaded by a thread while the present one is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


@contextmanager
def prefetched(
    load: Callable[[Item], Loaded], items: Sequence[Item], *, ahead: bool = True
) -> Iterator[Iterator[Loaded]]:
    """Yields an iterator over `load(item)` for every item, one ahead of its reader.

    An error while loading is raised where the item is asked for.

    Args:
        load: Called once for every item, in order.
        items: What to load.
        ahead: If not, an item is loaded only when it is asked for, so that there is never more than one.
    """
    if not ahead:
        yield (load(item) for item in items)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="largemerge-read") as pool:

        def loaded() -> Iterator[Loaded]:
            coming: Future[Loaded] | None = pool.submit(load, items[0]) if items else None
            for position in range(len(items)):
                assert coming is not None
                present = coming.result()
                coming = pool.submit(load, items[position + 1]) if position + 1 < len(items) else None
                yield present
                del present  # its memory must not wait for the next one

        yield loaded()
