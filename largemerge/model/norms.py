"""Norms in a block: modules that scale every feature of their input by an element of a vector.

    y = x̂ ∘ w + b        LayerNorm, RMSNorm, and the like; x̂ is the normalised input

No class is known here. A module is a norm if it has a vector `weight`, maybe a `bias`, nothing else, and if what it
computes is linear in `weight`, element by element. Then x̂ is the difference of what it computes with ones and with
zeros in the place of `weight`, whether it multiplies by w or, as Gemma does, by 1 + w.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

_PROBED_ROWS = 3


def may_be_norms(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside a module that have a vector `weight`, maybe a `bias`, and nothing else, by path in it."""
    return {
        name: child
        for name, child in module.named_modules()
        if not list(child.children())
        and not list(child.buffers())
        and "weight" in (own := dict(child.named_parameters()))
        and own.keys() <= {"weight", "bias"}
        and all(parameter.dim() == 1 and parameter.is_floating_point() for parameter in own.values())
    }


def is_norm(module: nn.Module) -> bool:
    """Whether one of `may_be_norms` computes x̂ ∘ w + b, with an x̂ that does not depend on w; found out by a trial."""
    size = module.get_parameter("weight").shape[0]
    generator = torch.Generator().manual_seed(size)
    x_NI = torch.randn(_PROBED_ROWS, size, generator=generator)
    weight_I = torch.randn(size, generator=generator)
    try:
        zero_NI = _compute(module, x_NI, torch.zeros(size))
        found_NI = _compute(module, x_NI, weight_I) - zero_NI
        expected_NI = normalized(module, x_NI) * weight_I
    except Exception:  # whatever a module raises that takes something else: it is none
        return False
    return found_NI.shape == x_NI.shape and torch.allclose(found_NI, expected_NI, rtol=1e-4, atol=1e-5)


def scales_by_weight(module: nn.Module) -> bool:
    """Whether a norm multiplies by its weight alone, not as Gemma does by 1 + w."""
    size = module.get_parameter("weight").shape[0]
    x_NI = torch.randn(_PROBED_ROWS, size, generator=torch.Generator().manual_seed(size))
    return not bool(_compute(module, x_NI, torch.zeros(size)).any())


def normalized(module: nn.Module, x_NI: torch.Tensor) -> torch.Tensor:
    """Computes x̂ `[N, I]` in float32.

    Args:
        module: A norm; its parameters may be anywhere, and are not read.
        x_NI: Rows of its input.
    """
    x_NI = x_NI.to(torch.float32)
    ones_I = torch.ones(x_NI.shape[-1], device=x_NI.device)
    return _compute(module, x_NI, ones_I) - _compute(module, x_NI, torch.zeros_like(ones_I))


def _compute(module: nn.Module, x_NI: torch.Tensor, weight_I: torch.Tensor) -> torch.Tensor:
    """What a norm computes with another `weight`, and a `bias` of zeros."""
    other: Any = copy.copy(module)  # called by its class: hooks that watch the module do not see it
    known = {name for name, parameter in module._parameters.items() if parameter is not None}
    zeros_I = torch.zeros_like(weight_I)
    made = {"weight": weight_I, "bias": zeros_I}
    other._parameters = {name: made[name] if name in known else None for name in module._parameters}
    result: torch.Tensor = type(module).forward(other, x_NI)
    return result
