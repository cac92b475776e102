"""What a merge refuses, before any work; and how it treats what lies in the output folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf
from cases import (
    Case,
    MakeCase,
    assert_close,
    files_in,
    merge_and_load,
    names_in,
    origins,
    rewrite_weights,
    touch,
    write_case,
)
from transformers import PreTrainedModel

import largemerge
from largemerge import CheckpointError, LargemergeError, MergeError, OutputError

SIDE_FILES = {"README.md", "config.json", "generation_config.json", "largemerge_config.yaml", "merge_report.json"}


# Refused


def refused(case: Case, error: type[LargemergeError], *mentions: str) -> tuple[str, ...]:
    before = files_in(case.folder)
    with pytest.raises(error) as caught:
        largemerge.merge(case.config, case.folder / "merged")
    assert files_in(case.folder) == before
    assert all(text in str(caught.value) for text in mentions), str(caught.value)
    return caught.value.problems


def llama(**changes: Any) -> tf.LlamaForCausalLM:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**(tiny_models.LLM | changes)))


def two_llamas(folder: Path, *changes: dict[str, Any], **more: Any) -> Case:
    models: list[PreTrainedModel] = [llama(**change) for change in changes]
    return write_case(folder, models, [tiny_models.inputs("text", 4, index) for index in range(len(models))], **more)


@pytest.mark.parametrize("larger_first", [False, True])
def test_candidates_of_other_shapes_are_refused(tmp_path: Path, larger_first: bool) -> None:
    sizes = (70, 64) if larger_first else (64, 70)
    case = two_llamas(tmp_path, *({"vocab_size": size} for size in sizes))
    problems = refused(case, LargemergeError)
    assert len(problems) == 2
    for name, problem in zip(("model.embed_tokens.weight", "lm_head.weight"), problems, strict=True):
        shapes = f"[{sizes[0]}, 16] as in model0, found {{'model1': [{sizes[1]}, 16]}}"
        assert problem.startswith(f"{name}: expected {shapes}")
        assert "parameters.exclude" in problem and "base_model" in problem


def test_a_base_stands_in_for_tensors_of_other_shapes(tmp_path: Path) -> None:
    case = two_llamas(tmp_path, {}, {"vocab_size": 70}, exclude=["embed_tokens", "lm_head"])
    refused(case, LargemergeError, "model.embed_tokens.weight", "lm_head.weight")
    base = llama()
    base.save_pretrained(tmp_path / "pretrained")
    case.config["base_model"] = str(tmp_path / "pretrained")
    merged = merge_and_load(case)
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight)
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)


@pytest.mark.parametrize("more_first", [False, True])
def test_candidates_of_other_depths_are_refused(tmp_path: Path, more_first: bool) -> None:
    """Blocks that only one has must not be dropped."""
    depths = (4, 3) if more_first else (3, 4)
    case = two_llamas(tmp_path, *({"num_hidden_layers": depth} for depth in depths))
    refused(case, LargemergeError, "model.layers.3", "model1")


@pytest.mark.parametrize("which", ["model0", "model1"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 4}, "of layers that its config.json counts: model.layers.3."),
        ({"num_hidden_layers": 1}, "of more layers than its config.json counts: model.layers.1."),
        ({"vocab_size": 60}, "model.embed_tokens.weight is [64, 16] in its files, and [60, 16] by its config.json"),
    ],
)
def test_every_candidate_is_as_its_own_config_says(
    tmp_path: Path, which: str, changes: dict[str, Any], told: str
) -> None:
    case = two_llamas(tmp_path, {}, {})
    config = json.loads((tmp_path / which / "config.json").read_text())
    (tmp_path / which / "config.json").write_text(json.dumps(config | changes))
    refused(case, CheckpointError, f"{which}: ", told)


def test_differing_configs_are_noted(tmp_path: Path) -> None:
    case = two_llamas(tmp_path, {"rope_theta": 10000.0}, {"rms_norm_eps": 1e-4})
    notes = largemerge.plan(case.config).notes
    assert [note for note in notes if "rms_norm_eps" in note and "0.0001" in note and "model1" in note]


def test_candidates_of_other_classes_are_refused(tmp_path: Path) -> None:
    models: list[PreTrainedModel] = [tiny_models.build("llama"), tiny_models.build("mistral")]
    case = write_case(tmp_path, models, [tiny_models.inputs("text", 4, 0)] * 2)
    refused(case, CheckpointError, "'model0': 'LlamaForCausalLM'", "'model1': 'MistralForCausalLM'")


def test_all_broken_checkpoints_are_told_at_once(make_case: MakeCase) -> None:
    case = make_case(num_candidates=4, num_samples=4)
    (case.folder / "model0" / "config.json").unlink()
    (case.folder / "model1" / "model.safetensors").write_bytes(b"")
    shutil.rmtree(case.folder / "model3")
    problems = refused(case, CheckpointError)
    assert [problem.split(":")[0] for problem in problems] == ["model0", "model1", "model3"]


@pytest.mark.parametrize("part", [".layers.1.", "embed_tokens"])
def test_what_no_candidate_has_and_the_model_needs_is_named(make_case: MakeCase, part: str) -> None:
    case = make_case(num_samples=4)
    for number in (0, 1):
        rewrite_weights(
            case.folder / f"model{number}",
            lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key},
        )
    with pytest.raises(LargemergeError, match=r"model0: its files lack \d+ tensor") as caught:
        largemerge.merge(case.config, case.folder / "merged")
    assert part in str(caught.value) and "fetch the checkpoint again" in str(caught.value)


def test_a_missing_tensor_is_named(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    lost = "model.layers.2.mlp.up_proj.weight"
    rewrite_weights(
        case.folder / "model1", lambda tensors: {name: value for name, value in tensors.items() if name != lost}
    )
    refused(case, LargemergeError, "model1: its files lack 1 tensor that LlamaForCausalLM needs", lost)


def test_quantized_candidates_are_refused(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    path = case.folder / "model0" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(config))
    refused(case, CheckpointError, "model0: quantized (gptq)")


@pytest.mark.parametrize(("key", "value"), [("architectures", ["NoSuchModel"]), ("model_type", "no_such_type")])
def test_an_unknown_class_is_refused(make_case: MakeCase, key: str, value: Any) -> None:
    case = make_case(num_samples=4)
    for index in range(2):
        path = case.folder / f"model{index}" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(case, LargemergeError, "model0: ", str(value[0] if isinstance(value, list) else value))


def test_weights_that_are_not_finite_are_told_with_where(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    name = "model.layers.1.self_attn.v_proj.weight"
    rewrite_weights(
        case.folder / "model1", lambda tensors: tensors | {name: torch.full_like(tensors[name], float("inf"))}
    )
    with pytest.raises(MergeError, match=rf"model\.layers\.1\..*model1 holds infinity in {re.escape(name)}"):
        largemerge.merge(case.config, case.folder / "merged")
    assert not (case.folder / "merged" / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.norm.weight", r"model1's model\.norm\.weight goes up to 1e\+300, more than float32 holds"),
        (
            "model.layers.0.self_attn.q_proj.weight",
            r"model1's model\.layers\.0\.self_attn\.q_proj\.weight goes up to 1e\+300",
        ),
    ],
)
def test_weights_that_float32_does_not_hold(make_case: MakeCase, name: str, told: str) -> None:
    case = make_case(num_samples=4)

    def large(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {key: tensor.double() for key, tensor in tensors.items()}
        made[name].view(-1)[3] = 1e300
        return made

    rewrite_weights(case.folder / "model1", large)
    with pytest.raises(MergeError, match=told):
        largemerge.merge(case.config, case.folder / "merged")
    assert not (case.folder / "merged" / "config.json").exists()


# The output folder


def test_a_folder_with_something_in_it_is_refused(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    touch(case.folder / "merged", "notes.txt")
    refused(case, OutputError, "is not empty", "notes.txt", "--force")


def test_an_empty_folder_is_taken(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    (case.folder / "merged").mkdir()
    merge_and_load(case)


def test_a_file_in_the_place_of_the_folder_is_refused(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    (case.folder / "merged").touch()
    refused(case, OutputError, "is a file; expected a folder")


def test_a_file_in_the_place_of_a_parent_is_refused(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    (case.folder / "parent").touch()
    with pytest.raises(OutputError, match=r"parent is a file"):
        largemerge.merge(case.config, case.folder / "parent" / "merged")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("which", ["model1", "pretrained", "link"])
def test_an_input_is_never_written_to(base_case: Case, which: str, force: bool) -> None:
    (base_case.folder / "link").symlink_to(base_case.folder / "model0")
    before = files_in(base_case.folder)
    with pytest.raises(OutputError, match="holds an input"):
        largemerge.merge(base_case.config, base_case.folder / which, force=force)
    assert files_in(base_case.folder) == before


def test_a_folder_with_calibration_data_is_never_replaced(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    touch(case.folder / "merged", "config.json")
    data = case.folder / "merged" / "data.safetensors"
    shutil.move(case.folder / "data1.safetensors", data)
    case.config["models"][1]["calibration"]["data"] = str(data)
    before = files_in(case.folder)
    with pytest.raises(OutputError, match=r"holds an input \(.*data\.safetensors\)"):
        largemerge.merge(case.config, case.folder / "merged", force=True)
    assert files_in(case.folder) == before


def test_a_folder_above_an_input_is_never_replaced(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    before = files_in(case.folder)
    with pytest.raises(OutputError, match="holds an input"):
        largemerge.merge(case.config, case.folder, force=True)
    assert files_in(case.folder) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("which", ["model1", "pretrained"])
def test_nothing_is_written_inside_an_input(base_case: Case, which: str, force: bool) -> None:
    touch(base_case.folder / which / "1_Pooling", "config.json")
    before = files_in(base_case.folder)
    for out in ("1_Pooling", "new/merged"):
        with pytest.raises(OutputError, match="lies in an input"):
            largemerge.merge(base_case.config, base_case.folder / which / out, force=force)
    assert files_in(base_case.folder) == before


STALE = (
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "tokenizer.json",
    "vocab.txt",
    "preprocessor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/old.jinja",
)


def test_force_replaces_an_old_checkpoint_wholly(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    for index in range(2):
        (case.folder / f"model{index}" / "generation_config.json").unlink()
    touch(case.folder / "merged", *STALE, "notes.txt")
    merge_and_load(case, force=True)
    kept = SIDE_FILES - {"generation_config.json"} | {"model.safetensors"}
    assert names_in(case.folder / "merged") == kept | {"notes.txt"}
    assert origins(case.folder / "merged", "notes.txt") == ["merged"]


def test_force_over_an_earlier_merge_in_more_shards(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    largemerge.merge(case.config, case.folder / "merged", max_shard_bytes=2000)
    case.config["parameters"]["off_diagonal_scale"] = 0.3
    expected = merge_and_load(case, "expected", max_shard_bytes=4000)
    assert_close(merge_and_load(case, force=True, max_shard_bytes=4000), expected, tolerance=0)
    assert names_in(case.folder / "merged") == names_in(case.folder / "expected")


def test_force_leaves_the_old_checkpoint_alone_until_the_new_one_is_there(make_case: MakeCase) -> None:
    case = make_case(num_samples=4)
    touch(case.folder / "merged", *STALE)
    before = files_in(case.folder / "merged")
    name = "model.layers.2.self_attn.v_proj.weight"
    rewrite_weights(
        case.folder / "model1", lambda tensors: tensors | {name: torch.full_like(tensors[name], float("nan"))}
    )
    with pytest.raises(MergeError):
        largemerge.merge(case.config, case.folder / "merged", force=True)
    after = files_in(case.folder / "merged")
    assert {path: content for path, content in after.items() if not path.startswith(".largemerge/")} == before
