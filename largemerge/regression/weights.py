"""Weights of candidates, base and output as parameters of the module, read and written when they are needed.

    read    a reader of one model → KeyMapping.load → parameters, on the CPU, as stored
    write   parameters → KeyMapping.store → ShardWriter, on rank 0

Only rank 0 has a writer. Other ranks get merged weights from it, by a collective call.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.tensor_info import OutputTensor, Tensors, list_kinds
from largemerge.checkpoint.writer import ShardWriter, why_unmergeable
from largemerge.distributed.ranks import Ranks
from largemerge.errors import CheckpointError
from largemerge.model.key_mapping import KeyMapping, ReadTensor
from largemerge.regression.inputs import Inputs
from largemerge.regression.tokens import ArrangedReader, Tokens

MERGED = "merged"
"""The output, as far as it has been written, as an owner of weights (see `Weights.load_non_block`)."""


@dataclass(frozen=True)
class Weights:
    """Reads the weights of candidates, base and output, and writes those of the output.

    Attributes:
        inputs: Opened checkpoints and how their names map to the module's.
        readers: Readers of the candidates, in order.
        base_reader: Reader of the base; `None` without a base.
        output: Tensors of the output, by name on disk.
        writer: Writer of the output; `None` on other ranks than rank 0.
        ranks: The ranks of the merge.
        device: The device that computes.
        writes_parameters: Whether the writer's tensors are parameters as they are, by their own names, and not those of
            a checkpoint.
    """

    inputs: Inputs
    readers: Sequence[TensorReader]
    base_reader: TensorReader | None
    output: Mapping[str, OutputTensor]
    writer: ShardWriter | None
    ranks: Ranks
    device: torch.device
    writes_parameters: bool = False

    @property
    def own_writer(self) -> ShardWriter:
        """The writer; asked for on rank 0 alone."""
        assert self.writer is not None, "only the first rank writes"
        return self.writer

    @property
    def all_readers(self) -> tuple[TensorReader, ...]:
        """The candidates' readers, and the base's if there is one."""
        return (*self.readers, *([self.base_reader] if self.base_reader is not None else []))

    @property
    def bytes_read(self) -> int:
        """Bytes read from candidates and base, so far."""
        return sum(reader.bytes_read for reader in self.all_readers)

    def read_candidate(self, index: int, names: Sequence[str]) -> Tensors:
        """Reads parameters of one candidate, on the CPU, as stored; excluded ones that it lacks, from the base."""
        mapping = self.inputs.candidate_mappings[index]
        own = [name for name in names if mapping.has(name)]
        lacking = [name for name in names if not mapping.has(name)]
        tensors = self._load(mapping, own, self.readers[index].read)
        return tensors | (self.read_base(lacking) if lacking else {})

    def read_base(self, names: Sequence[str]) -> Tensors:
        """Reads parameters of the base, on the CPU, as stored."""
        if self.base_reader is None or self.inputs.base_mapping is None:
            raise CheckpointError(
                f"no model has {list_kinds(names)}, which {self.inputs.reference.name} needs to compute; expected "
                "whole checkpoints: fetch them again"
            )
        return self._load(self.inputs.base_mapping, names, self.base_reader.read)

    def why_not_finite(self, names: Iterable[str]) -> str | None:
        """Names the first model that holds NaN, infinity, or more than float32 can hold, in some parameters."""
        readers = {reader.checkpoint.name: reader for reader in self.all_readers}
        for name in names:
            for model, key in (
                (m, key) for keys in self.inputs.keys_by_model(name).values() for m, key in keys.items()
            ):
                found = why_unmergeable(model, key, readers[model].read(key)) if model in readers else None
                if found is not None:
                    return found
        return None

    def read_merged(self, names: Sequence[str]) -> Tensors:
        """Collective: reads parameters of the output, rounded or quantised as they were written."""
        return self.ranks.tensors_from_first(
            lambda: self._load(self.inputs.reference_mapping, names, self.own_writer.read), self.device
        )

    def load_non_block(self, owner: Hashable, parameters: Sequence[str], buffers: Sequence[str]) -> Tensors:
        """Reads parameters outside the blocks, and those of the buffers that the output has.

        Collective if the owner is `MERGED`.

        Args:
            owner: `MERGED`, or the number of a candidate.
            parameters: Names of the parameters that are needed.
            buffers: Names of the buffers that are read if they are there.
        """
        names = [*parameters, *(name for name in buffers if self.inputs.reference_mapping.has(name))]
        if not isinstance(owner, int):
            return self.read_merged(names)
        tensors, tokens = self.read_candidate(owner, names), self.inputs.tokens
        if tokens is not None and tokens.input_parameter in tensors:
            tensors[tokens.input_parameter] = self._own_embeddings(owner, tokens, tensors[tokens.input_parameter])
        return tensors

    def _own_embeddings(self, index: int, tokens: Tokens, arranged: torch.Tensor) -> torch.Tensor:
        """Adds the rows of a candidate's tokens that the output lacks below its input embeddings."""
        reader = self.readers[index]
        keys = self.inputs.candidate_mappings[index].keys_of(tokens.input_parameter)
        plain = reader.inner if isinstance(reader, ArrangedReader) else reader
        return tokens.own_embeddings(self.inputs.names[index], keys[0], arranged, plain) if keys else arranged

    def store(self, tensors: Tensors) -> None:
        """Writes parameters of the output; called on rank 0 alone."""
        with self.ranks.blocked():
            self.write(self.to_disk_layout(tensors))

    def to_disk_layout(self, tensors: Tensors) -> Tensors:
        """Brings parameters of the output to their names and layout on disk; empty on other ranks than rank 0."""
        if self.writer is None:
            return {}
        if self.writes_parameters:
            return dict(tensors)
        mapping = self.inputs.reference_mapping
        canonical = {mapping.canonical(name): tensor for name, tensor in tensors.items()}
        return mapping.store(self.inputs.skeleton.model, canonical)

    def write(self, on_disk: Tensors) -> int:
        """Writes what `to_disk_layout` returned, and flushes it; returns the bytes. From any thread, one at a time."""
        before = self.own_writer.bytes_written
        for key, tensor in on_disk.items():
            self.own_writer.write(key, tensor)
        self.own_writer.flush()
        return self.own_writer.bytes_written - before

    def as_written(self, tensors: Tensors) -> Tensors:
        """Collective: parameters that were just written, as `read_merged` would read them: quantised ones differ."""
        quantized = [name for name in tensors if self._quantized_as(name) is not None]
        return tensors | (self.read_merged(quantized) if quantized else {})

    def quantization_errors(self, names: Iterable[str]) -> dict[str, float]:
        """‖written - merged‖ / ‖merged‖ of each of the parameters that was written quantised."""
        errors = self.writer.quantization_errors if self.writer is not None else {}
        return {name: errors[key] for name in names if (key := self._quantized_as(name)) is not None and key in errors}

    def quantizes(self, names: Iterable[str]) -> bool:
        """Whether any of the parameters is written quantised."""
        return any(self._quantized_as(name) is not None for name in names)

    def _quantized_as(self, name: str) -> str | None:
        """Name on disk of a parameter that is written quantised; `None` for any other."""
        if self.writes_parameters:
            return None
        mapping = self.inputs.reference_mapping
        key = mapping.renamed.get(mapping.canonical(name))
        return key if key is not None and self.output[key].quantization is not None else None

    def stored_bytes(self, index: int, wanted: Sequence[str]) -> int:
        """Bytes on disk of what `read_candidate` reads."""
        mapping, checkpoint = self.inputs.candidate_mappings[index], self.inputs.candidates[index]
        own = {mapping.canonical(name) for name in wanted if mapping.has(name)}
        total = self.inputs.stored_bytes(checkpoint, mapping.disk_keys(own))
        lacking = [name for name in wanted if not mapping.has(name)]
        if lacking:
            assert self.inputs.base is not None and self.inputs.base_mapping is not None, lacking
            base_mapping = self.inputs.base_mapping
            keys = base_mapping.disk_keys([base_mapping.canonical(name) for name in lacking])
            total += self.inputs.stored_bytes(self.inputs.base, keys)
        return total

    def _load(self, mapping: KeyMapping, names: Sequence[str], read: ReadTensor) -> Tensors:
        """Reads parameters by the names that the module has for them, tied ones included."""
        canonical = {name: mapping.canonical(name) for name in names}
        loaded = mapping.load(self.inputs.skeleton.model, list(canonical.values()), read)
        return {name: loaded[own] for name, own in canonical.items()}
