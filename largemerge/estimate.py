"""What a placement of the work holds at its peak, on host, device and disk.

A placement says where hidden states wait, in how many passes a block is solved, whether the next block is read ahead,
and how many samples run at once. On the CPU everything is host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from largemerge.average import CHUNK_BYTES as AVERAGE_CHUNK_BYTES
from largemerge.passes import BlockPass, mean_dtype
from largemerge.regression.solve import may_need_float64
from largemerge.regression.sums import CHUNK_BYTES, sums_bytes
from largemerge.workload import BlockKind, Workload

_BITSANDBYTES_BITS = 8.5  # a byte, and a float32 scale for every 64
_SPARING_SHARE, _REUSING_SHARE = 0.04, 0.2  # of everything: what the allocator keeps between two uses
_MOST_REUSING_BYTES = 2 << 30
"""Larger merges spend little of their time on fresh pages, and holes between reused ones cost them more memory."""
_LIBRARIES_BYTES = 48 << 20  # work space of matrix products, stacks of threads, shared libraries touched on the way


class Waiting(str, Enum):
    """Where hidden states wait between blocks."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True)
class Placement:
    """How the work is laid out.

    Attributes:
        hidden_states: Where they wait.
        passes: In how many passes a block is solved.
        prefetch: Whether the next candidate's block is read while this one computes.
        samples: That run at once.
    """

    hidden_states: Waiting
    passes: int
    prefetch: bool
    samples: int

    def writes_behind(self, device: torch.device) -> bool:
        """Whether a merged block is written while the next one is merged: where a GPU would wait for the disk."""
        return self.prefetch and device.type != "cpu"

    def __str__(self) -> str:
        where = {Waiting.DEVICE: "on the device", Waiting.HOST: "in host memory", Waiting.DISK: "on disk"}
        linears = "all linears of a block at once" if self.passes == 1 else f"a block's linears in {self.passes} passes"
        ahead = "the next block read ahead" if self.prefetch else "no block read ahead"
        return f"hidden states {where[self.hidden_states]}, {linears}, {ahead}, {self.samples} samples at once"


@dataclass(frozen=True)
class Footprint:
    """Bytes held at the peak.

    Attributes:
        host: Anonymous memory of the process.
        device: 0 on the CPU.
        disk: Hidden states; the output comes on top.
        parts: What makes up the larger of host and device, at the moment of its peak.
        sparing: Whether freed host memory goes back to the system at once (see `memory.reuse_freed_memory`).
    """

    host: int
    device: int
    disk: int
    parts: Mapping[str, int]
    sparing: bool


def footprint(
    work: Workload, placement: Placement, device: torch.device, before: int, *, eight_bit: bool, limited: bool
) -> Footprint:
    """What a placement holds.

    Args:
        work: To be done.
        placement: How.
        device: That computes.
        before: Bytes that the process holds before it starts.
        eight_bit: Hidden states wait in 8 bits.
        limited: The user has set the most host memory.
    """
    moments = [
        moment | {"embeddings": work.first_bytes if kind.block.index == 0 else 0}
        for kind in work.kinds
        for each in kind.passes(placement.passes, keeps_outputs=work.own_stream)
        for moment in _moments(work, kind, each, placement)
    ]
    computing = max(moments, key=_total)
    before_blocks = [
        {"loading of calibration inputs": work.loading_bytes},
        {"tensors outside the blocks": min(work.outside_bytes, 8 * AVERAGE_CHUNK_BYTES)},
    ]
    shrunk = _BITSANDBYTES_BITS / 8 / work.compute_dtype.itemsize if eight_bit else 1.0
    hidden = round(work.hidden_bytes * shrunk)
    waiting = placement.hidden_states
    # On disk: the present batch, the next one, and those that are still being written.
    buffers = 4 * work.sample_hidden_bytes * placement.samples if waiting is Waiting.DISK else 0
    host = {"process": before + _LIBRARIES_BYTES, "calibration inputs": work.input_bytes}
    host["hidden states"] = hidden if waiting is Waiting.HOST else buffers
    on_disk = hidden if waiting is Waiting.DISK else 0
    if device.type == "cpu":
        parts, sparing = _with_allocator(host | max(computing, *before_blocks, key=_total), limited)
        return Footprint(_total(parts), 0, on_disk, parts, sparing)
    largest_block = max((kind.bytes_of(kind.names) for kind in work.kinds), default=0)
    behind = largest_block if placement.writes_behind(device) else 0
    in_transit = {
        "blocks in transit": 2 * max(_largest_read(work, placement.passes), work.first_bytes),
        "a block on its way to the disk": behind,  # a tensor at a time, and what the allocator keeps of it
    }
    in_host, sparing = _with_allocator(host | max(in_transit, *before_blocks, key=_total), limited)
    # On the device, torch's own allocator.
    on_device = {"hidden states": hidden if waiting is Waiting.DEVICE else 0, "a block on its way to the disk": behind}
    parts, _ = _with_allocator(computing | on_device, True)
    return Footprint(_total(in_host), _total(parts), on_disk, max(parts, in_host, key=_total), sparing)


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def _with_allocator(parts: Mapping[str, int], limited: bool) -> tuple[dict[str, int], bool]:
    """With what the allocator keeps, and whether it is to keep little."""
    ours = sum(value for name, value in parts.items() if name != "process")
    sparing = limited or _total(parts) > _MOST_REUSING_BYTES
    return {**parts, "allocator": round(ours * (_SPARING_SHARE if sparing else _REUSING_SHARE))}, sparing


def _moments(work: Workload, kind: BlockKind, each: BlockPass, placement: Placement) -> list[dict[str, int]]:
    """The moments of a pass when most is held: collecting, solving, and the merged block's forward pass."""
    block, dtype = kind.block, work.compute_dtype
    solved = [f"{block.name}.{path}.weight" for group in each.groups for path in group.outputs]
    ahead = _largest_read(work, placement.passes) if placement.prefetch else 0
    averaged = sum(kind.sizes[name] for name in kind.names if name not in _all_solved(kind)) * 4 if each.averages else 0
    sums = averaged + sum(
        sums_bytes(list(group.outputs.values()), group.num_inputs, mean_dtype(block, group)) for group in each.groups
    )
    widest = max((group.num_inputs for group in each.groups), default=0)
    until = None if each.last and work.own_stream else (each.groups[-1].leader if each.groups else "")
    largest_group = max((4 * group.num_inputs * sum(group.outputs.values()) for group in each.groups), default=0)
    chunks = 3 * min(CHUNK_BYTES, largest_group)  # of differences, and of what is made of them
    collect = {
        "weights": kind.bytes_of(each.reads) + kind.bytes_of(solved) + ahead + _cast_bytes(kind, each.reads, dtype),
        "sums": sums,
        "activations": _activation_bytes(work, kind, placement.samples, until) + chunks,
    }
    largest = max((kind.bytes_of([name]) for name in solved), default=0)
    solve = {
        "weights": kind.bytes_of(solved) + largest + ahead,
        "sums": sums,
        "solve": _fallback_bytes(work, widest) + chunks,
    }
    if work.own_stream:
        return [collect, solve]
    forward = {
        "weights": kind.bytes_of(kind.names) + ahead + _cast_bytes(kind, kind.names, dtype),
        "sums": 0,
        "activations": _activation_bytes(work, kind, placement.samples, None),
    }
    return [collect, solve, forward]


def _fallback_bytes(work: Workload, num_inputs: int) -> int:
    """Of a second try at a solve in float64; of eigenvectors, where the whole Gram has too few tokens."""
    most_rank = sum(max(rows.values()) for rows in work.rows)
    if work.off_diagonal_scale == 1 and most_rank < num_inputs:
        return 32 * num_inputs**2
    return 8 * num_inputs**2 if may_need_float64(num_inputs, work.off_diagonal_scale) else 0


def _all_solved(kind: BlockKind) -> set[str]:
    return {f"{kind.block.name}.{path}.weight" for group in kind.block.groups for path in group.outputs}


def _largest_read(work: Workload, num_passes: int) -> int:
    return max(
        (
            kind.bytes_of(each.reads)
            for kind in work.kinds
            for each in kind.passes(num_passes, keeps_outputs=work.own_stream)
        ),
        default=0,
    )


def _cast_bytes(kind: BlockKind, names: tuple[str, ...] | list[str], dtype: torch.dtype) -> int:
    """Of the copies in the forward's dtype, where that is not the stored one."""
    different = [plan.name for plan in kind.block.tensors if plan.dtype != dtype and plan.name in set(names)]
    return kind.bytes_of(different, dtype)


def _activation_bytes(work: Workload, kind: BlockKind, samples: int, until: str | None) -> int:
    """Of what a block computes for some samples, up to the linear `until`, and of a Gram's rows in float32."""
    order = [role.name for role in kind.roles]
    reached = order if until is None else order[: order.index(until)] if until in order else []
    rows = samples * work.sample_rows[kind.block.stack]
    features = sum(kind.linears[path][1] for path in reached)  # outputs; the inputs of one are others' outputs
    widest = max((group.num_inputs for group in kind.block.groups), default=0)
    width = max((sizes[0] for sizes in kind.linears.values()), default=0)
    float32_rows = 0 if until is None else rows * 4 * widest
    return rows * (features + 4 * width) * work.compute_dtype.itemsize + float32_rows
