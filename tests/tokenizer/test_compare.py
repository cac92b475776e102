"""Every kind of tokenizer comes along, and what the output's encodes is held against what the input's encodes."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from cases import weights_in
from tokenized import CODE, ENGLISH, train, write_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MarianConfig,
    MistralConfig,
    PreTrainedConfig,
)

import largemerge
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.side_files import TOKENIZER_FILES, find_side_files, tokenizer_names
from largemerge.checkpoint.tokenizer_check import check_tokenizer_files
from largemerge.config_file import WARNING
from largemerge.errors import LargemergeError
from largemerge.tokenizer import compare
from largemerge.tokenizer.compare import check_output_tokenizer

HALF = {"weight": 0.5}
TEXT = "the merging of models is 13 naïve additions </s>"
KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], set[str]]] = {
    "spm.model": (DebertaV2Config, {"tokenizer_class": "DebertaV2Tokenizer"}, {"spm.model"}),
    "source.spm": (MarianConfig, {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "de"},
                   {"source.spm", "target.spm", "vocab.json"}),
    "tokenizer.model": (LlamaConfig, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer.model"}),
    "vocab.json": (GPT2Config, {}, {"vocab.json", "merges.txt"}),
    "vocab.txt": (BertConfig, {}, {"vocab.txt"}),
    "tekken.json": (MistralConfig, {}, {"tekken.json"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind, with a trained tokenizer and a config, and no `tokenizer.json` anywhere."""
    root = tmp_path_factory.mktemp("tokenizers")
    (root / "corpus.txt").write_text("\n".join([*ENGLISH, *CODE] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "corpus.txt"), model_prefix=str(root / "sp"), vocab_size=80, model_type="bpe", minloglevel=3
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(root / "sp.model"))
    for name, (config, settings, files) in KINDS.items():
        folder = root / name
        folder.mkdir()
        config().save_pretrained(folder)
        if settings:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        for file in files:
            if file.endswith((".model", ".spm")):
                shutil.copy(root / "sp.model", folder / file)
    ids = {pieces.id_to_piece(number): number for number in range(80)} | {"<pad>": 80}
    (root / "source.spm" / "vocab.json").write_text(json.dumps(ids))
    bpe = train("BPE", [*ENGLISH, *CODE])
    bpe.model.save(str(root / "vocab.json"))
    train("WordPiece", ENGLISH).model.save(str(root / "vocab.txt"))
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *(root / "vocab.txt" / "vocab.txt").read_text().split("\n")]
    (root / "vocab.txt" / "vocab.txt").write_text("\n".join(words))
    ranks = [bytes([number]) for number in range(256)] + [b"th", b"the", b"ing", b"mod", b"model"]
    tekken = {
        "config": {
            "pattern": r"\w+|[^\w\s]+|\s+",
            "default_vocab_size": len(ranks) + 3,
            "default_num_special_tokens": 3,
        },
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(part).decode()} for rank, part in enumerate(ranks)],
        "special_tokens": [{"rank": rank, "token_str": token} for rank, token in enumerate(["<unk>", "<s>", "</s>"])],
    }
    (root / "tekken.json" / "tekken.json").write_text(json.dumps(tekken))
    return root


def checked(folder: Path, change: Callable[[Path], None] = lambda made: None) -> tuple[list[str], list[str]]:
    config = json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint(folder.name, folder, config, {}, {})
    side_files = find_side_files(checkpoint, folder, folder)
    return check_output_tokenizer(side_files, config, folder, trust_remote_code=False, write=change)


def test_every_file_that_a_class_of_transformers_asks_for_is_known() -> None:
    """Read from the source of all tokenizer classes: importing them takes ten seconds."""
    sources = Path(transformers.__file__).parent.rglob("*.py")
    texts = [text for source in sources if "vocab_files_names" in (text := source.read_text(encoding="utf-8")).lower()]
    tables = [table for text in texts for table in re.findall(r"VOCAB_FILES_NAMES[^=\n]*=\s*\{(.*?)\}", text, re.S)]
    names = {name for table in tables for name in re.findall(r':\s*"([^"]+)"', table)}
    assert len(names) > 20
    names |= {"tekken.json", "tiktoken.model", "tokenizer.model.v3", "qwen.tiktoken", "tokenizer.4.2.0.json"}
    unknown = [name for name in names if not any(Path(name).match(pattern) for pattern in TOKENIZER_FILES)]
    assert unknown == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_every_kind_comes_along_and_encodes_alike(folders: Path, kind: str) -> None:
    folder = folders / kind
    assert KINDS[kind][2] <= set(tokenizer_names(folder))
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    assert len(set(ids)) > 5, "a tokenizer without its vocabulary knows no word"
    assert checked(folder) == ([], [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_missing_is_found_out(folders: Path, kind: str) -> None:
    file = kind if kind != "source.spm" else "vocab.json"
    (problem,), notes = checked(folders / kind, lambda made: (made / file).unlink())
    assert problem.startswith("the output's tokenizer") and not notes


def test_another_class_is_found_out(folders: Path) -> None:
    def change(made: Path) -> None:
        (made / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')

    (problem,), _ = checked(folders / "tokenizer.model", change)
    assert "encodes" in problem or "cannot be loaded" in problem


@pytest.mark.parametrize("content", ["{}", "null", '{"model": 5}'])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    (problem,), notes = checked(tmp_path)
    assert problem.startswith(str(tmp_path / "tokenizer.json")) and "another tokenizer_source" in problem and not notes


def test_a_tokenizer_that_no_class_here_loads_is_copied_and_told(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        '{"model": {"type": "OfTheFuture", "vocab": {"a": 0}}, "added_tokens": []}'
    )
    problems, (note,) = checked(tmp_path)
    assert not problems and str(tmp_path) in note and "cannot be loaded" in note and "copied unchecked" in note
    assert note.startswith(WARNING)  # told without --quiet's leave, and refused by --strict


Change = Callable[[dict[str, Any]], object]
SPLIT = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
SPECIAL = {"SpecialToken": {"id": "[NONE]", "type_id": 0}}
FIRST, SECOND = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
TEMPLATE = {"type": "TemplateProcessing", "single": [SPECIAL, FIRST], "pair": [FIRST, SECOND], "special_tokens": {}}
BROKEN: list[tuple[str, Change, str]] = [
    ("tokenizer.json", lambda file: file["model"].update(vocab=[]), "model.vocab: expected tokens and their numbers"),
    ("tokenizer.json", lambda file: file["model"].update(vocab={}, merges=[]), "their numbers, found none"),
    ("tokenizer.json", lambda file: file["model"].update(merges=[["qq", "e"]]), "tokens of model.vocab, found 'qq'"),
    (
        "tokenizer.json",
        lambda file: file["model"].update(merges=["t h", "e qq"]),
        "merges[1]: expected tokens of model",
    ),
    ("tokenizer.json", lambda file: file["model"].update(merges=[1, 2]), "model.merges[0]: expected a pair of tokens"),
    ("tokenizer.json", lambda file: file["model"].update(merges=[["a"]]), "expected a pair of tokens, found ['a']"),
    ("tokenizer.json", lambda file: file["model"].update(dropout=5.0), "expected a number from 0 to 1, found 5.0"),
    ("tokenizer.json", lambda file: file.pop("added_tokens"), "another of its files, lacks the key 'added_tokens'"),
    ("tokenizer.json", lambda file: file["model"].update(type=5), "model.type: expected a name, found 5"),
    ("tokenizer.json", lambda file: file["model"]["vocab"].update(zzzz=5), "found 5 for '#' and 'zzzz'"),
    ("tokenizer.json", lambda file: file.update(pre_tokenizer=SPLIT), "tokenizer.json: a regular expression is wrong"),
    ("tokenizer.json", lambda file: file.update(normalizer=[1]), "normalizer: expected keys and values with a 'type'"),
    ("tokenizer.json", lambda file: file.update(normalizer={"type": 5}), "normalizer.type: expected a name, found 5"),
    ("tokenizer.json", lambda file: file.update(normalizer={}), "its part of the kind Normalizer"),
    (
        "tokenizer.json",
        lambda file: file.update(decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, 1]}),
        "decoder.decoders[1]: expected keys and values with a 'type', found 1",
    ),
    ("tokenizer.json", lambda file: file.update(decoder={"type": "Replace"}), "its part of the kind Decoder"),
    (
        "tokenizer.json",
        lambda file: file.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "aa"}),
        "tokenizer.json cannot encode a text: the library `tokenizers` panics",
    ),
    (
        "tokenizer.json",
        lambda file: file["post_processor"]["special_tokens"]["<s>"].update(ids=[9999]),
        "post_processor.special_tokens.<s>: expected a number of the vocabulary, 279 at most, found 9999",
    ),
    (
        "tokenizer.json",
        lambda file: file.update(post_processor={"type": "BertProcessing", "sep": ["a", 9999], "cls": ["a", 1]}),
        "post_processor.sep: expected a number of the vocabulary, 279 at most, found 9999",
    ),
    ("tokenizer.json", lambda file: file.update(post_processor=TEMPLATE), "panics (no entry found for key); expected"),
    (
        "tokenizer.json",
        lambda file: file.update(
            truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 9}
        ),
        "truncation.stride: expected less than max_length (2), found 9",
    ),
    ("tokenizer_config.json", lambda file: file.update(bos_token=5), "bos_token: expected a text, or a token"),
    ("tokenizer_config.json", lambda file: file.update(padding_side="middle"), "'left' or 'right', found 'middle'"),
    ("tokenizer_config.json", lambda file: file.update(extra_special_tokens=5), "expected a list of tokens, or names"),
    ("tokenizer_config.json", lambda file: file.update(tokenizer_class=5), "expected the name of a class, found 5"),
    ("tokenizer_config.json", lambda file: file.update(bos_token={"content": "<x>"}), "Special token bos_token has"),
    ("special_tokens_map.json", lambda file: file.update(eos_token=5), "eos_token: expected a text, or a token"),
]


def loaded(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


@pytest.mark.parametrize(("name", "change", "told"), BROKEN, ids=[f"{each[0]}-{each[2]}" for each in BROKEN])
def test_a_tokenizer_that_does_not_load_is_refused(tmp_path: Path, name: str, change: Change, told: str) -> None:
    write_model(tmp_path, 1, train("BPE", ENGLISH, 280))
    assert checked(tmp_path) == ([], [])
    content = loaded(tmp_path / name)
    change(content)
    (tmp_path / name).write_text(json.dumps(content))
    (problem,), notes = checked(tmp_path)
    assert told in problem and str(tmp_path) in problem and name.split("_")[0] in problem and not notes
    assert problem.endswith("; mend it, or choose another tokenizer_source")


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, 1, train("BPE", ENGLISH, 280))
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x01")
        (problem,), _ = checked(tmp_path)
        assert f"{tmp_path / name} is not UTF-8 text: byte 0 is 0xff; mend it" in problem
        (tmp_path / name).unlink()


BAD = "{% for"
TEMPLATES: list[tuple[str, Any, str]] = [
    ("chat_template.jinja", BAD, ""),
    ("chat_template.jinja", "{% generation %}{{ 1 }}", ""),
    ("additional_chat_templates/tools.jinja", BAD, ""),
    ("chat_template.json", {"chat_template": BAD}, "chat_template: "),
    ("tokenizer_config.json", {"chat_template": BAD}, "chat_template: "),
    ("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": BAD}]}, "chat_template.rag: "),
]


@pytest.mark.parametrize(("name", "content", "key"), TEMPLATES)
def test_a_chat_template_that_is_none_is_refused(tmp_path: Path, name: str, content: Any, key: str) -> None:
    write_model(tmp_path, 1, train("BPE", ENGLISH, 280))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(loaded(tmp_path / name) | content)
    (tmp_path / name).write_text(text)
    (problem,), notes = checked(tmp_path)
    assert problem.startswith(f"{tmp_path / name}: {key}not a Jinja template: line 1: ") and not notes
    assert problem.endswith("; mend it, or set another chat_template")
    good = "{% generation %}{% for m in messages %}{% break %}{% endfor %}{% endgeneration %}"
    (tmp_path / name).write_text(text.replace(BAD, good).replace("{% generation %}{{ 1 }}", good))
    assert checked(tmp_path) == ([], [])


def test_a_template_of_one_s_own_takes_a_broken_one_s_place(tmp_path: Path) -> None:
    for seed in range(2):
        write_model(tmp_path / f"m{seed}", seed, train("BPE", ENGLISH, 280))
        (tmp_path / f"m{seed}" / "chat_template.jinja").write_text(BAD)
    models = [{"model": str(tmp_path / f"m{seed}"), "parameters": HALF} for seed in range(2)]
    config = {"merge_method": "linear", "models": models}
    (problem,) = largemerge.plan(config).problems
    assert str(tmp_path / "m0" / "chat_template.jinja") in problem
    (tmp_path / "m0" / "chat_template.jinja").write_text(f"{BAD}\n")  # whose end is left out
    (problem,) = largemerge.plan({**config, "chat_template": "auto"}).problems
    assert str(tmp_path / "m0" / "chat_template.jinja") in problem
    (problem,) = largemerge.plan({**config, "tokenizer_source": "union"}).problems
    assert "chat_template.jinja: not a Jinja template" in problem
    assert largemerge.plan({**config, "chat_template": "chatml"}).problems == []


@pytest.mark.parametrize("union", [False, True])
def test_dropout_is_no_difference(tmp_path: Path, union: bool) -> None:
    for seed, texts in ((0, ENGLISH), (1, CODE)):
        write_model(tmp_path / f"m{seed}", seed, train("BPE", texts, 300), num_rows=400)
        document = loaded(tmp_path / f"m{seed}" / "tokenizer.json")
        document["model"]["dropout"] = 0.5
        (tmp_path / f"m{seed}" / "tokenizer.json").write_text(json.dumps(document))
    if not union:
        assert checked(tmp_path / "m0") == ([], [])
        return
    models = [{"model": str(tmp_path / f"m{seed}"), "parameters": HALF} for seed in range(2)]
    config = {"merge_method": "linear", "models": models, "tokenizer_source": "union"}
    largemerge.merge(config, tmp_path / "out", quiet=True)
    assert loaded(tmp_path / "out" / "tokenizer.json")["model"]["dropout"] == 0.5


def test_a_tokenizer_that_samples_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one of SentencePiece with sampling: two texts in a row are encoded in two ways."""
    write_model(tmp_path, 1, train("BPE", ENGLISH, 280))
    counter = itertools.count()
    monkeypatch.setattr(compare, "_encoder", lambda tokenizer: lambda text: [next(counter)])
    problems, (note,) = checked(tmp_path)
    assert problems == [] and "by chance" in note and str(tmp_path) in note


UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown part": ({"tokenizer.json": {"normalizer": {"type": "New"}}}, "does not know the normalizer 'New'"),
    "an unknown part in a sequence": (
        {"tokenizer.json": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "New"}]}}},
        "the normalizer 'New' (normalizer.normalizers[1])",
    ),
    "an unknown decoder": ({"tokenizer.json": {"decoder": {"type": "New"}}}, "does not know the decoder 'New'"),
    "an unknown class": (
        {"tokenizer.json": None, "vocab.txt": "a", "tokenizer_config.json": {"tokenizer_class": "NewTokenizer"}},
        "does not have the class NewTokenizer",
    ),
    "an unknown model": (
        {"tokenizer.json": None, "vocab.txt": "a", "tokenizer_config.json": None, "config.json": {"model_type": "new"}},
        "does not know the model_type 'new'",
    ),
    "a package": (
        {"tokenizer.json": None, "tokenizer.model": "IQ== 0\nIg== 1\n", "tokenizer_config.json": None},
        "it needs tiktoken, which is not installed",
    ),
    "code": (
        {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tok.New", None]}, "tokenizer_class": "New"}},
        "trust_remote_code: true",
    ),
    "tekken": (
        {"tokenizer.json": None, "tokenizer_config.json": None, "tekken.json": {"a": 1}},
        "lacks the key 'config'",
    ),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_only_what_lacks_a_reader_here_is_copied_unchecked(tmp_path: Path, what: str) -> None:
    write_model(tmp_path, 1, train("BPE", ENGLISH, 280))
    files, told = UNREADABLE[what]
    if what == "a package" and importlib.util.find_spec("tiktoken"):
        pytest.skip("tiktoken is installed")
    if what == "code":
        (tmp_path / "tok.py").write_text("New = None\n")
        (tmp_path / "tokenizer.json").unlink()
    for name, content in files.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            text = content if isinstance(content, str) else json.dumps(loaded(tmp_path / name) | content)
            (tmp_path / name).write_text(text)
    problems, (note,) = checked(tmp_path)
    assert problems == [] and note.startswith(WARNING) and told in note and "copied unchecked" in note


@pytest.mark.parametrize("content", ["\x00garbage", "\ngarbage", ""])
def test_a_sentencepiece_model_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    """Transformers asks for tiktoken then, which would not help."""
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text(content)
    (problem,), notes = checked(tmp_path)
    assert "expected a vocabulary" in problem and "found none in tokenizer.model; mend it" in problem and not notes


@pytest.mark.parametrize(("name", "config"), [("vocab.txt", BertConfig), ("vocab.json", GPT2Config)])
def test_an_empty_vocabulary_is_refused(tmp_path: Path, name: str, config: type[PreTrainedConfig]) -> None:
    config().save_pretrained(tmp_path)
    (tmp_path / "merges.txt").touch()
    (tmp_path / name).write_text("{}" if name.endswith("json") else "")
    (problem,), _ = checked(tmp_path)
    assert str(tmp_path / name) in problem and "found none" in problem


def test_added_tokens_that_repeat_the_vocabulary_are_right(tmp_path: Path) -> None:
    write_model(tmp_path, 1, train("BPE", ENGLISH, 280), ["<new>"])
    document = loaded(tmp_path / "tokenizer.json")
    assert {entry["content"] for entry in document["added_tokens"]} & set(document["model"]["vocab"])
    document["model"]["vocab"]["<new>"] = next(
        entry["id"] for entry in document["added_tokens"] if entry["content"] == "<new>"
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert checked(tmp_path) == ([], [])


def test_a_vocabulary_for_each_language_is_one(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"eng": {"a": 0, "b": 1}, "deu": {"a": 0, "ö": 1}}')
    check_tokenizer_files(tmp_path)
    (tmp_path / "vocab.json").write_text('{"eng": {"a": 0, "b": "x"}}')
    with pytest.raises(LargemergeError, match=r"vocab.json: eng.'b': expected a whole number, found 'x'"):
        check_tokenizer_files(tmp_path)


def test_a_folder_without_a_tokenizer_needs_none(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    assert checked(tmp_path) == ([], [])


@pytest.fixture(scope="module")
def encoders(folders: Path) -> Path:
    """Two DeBERTas with `spm.model` alone."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = DebertaV2Config(vocab_size=84, max_position_embeddings=32, pad_token_id=0, **sizes)
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = folders / f"deberta{seed}"
        DebertaV2ForSequenceClassification(config).save_pretrained(folder)
        for name in ("spm.model", "tokenizer_config.json"):
            shutil.copy(folders / "spm.model" / name, folder / name)
    (folders / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ENGLISH))
    return folders


@pytest.mark.parametrize("method", ["linear", "regmean"])
def test_deberta_encodes_after_the_merge_as_before(encoders: Path, tmp_path: Path, method: str) -> None:
    more = {"parameters": HALF} if method == "linear" else {"calibration": {"data": str(encoders / "data.jsonl")}}
    models = [{"model": str(encoders / f"deberta{seed}"), **more} for seed in (1, 2)]
    largemerge.merge({"merge_method": method, "models": models}, tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "spm.model").read_bytes() == (encoders / "sp.model").read_bytes()
    before, after = (AutoTokenizer.from_pretrained(each) for each in (encoders / "deberta1", tmp_path / "out"))
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert after.tokenize("models") == before.tokenize("models") != [before.unk_token]


def test_a_link_that_leads_out_is_not_followed_and_stops_the_merge(encoders: Path, tmp_path: Path) -> None:
    """A link in a folder of strangers may lead to a secret, which the output would make public."""
    shutil.copytree(encoders / "deberta1", tmp_path / "linked")
    (tmp_path / "linked" / "spm.model").unlink()
    (tmp_path / "linked" / "spm.model").symlink_to(encoders / "sp.model")
    models = [{"model": str(folder), "parameters": HALF} for folder in (tmp_path / "linked", encoders / "deberta2")]
    plan = largemerge.plan({"merge_method": "linear", "models": models})
    assert any("spm.model is a link that leads out" in note for note in plan.notes)
    with pytest.raises(LargemergeError, match="the output's tokenizer"):
        largemerge.merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_union_is_compared_with_its_own_vocabulary(tmp_path: Path) -> None:
    write_model(tmp_path / "a", 1, train("BPE", ENGLISH, 280), ["<|im_start|>"])
    write_model(tmp_path / "b", 2, train("BPE", CODE, 290), ["<|tool|>"])
    (tmp_path / "a" / "tekken.json").write_text("{}")  # vocabulary of old: the union replaces it
    models = [{"model": str(tmp_path / name), "parameters": HALF} for name in "ab"]
    config = {"merge_method": "linear", "models": models, "tokenizer_source": "union"}
    assert largemerge.plan(config).problems == []
    largemerge.merge(config, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "tekken.json").exists()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("def <|tool|> the <|im_start|>")["input_ids"]
    assert max(ids) < len(weights_in(tmp_path / "out")["lm_head.weight"])
