"""What is a norm, and what its scale multiplies, found by a trial."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from largemerge.model.norms import is_norm, may_be_norms, normalized


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", {"input_layernorm", "post_attention_layernorm"}),
        ("olmo2", {"self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "post_feedforward_layernorm"}),
        ("bert", {"attention.output.LayerNorm", "output.LayerNorm"}),
        ("dinov2", {"norm1", "norm2"}),  # and LayerScale, whose vector has another name
    ],
)
def test_norms_of_a_block(architecture: str, expected: set[str]) -> None:
    model = tiny_models.build(architecture)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3]
    block = lists[0][0]
    assert {name for name, module in may_be_norms(block).items() if is_norm(module)} == expected


def test_what_is_none() -> None:
    for module in (nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LayerNorm((2, 3)), nn.LayerNorm(3, elementwise_affine=False)):
        assert not may_be_norms(module)

    class Squared(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight**2

    class Gated(nn.LayerNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * gate

    for other in (Squared(8), Gated(8)):
        assert may_be_norms(other) and not is_norm(other)


@pytest.mark.parametrize("bias", [True, False])
def test_what_a_layer_norm_multiplies(bias: bool) -> None:
    """Neither its weights count, nor their device, nor who watches it."""
    norm = nn.LayerNorm(8, bias=bias, device="meta")
    norm.register_forward_pre_hook(lambda *_: pytest.fail("the hook was called"))
    x_NI = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    wide_NI = x_NI.double()
    expected_NI = (wide_NI - wide_NI.mean(1, keepdim=True)) / (
        wide_NI.var(1, keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    assert is_norm(norm)
    torch.testing.assert_close(normalized(norm, x_NI).double(), expected_NI, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # of which one multiplies by w, the other by 1 + w
def test_what_an_rms_norm_multiplies(architecture: str) -> None:
    norm = tiny_models.build(architecture).model.layers[0].input_layernorm
    x_NI = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected_NI = x_NI / (x_NI.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(normalized(norm, x_NI), expected_NI, rtol=1e-5, atol=1e-5)
