#!/usr/bin/env python3
"""Merge twenty tasks four at a time, each time with the merge so far: the paper's sequential experiment.

    python sequential.py 0 ./sequential               # the first of five orders
    python sequential.py 0 ./sequential --limit 100   # a quick try: 100 images of each task are measured

Five merges come into the folder, step-1 to step-5, each with its scores in all twenty tasks. From the second on, the
merge so far is a candidate like the four new experts, with 256 images in all of the T tasks that are in it. It stands
in the configuration T times, with 256 / T images of one task and a weight of 1 / T each: as all have as many tokens,
their Gram matrices add up to that of one candidate with all images.

The published script goes on from one order's last merge in the next order; here every order starts afresh.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

import largemerge

FOLDER = Path(__file__).parent
NAME = "clip-vit-b-32-twenty-tasks.yaml"
AT_A_TIME, NUM_SAMPLES = 4, 256
ORDERS = (
    "pcam fer2013 oxford-iiit-pet rendered-sst2 gtsrb fashion_mnist sun397 cifar100 eurosat stanford-cars "
    "mnist stl10 dtd oxford_flowers102 cifar10 food101 kmnist emnist_letters svhn resisc45",
    "cifar100 sun397 emnist_letters eurosat resisc45 food101 oxford_flowers102 pcam rendered-sst2 "
    "stanford-cars cifar10 gtsrb mnist dtd kmnist fashion_mnist stl10 svhn oxford-iiit-pet fer2013",
    "eurosat rendered-sst2 sun397 fashion_mnist food101 kmnist oxford-iiit-pet dtd pcam fer2013 "
    "oxford_flowers102 mnist resisc45 stanford-cars cifar10 stl10 gtsrb emnist_letters svhn cifar100",
    "emnist_letters resisc45 mnist cifar10 fashion_mnist svhn kmnist stl10 gtsrb eurosat sun397 pcam "
    "oxford_flowers102 fer2013 oxford-iiit-pet food101 dtd rendered-sst2 stanford-cars cifar100",
    "gtsrb stanford-cars sun397 fashion_mnist cifar10 emnist_letters svhn fer2013 oxford-iiit-pet food101 "
    "mnist rendered-sst2 dtd cifar100 oxford_flowers102 pcam kmnist stl10 eurosat resisc45",
)
"""The published orders, by number."""


def steps(order: int, out: Path) -> list[dict[str, Any]]:
    """Makes the configurations of an order, one for each step."""
    whole = yaml.safe_load((FOLDER / NAME).read_text(encoding="utf-8"))
    experts, names = {model["name"]: model for model in whole["models"]}, ORDERS[order].split()
    found = []
    for number in range(0, len(names), AT_A_TIME):
        before, new = names[:number], names[number : number + AT_A_TIME]
        share = {"num_samples": NUM_SAMPLES // max(1, len(before))}
        so_far = [
            {
                "model": str(out / f"step-{number // AT_A_TIME}"),
                "name": f"so far, {name}",
                "calibration": {**experts[name]["calibration"], **share},
                "parameters": {"weight": 1 / len(before)},
            }
            for name in before
        ]
        found.append({**whole, "models": [*so_far, *(experts[name] for name in new)]})
    return found


def main() -> None:
    """Merges and measures the steps of one order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("order", type=int, choices=range(len(ORDERS)))
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, help="images of each task that are measured, at most")
    options = parser.parse_args()
    for number, config in enumerate(steps(options.order, options.out.absolute()), 1):
        folder = options.out / f"step-{number}"
        largemerge.merge(config, folder, quiet=False)
        evaluation = FOLDER / "evaluation" / NAME
        scores = options.out / f"scores-{number}"
        found = largemerge.evaluate(evaluation, {folder.name: folder}, out=scores, limit=options.limit, quiet=False)
        print(f"step {number}: {found.mean(folder.name):.4f} mean accuracy of {len(found.tasks)} tasks, {scores}")


if __name__ == "__main__":
    main()
