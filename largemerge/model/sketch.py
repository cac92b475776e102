"""A checkpoint as it would be, from its `config.json` alone: for plans of models whose weights are elsewhere."""

from __future__ import annotations

from pathlib import Path

from largemerge.checkpoint.index import Checkpoint, read_json
from largemerge.checkpoint.quantized import model_dtype
from largemerge.checkpoint.tensor_info import TensorInfo
from largemerge.model.skeleton import build_skeleton


def sketch_checkpoint(folder: Path, name: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """The tensors that the class would save, tied ones once, in the config's dtype (bfloat16 where it names none).

    Args:
        folder: With `config.json`.
        name: What the user calls the checkpoint.
        trust_remote_code: Allow the checkpoint's own Python code.

    Raises:
        LargemergeError: If there is no config, or Transformers does not understand it.
    """
    config = read_json(folder / "config.json", name)
    bare = Checkpoint(name, folder, config, {}, {})
    dtype = model_dtype(config)
    skeleton = build_skeleton(bare, dtype=dtype, trust_remote_code=trust_remote_code)
    again = {alias for aliases in skeleton.aliases.values() for alias in aliases[1:]}
    tensors = {
        key: TensorInfo(key, tuple(tensor.shape), dtype, folder / "config.json", None)
        for key, tensor in skeleton.model.state_dict().items()
        if key not in again
    }
    return Checkpoint(name, folder, config, tensors, {})
