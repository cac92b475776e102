"""What alignment is worth for two models that were trained from different beginnings.

    PYTHONPATH=. .venv/bin/python benchmarks/alignment_quality.py --work /tmp/alignment --pairs 3

Pairs of small vision transformers (see `quality_images.py`) learn the same digits from different random weights, and in
another order. Their average is measured on digits that none has seen: as they are, with neurons and heads of the second
in the order of the first, and with the features of the residual stream, too. A model trains for a minute on one core,
at a width of 96. The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from transformers import ViTForImageClassification

import largemerge
from measure import machine
from quality_images import Digits, new_model, pixels_of, split_digits, train_on
from quality_images import Sizes as ImageSizes

WAYS = {
    "plain average": None,
    "aligned within blocks": "weights",
    "aligned, with the residual stream": {"residual_stream": True},
}


def main() -> None:
    """Trains, merges and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and merges")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = ImageSizes(width=options.width, layers=options.layers, base_steps=options.steps)
    train, _, heldout = split_digits(sizes, 0)
    rows: dict[str, list[tuple[float, float]]] = {}
    moved: list[dict[str, float]] = []
    for pair in range(options.pairs):
        work = options.work / f"pair-{pair}"
        folders = [trained(work / name, train, sizes, 2 * pair + number) for number, name in enumerate("ab")]
        for name, folder in zip(("model a", "model b"), folders, strict=True):
            rows.setdefault(name, []).append(measured(folder, heldout))
        for way, align in WAYS.items():
            out = work / way.replace(",", "").replace(" ", "-")
            report = largemerge.merge(config(folders, align), out, force=True)
            rows.setdefault(way, []).append(measured(out, heldout))
            for streams in report.to_json().get("align", {}).get("residual_streams", {}).values():
                moved += [{key: stream[key] for key in ("moved", "size", "rounds", "before", "after")}
                          for stream in streams.values()]  # fmt: skip
    print("| | loss | right |\n|---|--:|--:|")
    for name, scores in rows.items():
        print(f"| {name} | {mean(loss for loss, _ in scores):.3f} | {mean(right for _, right in scores):.1%} |")
    result = {"benchmark": "alignment_quality", "machine": machine()}
    print(json.dumps({**result, "options": vars(options), "scores": rows, "streams": moved}, default=str))


def trained(folder: Path, train: Digits, sizes: ImageSizes, seed: int) -> Path:
    """Trains a model from the beginning, unless it is there."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(seed)
    model = new_model(sizes)
    train_on(model, train, lambda images: images, sizes.base_steps, sizes.base_rate, sizes.batch_size, seed)
    model.save_pretrained(folder)
    return folder


def config(folders: list[Path], align: object) -> dict[str, object]:
    """The average of two models."""
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    return {"merge_method": "linear", "models": models, **({"align": align} if align is not None else {})}


@torch.no_grad()
def measured(folder: Path, heldout: Digits) -> tuple[float, float]:
    """Loss and share of right answers on held-out digits."""
    model = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    logits = model(pixels_of(heldout.images)).logits
    right = (logits.argmax(1) == heldout.labels).float().mean().item()
    return F.cross_entropy(logits, heldout.labels).item(), right


if __name__ == "__main__":
    main()
