"""Models block by block: the same as the plain forward, bit for bit, or refused before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny_models
import torch
import transformers as tf
from cases import Case, MakeCase, assert_close, files_in, merge_and_load, write_case
from safetensors.torch import save_file
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

import largemerge
from largemerge import ArchitectureError, CalibrationError
from largemerge.checkpoint.index import open_checkpoint
from largemerge.model.fake_forward import equal_trees, fake_model
from largemerge.model.forward import block_weights, original_forward, resumed_at
from largemerge.model.skeleton import Skeleton, assign_tensors, build_skeleton
from largemerge.model.trace import ModelTrace, trace_model

Inputs = dict[str, torch.Tensor]


def build(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Skeleton]:
    """A model with weights, and the skeleton of its checkpoint."""
    tiny_models.build(architecture).to(dtype).save_pretrained(folder)
    skeleton = build_skeleton(open_checkpoint(folder, architecture))
    # Not `.to(dtype)`, which would round rotary frequencies too.
    model = type(skeleton.model).from_pretrained(folder, dtype=dtype).eval()
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        config.use_cache = False
    return model, skeleton


def padded_inputs(architecture: str, padding: str, dtype: torch.dtype) -> Inputs:
    inputs = tiny_models.inputs(tiny_models.ARCHITECTURES[architecture].kind, 3, 0, padding)
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def outline(inputs: Inputs) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in inputs.items()}


@contextmanager
def noted_blocks(model: PreTrainedModel, skeleton: Skeleton) -> Iterator[dict[str, Any]]:
    """What every block of a real model returns, by name."""
    seen: dict[str, Any] = {}

    def note(name: str, output: Any) -> None:
        assert name not in seen
        seen[name] = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)

    names = [stack.block_name(index) for stack in skeleton.stacks for index in range(len(stack.blocks))]
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: note(name, output))
        for name in names
    ]
    yield seen
    for handle in handles:
        handle.remove()


def run_one_by_one(model: PreTrainedModel, skeleton: Skeleton, inputs: Inputs, order: tuple[int, ...]) -> Mapping:
    """The outputs of all blocks; of those, only the one that runs has weights."""
    state = model.state_dict()
    assign_tensors(skeleton, {name: state[name] for name in skeleton.non_block_tensors()})
    outputs: dict[int, Any] = {}
    seen: dict[str, Any] = {}
    for number in order:
        stack = skeleton.stacks[number]
        for index, block in enumerate(stack.blocks):
            name = stack.block_name(index)

            def visit(*args: Any, block: torch.nn.Module = block, name: str = name, **kwargs: Any) -> None:
                seen[name] = original_forward(block)(*args, **kwargs)

            weights = {path: state[f"{name}.{path}"] for path in block.state_dict()}
            with block_weights(block, weights), resumed_at(skeleton, number, index) as run:
                run(inputs, outputs, visit)
            outputs[number] = seen[name]
            assert all(tensor.is_meta for tensor in block.parameters())
    return seen


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_resumed_blocks_return_what_the_plain_forward_returns(tmp_path: Path, name: str) -> None:
    check_resumed(name, "right", torch.float32, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "bert", "t5", "bart", "clip"])
def test_resumed_blocks_agree_with_padding_on_the_left_too(tmp_path: Path, name: str) -> None:
    check_resumed(name, "left", torch.float32, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "opt", "clip", "mixtral"])
def test_resumed_blocks_agree_in_bfloat16_too(tmp_path: Path, name: str) -> None:
    check_resumed(name, "right", torch.bfloat16, tmp_path)


def check_resumed(architecture: str, padding: str, dtype: torch.dtype, folder: Path) -> None:
    model, skeleton = build(architecture, folder, dtype)
    inputs = padded_inputs(architecture, padding, dtype)
    order = trace_model(skeleton, outline(inputs)).order
    with noted_blocks(model, skeleton) as expected, torch.no_grad():
        model(**inputs)
    found = run_one_by_one(model, skeleton, inputs, order)
    assert list(found) == list(expected), "the order in which blocks run"
    assert len(found) == tiny_models.ARCHITECTURES[architecture].num_blocks
    for name, output in expected.items():
        assert equal_trees(found[name], output), name


def test_sliding_windows_matter_in_this_test(tmp_path: Path) -> None:
    """If Gemma 2's full mask were used in every block, the test above would see it."""
    model, skeleton = build("gemma2", tmp_path)
    inputs = padded_inputs("gemma2", "right", torch.float32)
    with noted_blocks(model, skeleton) as sliding, torch.no_grad():
        model(**inputs)
    model.config.layer_types[:] = ["full_attention"] * 3
    for block in model.model.layers:
        block.self_attn.sliding_window = None
        block.attention_type = "full_attention"  # where Transformers asks the block, as it did before
    with noted_blocks(model, skeleton) as full, torch.no_grad():
        model(**inputs)
    assert not equal_trees(sliding["model.layers.0"], full["model.layers.0"])


# What the trace finds out


def traced(architecture: str, folder: Path, inputs: Inputs | None = None) -> tuple[Skeleton, ModelTrace]:
    _, skeleton = build(architecture, folder)
    return skeleton, trace_model(skeleton, outline(inputs or padded_inputs(architecture, "right", torch.float32)))


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "gpt2", "clip", "t5", "mixtral"])
def test_the_skeleton_is_as_before(tmp_path: Path, name: str) -> None:
    skeleton, _ = traced(name, tmp_path)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.model.buffers())
    assert not any("forward" in vars(module) for module in skeleton.model.modules())
    assert not any(module._forward_pre_hooks for module in skeleton.model.modules())


def groups_of(trace: ModelTrace, stack: int) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = {}
    for role in trace.stacks[stack].roles[0]:
        groups.setdefault(role.group, set()).add(role.name.rpartition(".")[2])
    return groups


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        ("phi3", [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]),
        ("gpt2", [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}]),
        ("bert", [{"query", "key", "value"}, {"dense"}, {"dense"}, {"dense"}]),
        ("clip_vision", [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}]),
        ("mixtral", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}]),
        # One tensor after the norm, read by attention and by the MLP.
        ("gpt_neox", [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
    ],
)
def test_linears_that_read_the_same_tensor_are_one_group(tmp_path: Path, name: str, expected: list[set[str]]) -> None:
    _, trace = traced(name, tmp_path)
    assert list(groups_of(trace, 0).values()) == expected


def test_only_what_matters_outside_the_blocks_is_loaded(tmp_path: Path) -> None:
    _, trace = traced("llama", tmp_path)
    assert trace.stacks[0].needed_by_first == {"model.embed_tokens.weight"}
    assert trace.stacks[0].needed_by_later == frozenset()


def test_an_encoders_final_norm_matters_to_the_decoder(tmp_path: Path) -> None:
    skeleton, trace = traced("t5", tmp_path)
    assert [skeleton.stacks[number].name for number in trace.order] == ["encoder.block", "decoder.block"]
    encoder, decoder = (trace.stacks[number] for number in trace.order)
    assert encoder.needed_by_first == {"shared.weight"}
    assert decoder.needed_by_first == {"shared.weight", "encoder.final_layer_norm.weight"}
    assert decoder.needed_by_later == {"encoder.final_layer_norm.weight"}
    assert (encoder.token_input, decoder.token_input) == ("input_ids", "decoder_input_ids")


LENGTHS = [(11, 7), (7, 5), (5, 9), (9, 5), (4, 4), (3, 2), (2, 3)]


def seq2seq_inputs(lengths: tuple[int, int], seed: int = 0, num_samples: int = 24) -> Inputs:
    inputs: Inputs = {}
    for prefix, length in zip(("", "decoder_"), lengths, strict=True):
        tensors = tiny_models.inputs("text", num_samples, seed, "right", length)
        inputs |= {prefix + name: tensor for name, tensor in tensors.items()}
    return inputs


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cross_attention_reads_rows_of_the_encoder(tmp_path: Path, name: str, lengths: tuple[int, int]) -> None:
    """Stacks are told apart however short the calibration samples are."""
    _, trace = traced(name, tmp_path, seq2seq_inputs(lengths))
    encoder, decoder = trace.order
    for roles in trace.stacks[decoder].roles:
        rows = {role.name: role.token_stack for role in roles}
        crossing = {path for path in rows if path.endswith(reference.CROSS)}
        assert len(crossing) == 2
        assert {path: rows[path] for path in rows} == {path: encoder if path in crossing else decoder for path in rows}
    assert {role.token_stack for roles in trace.stacks[encoder].roles for role in roles} == {encoder}


@pytest.mark.parametrize("lengths", [(5, 9), (4, 4), (2, 3)])
def test_short_samples_of_an_encoder_decoder_agree_with_the_formulas(tmp_path: Path, lengths: tuple[int, int]) -> None:
    models = [tiny_models.perturbed("t5", index) for index in range(2)]
    inputs = [seq2seq_inputs(lengths, seed) for seed in range(2)]
    case = write_case(tmp_path, models, inputs, ridge=1e-3)
    expected = reference.merge("regmean_plusplus", models, inputs, case.weights, ridge=1e-3)
    assert_close(merge_and_load(case), expected)


def test_candidates_may_give_the_forward_different_things(make_case: MakeCase) -> None:
    """One stack has padding masks, the other needs none."""
    case = make_case("llama", ridge=0.0)
    case.inputs[1] = tiny_models.inputs("text", 24, 1, "none")
    save_file(case.inputs[1], case.folder / "data1.safetensors")
    expected = reference.merge("regmean_plusplus", case.models, case.inputs, case.weights)
    assert_close(merge_and_load(case), expected)


# Refused


def refused(case: Case, error: type[Exception], match: str) -> None:
    """Both `plan` and `merge` refuse; nothing is written."""
    before = files_in(case.folder)
    for attempt in (lambda: largemerge.plan(case.config), lambda: largemerge.merge(case.config, case.folder / "out")):
        with pytest.raises(error, match=match):
            attempt()
    assert files_in(case.folder) == before


def text_case(folder: Path, model: PreTrainedModel, **inputs: torch.Tensor) -> Case:
    return write_case(folder, [model, model], [inputs or tiny_models.inputs("text", 4, 0)] * 2)


def test_stacks_that_run_in_turns_are_refused(tmp_path: Path) -> None:
    config = tf.XLMConfig(vocab_size=tiny_models.VOCAB_SIZE, emb_dim=16, n_layers=3, n_heads=4)
    case = text_case(tmp_path, tf.XLMWithLMHeadModel(config))
    refused(case, ArchitectureError, r"transformer.attentions run in 3 parts, in turns with those of transformer.ffns")


def test_a_model_without_stacks_is_refused(tmp_path: Path) -> None:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = tf.ResNetForImageClassification(config)
    case = text_case(tmp_path, model, pixel_values=torch.randn(2, 3, 32, 32))
    refused(
        case, ArchitectureError, r"ResNetForImageClassification: no stack of like blocks .*stacks: \[model\.layers\]"
    )


def test_stacks_that_are_not_there_are_refused_with_those_that_are(make_case: MakeCase) -> None:
    case = make_case("llama", num_samples=4)
    case.config["stacks"] = ["model.layer", "model.layers", "model.norm"]
    with pytest.raises(ArchitectureError) as caught:
        largemerge.plan(case.config)
    assert len(caught.value.problems) == 2
    assert "'model.layer' is no list of modules" in caught.value.problems[0]
    assert "'model.norm' is no list of modules" in caught.value.problems[1]
    assert all("['model.layers']" in problem for problem in caught.value.problems)
    refused(case, ArchitectureError, "model.layer")


def test_the_right_stacks_may_be_named(make_case: MakeCase) -> None:
    case = make_case("clip", num_samples=4)
    case.config["stacks"] = ["vision_model.encoder.layers"]
    plan = largemerge.plan(case.config)
    assert plan.stacks == (("vision_model.encoder.layers", 3),)
    assert all(tensor.name.startswith("vision_model.encoder.layers.") for tensor in plan.tensors if not tensor.reason)
    merge_and_load(case)


def test_pixels_for_a_language_model_are_refused(tmp_path: Path) -> None:
    case = text_case(tmp_path, tiny_models.build("llama"), pixel_values=torch.randn(2, 3, 12, 12))
    refused(case, CalibrationError, r"'pixel_values' is no argument of the model's forward.*input_ids")


@pytest.mark.parametrize("given", ["pixel_values", "input_ids"])
def test_half_of_what_a_model_of_two_towers_needs_is_refused(tmp_path: Path, given: str) -> None:
    inputs = {given: tiny_models.inputs("clip", 4, 0)[given]}
    case = text_case(tmp_path, tiny_models.build("clip"), **inputs)
    refused(case, ArchitectureError, rf"CLIPModel: cannot be run on calibration inputs \['{given}'\]")


@pytest.mark.parametrize("name", ["use_cache", "cache", "past_key_values", "logits_to_keep"])
def test_arguments_that_hold_no_samples_are_refused(tmp_path: Path, name: str) -> None:
    case = text_case(tmp_path, tiny_models.build("llama"), input_ids=torch.ones(2, 5).long(), **{name: torch.ones(2)})
    refused(
        case, CalibrationError, rf"data0\.safetensors: tensor '{name}' is no argument .*that holds samples.*; it takes"
    )


def test_pixels_of_a_wrong_shape_name_candidate_and_file(tmp_path: Path) -> None:
    case = text_case(tmp_path, tiny_models.build("vit"), pixel_values=torch.randn(2, 3, 12))
    words = r"'model0': .*data0\.safetensors: ViT.*: cannot be run .*\[2, 3, 12\].*; expected .* \(not enough values"
    refused(case, ArchitectureError, words)


def test_pixels_of_unlike_shapes_name_both_candidates(tmp_path: Path) -> None:
    model = tiny_models.build("vit")
    pixels = [{"pixel_values": torch.randn(2, 3, *sides)} for sides in ((12, 12), (12,))]
    case = write_case(tmp_path, [model, model], pixels)
    words = r"'model0': .*data0\.safetensors has .*\[3, 12, 12\].*'model1': .*data1\.safetensors has .*\[3, 12\]"
    refused(case, CalibrationError, words)


@pytest.mark.parametrize(
    ("model", "name", "rows"),
    [
        ("gpt2", "position_ids", 64),
        ("gpt2", "token_type_ids", 64),
        ("bert", "position_ids", 64),
        ("bert", "token_type_ids", 2),
    ],
)
def test_numbers_beyond_an_embeddings_rows_are_refused(tmp_path: Path, model: str, name: str, rows: int) -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    case = text_case(tmp_path, tiny_models.build(model), input_ids=ids, **{name: ids * rows})
    refused(
        case, CalibrationError, rf"data0\.safetensors: tensor '{name}' .*expected 0 to {rows - 1}, .* has {rows} rows"
    )


def test_positions_of_a_model_that_computes_them_may_be_any(tmp_path: Path) -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    case = text_case(tmp_path, tiny_models.build("llama"), input_ids=ids, position_ids=ids * 10_000)
    assert not largemerge.plan(case.config).problems


def test_a_sample_longer_than_the_model_allows_is_refused(tmp_path: Path) -> None:
    model = tiny_models.build("gpt2")
    ids = torch.ones(2, model.config.n_positions + 1, dtype=torch.long)
    case = text_case(tmp_path, model, input_ids=ids)
    with pytest.raises(CalibrationError, match=r"model0.*\[2, 65\].*64 positions"):
        largemerge.merge(case.config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    ids = torch.full((2, 5), tiny_models.VOCAB_SIZE)
    case = text_case(tmp_path, tiny_models.build("llama"), input_ids=ids)
    with pytest.raises(CalibrationError, match=r"model0.*input_ids.*64"):
        largemerge.merge(case.config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_large_made_up_matrices(tmp_path: Path, dtype: torch.dtype) -> None:
    config = tiny_models.build("llama").config
    config.update({"hidden_size": 1024, "intermediate_size": 1280, "num_hidden_layers": 1})
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    skeleton = build_skeleton(open_checkpoint(tmp_path, "llama"), dtype=dtype)
    x = torch.randn(2, 3, 1024).to(dtype)
    x[0, 1, 5] = torch.nan
    with fake_model(skeleton, outline(padded_inputs("llama", "right", dtype)), {}) as fake:
        weight = fake.weights["model.layers.0.mlp.up_proj.weight"]
        output, expected = torch.nn.functional.linear(x, weight), x @ weight.clone().T
    assert weight.shape == (1280, 1024) and output.dtype == dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert output[0, 1].isnan().all() and output.isnan().sum() == 1280


class GossipingLayer(tf.models.llama.modeling_llama.LlamaDecoderLayer):
    """A block that tells the next one something which does not go through its arguments."""

    heard = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs) + GossipingLayer.heard
        GossipingLayer.heard = output.mean().item()
        return output


def test_a_model_that_computes_something_else_when_resumed_is_refused(tmp_path: Path) -> None:
    _, skeleton = build("llama", tmp_path)
    inputs = padded_inputs("llama", "right", torch.float32)
    trace_model(skeleton, outline(inputs))
    for block in skeleton.stacks[0].blocks:
        block.__class__ = GossipingLayer
    with pytest.raises(ArchitectureError, match=r"model\.layers\.0 computes something else .* resumed"):
        trace_model(skeleton, outline(inputs))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
