"""The held-out loss of a checkpoint on each kind of text, in nats per token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from experts import fast_products

BATCH_SIZE = 8


def heldout_losses(checkpoint: Path, heldout: Mapping[str, torch.Tensor], cache: Path) -> dict[str, float]:
    """Mean next-token loss per kind of text.

    Args:
        checkpoint: Folder; loaded as anyone would, which must find no missing and no unexpected key.
        heldout: Token ids per kind of text, `[sequences, length]`.
        cache: Folder of results, each filed under the hash of the weights and the held-out tokens.

    Returns:
        Nats per token, by kind.
    """
    digest = _digest(checkpoint, heldout)
    result = cache / f"{digest}.json"
    if result.is_file():
        losses: dict[str, float] = json.loads(result.read_text())
        return losses
    model, loading = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    wrong = {key: value for key, value in loading.items() if value}
    assert not wrong, f"{checkpoint} does not load cleanly: {wrong}"
    losses = {kind: _loss(model.eval(), tokens) for kind, tokens in heldout.items()}
    cache.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(losses))
    return losses


@torch.no_grad()
def _loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    total = 0.0
    for batch in tokens.split(BATCH_SIZE):
        with fast_products():
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / tokens[:, 1:].numel()


def _digest(checkpoint: Path, heldout: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for path in sorted([checkpoint / "config.json", *checkpoint.glob("*.safetensors")]):
        digest.update(path.read_bytes())
    for kind, tokens in heldout.items():
        digest.update(kind.encode() + tokens.numpy().tobytes())
    return digest.hexdigest()[:16]
