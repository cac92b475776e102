"""What a merge has to do, in plain numbers: rows, bytes and operations, and how they can be placed.

    counting.py ──► Workload: BlockNumbers for every kind of block, PassNumbers for every number of passes
                        └──► placement.py   what is held
                        └──► cost.py        how long it takes
                        └──► ranks.py       which rank does it

Planning adds and multiplies these numbers; blocks that are alike are counted once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from largemerge.regression.solve import solve_operations


class OffloadTo(str, Enum):
    """Where hidden states are kept between blocks."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True)
class Placement:
    """Where hidden states are kept, and how a block's work is cut.

    Attributes:
        hidden_states: Where hidden states are kept between blocks.
        passes: Number of passes in which a block is solved.
        prefetch: Whether the next candidate's block is read while this one computes.
        samples: Number of samples that run at once.
    """

    hidden_states: OffloadTo
    passes: int
    prefetch: bool
    samples: int

    def writes_in_background(self, device: torch.device) -> bool:
        """Whether a merged block is written while the next one is merged: where a GPU would wait for the disk."""
        return self.prefetch and device.type != "cpu"

    def __str__(self) -> str:
        where = {OffloadTo.DEVICE: "on the device", OffloadTo.HOST: "in host memory", OffloadTo.DISK: "on disk"}
        linears = "all linears of a block at once" if self.passes == 1 else f"a block's linears in {self.passes} passes"
        ahead = "the next block read ahead" if self.prefetch else "no block read ahead"
        return f"hidden states {where[self.hidden_states]}, {linears}, {ahead}, {self.samples} samples at once"


BatchShapes = Mapping[str, tuple[int, ...]]
"""Forward argument → its shape in one batch."""


@dataclass(frozen=True)
class GroupNumbers:
    """A group of linears that is solved.

    Attributes:
        leader: Path of the group's first linear in the block.
        num_inputs: Number of inputs I.
        num_outputs: Number of outputs O of all linears together.
    """

    leader: str
    num_inputs: int
    num_outputs: int

    @property
    def solve_operations(self) -> int:
        """Multiplications and additions of a factorisation and two triangular solves."""
        return solve_operations(self.num_inputs, self.num_outputs)


@dataclass(frozen=True)
class ForwardNumbers:
    """Running the data of all candidates through a block, or a part of it.

    Attributes:
        operations: Multiplications and additions of linears and attention.
        moved_bytes: Bytes of activations that are read and written on the way.
        sample_bytes: Bytes of activations of one sample that are held.
    """

    operations: float
    moved_bytes: float
    sample_bytes: int

    def __add__(self, other: ForwardNumbers) -> ForwardNumbers:
        """Numbers of two runs that take turns, batch by batch."""
        return ForwardNumbers(
            self.operations + other.operations,
            self.moved_bytes + other.moved_bytes,
            self.sample_bytes + other.sample_bytes,
        )


@dataclass(frozen=True)
class PassNumbers:
    """One pass over a block: all candidates are run, and some groups are solved.

    Attributes:
        read_bytes: Bytes of the tensors that are read of every candidate.
        cast_bytes: Bytes of copies of these tensors in the forward's dtype, where that is not the stored one.
        merged_bytes: Bytes of the block's tensors that are merged already, and run.
        solved_bytes: Bytes of the weights that are solved.
        largest_solved_bytes: Bytes of the largest weight that is solved.
        sums_bytes: Bytes of the sums of the groups, and of running averages.
        chunk_bytes: Bytes of differences of weights in float32, and of what is made of them.
        fallback_bytes: Bytes of a second attempt at the hardest solve.
        runs: Whether the candidates' data is run at all.
        forward: Forward passes of the candidates.
        gram_operations: Operations of all candidates' Gram matrices.
        right_hand_side_operations: Operations of all candidates' right-hand sides.
        groups: Groups that are solved.
    """

    read_bytes: int
    cast_bytes: int
    merged_bytes: int
    solved_bytes: int
    largest_solved_bytes: int
    sums_bytes: int
    chunk_bytes: int
    fallback_bytes: int
    runs: bool
    forward: ForwardNumbers
    gram_operations: int
    right_hand_side_operations: float
    groups: tuple[GroupNumbers, ...]


@dataclass(frozen=True)
class BlockNumbers:
    """Numbers of the blocks of one kind: blocks that are alike are counted once.

    Attributes:
        count: Number of blocks.
        num_outputs_read: Number of blocks whose output is read by a later one.
        is_first: Whether one of the blocks is the first of its stack, so that embeddings are held beside it.
        bytes: Bytes of all tensors of one block, as they are written.
        cast_bytes: Bytes of copies of these tensors in the forward's dtype, where that is not the stored one.
        forward: Forward pass of the merged block, from where the last pass has stopped.
        whole: Forward pass of the whole block.
        groups: All groups that are solved.
        exchanged_bytes: Bytes of sums, solved weights and averages of one block that ranks exchange.
        shared_gram_bytes: Bytes of Gram matrices of one block that a rank all-reduces with others, there and back.
        previous_bytes: Bytes of the sums of one block that are read: of an earlier merge, or in place of data.
        kept_bytes: Bytes of the sums of one block that are kept for a later merge.
        passes: Numbers of each pass, for one pass, for two passes, and so on.
    """

    count: int
    num_outputs_read: int
    is_first: bool
    bytes: int
    cast_bytes: int
    forward: ForwardNumbers
    whole: ForwardNumbers
    groups: tuple[GroupNumbers, ...]
    exchanged_bytes: int
    shared_gram_bytes: int
    previous_bytes: int
    kept_bytes: int
    passes: tuple[tuple[PassNumbers, ...], ...]

    def in_passes(self, number: int) -> tuple[PassNumbers, ...]:
        """Numbers of each of `number` passes; of one pass for every group where there are fewer groups."""
        return self.passes[min(number, len(self.passes)) - 1]


@dataclass(frozen=True)
class HeadNumbers:
    """The head, where it is solved.

    Attributes:
        tied: Whether all candidates' blocks are run once more before the first is merged.
        gram_operations: Operations of all candidates' Gram matrices and products with their own features.
        product_operations: Operations of right-hand sides and solves, panel by panel.
        sums_bytes: Bytes of the Gram matrices of all candidates.
        panel_bytes: Bytes of the rows that are solved at once, of all candidates and of what is made of them.
    """

    tied: bool = False
    gram_operations: float = 0.0
    product_operations: float = 0.0
    sums_bytes: int = 0
    panel_bytes: int = 0


@dataclass(frozen=True)
class ProbeShapes:
    """Shapes at which a machine is measured: those of the blocks that most of the model consists of.

    Attributes:
        sample_rows: Number of rows of one sample.
        num_inputs: Number of inputs of the largest linear.
        num_outputs: Number of outputs of the largest linear.
        gram_size: Number of rows of the largest Gram matrix.
        dtype: Dtype of the forward passes.
    """

    sample_rows: int
    num_inputs: int
    num_outputs: int
    gram_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Workload:
    """What a merge, or one rank of it, has to do.

    Attributes:
        num_candidates: Number of candidates K.
        forwards_merged: Whether merged blocks are run to make the next hidden states.
        hidden_itemsize: Bytes of an element of hidden states.
        blocks: Numbers of all blocks, by kind.
        head: Numbers of the head.
        has_rows: Whether there is any data, or Gram matrices in its place, by candidate.
        batch_samples: Number of samples in the largest batch.
        num_batches: Number of batches of all candidates.
        sample_hidden_bytes: Bytes of the outputs of all stacks for one sample, at most.
        hidden_bytes: Bytes of the outputs of all stacks for all samples.
        input_bytes: Bytes of calibration inputs that are held all the time.
        loading_bytes: Bytes of calibration inputs that are held only until they are on disk.
        first_bytes: Bytes of the tensors outside the stacks that the first block needs, in the forward's dtype.
        non_block_bytes: Bytes of all tensors outside the stacks, as they are written.
        non_block_buffer_bytes: Bytes of buffers through which these tensors are averaged.
        adapter_bytes: Bytes that adapters keep in memory.
        num_kernels: Number of unlike products on the way through a block: shapes of batches times shapes of linears.
        probe: Shapes at which a machine is measured.
    """

    num_candidates: int
    forwards_merged: bool
    hidden_itemsize: int
    blocks: tuple[BlockNumbers, ...]
    head: HeadNumbers
    has_rows: tuple[bool, ...]
    batch_samples: int
    num_batches: int
    sample_hidden_bytes: int
    hidden_bytes: int
    input_bytes: int
    loading_bytes: int
    first_bytes: int
    non_block_bytes: int
    non_block_buffer_bytes: int
    adapter_bytes: int
    num_kernels: int
    probe: ProbeShapes

    @property
    def exchanged_bytes(self) -> int:
        """Bytes that every rank gives or gets: sums, solved weights, averages, merged embeddings."""
        return self.first_bytes + sum(kind.count * kind.exchanged_bytes for kind in self.blocks)

    @property
    def shared_gram_bytes(self) -> int:
        """Bytes of Gram matrices that this rank all-reduces with others."""
        return sum(kind.count * kind.shared_gram_bytes for kind in self.blocks)

    @property
    def max_passes(self) -> int:
        """Maximum number of passes in which a block can be solved."""
        return max((len(kind.passes) for kind in self.blocks), default=1)


@dataclass(frozen=True)
class GramGroups:
    """Groups of ranks that add up a candidate's Gram matrices and compute its right-hand sides together.

    Attributes:
        total_rows: Number of rows of all ranks, by candidate and stack.
        group_sizes: Number of ranks, this one included, that compute a candidate's right-hand sides together.
        summed: Numbers of the candidates whose Gram matrices this rank reads in place of data.
    """

    total_rows: Sequence[Mapping[int, int]]
    group_sizes: Sequence[int]
    summed: frozenset[int] = frozenset()
