"""Is a merged Llama whole? Headers, a sample of the numbers, and the model's own opinion of the keys.

A model of which two copies fit into memory is loaded by `from_pretrained` and run; of a larger one, the keys and
shapes on disk are compared with those of the model built on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from synthetic_llama import DTYPE, Geometry, Shapes

SAMPLED_BLOCKS = 4
SAMPLED_ROWS = 256
"""Of each matrix, from its middle."""


def verify(merged: Path, geometry: Geometry, candidates: Sequence[Path]) -> str:
    """Checks a merged checkpoint; ends the program with all problems if there are any.

    Args:
        merged: Its folder.
        geometry: What it should be.
        candidates: Folders of what it was merged from, to see that it is none of them.

    Returns:
        What has been checked, in words.
    """
    found = _headers(merged)
    problems = _differences(found, geometry.shapes(), "the geometry")
    if not problems:
        sampled = _sampled_tensors(geometry)
        problems = [problem for name in sampled for problem in _number_problems(merged, candidates, name)]
    if problems:
        raise SystemExit("\n".join([f"{merged} is not whole:", *problems[:10]]))
    checked = f"{len(found)} headers, numbers of {len(sampled)} tensors"
    if 2 * geometry.num_bytes > psutil.virtual_memory().available:
        _check_on_meta(merged, found)
        return f"{checked}, all keys and shapes of the model on the meta device"
    _check_loaded(merged, geometry)
    return f"{checked}, from_pretrained without missing or unexpected keys, a forward pass"


def _headers(folder: Path) -> Shapes:
    """Shapes of all tensors, from the shards' own headers; the index has to say the same."""
    shapes: Shapes = {}
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                part = file.get_slice(name)
                assert part.get_dtype() == "BF16", f"{path}: {name} is {part.get_dtype()}"
                assert name not in shapes, f"{path}: {name} is in {files[name]} too"
                shapes[name], files[name] = tuple(part.get_shape()), path.name
    index = folder / "model.safetensors.index.json"
    if index.exists() or len(set(files.values())) > 1:
        assert json.loads(index.read_text())["weight_map"] == files, f"{index} does not say what the shards hold"
    return shapes


def _differences(found: Shapes, expected: Shapes, whose: str) -> list[str]:
    missing = [f"{name}: missing" for name in expected.keys() - found.keys()]
    unexpected = [f"{name}: unexpected" for name in found.keys() - expected.keys()]
    both = found.keys() & expected.keys()
    shapes = [f"{name}: {found[name]}, by {whose} {expected[name]}" for name in both if found[name] != expected[name]]
    return sorted(missing + unexpected + shapes)


def _sampled_tensors(geometry: Geometry) -> list[str]:
    """All tensors outside the blocks, and of blocks from the first to the last."""
    last = geometry.num_layers - 1
    layers = sorted({round(step * last / (SAMPLED_BLOCKS - 1)) for step in range(SAMPLED_BLOCKS)})
    return [*geometry.outside(), *(name for layer in layers for name in geometry.block(layer))]


def _number_problems(merged: Path, candidates: Sequence[Path], name: str) -> list[str]:
    rows = _rows(merged, name)
    if not rows.isfinite().all():
        return [f"{name}: not finite"]
    if rows.std() == 0 and rows.dim() == 2:
        return [f"{name}: all numbers are the same"]
    others = [_rows(candidate, name) for candidate in candidates]
    if rows.dim() == 2 and any(torch.equal(rows, other) for other in others):
        return [f"{name}: exactly a candidate's"]
    mean = torch.stack(others).mean(0)
    spread = max(float((other - mean).norm()) for other in others)
    # The regression may leave the candidates' hull, but not for another place altogether.
    if float((rows - mean).norm()) > 3 * spread + 0.01 * float(mean.norm()):
        return [f"{name}: far from every candidate"]
    return []


def _rows(folder: Path, name: str) -> torch.Tensor:
    """Rows from the middle of a tensor, in float32."""
    file_name = "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        file_name = json.loads(index.read_text())["weight_map"][name]
    with safe_open(folder / file_name, framework="pt") as file:
        part = file.get_slice(name)
        start = max(0, part.get_shape()[0] - SAMPLED_ROWS) // 2
        rows: torch.Tensor = part[start : start + SAMPLED_ROWS]
    return rows.float()


def _check_on_meta(merged: Path, found: Shapes) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(merged), dtype=DTYPE)
    problems = _differences(
        found, {name: tuple(value.shape) for name, value in model.state_dict().items()}, "the model"
    )
    if problems:
        raise SystemExit("\n".join([f"{merged} does not fit its own model:", *problems[:10]]))


@torch.no_grad()
def _check_loaded(merged: Path, geometry: Geometry) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(
        merged, device_map=None, dtype=DTYPE, output_loading_info=True
    )
    wrong = {key: value for key, value in loading.items() if value}
    if wrong:
        raise SystemExit(f"{merged} does not load cleanly: {wrong}")
    tokens = torch.arange(32).remainder(geometry.vocabulary)[None]
    if not model.eval()(input_ids=tokens, use_cache=False).logits.isfinite().all():
        raise SystemExit(f"{merged} computes logits that are not finite")
