"""Which device a merge computes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from largemerge.errors import LargemergeError

if TYPE_CHECKING:
    from largemerge.distributed import Ranks

CPU = torch.device("cpu")
_SIZE = 1024


def choose_device(device: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        LargemergeError: If torch knows no such device, or cannot use it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise LargemergeError(f"--device {device}: {first_line}; expected auto, cpu or cuda:0") from None
    return chosen


def warm_up(device: torch.device, compute: Callable[[], None]) -> None:
    """Loads what torch loads late on a GPU: libraries and kernels hold host memory, of which a plan is to know.

    Args:
        device: That will compute; on the CPU nothing happens.
        compute: Something small of all that will be computed.
    """
    if device.type != "cuda":
        return
    with suppress(torch.OutOfMemoryError):  # the plan will say what is missing
        compute()
    torch.cuda.empty_cache()


def compute_a_little(device: torch.device) -> None:
    """What a regression merge does on a GPU: attention, the kinds of products in Gram matrices, solves."""
    x_NN = torch.rand(_SIZE, _SIZE, device=device)
    half_NN = x_NN.to(torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16)
    heads = half_NN.view(1, 8, _SIZE, -1)
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    torch.nn.functional.silu(half_NN).softmax(dim=-1)
    torch.mm(half_NN, half_NN)
    product_NN = torch.mm(half_NN, half_NN, out_dtype=torch.float32)
    gram_NN = product_NN @ product_NN.T
    gram_NN.diagonal().add_(gram_NN.trace())
    for exact_NN in (gram_NN, gram_NN.double()):
        lower_NN, _ = torch.linalg.cholesky_ex(exact_NN)
        torch.cholesky_solve(exact_NN, lower_NN).to(CPU)


def device_of_rank(device: str, ranks: Ranks, *, shared: bool = False) -> torch.device:
    """Every rank of a machine computes on a GPU of its own, where there are any.

    Args:
        device: As the user says it.
        ranks: Of the merge.
        shared: Ranks may share a GPU: they send each other nothing from there.

    Raises:
        LargemergeError: As in `choose_device`; and if ranks would share a GPU, which their collectives (NCCL) refuse.
    """
    count = torch.cuda.device_count()
    any_gpu = device in ("auto", "cuda") and count > 0
    own = any_gpu and ranks.size > 1
    chosen = torch.device("cuda", ranks.local_rank % count) if own else choose_device(device)
    if chosen.type != "cuda":
        return chosen
    gpus = count if any_gpu else 1
    if not shared and ranks.local_size > gpus:
        raise LargemergeError(
            f"--device {device}: {ranks.local_size} ranks of this machine would share {gpus} GPU{'s' * (gpus > 1)}; "
            "expected one rank for each GPU, or --device cpu"
        )
    if chosen.index is not None:
        torch.cuda.set_device(chosen)
    return chosen
