"""A candidate's tokenizer: which one it gets; conversations by its chat template, and which tokens count."""

from __future__ import annotations

import pytest

from largemerge.calibration import load_calibration
from largemerge.calibration.columns import choose_fields
from largemerge.calibration.tokenizer import open_text_reader, shared_tokenizers
from largemerge.errors import CalibrationError

GENERATION_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant> "
    "{% generation %}{{ message['content'] }} </s>{% endgeneration %} "
    "{% else %}<user> {{ message['content'] }} </s> {% endif %}{% endfor %}"
)
# What comes before depends on what comes after, as where earlier reasoning is dropped.
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> "
    "{% if loop.last %}{{ message['content'] }} {% else %}on {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_candidates_with_the_same_files_share_a_tokenizer(
    make_config, write_jsonl, text_signature, tmp_path, save_tokenizer
):
    config = make_config(write_jsonl([{"text": "the cat"}]))
    folders = [save_tokenizer(tmp_path / name) for name in ("one", "two")]
    folders.append(save_tokenizer(tmp_path / "other", model_max_length=2))

    def reader(folder):
        fields = choose_fields(config, ("text",), text_signature, "here")
        return open_text_reader(folder, config, fields, text_signature, "here", trust_remote_code=False)

    with shared_tokenizers():
        one, two, other = (reader(folder) for folder in folders)
    assert one.tokenizer is two.tokenizer
    assert other.tokenizer is not one.tokenizer
    assert (one.max_length, other.max_length) == (config.max_length, 2)
    assert reader(folders[0]).tokenizer is not one.tokenizer  # it is not kept


# Conversations


def turns(*contents):
    roles = ("user", "assistant") * len(contents)
    return {"chat": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


@pytest.fixture
def load(make_config, checkpoint, text_signature):
    def run(data, signature=text_signature, folder=checkpoint, **settings):
        return load_calibration(make_config(data, messages_field="chat", **settings), "chatty", folder, signature)

    return run


@pytest.fixture
def complaint(load):
    def find(data, *arguments, **settings):
        with pytest.raises(CalibrationError) as caught:
            load(data, *arguments, **settings)
        return "\n".join(caught.value.problems)

    return find


def test_messages_go_through_the_chat_template(load, write_jsonl, ids):
    path = write_jsonl([turns("how are you", "fine thanks"), turns("hello"), {"chat": []}])

    batch = load(path).batches[0]

    long = ids("<s> <user> how are you </s> <assistant> fine thanks </s>")
    assert batch.inputs["input_ids"].tolist() == [long, ids("<s> <user> hello </s>") + [3] * 6]
    assert batch.loss_mask is None


def test_special_tokens_are_not_added_twice(load, write_jsonl, ids, tmp_path, save_tokenizer):
    folder = save_tokenizer(tmp_path / "framed", frame="<s> $A </s>", chat_template=GENERATION_TEMPLATE)
    batch = load(write_jsonl([turns("hello")]), folder=folder).batches[0]
    assert batch.inputs["input_ids"].tolist() == [ids("<user> hello </s>")]


def test_assistant_only_by_generation_marks(load, write_jsonl, ids, tmp_path, save_tokenizer):
    folder = save_tokenizer(tmp_path / "marked", chat_template=GENERATION_TEMPLATE)
    path = write_jsonl([turns("hello", "fine thanks", "how", "the cat")])

    batch = load(path, folder=folder, assistant_only=True).batches[0]

    expected = ids("<user> hello </s> <assistant> fine thanks </s> <user> how </s> <assistant> the cat </s>")
    assert batch.inputs["input_ids"].tolist() == [expected]
    assert batch.loss_mask is not None
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]]


def test_assistant_only_by_prefixes(load, write_jsonl, ids):
    path = write_jsonl([turns("hello", "fine thanks", "how", "the cat")])

    batch = load(path, assistant_only=True).batches[0]

    expected = ids("<s> <user> hello </s> <assistant> fine thanks </s> <user> how </s> <assistant> the cat </s>")
    assert batch.inputs["input_ids"].tolist() == [expected]
    assert batch.loss_mask is not None
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]]


@pytest.fixture
def byte_level_checkpoint(tmp_path):
    """Saves a byte-level BPE tokenizer, as most chat models have, with this template."""

    def save(name, template):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(["the cat sat on a mat", "user assistant system"] * 5, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_both_ways_to_the_mask_agree(load, write_jsonl, byte_level_checkpoint):
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    plain = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    path = write_jsonl([turns("wie schön: the cat?", "a mat\n\nété 日本", "and on?", " sat"), turns("hé", "the mat")])
    by_marks, by_prefixes = (
        load(path, folder=byte_level_checkpoint(name, template), assistant_only=True, max_length=200)
        for name, template in (("marked", marked), ("plain", plain))
    )
    mask = by_marks.batches[0].loss_mask
    assert mask is not None and 0 < mask.sum() < mask.numel()
    assert by_marks.fingerprint == by_prefixes.fingerprint


def test_marks_with_a_tokenizer_that_cannot_find_characters(load, write_jsonl, tmp_path):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "bytes")
    mask = load(write_jsonl([turns("hi", "yes")]), folder=tmp_path / "bytes", assistant_only=True).batches[0].loss_mask
    assert mask is not None and mask.int().tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1]]  # u : h i a : y e s


def test_mask_is_truncated_and_padded_with_the_tokens(load, write_jsonl):
    path = write_jsonl([turns("hello", "fine thanks"), turns("how")])
    batch = load(path, assistant_only=True, max_length=6).batches[0]
    assert batch.inputs["input_ids"].shape == (2, 6)
    assert batch.loss_mask is not None
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]


def test_assistant_only_when_packed(load, write_jsonl):
    path = write_jsonl([turns("hello", "fine"), turns("hello", "fine")])
    batch = load(path, assistant_only=True, pack=True, max_length=14).batches[0]
    assert batch.loss_mask is not None
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 0, 0, 1, 1] * 2]


def test_own_mask_and_assistant_only_both_count(load, write_jsonl):
    path = write_jsonl([{**turns("hello", "fine"), "mask": [1, 1, 1, 1, 1, 1, 0]}])
    mask = load(path, assistant_only=True, loss_mask_field="mask").batches[0].loss_mask
    assert mask is not None and mask.int().tolist() == [[0, 0, 0, 0, 0, 1, 0]]


def test_keys_that_other_rows_have_do_not_reach_the_template(load, write_jsonl, ids, tmp_path, save_tokenizer):
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ 'hello' if 'name' in m }} {% endfor %}"
    folder = save_tokenizer(tmp_path / "nosy", chat_template=template)
    path = write_jsonl([{"chat": [{"role": "user", "content": "cat", "name": "a"}]}, turns("mat")])
    batch = load(path, folder=folder).batches[0]
    assert batch.inputs["input_ids"].tolist() == [ids("<user> cat hello"), [*ids("<user> mat"), 3]]


def test_no_chat_template(complaint, write_jsonl, tmp_path, save_tokenizer):
    folder = save_tokenizer(tmp_path / "plain")
    problem = complaint(write_jsonl([turns("hello")]), folder=folder)
    assert f"messages_field: the tokenizer in {folder} has no chat template" in problem
    assert "candidate 'chatty'" in problem


def test_template_that_forgets(complaint, write_jsonl, tmp_path, save_tokenizer):
    folder = save_tokenizer(tmp_path / "forgetful", chat_template=FORGETFUL_TEMPLATE)
    problem = complaint(write_jsonl([turns("hello", "fine", "how", "fine")]), folder=folder, assistant_only=True)
    assert "row 0: assistant_only: the chat template writes the conversation up to message 1 otherwise" in problem
    assert "(token 1 of 3 differs)" in problem
    assert "use a chat template with {% generation %}, or 'loss_mask_field'" in problem


def test_conversation_that_begins_with_the_assistant(complaint, write_jsonl):
    path = write_jsonl([{"chat": [{"role": "assistant", "content": "hello"}]}])
    assert "row 0: assistant_only: the conversation begins with the assistant" in complaint(path, assistant_only=True)


def test_generation_marks_that_find_no_token(complaint, write_jsonl, tmp_path, save_tokenizer):
    # This tokenizer drops spaces, and nothing else is marked.
    marked = "{% generation %}{{ message['content'] }} </s>{% endgeneration %}"
    assert marked in GENERATION_TEMPLATE
    spaces = "{% generation %} {% endgeneration %}{{ message['content'] }} </s>"
    folder = save_tokenizer(tmp_path / "spaced", chat_template=GENERATION_TEMPLATE.replace(marked, spaces))
    problem = complaint(write_jsonl([turns("hello", "fine")]), folder=folder, assistant_only=True)
    assert "marks the assistant's text by {% generation %}, yet no token" in problem


def test_template_that_rejects(complaint, write_jsonl, tmp_path, save_tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    folder = save_tokenizer(tmp_path / "strict", chat_template=template)
    problem = complaint(write_jsonl([turns("hello")]), folder=folder)
    assert "row 0: the chat template rejects the conversation (TemplateError: roles must alternate)" in problem
    assert "row 0" in complaint(write_jsonl([turns("hello")]), folder=folder, pack=True)


def test_rows_that_are_no_conversations(complaint, write_jsonl):
    path = write_jsonl([{"chat": "hello"}, {"chat": [{"from": "human", "value": "hi"}]}, {"chat": ["hi"]}])
    problem = complaint(path)
    assert "row 0: 'chat': expected a list of {'role': ..., 'content': ...}, found 'hello' (str)" in problem
    assert "row 1: 'chat': expected a list of {'role': ..., 'content': ...}; message 0 has no 'role'" in problem
    assert "'from', 'value'" in problem
    assert "row 2: 'chat'" in problem and "found 'hi' (str) as message 0" in problem


def test_nothing_but_empty_conversations(complaint, write_jsonl):
    assert "all texts are empty" in complaint(write_jsonl([{"chat": []}]))
