"""What a placement of the work holds at its peak, and the fastest placement that keeps the limits.

    Workload, limits ──► every placement ──► footprint, cost ──► choose_placement ──► Choice, and why

A placement says where hidden states are kept (device, host or disk), in how many passes a block is solved, whether the
next block is prefetched, and how many samples run at once. On the CPU everything is host memory. All placements are
compared. The choice depends on shapes and limits alone, not on how fast this machine is just now, so that a resumed
run makes the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from largemerge.checkpoint.room import free_bytes
from largemerge.machine import free_on_gpu, kernels_kept, memory_in_use
from largemerge.regression.config import MemoryConfig
from largemerge.regression.planning.cost import NOMINAL_RATES, estimate_seconds
from largemerge.regression.planning.workload import BlockNumbers, OffloadTo, PassNumbers, Placement, Workload
from largemerge.units import gib

_BITSANDBYTES_BITS = 8.5  # a byte, and a float32 scale for every 64
_MARGIN = 0.95  # of what is free now, where the user has set no limit
_SPARING_SHARE, _REUSING_SHARE = 0.04, 0.2  # of everything: what the allocator keeps between two uses
_MAX_REUSING_BYTES = 2 << 30
"""Larger merges spend little of their time on fresh pages, and holes between reused ones cost them more memory."""
_LIBRARIES_BYTES = 48 << 20  # work space of matrix products, stacks of threads, shared libraries touched on the way

_KERNEL_BYTES = 640 << 10  # that oneDNN keeps for every shape of a product


@dataclass(frozen=True)
class Footprint:
    """Bytes held at the peak.

    Attributes:
        host: Bytes of anonymous memory of the process.
        device: Bytes on a GPU; 0 on the CPU.
        disk: Bytes of hidden states on disk; the output comes on top.
        parts: What makes up the larger of host and device, at the moment of its peak, in bytes.
        sparing: Whether freed host memory goes back to the system at once (see `machine.reuse_freed_memory`).
    """

    host: int
    device: int
    disk: int
    parts: Mapping[str, int]
    sparing: bool


def footprint(
    work: Workload, placement: Placement, device: torch.device, process_bytes: int, *, eight_bit: bool, limited: bool
) -> Footprint:
    """Computes what a placement holds at its peak.

    Args:
        work: What there is to do.
        placement: Placement of the work.
        device: The device that computes.
        process_bytes: Anonymous memory of the process before the work.
        eight_bit: Whether hidden states are kept in 8 bits.
        limited: Whether the user has limited host memory.
    """
    moments = [
        moment | {"embeddings": work.first_bytes if kind.is_first else 0}
        for kind in work.blocks
        for numbers in kind.in_passes(placement.passes)
        for moment in _moments(work, kind, numbers, placement)
    ]
    if work.head.sums_bytes:
        largest = max((kind.bytes + kind.cast_bytes for kind in work.blocks), default=0)
        activations = max((kind.whole.sample_bytes for kind in work.blocks), default=0) * placement.samples
        running = {"weights": 2 * largest if work.head.tied else 0, "sums": work.head.sums_bytes}
        moments.append(running | {"activations": activations})
        moments.append({"sums": work.head.sums_bytes, "solve": work.head.panel_bytes})
    computing = max(moments, key=_total)
    before_blocks = [
        {"loading of calibration inputs": work.loading_bytes},
        {"tensors outside the blocks": work.non_block_buffer_bytes},
    ]
    shrunk = _BITSANDBYTES_BITS / 8 / work.hidden_itemsize if eight_bit else 1.0
    hidden = round(work.hidden_bytes * shrunk)
    offload = placement.hidden_states
    # On disk: the present batch, the next one, and those that are still being written.
    buffers = 4 * work.sample_hidden_bytes * placement.samples if offload is OffloadTo.DISK else 0
    host = {"process": process_bytes + _LIBRARIES_BYTES, "calibration inputs": work.input_bytes}
    host["hidden states"] = hidden if offload is OffloadTo.HOST else buffers
    host |= {"adapters": work.adapter_bytes} if work.adapter_bytes else {}
    on_disk = hidden if offload is OffloadTo.DISK else 0
    if device.type == "cpu":
        host["kernels"] = min(work.num_kernels, kernels_kept()) * _KERNEL_BYTES
        parts, sparing = _with_allocator(host | max(computing, *before_blocks, key=_total), limited)
        return Footprint(_total(parts), 0, on_disk, parts, sparing)
    largest_block = max((kind.bytes for kind in work.blocks), default=0)
    written = largest_block if placement.writes_in_background(device) else 0
    in_transit = {
        "blocks in transit": 2 * max(_largest_read(work, placement.passes), work.first_bytes),
        "a block on its way to the disk": written,  # a tensor at a time, and what the allocator keeps of it
    }
    in_host, sparing = _with_allocator(host | max(in_transit, *before_blocks, key=_total), limited)
    # On the device, torch's own allocator.
    on_device = {
        "hidden states": hidden if offload is OffloadTo.DEVICE else 0,
        "a block on its way to the disk": written,
    }
    parts, _ = _with_allocator(computing | on_device, True)
    return Footprint(_total(in_host), _total(parts), on_disk, max(parts, in_host, key=_total), sparing)


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def _with_allocator(parts: Mapping[str, int], limited: bool) -> tuple[dict[str, int], bool]:
    """Adds what the allocator keeps; returns also whether it is to keep little."""
    ours = sum(value for name, value in parts.items() if name not in ("process", "kernels"))
    sparing = limited or _total(parts) > _MAX_REUSING_BYTES
    return {**parts, "allocator": round(ours * (_SPARING_SHARE if sparing else _REUSING_SHARE))}, sparing


def _moments(work: Workload, kind: BlockNumbers, numbers: PassNumbers, placement: Placement) -> list[dict[str, int]]:
    """What is held at the peaks of a pass: while collecting, solving, and running the merged block."""
    ahead = _largest_read(work, placement.passes) if placement.prefetch else 0
    collect = {
        "weights": numbers.read_bytes + numbers.merged_bytes + numbers.solved_bytes + ahead + numbers.cast_bytes,
        "sums": numbers.sums_bytes,
        "activations": placement.samples * numbers.forward.sample_bytes + numbers.chunk_bytes,
    }
    solve = {
        "weights": numbers.merged_bytes + numbers.solved_bytes + numbers.largest_solved_bytes + ahead,
        "sums": numbers.sums_bytes,
        "solve": numbers.fallback_bytes + numbers.chunk_bytes,
    }
    if not work.forwards_merged:
        return [collect, solve]
    forward = {
        "weights": kind.bytes + ahead + kind.cast_bytes,
        "sums": 0,
        "activations": placement.samples * kind.forward.sample_bytes,
    }
    return [collect, solve, forward]


def _largest_read(work: Workload, num_passes: int) -> int:
    """Bytes of the tensors that one pass reads of a candidate, at most."""
    return max((numbers.read_bytes for kind in work.blocks for numbers in kind.in_passes(num_passes)), default=0)


@dataclass(frozen=True)
class Limits:
    """How much a process may hold.

    Attributes:
        host: Bytes of anonymous host memory, at most.
        device: Bytes on a GPU, at most.
        host_is_set: Whether the user has set the limit of the host.
        device_is_set: Whether the user has set the limit of the device.
        scratch: Folder for hidden states on disk; `None` where no output folder is known.
    """

    host: int
    device: int
    host_is_set: bool
    device_is_set: bool
    scratch: Path | None


@dataclass(frozen=True)
class Choice:
    """A placement and the reasons for it.

    Attributes:
        placement: The chosen placement.
        footprint: What it holds at its peak.
        reasons: Why this placement, in sentences.
        problems: Why not even the smallest placement fits, and what would help.
    """

    placement: Placement
    footprint: Footprint
    reasons: tuple[str, ...]
    problems: tuple[str, ...]


def find_limits(memory: MemoryConfig, device: torch.device, out: Path | None, local_ranks: int = 1) -> Limits:
    """Finds what a process may hold: the user's limits, else its part of what is free for `local_ranks` of them."""
    free_device = free_on_gpu(device, local_ranks) if device.type == "cuda" else 0
    free_host = psutil.virtual_memory().available // local_ranks + memory_in_use(device).host_anonymous
    return Limits(
        host=memory.host if memory.host is not None else int(free_host * _MARGIN),
        device=memory.device if memory.device is not None else int(free_device * _MARGIN),
        host_is_set=memory.host is not None,
        device_is_set=memory.device is not None,
        scratch=Path(memory.disk) if memory.disk is not None else out,
    )


def choose_placement(
    work: Workload, limits: Limits, device: torch.device, process_bytes: int, *, eight_bit: bool
) -> Choice:
    """Chooses the fastest placement that keeps the limits."""
    ranked = sorted(
        (
            (
                placement,
                footprint(work, placement, device, process_bytes, eight_bit=eight_bit, limited=limits.host_is_set),
            )
            for placement in _placements(work, device)
        ),
        key=lambda item: _cost(work, item[0]),
    )
    free = _free_disk(limits.scratch)
    fitting = [item for item in ranked if not _exceeded(item[1], limits, device, free)]
    if not fitting:
        smallest = min(ranked, key=lambda item: (item[1].device, item[1].host))
        return Choice(*smallest, (), _problems(work, smallest[1], limits, device, free))
    chosen, fastest = fitting[0], ranked[0]
    if chosen is fastest:
        return Choice(*chosen, ("the fastest placement fits",), ())
    reasons = (
        f"the fastest placement ({fastest[0]}) would {', and '.join(_exceeded(fastest[1], limits, device, free))}",
        f"with more it would take {100 * (1 - _cost(work, fastest[0]) / _cost(work, chosen[0])):.0f} % less time",
    )
    return Choice(*chosen, reasons, ())


def _placements(work: Workload, device: torch.device) -> Iterator[Placement]:
    """All placements that can be chosen."""
    samples = work.batch_samples
    counts = [samples]
    while samples > 1:
        samples = -(-samples // 2)
        counts.append(samples)
    places = [OffloadTo.HOST, OffloadTo.DISK] if device.type == "cpu" else list(OffloadTo)
    for offload in places:
        for passes in range(1, work.max_passes + 1):
            for prefetch in (True, False):
                for count in counts:
                    yield Placement(offload, passes, prefetch, count)


def _cost(work: Workload, placement: Placement) -> float:
    """Seconds that a placement would take at nominal rates."""
    return sum(estimate_seconds(work, placement, NOMINAL_RATES).values())


def _exceeded(needed: Footprint, limits: Limits, device: torch.device, free_disk: int | None) -> list[str]:
    """What a placement has too little of, in words that follow `would`."""
    found = []
    if needed.host > limits.host:
        found.append(f"hold {gib(needed.host)} of host memory ({_limit_words(limits.host_is_set)} {gib(limits.host)})")
    if device.type == "cuda" and needed.device > limits.device:
        found.append(
            f"hold {gib(needed.device)} on {device} ({_limit_words(limits.device_is_set)} {gib(limits.device)})"
        )
    if free_disk is not None and needed.disk > free_disk:
        found.append(f"write {gib(needed.disk)} of hidden states to a disk with {gib(free_disk)} free")
    return found


def _limit_words(is_set: bool) -> str:
    return "the limit is" if is_set else "available are"


def _free_disk(scratch: Path | None) -> int | None:
    return None if scratch is None else free_bytes(scratch)


def _problems(
    work: Workload, smallest: Footprint, limits: Limits, device: torch.device, free_disk: int | None
) -> tuple[str, ...]:
    """Says that nothing fits, and which change would help."""
    changes = []
    if smallest.host > limits.host:
        more = f"memory: {{host: {_rounded_up(smallest.host)}}}"
        changes.append(f"{more} would do" if limits.host_is_set else f"{_rounded_up(smallest.host)} of memory would do")
    if device.type == "cuda" and smallest.device > limits.device:
        changes.append(f"memory: {{device: {_rounded_up(smallest.device)}}} would do, or --device cpu")
    if free_disk is not None and smallest.disk > free_disk:
        changes.append("memory: {disk: FOLDER} on a disk with more room")
    if smallest.parts.get("activations", 0) > sum(smallest.parts.values()) // 4:
        changes.append("a shorter max_length would need less")
    if smallest.parts.get("calibration inputs", 0) > sum(smallest.parts.values()) // 4:
        changes.append("fewer calibration samples (num_samples) would need less")
    exceeded = ", and ".join(_exceeded(smallest, limits, device, free_disk))
    return (f"even the smallest placement would {exceeded}; {'; '.join(changes)}",)


def _rounded_up(num_bytes: int) -> str:
    return f"{-(-num_bytes * 10 // 2**30) / 10:.1f}GiB"
