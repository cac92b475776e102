"""Ready-made tensors, used as they are, and what is said of wrong ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from largemerge.calibration import load_calibration, outline_calibration
from largemerge.errors import CalibrationError

TOKENS = torch.arange(15).view(5, 3)


@pytest.fixture
def save(tmp_path):
    def write(tensors):
        path = tmp_path / "data.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        return path

    return write


@pytest.fixture
def complaint(save, make_config, tmp_path, text_signature):
    """The problems that a file of these tensors gives, in the outline as in loading."""

    def find(tensors, signature=text_signature, **settings):
        config = make_config(save(tensors), **settings)
        found = []
        for function in (outline_calibration, load_calibration):
            with pytest.raises(CalibrationError) as caught:
                function(config, "math", tmp_path, signature)
            found.append(caught.value.problems)
        assert found[0] == found[1]
        return "\n".join(found[0])

    return find


def test_tensors_are_used_as_they_are_and_in_order(save, make_config, tmp_path, text_signature):
    attention = torch.ones(5, 3, dtype=torch.bool)
    mask = torch.tensor([[0, 1, 1]] * 5)
    path = save({"input_ids": TOKENS, "attention_mask": attention, "loss_mask": mask})

    calibration = load_calibration(make_config(path, num_samples=3), "math", tmp_path, text_signature)

    assert calibration.name == "math" and calibration.num_samples == 3
    first, second = calibration.batches
    assert torch.equal(first.inputs["input_ids"], TOKENS[:2])
    assert torch.equal(second.inputs["input_ids"], TOKENS[2:3])
    assert torch.equal(first.inputs["attention_mask"], attention[:2])
    assert set(first.inputs) == {"input_ids", "attention_mask"}
    assert first.loss_mask is not None and first.loss_mask.dtype == torch.bool
    assert first.loss_mask.tolist() == [[False, True, True]] * 2
    assert all(tensor.is_contiguous() for batch in calibration.batches for tensor in batch.inputs.values())


def test_floating_tensors_keep_their_dtype(save, make_config, tmp_path, vision_signature):
    pixels = torch.randn(5, 3, 4, 4).bfloat16()
    config = make_config(save({"pixel_values": pixels}))

    calibration = load_calibration(config, "cars", tmp_path, vision_signature)

    assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in calibration.batches]), pixels[:4])
    assert calibration.batches[0].loss_mask is None


def test_fewer_samples_than_asked_for(save, make_config, tmp_path, text_signature):
    config = make_config(save({"input_ids": TOKENS}), num_samples=100)
    assert load_calibration(config, "math", tmp_path, text_signature).num_samples == 5
    assert outline_calibration(config, "math", tmp_path, text_signature).num_samples == 5


def test_outline_reads_the_header(save, make_config, tmp_path, clip_signature):
    tensors = {"input_ids": TOKENS, "pixel_values": torch.zeros(5, 3, 4, 4, dtype=torch.float16)}
    path = save({**tensors, "loss_mask": torch.ones(5, 3, dtype=torch.bool)})

    outline = outline_calibration(make_config(path), "cars", tmp_path, clip_signature)

    assert outline.num_samples == 4 and outline.batch_size == 2
    assert outline.inputs == {"input_ids": ((3,), torch.int64), "pixel_values": ((3, 4, 4), torch.float16)}


def test_unknown_name(complaint):
    problem = complaint({"inputs_ids": TOKENS})
    assert "candidate 'math'" in problem and "data.safetensors" in problem
    assert "'inputs_ids' is no argument of the model's forward that holds samples; did you mean 'input_ids'?" in problem
    assert "it takes ['attention_mask', 'input_ids', 'position_ids']" in problem


def test_several_problems_at_once(complaint):
    problem = complaint({"input_ids": TOKENS.float(), "attention_mask": torch.ones(4, 3), "foo": TOKENS}, pack=True)
    assert "tensor 'foo' is no argument" in problem
    assert "differ in their number of samples" in problem and "'attention_mask': 4" in problem
    assert "tensor 'input_ids' has torch.float32; expected integers" in problem
    assert "pack: a .safetensors file has no columns" in problem


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.bool, torch.bfloat16])
def test_tokens_of_a_dtype_that_no_embedding_takes(complaint, dtype):
    problem = complaint({"input_ids": TOKENS.to(dtype)})
    assert f"tensor 'input_ids' has {dtype}; expected integers: int64 or int32" in problem


def test_empty(complaint):
    assert "empty; expected at least one sample" in complaint({"input_ids": TOKENS[:0]})
    assert "no tensors; expected some that the model's forward takes" in complaint({})
    assert "no tensors" in complaint({"loss_mask": TOKENS})


def test_single_number(complaint):
    assert "tensor 'position_ids' is a single number" in complaint(
        {"input_ids": TOKENS, "position_ids": torch.tensor(1)}
    )


def test_loss_mask_of_another_shape(complaint, seq2seq_signature, vision_signature):
    tensors = {"input_ids": TOKENS, "loss_mask": torch.ones(5, 4)}
    assert "tensor 'loss_mask' is [5, 4]; expected like 'input_ids', [5, 3]" in complaint(tensors)
    tensors = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :2].contiguous(), "loss_mask": torch.ones(5, 3)}
    assert "expected like 'decoder_input_ids', [5, 2]" in complaint(tensors, seq2seq_signature)
    tensors = {"pixel_values": torch.ones(5, 3, 4, 4), "loss_mask": torch.ones(5, 3)}
    assert "expected a tensor 'input_ids' beside it" in complaint(tensors, vision_signature)


def test_encoder_decoder_needs_the_decoders_tokens(complaint, seq2seq_signature):
    assert "add a tensor 'decoder_input_ids'" in complaint({"input_ids": TOKENS}, seq2seq_signature)


def test_subset_is_for_datasets(complaint):
    assert "subset: only datasets have subsets; remove it" in complaint({"input_ids": TOKENS}, subset="x")
    assert "split: 'test', but only datasets have splits" in complaint({"input_ids": TOKENS}, split="test")


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("pixel_values", torch.tensor([[1.0], [float("nan")], [2.0]]), "has NaN or infinity in samples [1]"),
        ("pixel_values", torch.tensor([1.0, float("inf"), 2.0]), "has NaN or infinity in it"),
        ("pixel_values", torch.tensor([[1.0], [2.0], [-1e38]]), "has numbers beyond 1e+06 in samples [2]"),
        ("pixel_values", torch.tensor([[1.0], [2.0], [1e25]]), "has numbers beyond 1e+06 in samples [2]"),
        ("input_ids", torch.tensor([[1], [-100], [2]]), "has negative numbers (the least is -100)"),
    ],
)
def test_values(save, make_config, tmp_path, clip_signature, name, tensor, expected):
    with pytest.raises(CalibrationError) as caught:
        load_calibration(make_config(save({name: tensor})), "cars", tmp_path, clip_signature)
    assert expected in str(caught.value)


def test_values_beyond_num_samples_are_not_read(save, make_config, tmp_path, vision_signature):
    pixels = torch.tensor([[1.0], [2.0], [float("nan")]])
    config = make_config(save({"pixel_values": pixels}), num_samples=2)
    assert load_calibration(config, "cars", tmp_path, vision_signature).num_samples == 2


def test_loss_mask_values(save, make_config, tmp_path, text_signature):
    config = make_config(save({"input_ids": TOKENS, "loss_mask": TOKENS}))
    with pytest.raises(CalibrationError, match="'loss_mask' has other numbers than 0 and 1"):
        load_calibration(config, "math", tmp_path, text_signature)


def test_loss_mask_that_keeps_everything_out(save, make_config, tmp_path, text_signature):
    config = make_config(save({"input_ids": TOKENS, "loss_mask": torch.zeros(5, 3)}))
    with pytest.raises(CalibrationError, match="keeps every token of every sample out"):
        load_calibration(config, "math", tmp_path, text_signature)


def test_broken_file(tmp_path, make_config, text_signature):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(CalibrationError, match=r"broken\.safetensors: not a readable \.safetensors file"):
        load_calibration(make_config(path), "math", tmp_path, text_signature)


def test_settings_change_the_fingerprint(save, make_config, tmp_path, text_signature):
    path = save({"input_ids": TOKENS})
    first, again, fewer = (
        load_calibration(make_config(path, num_samples=number), "math", tmp_path, text_signature).fingerprint
        for number in (4, 4, 3)
    )
    assert first == again != fewer
    assert len(first) == 64


def test_decoder_tokens_may_come_as_embeddings(save, make_config, tmp_path, seq2seq_signature):
    signature = replace(
        seq2seq_signature, forward_arguments=seq2seq_signature.forward_arguments | {"decoder_inputs_embeds"}
    )
    embeddings = torch.randn(5, 2, 4)
    path = save({"input_ids": TOKENS, "decoder_inputs_embeds": embeddings, "loss_mask": torch.ones(5, 2)})
    calibration = load_calibration(make_config(path), "math", tmp_path, signature)
    assert torch.equal(calibration.batches[0].inputs["decoder_inputs_embeds"], embeddings[:2])


ONES = torch.ones(5, 3, dtype=torch.long)


def loading(save, make_config, tmp_path, signature, tensors):
    """The problems that loading these tensors gives; of values an outline knows nothing."""
    with pytest.raises(CalibrationError) as caught:
        load_calibration(make_config(save(tensors), num_samples=5), "math", tmp_path, signature)
    return str(caught.value)


@pytest.mark.parametrize("number", [2, -1, 0.5])
@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask", "pixel_attention_mask"])
def test_masks_of_other_numbers_than_0_and_1(save, make_config, tmp_path, seq2seq_signature, name, number):
    more = {"pixel_attention_mask"}
    signature = replace(seq2seq_signature, forward_arguments=seq2seq_signature.forward_arguments | more)
    mask = torch.ones(5, 3, dtype=torch.float32 if number == 0.5 else torch.long)
    mask[2, 1] = number
    tensors = {"input_ids": TOKENS, "decoder_input_ids": TOKENS, name: mask}
    found = loading(save, make_config, tmp_path, signature, tensors)
    assert f"tensor {name!r} has other numbers than 0 and 1, such as {number}; expected 1 for what counts" in found


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(save, make_config, tmp_path, text_signature, dtype):
    mask = (TOKENS % 3 < 2).to(dtype)
    path = save({"input_ids": TOKENS, "attention_mask": mask})
    data = load_calibration(make_config(path), "math", tmp_path, text_signature)
    assert torch.equal(data.batches[0].inputs["attention_mask"], mask[:2])


def test_a_sample_that_is_padding_alone(save, make_config, tmp_path, text_signature):
    mask = ONES.clone()
    mask[1] = mask[3] = 0
    found = loading(save, make_config, tmp_path, text_signature, {"input_ids": TOKENS, "attention_mask": mask})
    assert "'attention_mask' is 0 everywhere in samples [1, 3], which have no token then" in found


def test_a_loss_mask_where_only_padding_counts(save, make_config, tmp_path, text_signature, seq2seq_signature):
    mask = ONES.clone()
    mask[:, 2] = 0
    tensors = {"input_ids": TOKENS, "attention_mask": mask, "loss_mask": 1 - mask}
    told = "keeps every token of every sample out (as padded or truncated); expected 1 for tokens that count"
    assert told in loading(save, make_config, tmp_path, text_signature, tensors)
    decoder = {"decoder_input_ids": TOKENS, "decoder_attention_mask": mask}
    assert told in loading(save, make_config, tmp_path, seq2seq_signature, tensors | decoder)


def test_some_samples_of_which_only_padding_counts_are_noted(save, make_config, tmp_path, text_signature):
    mask = ONES.clone()
    mask[:, 2] = 0
    loss_mask = mask.clone()
    loss_mask[3] = 1 - mask[3]
    path = save({"input_ids": TOKENS, "attention_mask": mask, "loss_mask": loss_mask})
    (note,) = load_calibration(make_config(path), "math", tmp_path, text_signature).notes
    assert f"'math': {path}: 1 of 4 samples add nothing: the loss mask keeps every token of theirs out" in note
    assert not load_calibration(make_config(path, num_samples=3), "math", tmp_path, text_signature).notes


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"input_ids": TOKENS[None].reshape(5, 1, 3)}, "'input_ids' is [5, 1, 3]; expected [samples, tokens]"),
        ({"input_ids": TOKENS, "attention_mask": ONES[:, :2]}, "'attention_mask' is [5, 2]; expected like 'input_ids'"),
        ({"input_ids": TOKENS, "attention_mask": ONES.view(5, 1, 1, 3)}, "is [5, 1, 1, 3]; expected like 'input_ids'"),
        ({"input_ids": TOKENS, "position_ids": ONES[:, 0]}, "'position_ids' is [5]; expected like 'input_ids', [5, 3]"),
        ({"input_ids": TOKENS, "position_ids": ONES.float()}, "'position_ids' has torch.float32; expected integers"),
        ({"attention_mask": ONES}, "nothing but ['attention_mask'], which belong to other tensors; expected what"),
        ({"input_ids": TOKENS, "inputs_embeds": torch.ones(5, 3, 4)}, "which stand for each other; expected one"),
        (
            {"inputs_embeds": torch.ones(5, 3, 4), "attention_mask": ONES[:, :2]},
            "expected like 'inputs_embeds', [5, 3]",
        ),
        ({"pixel_values": TOKENS}, "'pixel_values' has torch.int64; expected a floating-point dtype"),
        ({"pixel_values": torch.ones(5, 3, 0)}, "tensors with no numbers: ['pixel_values']"),
    ],
)
def test_shapes_and_dtypes_are_told_before_a_model_sees_them(complaint, text_signature, tensors, told):
    more = {"inputs_embeds", "pixel_values"}
    signature = replace(text_signature, forward_arguments=text_signature.forward_arguments | more)
    assert told in complaint(tensors, signature)


def test_choices_are_a_dimension_where_a_model_takes_them(save, make_config, tmp_path, text_signature):
    signature = replace(text_signature, token_shape=("samples", "choices", "tokens"))
    ids = torch.arange(30).view(5, 2, 3)
    path = save({"input_ids": ids, "attention_mask": torch.ones(5, 2, 3)})
    assert load_calibration(make_config(path), "math", tmp_path, signature).num_samples == 4


@pytest.mark.parametrize("number", [3, -1])
def test_positions_beyond_the_embedding(save, make_config, tmp_path, text_signature, number):
    tensors = {"input_ids": TOKENS, "position_ids": ONES * number}
    found = loading(save, make_config, tmp_path, replace(text_signature, id_limits={"position_ids": 3}), tensors)
    told = {3: "has numbers from 3 to 3; expected 0 to 2", -1: "has negative numbers (the least is -1)"}
    assert f"tensor 'position_ids' {told[number]}" in found
