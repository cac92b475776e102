"""What a checkpoint folder holds, from headers alone; and folders that hold none, or a broken one."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from largemerge import CheckpointError
from largemerge.checkpoint.index import Checkpoint, natural_key, open_checkpoint
from largemerge.checkpoint.locate import _IGNORED, _PATTERNS, locate_checkpoint
from largemerge.checkpoint.side_files import find_side_files
from largemerge.checkpoint.tensor_files import open_tensor_file
from largemerge.checkpoint.tensor_info import SAFETENSORS_DTYPES

CONFIG = b'{"model_type": "llama"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config, and no weights yet."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 4}')
    return tmp_path


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, "maths")


def problems_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        opened(folder)
    return caught.value.problems


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# What is right


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_every_dtype_is_described_as_the_safetensors_library_does(folder: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 5).to(dtype),
        "cube": torch.ones(2, 1, 3).to(dtype),
    }
    save_file(tensors, folder / "model.safetensors")
    infos = open_tensor_file(folder / "model.safetensors").tensors()
    raw = (folder / "model.safetensors").read_bytes()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(infos) == set(file.keys())
        for name, info in infos.items():
            expected = file.get_tensor(name)
            assert (info.name, info.shape, info.dtype) == (name, tuple(expected.shape), expected.dtype)
            assert info.num_bytes == expected.nbytes
            assert info.offset is not None
            stored = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert raw[info.offset : info.offset + info.num_bytes] == stored
    assert sum(info.num_bytes for info in infos.values()) == sum(tensor.nbytes for tensor in tensors.values())


def test_metadata_is_no_tensor(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt", "note": "x"})
    assert list(opened(folder).tensors) == ["a"]


def test_tensors_come_in_natural_order(folder: Path) -> None:
    names = ["layers.10.w", "layers.2.w", "norm.weight", "layers.2.b", "embed.weight", "layers.1.w"]
    save_file({name: torch.ones(1) for name in names}, folder / "model.safetensors")
    assert list(opened(folder).tensors) == [
        "embed.weight",
        "layers.1.w",
        "layers.2.b",
        "layers.2.w",
        "layers.10.w",
        "norm.weight",
    ]
    assert natural_key("h.2.attn") < natural_key("h.10.attn")


def test_a_sharded_checkpoint_of_transformers(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    checkpoint = opened(tmp_path)
    files = {info.file.name for info in checkpoint.tensors.values()}
    assert len(files) > 2
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert set(checkpoint.fingerprint) == {"config.json", *files}
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]


def test_a_single_file_comes_before_a_stale_index_as_in_transformers(folder: Path) -> None:
    """Saving a model anew as one file leaves the index of the shards behind."""
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    write_index(folder, {"a": "model-00001-of-00002.safetensors"})
    assert opened(folder).tensors["a"].file == folder / "model.safetensors"


def test_safetensors_come_before_pickles(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    torch.save({"b": torch.ones(2)}, folder / "pytorch_model.bin")
    assert list(opened(folder).tensors) == ["a"]


def test_tensors_that_the_index_does_not_name_are_left_out(folder: Path) -> None:
    save_file({"a": torch.ones(2), "stale": torch.ones(2)}, folder / "part.safetensors")
    write_index(folder, {"a": "part.safetensors"})
    assert list(opened(folder).tensors) == ["a"]


def test_fingerprints_change_with_the_file(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    before = opened(folder).fingerprint
    assert opened(folder).fingerprint == before
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    touched = opened(folder).fingerprint
    save_file({"b": torch.zeros(2)}, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    renamed = opened(folder).fingerprint
    assert before["model.safetensors"] != touched["model.safetensors"] != renamed["model.safetensors"]
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert opened(folder).fingerprint["config.json"] != before["config.json"]


# Broken weights


def test_a_file_cut_short_anywhere_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({"a": torch.ones(64), "b": torch.ones(3, 5)}, path)
    whole = path.read_bytes()
    for length in [0, 3, 8, 20, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        (problem,) = problems_of(folder)
        assert "maths" in problem or str(path) in problem
        assert "cut short" in problem


@pytest.mark.parametrize(
    ("header", "mentions"),
    [
        (b"\x80\x04 garbage \xff\xff", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"[1, 2]", "expected an object"),
        ({"a": entry(offsets=(0, 9999))}, "a: bytes 0..9999"),
        ({"a": entry(offsets=(-8, 0))}, "a: broken header entry: data_offsets is [-8, 0]"),
        ({"a": entry(offsets=(8, 0))}, "a: bytes 8..0"),
        ({"a": entry(shape=(3,))}, "a: bytes 0..8 do not hold F32 [3]"),
        ({"a": entry(shape=(-1, -2))}, "a: broken header entry"),
        ({"a": entry(shape="2")}, "a: broken header entry"),
        ({"a": entry(shape=None)}, "a: broken header entry"),
        ({"a": entry(shape=(2.5,))}, "a: broken header entry"),
        ({"a": entry(offsets=("0", "8"))}, "a: broken header entry"),
        ({"a": entry(offsets=(0, None))}, "a: broken header entry"),
        ({"a": entry(offsets=(0, 4, 8))}, "a: broken header entry"),
        ({"a": entry(offsets=7)}, "a: broken header entry"),
        ({"a": entry(dtype="F3")}, "a: dtype 'F3' is not supported"),
        ({"a": entry(dtype="C64")}, "a: dtype 'C64' is not supported"),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "a: broken header entry: lacks dtype"),
        ({"a": []}, "a: broken header entry"),
        ({"a": None}, "a: broken header entry"),
    ],
)
def test_broken_headers_are_refused_naming_file_and_tensor(folder: Path, header: Any, mentions: str) -> None:
    write_raw(folder / "model.safetensors", header, bytes(8))
    (problem,) = problems_of(folder)
    assert str(folder / "model.safetensors") in problem and mentions in problem


def test_a_header_length_of_nonsense_reads_nothing(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + bytes(100))
    (problem,) = problems_of(folder)
    assert str(folder / "model.safetensors") in problem and str(2**63) in problem


def test_a_large_file_pointer_is_no_safetensors_file(folder: Path) -> None:
    """What a clone without Git LFS leaves in the place of weights."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4400000\n"
    (folder / "model.safetensors").write_text(pointer)
    (problem,) = problems_of(folder)
    assert "not a safetensors file" in problem and "fetch it again" in problem


def test_every_broken_shard_is_named(folder: Path) -> None:
    for name in ("one", "two", "three"):
        save_file({name: torch.ones(100)}, folder / f"{name}.safetensors")
    for name in ("one", "three"):
        path = folder / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
    write_index(folder, {name: f"{name}.safetensors" for name in ("one", "two", "three")})
    problems = problems_of(folder)
    assert len(problems) == 2
    assert "one.safetensors" in problems[0] and "three.safetensors" in problems[1]


# Broken indexes


def test_every_missing_shard_is_named(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "there.safetensors")
    write_index(folder, {"a": "there.safetensors", "b": "gone.safetensors", "c": "lost.safetensors"})
    problems = problems_of(folder)
    assert len(problems) == 2
    assert "gone.safetensors" in problems[0] and "lost.safetensors" in problems[1]
    assert all("missing" in problem for problem in problems)


def test_tensors_missing_from_their_shard_are_named(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "part.safetensors")
    write_index(folder, {name: "part.safetensors" for name in ("a", "b", "c", "d", "e", "f")})
    (problem,) = problems_of(folder)
    assert "part.safetensors holds b, c, d and 2 more, but it does not" in problem


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "/etc/outside.safetensors", "sub/part.safetensors", "..", ".", "", 7, None]
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, target: Any) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path / "outside.safetensors", folder / "sub" / "part.safetensors"):
        save_file({"a": torch.ones(2)}, path)
    write_index(folder, {"a": target})
    (problem,) = problems_of(folder)
    assert f"maps 'a' to {target!r}; expected a plain file name" in problem


@pytest.mark.parametrize("weight_map", [None, [], {}, "a"])
def test_an_index_without_a_weight_map(folder: Path, weight_map: Any) -> None:
    write_index(folder, weight_map)
    (problem,) = problems_of(folder)
    assert "model.safetensors.index.json has no 'weight_map'" in problem


def test_an_index_that_is_no_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    (problem,) = problems_of(folder)
    assert problem.startswith("maths: ") and "not readable JSON" in problem


# Folders that are no checkpoints


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "weights.pt").touch()
    (problem,) = problems_of(folder)
    assert "no weights" in problem and "model.safetensors" in problem and "pytorch_model.bin" in problem
    assert "weights.pt" in problem


def test_no_config(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (problem,) = problems_of(tmp_path)
    assert problem == f"maths: {tmp_path / 'config.json'} does not exist; expected a checkpoint folder."


def test_an_adapter_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    (problem,) = problems_of(tmp_path)
    assert "LoRA" in problem and "model+adapter" in problem


def test_an_adapter_beside_a_config_is_told_too(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (problem,) = problems_of(folder)
    assert "LoRA" in problem and "model+adapter" in problem


@pytest.mark.parametrize(
    ("content", "mentions"),
    [(b"{", "not readable JSON"), (b"", "not readable JSON"), (b"\xff\xfe", "not UTF-8"), (b"[]", "a list")],
)
def test_a_broken_config(folder: Path, content: bytes, mentions: str) -> None:
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_bytes(content)
    (problem,) = problems_of(folder)
    assert problem.startswith(f"maths: {folder / 'config.json'}") and mentions in problem


# Pickles


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_described_without_their_data(folder: Path, zipped: bool) -> None:
    tensors = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.arange(4), "c": torch.ones(3, 2).T}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = opened(folder).tensors
    assert {name: (info.shape, info.dtype) for name, info in found.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


def test_sharded_pickles(folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, folder / "one.bin")
    torch.save({"b": torch.ones(3)}, folder / "two.bin")
    write_index(folder, {"a": "one.bin", "b": "two.bin"}, "pytorch_model.bin.index.json")
    assert {name: info.file.name for name, info in opened(folder).tensors.items()} == {"a": "one.bin", "b": "two.bin"}


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.trace), "w")


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (torch.save, "holds an object, io.open, which cannot be loaded without running code of the file's"),
        (lambda value, path: path.write_bytes(pickle.dumps(value)), "is pickled by protocol 4, expected 2"),
    ],
)
def test_a_malicious_pickle_is_refused_and_not_run(folder: Path, write: Callable[..., Any], told: str) -> None:
    write({"a": torch.ones(2), "b": Malicious(folder / "trace")}, folder / "pytorch_model.bin")
    (problem,) = problems_of(folder)
    assert "pytorch_model.bin" in problem and told in problem
    assert not (folder / "trace").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_every_broken_pickle_is_refused(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.ones(2000)}, path)
    whole = path.read_bytes()
    contents = [b"", b"garbage", b"\x80\x04.", b"PK\x03\x04 not a zip", whole[: len(whole) // 2], whole[:-30]]
    for content in contents:
        path.write_bytes(content)
        (problem,) = problems_of(folder)
        assert str(path) in problem


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"a": torch.ones(2)}, "ema": {"a": torch.ones(2)}},
        {"a": torch.ones(2), "epoch": 3},
        {"optimizer": {"state": {"a": torch.ones(2), "step": 3}}},
        [torch.ones(2)],
        torch.ones(2),
        {3: torch.ones(2)},
    ],
)
def test_a_pickle_of_something_else_is_refused(folder: Path, content: Any) -> None:
    """A training state, say, with the weights one level down."""
    torch.save(content, folder / "pytorch_model.bin")
    (problem,) = problems_of(folder)
    assert "pytorch_model.bin" in problem and "expected tensors by name" in problem


# From what the user wrote to a folder


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate_checkpoint(str(tmp_path), "maths") == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert locate_checkpoint(f"~/{tmp_path.name}", "maths") == tmp_path


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"maths: .*model\.safetensors is a file; expected a checkpoint folder"):
        locate_checkpoint(str(tmp_path / "model.safetensors"), "maths")


@pytest.mark.parametrize("reference", ["./absent", "/absent/folder", "~/absent/x", "absent", "a/b/c", "~nobody-here/x"])
def test_a_path_that_leads_nowhere(reference: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate_checkpoint(reference, "maths")
    assert str(caught.value).startswith(f"maths: {reference} does not exist; expected a checkpoint folder or a Hub id")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def add_to_cache(cache: Path, repository: str, commit: str, files: Mapping[str, bytes], refs: list[str]) -> Path:
    """Lays files out as huggingface_hub does: blobs by content, links to them in a snapshot, refs by name."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        blob = root / "blobs" / f"{commit}{name}".replace(".", "").replace("/", "")
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    for ref in refs:
        (root / "refs" / ref).write_text(commit)
    return snapshot


def test_a_hub_id_is_found_in_the_cache(hub_cache: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "w")
    weights = (tmp_path / "w").read_bytes()
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": weights}
    old = add_to_cache(hub_cache, "owner/tuned", "a" * 40, files, ["v1"])
    new = add_to_cache(hub_cache, "owner/tuned", "b" * 40, files, ["main"])
    assert locate_checkpoint("owner/tuned", "maths").resolve() == new.resolve()
    assert locate_checkpoint("owner/tuned@v1", "maths").resolve() == old.resolve()
    assert locate_checkpoint("owner/tuned@" + "a" * 40, "maths").resolve() == old.resolve()
    assert list(opened(locate_checkpoint("owner/tuned", "maths")).tensors) == ["a"]


def test_a_hub_id_whose_weights_are_pickles(hub_cache: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w")
    files = {"config.json": CONFIG, "pytorch_model.bin": (tmp_path / "w").read_bytes()}
    add_to_cache(hub_cache, "owner/tuned", "c" * 40, files, ["main"])
    assert list(opened(locate_checkpoint("owner/tuned", "maths")).tensors) == ["a"]


def test_a_sentence_encoder_of_the_hub(hub_cache: Path, tmp_path: Path) -> None:
    """In the old layout, with weights of either format: what is wanted is found, and links are followed."""
    torch.save({"a": torch.ones(2)}, tmp_path / "w")
    save_file({"linear.weight": torch.ones(2)}, tmp_path / "dense")
    modules = [{"path": "0_Transformer", "type": "x.Transformer"}, {"path": "2_Dense", "type": "x.Dense"}]
    files = {
        "modules.json": json.dumps(modules).encode(),
        "0_Transformer/config.json": CONFIG,
        "0_Transformer/pytorch_model.bin": (tmp_path / "w").read_bytes(),
        "0_Transformer/sentencepiece.bpe.model": b"x",
        "2_Dense/model.safetensors": (tmp_path / "dense").read_bytes(),
    }
    add_to_cache(hub_cache, "owner/tuned", "e" * 40, files, ["main"])
    checkpoint = opened(locate_checkpoint("owner/tuned", "maths"))
    assert list(checkpoint.tensors) == ["a", "2_Dense::linear.weight"] and checkpoint.inner == "0_Transformer"
    assert checkpoint.root.name == "e" * 40
    side_files = find_side_files(checkpoint, checkpoint.folder, checkpoint.folder)
    assert "0_Transformer/sentencepiece.bpe.model" in side_files.files


def test_all_that_a_tokenizer_reads_is_fetched() -> None:
    wanted = [
        "spm.model",
        "0_Transformer/source.spm",
        "qwen.tiktoken",
        "tokenizer.model.v3",
        "tekken.json",
        "prophetnet.tokenizer",
        "bpe.codes",
        "vocab.txt",
        "additional_chat_templates/tool.jinja",
        "layers/attention.py",
        "2_Dense/pytorch_model.bin",
        "model.fp16.safetensors",
    ]
    unwanted = ["onnx/tokenizer.json", "original/consolidated.safetensors", "model.gguf", "checkpoint-5/config.json"]
    filtered = filter_repo_objects([*wanted, *unwanted], allow_patterns=_PATTERNS, ignore_patterns=_IGNORED)
    assert list(filtered) == wanted


@pytest.mark.parametrize("reference", ["owner/absent", "owner/tuned@v9", "owner/not a name!"])
def test_a_hub_id_that_cannot_be_had(hub_cache: Path, reference: str) -> None:
    add_to_cache(hub_cache, "owner/tuned", "d" * 40, {"config.json": CONFIG}, ["main"])
    with pytest.raises(CheckpointError) as caught:
        locate_checkpoint(reference, "maths")
    repository = reference.partition("@")[0]
    assert str(caught.value).startswith(f"maths: {repository}")
    assert "neither a folder here nor to be had from the Hub" in str(caught.value)
    if "@" in reference:
        assert "at revision v9" in str(caught.value)
