"""What preparing data for a model needs to know of its class, and whether data fits it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import torch
from torch import nn

from largemerge.calibration.batches import CalibrationSet, ForwardSignature
from largemerge.model.skeleton import Skeleton

_EMBEDDINGS = {
    "position_ids": re.compile(r"(^|\.)(wpe|embed_positions|positions?_embeddings?|position_embed)$"),
    "token_type_ids": re.compile(r"(^|\.)(token_type|segment)_embeddings?$"),
}
"""Names that embeddings of positions and types of tokens have, by the argument that picks their rows."""
_NOT_OF_TEXT = re.compile(r"vision|visual|image|patch|pixel|audio|speech")


def forward_signature(skeleton: Skeleton) -> ForwardSignature:
    """What preparing calibration data needs to know of the model class."""
    config = skeleton.model.config
    return ForwardSignature(
        forward_arguments=skeleton.forward_arguments(),
        is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        pad_token_id=getattr(config, "pad_token_id", None),
        token_shape=("samples", *(("choices",) if "MultipleChoice" in skeleton.class_name else ()), "tokens"),
        id_limits=_id_limits(skeleton),
    )


def _id_limits(skeleton: Skeleton) -> dict[str, int]:
    """Numbers that positions and types of tokens have to stay below, where the model has embeddings of them."""
    limits: dict[str, int] = {}
    for path, module in skeleton.model.named_modules():
        if not isinstance(module, nn.Embedding) or _NOT_OF_TEXT.search(path):
            continue
        name = next((name for name, pattern in _EMBEDDINGS.items() if pattern.search(path)), None)
        if name is not None:
            # OPT and its kin keep rows for themselves: position 0 is row 2.
            rows = module.num_embeddings - max(0, getattr(module, "offset", 0))
            limits[name] = max(rows, limits.get(name, 0))
    vocabulary = getattr(skeleton.model.config.get_text_config(), "vocab_size", None)
    if isinstance(vocabulary, int):
        limits.setdefault("token_type_ids", vocabulary)  # as GPT-2 has it: they are tokens, too
    return limits


def loss_input(signature: ForwardSignature) -> str:
    """Name of the input that loss masks belong to."""
    return "decoder_input_ids" if signature.is_encoder_decoder else "input_ids"


def id_problems(data: CalibrationSet, vocabulary: int, placeholders: Collection[int]) -> Iterator[str]:
    """Yields which inputs hold token ids beyond a vocabulary; `placeholders` stand for images, and count as known."""
    names = sorted({name for batch in data.batches for name in batch.inputs if name.endswith("input_ids")})
    special = torch.tensor(sorted(placeholders), dtype=torch.int64)  # may lie beyond the text's vocabulary
    for name in names:
        ids = [x[~torch.isin(x, special)] for batch in data.batches if (x := batch.inputs[name]).numel()]
        ids = [x for x in ids if x.numel()]
        if not ids:
            continue
        lowest, highest = min(int(x.min()) for x in ids), max(int(x.max()) for x in ids)
        if lowest < 0 or highest >= vocabulary:
            yield (
                f"{name} holds token ids from {lowest} to {highest}; expected 0 to {vocabulary - 1}, "
                f"for the model's vocab_size is {vocabulary}. Is it another model's tokenizer?"
            )
