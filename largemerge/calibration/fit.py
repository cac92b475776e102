"""Whether the samples fit the model, found out before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from largemerge.calibration.batches import Batch, CalibrationSet
from largemerge.model.forward import resumed_at
from largemerge.model.rehearsal import Rehearsal
from largemerge.model.skeleton import Skeleton, poison_outside


def sample_problems(skeleton: Skeleton, rehearsal: Rehearsal, calibration: Sequence[CalibrationSet]) -> list[str]:
    """Token ids beyond the vocabulary, sequences longer than the model's position embeddings, and the like.

    Every batch is run up to the first block, with embeddings that cost no memory.
    """
    vocabulary: int | None = getattr(skeleton.model.config.get_text_config(), "vocab_size", None)
    problems = []
    poison_outside(skeleton, torch.device("cpu"))
    with resumed_at(skeleton, rehearsal.order[0], 0) as run:
        for data in calibration:
            found = list(_id_problems(data, vocabulary)) if vocabulary is not None else []
            for batch in () if found else data.batches:
                try:
                    run(_cast(batch, skeleton.dtype), {}, lambda *args, **kwargs: None)
                except (IndexError, RuntimeError, ValueError) as error:
                    found.append(_explained(skeleton, batch, error))
                    break
            problems += [f"candidate {data.name!r}: {problem}" for problem in found]
    return problems


def _id_problems(data: CalibrationSet, vocabulary: int) -> Iterator[str]:
    names = sorted({name for batch in data.batches for name in batch.inputs if name.endswith("input_ids")})
    for name in names:
        ids = [batch.inputs[name] for batch in data.batches if batch.inputs[name].numel()]
        lowest, highest = min(int(each.min()) for each in ids), max(int(each.max()) for each in ids)
        if lowest < 0 or highest >= vocabulary:
            yield (
                f"{name} holds token ids from {lowest} to {highest}; expected 0 to {vocabulary - 1}, "
                f"for the model's vocab_size is {vocabulary}. Is it another model's tokenizer?"
            )


def _cast(batch: Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}


def _explained(skeleton: Skeleton, batch: Batch, error: Exception) -> str:
    shapes = {name: list(tensor.shape) for name, tensor in batch.inputs.items()}
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    limit = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    hint = f"; the config allows {limit} positions: lower max_length" if limit is not None else ""
    return f"the model cannot be run on a batch of shapes {shapes}: {reason}{hint}"
