"""mergekit's names of modules mean the stacks of layers that a model has."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_free_cases import write_models

import largemerge
from largemerge.data_free.modules import module_of_tensor, stacks_of_modules
from largemerge.data_free.plan import DataFreePlan

QWEN2_VL = ["model.layers", "visual.blocks"]
QWEN3_VL = ["model.language_model.layers", "model.visual.blocks", "model.visual.deepstack_merger_list"]
GEMMA3 = ["language_model.model.layers", "vision_tower.vision_model.encoder.layers"]
LLAMA4 = ["language_model.model.layers", "vision_model.model.layers"]
WHISPER = ["model.decoder.layers", "model.encoder.layers"]


@pytest.mark.parametrize(
    ("stacks", "expected"),
    [
        (["model.layers"], {"default": ["model.layers"]}),
        (["model.layers"], {"text_decoder": ["model.layers"]}),
        (QWEN2_VL, {"text_decoder": ["model.layers"], "vision_tower": ["visual.blocks"], "multi_modal_projector": []}),
        (
            QWEN3_VL,
            {
                "text_decoder": QWEN3_VL[:1],
                "vision_tower": QWEN3_VL[1:2],
                "multi_modal_projector": QWEN3_VL[2:],
            },
        ),
        (GEMMA3, {"vision_tower": GEMMA3[1:], "multi_modal_projector": [], "text_decoder": GEMMA3[:1]}),
        (LLAMA4, {"text_decoder": LLAMA4[:1], "vision_model": LLAMA4[1:]}),
        (GEMMA3, {"language_model": GEMMA3[:1], "vision_tower.vision_model.encoder.layers": GEMMA3[1:], "default": []}),
        (WHISPER, {"encoder": WHISPER[1:], "decoder": WHISPER[:1]}),
        (
            ["encoder.block", "decoder.block"],
            {"encoder": ["encoder.block"], "decoder": ["decoder.block"], "shared": []},
        ),
    ],
)
def test_stacks_of_modules(stacks: list[str], expected: dict[str, list[str]]) -> None:
    found = stacks_of_modules(list(expected), stacks)
    assert {name: list(of_module) for name, of_module in found.items()} == expected


def test_names_that_mean_nothing_are_left_out() -> None:
    assert stacks_of_modules(["text_decoder", "vison_tower"], QWEN2_VL) == {"text_decoder": ("model.layers",)}


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("model.embed_tokens.weight", "text_decoder"),
        ("lm_head.weight", "text_decoder"),
        ("visual.patch_embed.proj.weight", "vision_tower"),
        ("visual.merger.ln_q.weight", "multi_modal_projector"),
    ],
)
def test_tensors_outside_the_stacks_belong_to_modules(tensor: str, module: str) -> None:
    names = ["vision_tower", "multi_modal_projector", "text_decoder"]
    assert module_of_tensor(tensor, stacks_of_modules(names, QWEN2_VL)) == module


def test_each_module_has_its_own_parameters(tmp_path: Path) -> None:
    write_models(tmp_path, "t5", 2)
    models = [str(tmp_path / f"model{seed}") for seed in range(2)]
    weights = {"shared": 0.1, "decoder": 0.2, "encoder": 0.3}
    config = {
        "merge_method": "linear",
        "modules": {
            name: {"models": [{"model": model} for model in models], "parameters": {"weight": [weight, weight]}}
            for name, weight in weights.items()
        },
    }
    plan = largemerge.plan(config, probe=False)
    assert isinstance(plan, DataFreePlan) and not plan.problems
    for task in plan.tasks:
        assert task.per_model["weight"] == [weights[task.name.split(".")[0]]] * 2, task.name
    assert {task.name.split(".")[0] for task in plan.tasks} == set(weights)
    del config["modules"]["encoder"]  # type: ignore[attr-defined]
    (problem,) = largemerge.plan(config, probe=False).problems
    assert (
        problem == "modules: found ['decoder', 'shared'], expected one for each of ['decoder.block', 'encoder.block']"
    )
