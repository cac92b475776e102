"""A model by reference: a folder, a Hub id, or another merge's result, with its adapter if it has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from largemerge.checkpoint.direct_io import Buffers
from largemerge.checkpoint.index import Checkpoint, open_checkpoint
from largemerge.checkpoint.locate import locate_checkpoint, split_reference
from largemerge.checkpoint.lora import AdaptedReader, Adapter, open_adapter
from largemerge.checkpoint.reader import CheckpointReader, TensorReader


def open_model(reference: str, made: Mapping[str, Checkpoint] | None = None) -> tuple[Checkpoint, Adapter | None]:
    """Opens a model and its adapter, if it has one, from their headers.

    Args:
        reference: A folder or Hub id, with `@revision` and `+adapter` if wanted.
        made: Checkpoints that other merges have made, by the name that a reference may use.

    Returns:
        The checkpoint, with the adapter's whole tensors in it; and the adapter, or `None`.

    Raises:
        LargemergeError: If either cannot be opened, or they do not fit together.
    """
    name, lora = split_reference(reference)
    model = (made or {}).get(name) or open_checkpoint(locate_checkpoint(name, name), name)
    if lora is None:
        return model, None
    return open_adapter(locate_checkpoint(lora, reference), reference, model)


@contextmanager
def open_reader(checkpoint: Checkpoint, adapter: Adapter | None, buffers: Buffers) -> Iterator[TensorReader]:
    """Reads a model's tensors, with its adapter if it has one; what is read once does not fill the system's cache."""
    with CheckpointReader(checkpoint, past_cache=True, buffers=buffers) as reader:
        if adapter is None:
            yield reader
            return
        with CheckpointReader(adapter.checkpoint) as own:
            yield AdaptedReader(reader, own, adapter)
