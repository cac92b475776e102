"""Model classes that hand more between blocks than a tensor of tokens: right beside a dense reference, or refused.

The reference is that of `benchmarks/architectures.py`: whole models, hooks, dense float64 solves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import report_of
from safetensors.torch import load_file, save_file

import largemerge
from largemerge import ArchitectureError, CalibrationError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from architectures import make_models, merge_config, merge_models

MERGED_BEFORE = ("Gemma3nForCausalLM", "AlbertForMaskedLM", "LlavaForConditionalGeneration", "Zamba2ForCausalLM")
"""Classes that RegMean++ merges here: what they hand on comes from merged blocks. RegMean merges the others."""

CLASSES = [
    # Later blocks read keys and values of earlier ones, from a mapping that all are given.
    ("causal", "Gemma3nForCausalLM", 52),
    ("causal", "Gemma4ForCausalLM", 36),
    # Position tables that no file holds.
    ("seq2seq", "MarianMTModel", 64),
    ("seq2seq", "PegasusForConditionalGeneration", 64),
    # Inputs [samples, 1, tokens, rank], [tokens, samples, in], and those of tokens that are pooled.
    ("causal", "DeepseekV3ForCausalLM", 32),
    ("seq2seq", "FSMTForConditionalGeneration", 64),
    ("masked", "FunnelForMaskedLM", None),
    # One block that runs as often as there are layers; weights that several blocks have in common.
    ("masked", "AlbertForMaskedLM", 6),
    ("causal", "Zamba2ForCausalLM", 10),
    # Blocks of two classes in one list, of which the text reaches one.
    ("causal", "MllamaForCausalLM", 21),
    # Images: as many tokens as features, patches in one list, outputs of an earlier block.
    ("multimodal", "Gemma3ForConditionalGeneration", 52),
    ("multimodal", "SmolVLMForConditionalGeneration", 52),
    ("multimodal", "LlavaForConditionalGeneration", 52),
    ("multimodal", "Qwen2VLForConditionalGeneration", 44),
]


@pytest.mark.parametrize(("kind", "name", "solved"), CLASSES, ids=[name for _, name, _ in CLASSES])
def test_every_tensor_agrees_with_the_dense_reference(tmp_path: Path, kind: str, name: str, solved: int | None) -> None:
    models, inputs = make_models(kind, name, tmp_path)
    outcome = merge_models("regmean_plusplus" if name in MERGED_BEFORE else "regmean", models, inputs, tmp_path)
    assert (outcome.status, outcome.reason) == ("clean", "")
    assert outcome.right, outcome.worst
    assert solved is None or outcome.solved == solved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "at_once"),
    [
        ("causal", "Gemma3nForCausalLM", True),
        ("masked", "AlbertForMaskedLM", True),
        ("masked", "FunnelForMaskedLM", False),
        ("multimodal", "LlavaForConditionalGeneration", False),
    ],
)
def test_unusual_blocks_are_calibrated(tmp_path: Path, kind: str, name: str, at_once: bool) -> None:
    """Blocks that share keys, run several times, pool their queries or are read by others; and it is told how."""
    models, _ = make_models(kind, name, tmp_path)
    config = merge_config("regmean", tmp_path, len(models)) | {"merge_method": "calibrated", "parameters": {}}
    report: Any = largemerge.merge(config, tmp_path / "out", quiet=True, device="cpu")
    _, info = type(models[0]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert any(note.startswith("granularity: the linears of") for note in report.plan.notes) == at_once
    assert report.plan.head.tied is not None or report.plan.head.groups
    assert all(value > 0 for by_block in report.drift.values() for value in by_block.values())


def test_passes_of_few_groups_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear that runs several times is watched to its last run, however the block is cut into passes."""
    models, inputs = make_models("masked", "AlbertForMaskedLM", tmp_path)
    assert merge_models("regmean", models, inputs, tmp_path).right
    import largemerge.regression.passes as passes_module

    whole = passes_module.block_passes
    monkeypatch.setattr(
        passes_module, "block_passes", lambda block, roles, _, advances: whole(block, roles, 9, advances=advances)
    )
    largemerge.merge(merge_config("regmean", tmp_path, 2), tmp_path / "cut", quiet=True, device="cpu")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("regmean", "cut"))
    assert all(torch.allclose(found[key], tensor, atol=1e-5) for key, tensor in expected.items())


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("smolvlm")
    _, inputs = make_models("multimodal", "SmolVLMForConditionalGeneration", folder)
    return folder, inputs


def config_with(folder: Path, *data: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The configuration with other calibration data."""
    config = merge_config("regmean", folder, 2)
    for index, tensors in enumerate(data):
        save_file({name: x.contiguous() for name, x in tensors.items()}, folder / f"other{index}.safetensors")
        config["models"][index]["calibration"] = {"data": str(folder / f"other{index}.safetensors")}
    return config


def test_text_alone_averages_the_vision_tower_and_says_so(
    smolvlm: tuple[Path, list[dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    folder, inputs = smolvlm
    ids = inputs[0]["input_ids"][:, 8:]
    config = config_with(folder, {"input_ids": ids}, {"input_ids": ids})
    plan = largemerge.plan(config)
    stack = "model.vision_model.encoder.layers"
    assert any(f"does not reach all 4 blocks of {stack}" in note for note in plan.notes)
    reasons = {tensor.reason for tensor in plan.tensors if tensor.name.startswith(stack)}
    assert reasons == {f"the calibration data does not reach {stack}"}
    largemerge.merge(config, tmp_path / "out", quiet=True, device="cpu")
    report = report_of(tmp_path / "out")
    assert any(stack in note for note in report["plan"]["notes"])
    merged_weights = load_file(tmp_path / "out" / "model.safetensors")
    first, second = (load_file(folder / f"model{index}" / "model.safetensors") for index in range(2))
    for name in (key for key in merged_weights if "vision_model.encoder.layers" in key):
        torch.testing.assert_close(merged_weights[name], (first[name] + 2 * second[name]) / 3)


def test_masks_of_pixels_are_told(smolvlm: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    folder, inputs = smolvlm
    mask = torch.ones(*inputs[0]["pixel_values"].shape[:2], 32, 32, dtype=torch.long)
    plan = largemerge.plan(config_with(folder, *({**own, "pixel_attention_mask": mask} for own in inputs)))
    assert any("pixel_attention_mask" in note and "vision_model.encoder.layers" in note for note in plan.notes)


def test_images_for_one_candidate_alone_are_refused(smolvlm: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    folder, inputs = smolvlm
    config = config_with(folder, inputs[0], {"input_ids": inputs[1]["input_ids"][:, 8:]})
    with pytest.raises(CalibrationError, match=r"pixel_values.*same for all candidates"):
        largemerge.plan(config)


def test_image_tokens_that_are_missing_are_refused(smolvlm: tuple[Path, list[dict[str, torch.Tensor]]]) -> None:
    folder, inputs = smolvlm
    without = [{name: x[:, 8:] if name != "pixel_values" else x for name, x in own.items()} for own in inputs]
    with pytest.raises(ArchitectureError, match=r"cannot be run on calibration inputs .*pixel_values.* \(.*tokens"):
        largemerge.plan(config_with(folder, *without))
