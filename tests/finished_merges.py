"""Finished merges of every kind, for tests that look at what lies in their folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiny_models
from cases import write_case
from data_free_cases import config_of, write_models

import largemerge

HOSTILE = "<script>alert(1)<"
"""Name of one model of each merge, which no page may obey."""


def merge_each(new_folder: Callable[[str], Path]) -> dict[str, Path]:
    """Merges three llamas by three methods; returns the output folders by method."""
    found = {}
    for method in ("calibrated", "regmean_plusplus"):
        folder = new_folder(method)
        models = [tiny_models.perturbed("llama", seed) for seed in range(3)]
        inputs = [tiny_models.inputs("text", 8, seed, "right") for seed in range(3)]
        case = write_case(folder, models, inputs, method=method)
        case.config["models"][2]["name"] = HOSTILE
        largemerge.merge(case.config, folder / "out")
        found[method] = folder / "out"
    folder = new_folder("ties")
    write_models(folder)
    (folder / "model3").rename(folder / HOSTILE)
    config = config_of(folder, "ties", base_model=str(folder / "model0"), parameters={"weight": 0.5, "density": 0.5})
    config["models"][2]["model"] = str(folder / HOSTILE)
    largemerge.merge(config, folder / "out")
    return found | {"ties": folder / "out"}
