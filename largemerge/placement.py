"""Choosing where things are held: the fastest placement that keeps the limits, and why.

All placements are compared: hidden states on device, host or disk; a block's linears solved at once or in passes; the
next block read ahead or not; fewer samples at once. The choice depends on shapes and limits alone, not on how
fast this machine is just now, so that a resumed run makes the same one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from largemerge.config import MemoryConfig
from largemerge.estimate import Footprint, Placement, Waiting, footprint
from largemerge.memory import free_on_gpu, memory_in_use
from largemerge.output import existing_folder
from largemerge.sizes import gib
from largemerge.timing import NOMINAL_RATES, estimate_seconds
from largemerge.workload import Workload

_MARGIN = 0.95  # of what is free now, where the user has set no limit


@dataclass(frozen=True)
class Limits:
    """The most bytes to hold, whether the user has said so, and where the disk is."""

    host: int
    device: int
    host_is_set: bool
    device_is_set: bool
    scratch: Path | None


@dataclass(frozen=True)
class Choice:
    """A placement and the reasons for it.

    Attributes:
        placement: Chosen.
        footprint: Its bytes.
        reasons: For people.
        problems: Why not even the smallest placement fits, and what would help.
    """

    placement: Placement
    footprint: Footprint
    reasons: tuple[str, ...]
    problems: tuple[str, ...]


def find_limits(memory: MemoryConfig, device: torch.device, out: Path | None, local_ranks: int = 1) -> Limits:
    """What the user allows every process, else its part of what this machine has free for `local_ranks` of them."""
    free_device = free_on_gpu(device, local_ranks) if device.type == "cuda" else 0
    free_host = psutil.virtual_memory().available // local_ranks + memory_in_use(device).host_anonymous
    return Limits(
        host=memory.host if memory.host is not None else int(free_host * _MARGIN),
        device=memory.device if memory.device is not None else int(free_device * _MARGIN),
        host_is_set=memory.host is not None,
        device_is_set=memory.device is not None,
        scratch=Path(memory.disk) if memory.disk is not None else out,
    )


def choose_placement(work: Workload, limits: Limits, device: torch.device, before: int, *, eight_bit: bool) -> Choice:
    """The fastest placement that keeps the limits."""
    ranked = sorted(
        (
            (
                placement,
                footprint(work, placement, device, before, eight_bit=eight_bit, limited=limits.host_is_set),
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
    most_passes = max((len(kind.block.groups) for kind in work.kinds), default=1)
    samples = work.batch_samples
    counts = [samples]
    while samples > 1:
        samples = -(-samples // 2)
        counts.append(samples)
    places = [Waiting.HOST, Waiting.DISK] if device.type == "cpu" else list(Waiting)
    for waiting in places:
        for passes in range(1, max(1, most_passes) + 1):
            for prefetch in (True, False):
                for count in counts:
                    yield Placement(waiting, passes, prefetch, count)


def _cost(work: Workload, placement: Placement) -> float:
    return sum(estimate_seconds(work, placement, NOMINAL_RATES).values())


def _exceeded(needed: Footprint, limits: Limits, device: torch.device, free_disk: int | None) -> list[str]:
    """What a placement has too little of, in words that follow `would`."""
    found = []
    if needed.host > limits.host:
        found.append(f"hold {gib(needed.host)} of host memory ({_what(limits.host_is_set)} {gib(limits.host)})")
    if device.type == "cuda" and needed.device > limits.device:
        found.append(f"hold {gib(needed.device)} on {device} ({_what(limits.device_is_set)} {gib(limits.device)})")
    if free_disk is not None and needed.disk > free_disk:
        found.append(f"write {gib(needed.disk)} of hidden states to a disk with {gib(free_disk)} free")
    return found


def _what(is_set: bool) -> str:
    return "the limit is" if is_set else "available are"


def waits_on_disk(memory: MemoryConfig) -> bool:
    """Whether calibration inputs in floating point (pixels) wait in a mapped file."""
    return memory.host is not None or memory.disk is not None


def _free_disk(scratch: Path | None) -> int | None:
    return None if scratch is None else shutil.disk_usage(existing_folder(scratch)).free


def _problems(
    work: Workload, smallest: Footprint, limits: Limits, device: torch.device, free_disk: int | None
) -> tuple[str, ...]:
    """That nothing fits, and the cheapest change that would."""
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
