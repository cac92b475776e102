"""Weights of candidates, base and output as parameters of the module, read when they are needed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.tensor_info import OutputTensor, Tensors
from largemerge.checkpoint.writer import ShardWriter
from largemerge.distributed.ranks import Ranks
from largemerge.model.key_mapping import KeyMapping, ReadTensor
from largemerge.regression.inputs import Inputs

MERGED = "merged"
"""As an owner of weights: the output, as far as it has been written."""


@dataclass(frozen=True)
class Weights:
    """Where the weights of a merge come from and go to.

    Attributes:
        inputs: Opened checkpoints and how their names map to the module's.
        readers: Of the candidates.
        base_reader: Of the base, if there is one.
        output: What is written, by name on disk.
        writer: Of the output; only on the first rank.
        ranks: That share the merge.
        device: That computes.
    """

    inputs: Inputs
    readers: Sequence[TensorReader]
    base_reader: TensorReader | None
    output: Mapping[str, OutputTensor]
    writer: ShardWriter | None
    ranks: Ranks
    device: torch.device

    @property
    def own_writer(self) -> ShardWriter:
        """The writer, on the only rank that may ask for it."""
        assert self.writer is not None, "only the first rank writes"
        return self.writer

    @property
    def bytes_read(self) -> int:
        """From candidates and base, so far."""
        readers = [*self.readers, *([self.base_reader] if self.base_reader is not None else [])]
        return sum(reader.bytes_read for reader in readers)

    def candidate(self, index: int, names: Sequence[str]) -> Tensors:
        """Parameters of one candidate, on the CPU, as stored. Where it lacks one that is excluded, the base's."""
        name_map = self.inputs.candidate_names[index]
        own = [name for name in names if name_map.has(name)]
        lacking = [name for name in names if not name_map.has(name)]
        tensors = self._load(name_map, own, self.readers[index].read)
        return tensors | (self.base(lacking) if lacking else {})

    def base(self, names: Sequence[str]) -> Tensors:
        """Parameters of the base."""
        assert self.base_reader is not None and self.inputs.base_names is not None, list(names)
        return self._load(self.inputs.base_names, names, self.base_reader.read)

    def merged(self, names: Sequence[str]) -> Tensors:
        """Collective: parameters of the output, rounded or quantised as they were written."""
        return self.ranks.tensors_from_first(
            lambda: self._load(self.inputs.reference_names, names, self.own_writer.read), self.device
        )

    def load_non_block(self, owner: Hashable, parameters: Sequence[str], buffers: Sequence[str]) -> Tensors:
        """Parameters outside the blocks, and those of the buffers that the output has.

        Collective if the owner is `MERGED`.

        Args:
            owner: `MERGED`, or a candidate's number.
            parameters: Names of those that are needed.
            buffers: Names of those that are taken if they are there.
        """
        names = [*parameters, *(name for name in buffers if self.inputs.reference_names.has(name))]
        return self.candidate(owner, names) if isinstance(owner, int) else self.merged(names)

    def store(self, tensors: Tensors) -> None:
        """Writes parameters of the output, on the only rank that may."""
        with self.ranks.blocked():
            self.write(self.to_disk_layout(tensors))

    def to_disk_layout(self, tensors: Tensors) -> Tensors:
        """Parameters of the output as they lie on disk, by their names there; nothing on ranks that do not write."""
        if self.writer is None:
            return {}
        names = self.inputs.reference_names
        on_disk = {names.canonical(name): tensor for name, tensor in tensors.items()}
        return names.store(self.inputs.skeleton.model, on_disk)

    def write(self, on_disk: Tensors) -> int:
        """Writes what `laid_out` has made, and flushes it; returns the bytes. From any thread, one at a time."""
        before = self.own_writer.bytes_written
        for key, tensor in on_disk.items():
            self.own_writer.write(key, tensor)
        self.own_writer.flush()
        return self.own_writer.bytes_written - before

    def as_written(self, tensors: Tensors) -> Tensors:
        """Collective: parameters that were just stored, as `merged` would read them: others if they are quantised."""
        quantized = [name for name in tensors if self._quantized_as(name) is not None]
        return tensors | (self.merged(quantized) if quantized else {})

    def quantization_errors(self, names: Iterable[str]) -> dict[str, float]:
        """‖written - merged‖ / ‖merged‖ of those of the parameters that were written quantised."""
        errors = self.writer.quantization_errors if self.writer is not None else {}
        return {name: errors[key] for name in names if (key := self._quantized_as(name)) is not None and key in errors}

    def quantizes(self, names: Iterable[str]) -> bool:
        """Whether any of the parameters is written quantised."""
        return any(self._quantized_as(name) is not None for name in names)

    def _quantized_as(self, name: str) -> str | None:
        """The name on disk of a parameter that is written quantised."""
        names = self.inputs.reference_names
        key = names.renamed.get(names.canonical(name))
        return key if key is not None and self.output[key].quantization is not None else None

    def stored_bytes(self, index: int, wanted: Sequence[str]) -> int:
        """Bytes on disk of what `candidate` reads."""
        name_map, checkpoint = self.inputs.candidate_names[index], self.inputs.candidates[index]
        own = {name_map.canonical(name) for name in wanted if name_map.has(name)}
        total = self.inputs.stored_bytes(checkpoint, name_map.disk_keys(own))
        lacking = [name for name in wanted if not name_map.has(name)]
        if lacking:
            assert self.inputs.base is not None and self.inputs.base_names is not None, lacking
            names = self.inputs.base_names
            keys = names.disk_keys([names.canonical(name) for name in lacking])
            total += self.inputs.stored_bytes(self.inputs.base, keys)
        return total

    def _load(self, name_map: KeyMapping, names: Sequence[str], read: ReadTensor) -> Tensors:
        wanted = {name: name_map.canonical(name) for name in names}
        loaded = name_map.load(self.inputs.skeleton.model, list(wanted.values()), read)
        return {name: loaded[on_disk] for name, on_disk in wanted.items()}
