"""A comparison of tiny merges: two experts, their calibration texts, and tasks of both kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from task_models import TEXTS, write_language_model, write_texts


def write_comparison(folder: Path) -> dict[str, Any]:
    """Writes two experts, a base, and calibration texts of which some are left over; returns a regression merge."""
    write_language_model(folder / "base")
    models = []
    for number, name in enumerate(("math", "code")):
        torch.manual_seed(number)
        expert = tf.AutoModelForCausalLM.from_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expert.save_pretrained(folder / name)
        tf.AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / name)
        data = write_texts(folder / f"{name}.jsonl", [f"{text} {word}" for text in TEXTS for word in TEXTS])
        models.append({"model": str(folder / name), "calibration": {"data": data}})
    return {
        "merge_method": "regmean",
        "base_model": str(folder / "base"),
        "models": models,
        "calibration": {"num_samples": 8, "batch_size": 4},
    }


def evaluation(folder: Path) -> dict[str, Any]:
    """The loss on texts of both kinds, beside the experts."""
    tasks = [
        {
            "name": name,
            "kind": "language_model",
            "data": str(folder / f"{name}.jsonl"),
            "num_samples": 6,
            "expert": str(folder / name),
        }
        for name in ("math", "code")
    ]
    return {"tasks": tasks, "resamples": 20}
