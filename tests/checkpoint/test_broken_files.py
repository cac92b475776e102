"""Files of weights by strangers: read to the right numbers, or refused from their headers; never a crash or garbage."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from largemerge.checkpoint.index import natural_key, open_checkpoint
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.checkpoint.tensor_files import MAX_NAME_LENGTH, SafetensorsFile, open_tensor_file
from largemerge.checkpoint.tensor_info import SAFETENSORS_DTYPES
from largemerge.errors import CheckpointError

W = torch.arange(12.0).reshape(3, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def problem_of(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_tensor_file(file).tensors()
    assert all(str(file) in problem and len(problem) < 900 for problem in caught.value.problems)
    return str(caught.value)


# Safetensors: what the library refuses is refused, and what it takes is read


def write_raw(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def by_the_library(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, bytes]] | None:
    """What the safetensors library reads; `None` if it refuses the file."""
    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError):  # the latter for sizes that no tensor has
        return None
    return {
        name: (tuple(tensor.shape), tensor.dtype, bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
        for name, tensor in found.items()
    }


def by_us(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, bytes]] | None:
    opened = SafetensorsFile(file)
    try:
        return {
            name: (info.shape, info.dtype, bytes(opened.read(info).reshape(-1).view(torch.uint8).tolist()))
            for name, info in opened.tensors().items()
        }
    except CheckpointError:
        return None
    finally:
        opened.close()


NAMES = st.sampled_from(["a", "b", "layers.²", "", "a\0", "__metadata__", "é" * 40])
SIDES = st.sampled_from([0, 1, 2, 3, 2**31, 2**62, 2**63, 2**64, -1, 2.0, True, None, "2"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*SAFETENSORS_DTYPES, "F32", "F32", "F9", None, 5]),
        "shape": st.lists(st.sampled_from([0, 1, 2]), max_size=3) | st.lists(SIDES, max_size=3) | st.none(),
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | st.lists(SIDES, max_size=3),
    },
    optional={"extra": st.integers()},
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A header and its data: right ones with one thing changed, or made of parts that do not fit."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(NAMES.filter(lambda name: name != "__metadata__"), max_size=3, unique=True)):
        dtype = draw(st.sampled_from(list(SAFETENSORS_DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = torch.Size(shape).numel() * SAFETENSORS_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if draw(st.booleans()):
        header[draw(NAMES)] = draw(ENTRIES | st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3)))
    text = json.dumps(header).encode()
    how = draw(st.sampled_from(["whole"] * 3 + ["bytes", "spaces", "data"]))
    if how == "bytes" and text:
        place = draw(st.integers(0, len(text) - 1))
        text = text[:place] + draw(st.binary(max_size=2)) + text[place + draw(st.integers(0, 2)) :]
    text += b" " * draw(st.integers(0, 8)) if how == "spaces" else b""
    return text, bytes(range(256)) * (end // 256) + bytes(range(end % 256)) + b"x" * (how == "data")


@given(made=headers())
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@example(made=(b"{}", b""))
@example(made=(b"{}", b"x"))
@example(made=(b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4, 0], "data_offsets": [0, 0]}}', b""))
@example(made=(b'{"a": {"dtype": "F32", "shape": [9223372036854775808, 0], "data_offsets": [0, 0]}}', b""))
@example(
    made=(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"format": 5}}', bytes(4))
)
@example(made=(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": null}', bytes(4)))
@example(made=(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": NaN}}', bytes(4)))
@example(made=(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": "\\ud800"}}', bytes(4)))
@example(made=(b'\xef\xbb\xbf{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)))
def test_what_the_library_refuses_is_refused_and_what_it_takes_is_read(place: Path, made: tuple[bytes, bytes]) -> None:
    write_raw(place / "made.safetensors", *made)
    assert by_us(place / "made.safetensors") == by_the_library(place / "made.safetensors")


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    ("entries", "num_bytes", "mentions"),
    [
        ({"a": [0, 8], "b": [4, 12]}, 12, "b: bytes 4..12 overlap another tensor's"),
        ({"a": [0, 8], "b": [0, 8]}, 8, "b: bytes 0..8 overlap another tensor's"),
        ({"a": [0, 8], "b": [12, 20]}, 20, "b: bytes 12..20 leave a hole before them, from 8 on"),
        ({"a": [4, 12]}, 12, "a: bytes 4..12 leave a hole before them, from 0 on"),
        ({"a": [0, 8]}, 11, "3 bytes after the last tensor belong to none"),
        ({"a" * 1_000_000: [0, 8]}, 8, f"has 1,000,000 characters, expected {MAX_NAME_LENGTH} or fewer"),
        ({"../../x::a": [0, 8]}, 8, "'../../x::a'; expected no '::'"),
    ],
)
def test_layouts_that_are_none(place: Path, entries: dict[str, list[int]], num_bytes: int, mentions: str) -> None:
    header = {name: {**F32, "data_offsets": offsets} for name, offsets in entries.items()}
    write_raw(place / "model.safetensors", json.dumps(header).encode(), bytes(num_bytes))
    assert mentions in problem_of(place / "model.safetensors")


def test_all_broken_entries_are_told_at_once(place: Path) -> None:
    header = {name: {**F32, "shape": shape, "data_offsets": [0, 8]} for name, shape in (("a", [-2]), ("b", [2.0]))}
    header["c"] = {**F32, "dtype": "C64", "data_offsets": [0, 16]}
    write_raw(place / "model.safetensors", json.dumps(header).encode(), bytes(16))
    found = problem_of(place / "model.safetensors")
    assert found.startswith("3 problems") and "a: " in found and "b: " in found and "c: dtype 'C64'" in found


def test_a_name_twice_is_refused(place: Path) -> None:
    entry = b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    write_raw(place / "model.safetensors", b"{" + entry + b", " + entry + b"}", bytes(8))
    assert "the key 'a' stands twice" in problem_of(place / "model.safetensors")


def test_a_checkpoint_without_tensors_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor in model"):
        open_checkpoint(tmp_path, "maths")


def test_names_with_digits_that_are_no_numbers() -> None:
    assert sorted(["x.²", "x.10", "x.2", "x.٣", "x."], key=natural_key) == ["x.2", "x.٣", "x.10", "x.", "x.²"]


# What lies in the place of a file


def links(kind: str, file: Path) -> None:
    {
        "is a named pipe": lambda: os.mkfifo(file),
        "is a folder": file.mkdir,
        "is a device": lambda: file.symlink_to("/dev/zero"),
        "leads in a circle": lambda: file.symlink_to(file.name),
        "which does not exist": lambda: file.symlink_to("blobs/absent"),
    }[kind]()


KINDS = ["is a named pipe", "is a folder", "is a device", "leads in a circle", "which does not exist"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "shard"])
def test_weights_that_are_no_files_are_told_rather_than_others_taken(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"a": W}, tmp_path / "pytorch_model.bin")
    if name == "shard":
        name = "model-1.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    (tmp_path / name).unlink(missing_ok=True)
    links(kind, tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path, "maths")
    (problem,) = caught.value.problems
    assert str(tmp_path / name) in problem and kind in problem


def test_weights_that_a_link_leads_to_are_read(tmp_path: Path) -> None:
    """People link large files: what is read as weights may lie anywhere."""
    (tmp_path / "model").mkdir()
    save_file({"a": W}, tmp_path / "elsewhere.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "model.safetensors").symlink_to("../elsewhere.safetensors")
    with CheckpointReader(open_checkpoint(tmp_path / "model", "maths")) as reader:
        assert torch.equal(reader.read("a"), W)


# Pickles


def rewritten(file: Path, change: Callable[[str, bytes], bytes | None], how: int = zipfile.ZIP_STORED) -> None:
    """Writes the entries of a saved file again, changed."""
    torch.save({"a": W}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in entries.items():
            made = change(name, content)
            if made is not None:
                archive.writestr(name, made)


def view_changed(name: str, content: bytes) -> bytes:
    """A view of 3 x 244 of a storage of twelve numbers."""
    return content.replace(b"K\x03K\x04\x86", b"K\x03K\xf4\x86") if name.endswith("data.pkl") else content


def cut_short(file: Path, *, old: bool) -> None:
    """Writes all but the end of a file, as a download that broke off leaves it."""
    torch.save({"a": W}, file, _use_new_zipfile_serialization=not old)
    content = file.read_bytes()
    file.write_bytes(content[: 250 if old else 800])


OTHER_ORDER = b"big" if sys.byteorder == "little" else b"little"
PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "compressed": (lambda file: rewritten(file, lambda _, content: content, zipfile.ZIP_DEFLATED), "is compressed"),
    "an entry cut short": (
        lambda file: rewritten(file, lambda name, content: content[:8] if "/data/" in name else content),
        "the numbers of a tensor (storage 0) are 8 bytes, expected 48",
    ),
    "an entry missing": (
        lambda file: rewritten(file, lambda name, content: None if "/data/" in name else content),
        "lacks the numbers of a tensor (storage 0, 48 bytes)",
    ),
    "a pickle cut short": (
        lambda file: rewritten(file, lambda name, content: content[:30] if name.endswith(".pkl") else content),
        "data.pkl) is cut short or broken",
    ),
    "no pickle": (
        lambda file: rewritten(file, lambda name, content: None if name.endswith(".pkl") else content),
        "no data.pkl",
    ),
    "another byte order": (
        lambda file: rewritten(file, lambda name, content: OTHER_ORDER if "byteorder" in name else content),
        "byte order",
    ),
    "a view that leads out": (
        lambda file: rewritten(file, view_changed),
        "larger than the numbers which the file holds",
    ),
    "sparse": (lambda file: torch.save({"a": W.to_sparse()}, file), "a is sparse_coo; expected a dense tensor"),
    "compressed rows": (lambda file: torch.save({"a": W.to_sparse_csr()}, file), "a is sparse_csr"),
    "nested": (lambda file: torch.save({"a": torch.nested.nested_tensor([W, W[:1]])}, file), "a is nested"),
    "quantized": (
        lambda file: torch.save({"a": torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)}, file),
        "a is quantized",
    ),
    "complex": (lambda file: torch.save({"a": W.to(torch.complex64)}, file), "a is complex64, which is not supported"),
    "uint16": (lambda file: torch.save({"a": W.to(torch.uint16)}, file), "a is uint16, which is not supported"),
    "meta": (lambda file: torch.save({"a": W.to("meta")}, file), "meta device"),
    "expanded": (lambda file: torch.save({"a": torch.ones(1).expand(2**40)}, file), "expanded from 4 bytes"),
    "a long name": (lambda file: torch.save({"a" * 5000: W}, file), "5,000 characters"),
    "a name that leads out": (lambda file: torch.save({"../x::a": W}, file), "expected no '::'"),
    "half of a character": (lambda file: torch.save({"\ud800": W}, file), "half of a character"),
    "a module": (
        lambda file: torch.save(torch.nn.Linear(2, 2), file),
        "holds an object, torch.nn.modules.linear.Linear, which cannot be loaded without running code",
    ),
    "arrays of numpy": (lambda file: torch.save({"a": numpy.ones(3)}, file), "holds numpy's arrays or numbers, which"),
    "arrays, pickled": (lambda file: file.write_bytes(pickle.dumps({"a": numpy.ones(3)}, 2)), "holds numpy's arrays"),
    "numbers, pickled": (lambda file: file.write_bytes(pickle.dumps({"a": 1}, 2)), "but none of torch.save"),
    "a pickle of protocol 4": (lambda file: file.write_bytes(pickle.dumps({"a": 1}, 4)), "by protocol 4, expected 2"),
    "tensors by protocol 4": (lambda file: torch.save({"a": W}, file, pickle_protocol=4), "by protocol 4, expected 2"),
    "nothing": (lambda file: file.write_bytes(b""), "is empty"),
    "a text": (lambda file: file.write_text("hello"), "is no file of torch.save: it begins with b'hello'"),
    "an end without a beginning": (lambda file: file.write_bytes(b"\x80\x02."), "but none of torch.save"),
    "a pointer": (lambda file: file.write_text("version https://git-lfs.github.com"), "is a pointer of Git LFS"),
    "a file cut short": (lambda file: cut_short(file, old=False), "is cut short (8"),
    "an old file cut short": (lambda file: cut_short(file, old=True), "is cut short or broken (2"),
    "a key of another type": (
        lambda file: torch.save({"lm_head.weight": W, True: W}, file),
        "the key True, which is no",
    ),
    "a text among tensors": (lambda file: torch.save({"a": W, "b": W, "c": "x"}, file), "'c' is a text, no tensor"),
    "tensors beside weights": (
        lambda file: torch.save({"model": {"a": W}, "b": W, "c": W}, file),
        "weights under 'model', and tensors beside them, such as 'b'; expected tensors by name. Write the weights",
    ),
    "an archive": (lambda file: zipfile.ZipFile(file, "w").writestr("x", "y"), "no data.pkl"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_cannot_be_read_right_are_refused_before_they_are_read(place: Path, case: str) -> None:
    write, mentions = PICKLES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(place / "pytorch_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = problem_of(place / "pytorch_model.bin")
    assert mentions in told
    for words in ("torch.serialization", "weights_only", "Errno", "None bytes", "empty list", "Unpickl", "Please"):
        assert words not in told


@pytest.mark.parametrize("old", [False, True])
def test_views_and_parameters_are_read_as_they_are(place: Path, old: bool) -> None:
    saved = {"a": W[1:], "b": W.T, "c": W[:, ::2], "d": torch.nn.Parameter(W), "e": W[:1].expand(3, 4)}
    torch.save(saved, place / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    (place / "model.safetensors").unlink(missing_ok=True)
    with CheckpointReader(open_checkpoint(place, "maths")) as reader, warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, tensor in saved.items():
            found = reader.read(name)
            assert torch.equal(found, tensor) and found.is_contiguous() and not found.requires_grad
