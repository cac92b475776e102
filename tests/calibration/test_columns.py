"""Columns and rows that become samples, and what is said of wrong ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from largemerge.calibration import columns
from largemerge.calibration.columns import Fields, choose_fields
from largemerge.errors import CalibrationError

NOTHING = Fields(None, None, None, None, None, None)


@pytest.fixture
def choose(make_config):
    def run(columns, signature, **settings):
        return choose_fields(make_config("data.jsonl", **settings), columns, signature, "candidate 'math': data.jsonl")

    return run


@pytest.fixture
def complaint(choose):
    def find(columns, signature, **settings):
        with pytest.raises(CalibrationError) as caught:
            choose(columns, signature, **settings)
        assert all(problem.startswith("candidate 'math': data.jsonl: ") for problem in caught.value.problems)
        return "\n".join(caught.value.problems)

    return find


def test_defaults_are_what_the_model_takes(choose, text_signature, vision_signature, clip_signature):
    both = ("image", "text", "label")
    assert choose(both, text_signature) == replace(NOTHING, text="text")
    assert choose(both, vision_signature) == replace(NOTHING, image="image")
    assert choose(both, clip_signature) == replace(NOTHING, text="text", image="image")
    assert choose(("text",), clip_signature) == replace(NOTHING, text="text")


def test_what_is_named_counts_alone(choose, clip_signature):
    columns = ("image", "text", "caption")
    assert choose(columns, clip_signature, image_field="image") == replace(NOTHING, image="image")
    assert choose(columns, clip_signature, text_field="caption") == replace(NOTHING, text="caption")
    fields = choose(columns, clip_signature, image_field="image", text_field="caption")
    assert fields == replace(NOTHING, image="image", text="caption")
    assert fields.columns == ["caption", "image"] and fields.has_text


def test_unknown_columns_are_taken_to_be_there(choose, text_signature, clip_signature):
    assert choose(None, text_signature) == replace(NOTHING, text="text")
    assert choose(None, clip_signature) == replace(NOTHING, text="text", image="image")
    assert choose(None, text_signature, messages_field="chat") == replace(NOTHING, messages="chat")


def test_no_default_column(complaint, text_signature, vision_signature, clip_signature):
    problem = complaint(("texts", "id"), text_signature)
    assert "no column 'text'; the columns are ['texts', 'id']; did you mean 'texts'?" in problem
    assert "set 'text_field' or 'messages_field'" in problem
    assert "no column 'image'; the columns are ['text']; set 'image_field'" in complaint(("text",), vision_signature)
    assert "set 'text_field' or 'messages_field' or 'image_field'" in complaint(("id",), clip_signature)


def test_columns_that_are_not_there(complaint, text_signature):
    problem = complaint(("content", "mask"), text_signature, text_field="contents", loss_mask_field="masks")
    assert "text_field: no column 'contents'; the columns are ['content', 'mask']; did you mean 'content'?" in problem
    assert "loss_mask_field: no column 'masks'" in problem and "did you mean 'mask'?" in problem


def test_model_that_takes_something_else(complaint, text_signature, vision_signature):
    problem = complaint(("text",), vision_signature, text_field="text")
    assert "text_field: the model takes no input_ids but ['pixel_values']; remove it" in problem
    problem = complaint(("chat",), vision_signature, messages_field="chat")
    assert "messages_field: the model takes no input_ids" in problem
    problem = complaint(("text", "image"), text_signature, text_field="text", image_field="image")
    assert "image_field: the model takes no pixel_values" in problem
    audio = replace(text_signature, forward_arguments=frozenset({"input_features"}))
    problem = complaint(("audio",), audio)
    assert "takes neither input_ids nor pixel_values but ['input_features']" in problem


def test_an_empty_name_is_a_name(complaint, choose, text_signature):
    assert "text_field: no column ''; the columns are ['text']" in complaint(("text",), text_signature, text_field="")
    assert choose(("", "text"), text_signature, text_field="").text == ""


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{"role": "user"}], "message 0 (user) has no 'content'"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "message 1 (assistant) has no"),
        ([{"role": "user", "content": 5}], "the 'content' of message 0 is 5 (int), expected a text or a list of parts"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], None),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], None),
        ([{"role": "user", "content": ""}], None),
    ],
)
def test_contents_of_messages(messages, told):
    found = columns.message_problem(messages)
    assert (found is None) if told is None else (told in found)


def test_encoder_decoder(choose, complaint, text_signature, seq2seq_signature):
    columns = ("text", "summary")
    assert choose(columns, seq2seq_signature, target_field="summary") == replace(NOTHING, text="text", target="summary")
    problem = complaint(columns, seq2seq_signature)
    assert "needs the decoder's text too: add 'target_field'" in problem
    assert "(the columns are ['text', 'summary'])" in problem
    assert "add 'target_field'" in complaint(None, seq2seq_signature)
    assert "target_field: the model is no encoder-decoder" in complaint(columns, text_signature, target_field="summary")
    no_start = replace(seq2seq_signature, decoder_start_token_id=None)
    assert "no decoder_start_token_id" in complaint(columns, no_start, target_field="summary")


def test_settings_that_do_not_go_together(
    complaint, text_signature, seq2seq_signature, clip_signature, vision_signature
):
    columns = ("text", "chat", "image", "target", "mask")
    problem = complaint(columns, text_signature, text_field="text", messages_field="chat")
    assert "'text_field' and 'messages_field' exclude each other" in problem
    assert "assistant_only: needs 'messages_field'" in complaint(columns, text_signature, assistant_only=True)
    problem = complaint(columns, seq2seq_signature, messages_field="chat", target_field="target", assistant_only=True)
    assert "assistant_only: marks tokens of the encoder" in problem
    assert "pack: texts that have an image each cannot be joined" in complaint(columns, clip_signature, pack=True)
    problem = complaint(columns, seq2seq_signature, target_field="target", pack=True)
    assert "pack: texts that have a target each cannot be joined" in problem
    problem = complaint(columns, vision_signature, loss_mask_field="mask")
    assert "loss_mask_field: there is one number per token of a text, but no text" in problem


def test_a_template_names_its_columns(choose, complaint, text_signature, vision_signature):
    fields = choose(("query", "response", "text"), text_signature, text_template="Q: {query}\nA: {response}")
    assert fields == replace(NOTHING, template="Q: {query}\nA: {response}")
    assert fields.columns == ["query", "response"] and fields.has_text
    problem = complaint(("question", "response"), text_signature, text_template="{questions} {response}")
    assert "text_template: no column 'questions'" in problem and "did you mean 'question'?" in problem
    assert "text_template: the model takes no input_ids" in complaint(("a",), vision_signature, text_template="{a}")
