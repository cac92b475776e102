"""The machines that a merge runs on, and their rates: measured here, or taken from data sheets.

    this machine      measure_rates: every kind of product, copies and the disk are timed for a few seconds, at the
                      model's own shapes, cut down where they are large
    another cluster   Cluster.rates: the numbers of a data sheet times a share that well-made kernels reach

A plan that rests on data sheets is good for choosing a machine, not for booking it to the minute.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from largemerge.checkpoint.direct_io import PROBE_SECONDS
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.reader import read_rate
from largemerge.checkpoint.writer import write_rate
from largemerge.config_file import shown
from largemerge.errors import ConfigError, shorten
from largemerge.matmul import linear_product, product
from largemerge.regression.gram import Gram, float32_means_float32
from largemerge.regression.planning.cost import Links, Rates
from largemerge.regression.planning.placement import Limits
from largemerge.regression.planning.workload import ProbeShapes
from largemerge.regression.solve import cholesky_

_GPU_SHARE = 0.92  # of a GPU's memory; the rest is the driver's, the libraries', and lost to fragmentation
_PROCESS_BYTES = 2 << 30  # host memory of a process that has imported everything and holds a CUDA context
_MATRIX_SHARE, _FLOAT32_SHARE, _CHOLESKY_SHARE, _MEMORY_SHARE, _LINK_SHARE = 0.6, 0.7, 0.3, 0.8, 0.8
_BATCH_SECONDS = 2e-3  # Python and small kernels on the way to a block
_MAX_FEATURES, _MAX_ROWS = 2048, 2048  # of the products that are timed here
_FASTEST = 1e18  # bytes per second
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(bit|B)(?:/s|ps)?\s*")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker describes it.

    Attributes:
        matrix: Dense bfloat16 operations per second of the matrix units.
        float32: Float32 operations per second outside the matrix units.
        bandwidth: Bytes per second from or to the GPU's memory.
        memory: Bytes of memory.
        link: Bytes per second, one way, to another GPU of the same node.
    """

    matrix: float
    float32: float
    bandwidth: float
    memory: int
    link: float


GPUS = {
    "a100": Gpu(312e12, 19.5e12, 2.0e12, 80 * 10**9, 300e9),
    "h100": Gpu(989e12, 67e12, 3.35e12, 80 * 10**9, 450e9),
    "h200": Gpu(989e12, 67e12, 4.8e12, 141 * 10**9, 450e9),
    "b200": Gpu(2250e12, 75e12, 8.0e12, 180 * 10**9, 900e9),
    "l40s": Gpu(362e12, 91.6e12, 0.864e12, 48 * 10**9, 32e9),
    "rtx4090": Gpu(165e12, 82.6e12, 1.008e12, 24 * 10**9, 32e9),
}


@dataclass(frozen=True)
class Cluster:
    """Nodes that are alike, with a rank for every GPU.

    Attributes:
        num_nodes: Number of nodes.
        gpus_per_node: Number of GPUs in each node.
        gpu: The kind of GPU.
        interconnect: Bytes per second, one way, between a node and the others.
        disk: Bytes per second that a node reads, and that the first one writes.
        host_memory: Bytes of host memory of a node.
    """

    num_nodes: int
    gpus_per_node: int
    gpu: Gpu
    interconnect: float
    disk: float
    host_memory: int

    @property
    def num_ranks(self) -> int:
        """Number of ranks: one for every GPU."""
        return self.num_nodes * self.gpus_per_node

    def limits(self) -> Limits:
        """How much a rank may hold."""
        return Limits(
            host=self.host_memory // self.gpus_per_node,
            device=int(self.gpu.memory * _GPU_SHARE),
            host_is_set=False,
            device_is_set=False,
            scratch=None,
        )

    def rates(self, compute_dtype: torch.dtype) -> Rates:
        """Rates of one rank; the disk's are those of the whole node."""
        float32 = _FLOAT32_SHARE * self.gpu.float32  # TF32 is never used
        fast = float32 if compute_dtype == torch.float32 else _MATRIX_SHARE * self.gpu.matrix
        return Rates(
            linear=fast,
            gram=fast,  # half of it, in the dtype of the activations
            product=float32,
            cholesky=_CHOLESKY_SHARE * self.gpu.float32,
            memory=_MEMORY_SHARE * self.gpu.bandwidth,
            read=self.disk,
            write=self.disk,
            batch_seconds=_BATCH_SECONDS,
        )

    def links(self) -> Links:
        """Connections between the ranks: a ring over all of them is as fast as its slowest link."""
        slowest = self.gpu.link if self.num_nodes == 1 else min(self.gpu.link, self.interconnect)
        return Links(_LINK_SHARE * slowest, 20e-6 * math.log2(max(2, self.num_ranks)), self.gpus_per_node)

    @property
    def process_bytes(self) -> int:
        """Bytes of host memory that a process holds before anything is read."""
        return _PROCESS_BYTES


def find_gpu(name: str) -> Gpu:
    """Looks up a GPU by its name.

    Raises:
        ConfigError: If the name is not known.
    """
    if not isinstance(name, str) or name.lower() not in GPUS:
        raise ConfigError(f"--gpu {shorten(str(name), 200)}: not known; expected one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def parse_rate(text: str, option: str) -> float:
    """Parses bytes per second from `400Gbit`, `25GB/s`, `200Gbps`.

    Raises:
        ConfigError: If the text is no rate.
    """
    written = text.replace("Gbps", "Gbit").replace("Mbps", "Mbit") if isinstance(text, str) else ""
    match = _RATE.fullmatch(written)
    number = float(match[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]] if match is not None else 0
    number = number / 8 if match is not None and match[3] == "bit" else number
    if not 1 <= number <= _FASTEST:
        raise ConfigError(f"{option} {shown(text)}: expected a rate such as 400Gbit, 200Gbps or 2GB/s")
    return number


@dataclass(frozen=True)
class Machines:
    """The machines that a merge runs on.

    Attributes:
        device: Kind of device on which every rank computes.
        num_ranks: Number of ranks of the merge.
        local_ranks: Number of ranks that share this machine.
        cluster: Machines elsewhere; `None` for this one.
    """

    device: torch.device
    num_ranks: int = 1
    local_ranks: int = 1
    cluster: Cluster | None = None


def measure_rates(
    shapes: ProbeShapes,
    checkpoint: Checkpoint,
    scratch: Path | None,
    device: torch.device,
    samples: int,
    *,
    at_once: int = 1,
) -> Rates:
    """Times products, copies, reads and writes on this machine.

    Args:
        shapes: Shapes of the products that are timed.
        checkpoint: A candidate, of which some megabytes are read.
        scratch: Folder to write a temporary file to; `None` for the system's.
        device: The device that computes.
        samples: Number of samples that run at once.
        at_once: Number of ranks that compute side by side, each with its part of the cores; rates are those of one.
    """
    read, write = read_rate([checkpoint]), write_rate(scratch)
    if at_once == 1 or device.type != "cpu":
        return replace(_compute_rates(shapes, device, samples), read=read, write=write)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // at_once))
    try:
        with ThreadPoolExecutor(at_once) as pool:
            measured = list(pool.map(lambda _: _compute_rates(shapes, device, samples), range(at_once)))
    finally:
        torch.set_num_threads(threads)
    mean = {name: sum(getattr(rates, name) for rates in measured) / at_once for name in vars(measured[0])}
    return Rates(**mean | {"read": read, "write": write})


def _compute_rates(shapes: ProbeShapes, device: torch.device, samples: int) -> Rates:
    """Measures compute and memory rates; disk rates are left out."""
    rows = min(_MAX_ROWS, samples * shapes.sample_rows)
    inputs, outputs = min(shapes.num_inputs, _MAX_FEATURES), min(shapes.num_outputs, _MAX_FEATURES)
    size = min(shapes.gram_size, _MAX_FEATURES)
    x_NI = torch.randn(rows, inputs, device=device).to(shapes.dtype)
    weight_OI = torch.randn(outputs, inputs, device=device).to(shapes.dtype)
    x_NS = torch.randn(rows, size, device=device).to(shapes.dtype)
    left_SS, gram = torch.randn(size, size, device=device), Gram(size, device)
    system_SS = left_SS @ left_SS.T / size + torch.eye(size, device=device)
    work_SS = torch.empty_like(system_SS)
    large = torch.empty(16 << 20, dtype=torch.uint8, device=device)
    with float32_means_float32():
        return Rates(
            linear=2 * rows * inputs * outputs / _seconds(lambda: linear_product(x_NI, weight_OI), device),
            gram=rows * size**2 / _seconds(lambda: gram.add_rows(x_NS), device),
            product=2 * size**3 / _seconds(lambda: product(left_SS, system_SS), device),
            cholesky=size**3 / 3 / _seconds(lambda: cholesky_(work_SS.copy_(system_SS)), device),
            memory=2 * large.nbytes / _seconds(lambda: large.clone(), device),
            read=math.inf,
            write=math.inf,
            batch_seconds=_BATCH_SECONDS,
        )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the median of several after one that warms up."""
    work()
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (time.perf_counter() - begin < PROBE_SECONDS and len(times) < 50):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
