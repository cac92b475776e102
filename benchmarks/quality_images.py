"""Images: one small vision transformer, and four experts that see the same handwritten digits in different ways.

    turned      by a quarter to the left
    inverted    dark on light
    mirrored    left to right
    shuffled    cut into sixteen squares, which are put together in another order

The base has learned a little of all of them, and of digits as they are; an expert goes on with one. What helps with one
way of seeing hurts with the others, so that their average is much worse than each expert at its own. The images are
scikit-learn's 1,797 digits of 8 × 8 pixels: 1,000 train, 256 calibrate, the rest measures. The seed chooses which, and
where training begins.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from quality_cases import Case, Score, digest, make_once

SIDE = 16
"""Pixels; the digits are enlarged."""
MEAN, STD = 0.3, 0.37
SQUARES = (6, 11, 0, 13, 9, 4, 15, 2, 8, 1, 14, 7, 12, 3, 5, 10)
"""The places that the squares of a shuffled digit come from."""


def _shuffled(images: torch.Tensor) -> torch.Tensor:
    squares = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).flatten(1, 2)
    return squares[:, list(SQUARES)].unflatten(1, (4, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


TASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "turned": lambda images: images.rot90(1, (1, 2)),
    "inverted": lambda images: 1 - images,
    "mirrored": lambda images: images.flip(2),
    "shuffled": _shuffled,
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    width: int = 96
    layers: int = 4
    base_steps: int = 800
    expert_steps: int = 350
    base_rate: float = 1e-3
    expert_rate: float = 8e-4
    batch_size: int = 64
    train: int = 1000
    calibration: int = 256


QUICK = Sizes(width=32, layers=2, base_steps=20, expert_steps=20)


@dataclass(frozen=True)
class Digits:
    """Some of the digits: images `[N, 8, 8]` from 0 to 1, labels `[N]`."""

    images: torch.Tensor
    labels: torch.Tensor


def make_case(work: Path, seed: int, quick: bool) -> Case:
    """Trains the base and the experts, a minute and half a minute each, unless they are there."""
    sizes = QUICK if quick else Sizes()
    train, calibration, heldout = split_digits(sizes, seed)
    base, experts = work / "base", {task: work / "experts" / task for task in TASKS}
    about = {"sizes": dataclasses.asdict(sizes), "seed": seed, "data": digest(train.images.numpy().tobytes())}
    make_once(base, about, lambda folder: _make_base(folder, train, sizes, seed))
    about = {**about, "base": digest(base)}
    for number, (task, folder) in enumerate(experts.items()):
        make = functools.partial(_make_expert, base=base, train=train, sizes=sizes, task=task, seed=seed + number)
        make_once(folder, {**about, "task": task}, make)
    files = {task: work / "calibration" / f"{task}.safetensors" for task in TASKS}
    for task, file in files.items():
        file.parent.mkdir(exist_ok=True)
        save_file({"pixel_values": pixels_of(TASKS[task](calibration.images))}, file)
    measured = digest(heldout.images.numpy().tobytes(), heldout.labels.numpy().tobytes())
    return Case(
        base,
        experts,
        files,
        {"batch_size": 64},
        lambda folder: _measure(folder, heldout),
        dtype="float32",
        heldout=measured,
    )


def split_digits(sizes: Sizes, seed: int) -> tuple[Digits, Digits, Digits]:
    """For training, calibration, and measuring."""
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    bounds = (0, sizes.train, sizes.train + sizes.calibration, len(images))
    parts = [order[start:stop] for start, stop in itertools.pairwise(bounds)]
    train, calibration, heldout = (Digits(images[part], labels[part]) for part in parts)
    return train, calibration, heldout


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """What the model reads, `[N, 1, SIDE, SIDE]`."""
    enlarged = F.interpolate(images[:, None], size=(SIDE, SIDE), mode="bilinear")
    return ((enlarged - MEAN) / STD).contiguous()


def new_model(sizes: Sizes) -> ViTForImageClassification:
    """A model of random weights, drawn from torch's own generator."""
    config = ViTConfig(
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        # With Transformers' 0.02 so narrow a model needs many more steps before it learns anything.
        initializer_range=0.08,
    )
    return ViTForImageClassification(config)


def _make_base(folder: Path, train: Digits, sizes: Sizes, seed: int) -> None:
    torch.manual_seed(seed)
    model = new_model(sizes)
    ways = [lambda images: images, *TASKS.values()]

    def mixed(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([way(part) for way, part in zip(ways, images.chunk(len(ways)), strict=True)])

    train_on(model, train, mixed, sizes.base_steps, sizes.base_rate, sizes.batch_size, seed)
    model.save_pretrained(folder)


def _make_expert(folder: Path, *, base: Path, train: Digits, sizes: Sizes, task: str, seed: int) -> None:
    model = ViTForImageClassification.from_pretrained(base)
    train_on(model, train, TASKS[task], sizes.expert_steps, sizes.expert_rate, sizes.batch_size, seed)
    model.save_pretrained(folder)


def train_on(
    model: torch.nn.Module,
    train: Digits,
    way: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
    rate: float,
    batch_size: int,
    seed: int,
) -> None:
    """AdamW on digits that are shifted by a pixel, fainter or stronger, and noisy."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(train.labels), (batch_size,), generator=generator)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        images = way(train.images[chosen]).roll(shift, (1, 2))
        images = images * (0.7 + 0.6 * torch.rand(batch_size, 1, 1, generator=generator))
        images = images + 0.1 * torch.randn(images.shape, generator=generator)
        loss = F.cross_entropy(model(pixels_of(images)).logits, train.labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def _measure(folder: Path, heldout: Digits) -> Mapping[str, Score]:
    model = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {}
    for task, way in TASKS.items():
        logits = model(pixels_of(way(heldout.images))).logits
        right = (logits.argmax(1) == heldout.labels).float().mean().item()
        scores[task] = Score(F.cross_entropy(logits, heldout.labels).item(), right)
    return scores
