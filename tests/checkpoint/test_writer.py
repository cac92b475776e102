"""Shards laid out beforehand and written in any order, as the safetensors library reads them."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from largemerge.checkpoint.index import open_checkpoint
from largemerge.checkpoint.tensor_info import SAFETENSORS_DTYPES, OutputTensor
from largemerge.checkpoint.writer import Shard, ShardWriter, layout_shards, weight_index, write_atomically
from largemerge.errors import OutputError

FLOAT = torch.float32


def outline(tensors: dict[str, torch.Tensor]) -> dict[str, OutputTensor]:
    return {name: OutputTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_all(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> tuple[Shard, ...]:
    shards = layout_shards(outline(tensors), max_shard_bytes)
    with ShardWriter(folder, outline(tensors), shards) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return shards


def data_bytes(shard: Shard) -> int:
    return shard.num_bytes - len(shard.header)


# Layout


def test_one_shard_has_no_number_and_no_index() -> None:
    (shard,) = shards = layout_shards({"a": OutputTensor(FLOAT, (2, 3)), "b": OutputTensor(FLOAT, ())}, 28)
    assert shard.file_name == "model.safetensors"
    assert data_bytes(shard) == 28
    assert weight_index(shards) is None


@pytest.mark.parametrize("limit", [1, 40, 41, 79, 80, 200, 399, 400])
def test_shards_are_filled_in_order_up_to_the_limit(limit: int) -> None:
    sizes = [10, 1, 25, 4, 30, 2, 2, 26]
    tensors = {f"t{index}": OutputTensor(FLOAT, (size,)) for index, size in enumerate(sizes)}
    shards = layout_shards(tensors, limit)
    assert [name for shard in shards for name in sorted(shard.offsets)] == list(tensors)
    for shard in shards:
        assert data_bytes(shard) == sum(tensors[name].num_bytes for name in shard.offsets)
        assert data_bytes(shard) <= limit or len(shard.offsets) == 1
    for before, after in itertools.pairwise(shards):
        first = min(after.offsets)
        assert data_bytes(before) + tensors[first].num_bytes > limit, "the first tensor would have had room before"


def test_names_of_shards_and_the_index() -> None:
    tensors = {f"t{index}": OutputTensor(FLOAT, (2,)) for index in range(3)}
    shards = layout_shards(tensors, 8)
    names = [shard.file_name for shard in shards]
    assert names == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    text = weight_index(shards)
    assert text is not None
    index = json.loads(text)
    assert index == {"metadata": {"total_size": 24}, "weight_map": dict(zip(tensors, names, strict=True))}


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    tensors = {f"{index}.{dtype}": torch.ones(index + 1).to(dtype) for index, dtype in
               enumerate(SAFETENSORS_DTYPES.values())}  # fmt: skip
    (shard,) = write_all(tmp_path, tensors, 10**6)
    assert len(shard.header) % 8 == 0
    for name, offset in shard.offsets.items():
        assert offset % tensors[name].dtype.itemsize == 0, name
    ends = sorted((offset, offset + tensors[name].nbytes) for name, offset in shard.offsets.items())
    assert [start for start, _ in ends[1:]] == [end for _, end in ends[:-1]], "a gap, or two in one place"
    assert ends[0][0] == len(shard.header) and ends[-1][1] == shard.num_bytes


# Files


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_the_safetensors_library_reads_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "odd": torch.tensor([1, 0, 1]).to(dtype),
        "matrix": (torch.randn(4, 6) * 9).to(dtype),
        "transposed": (torch.randn(4, 6) * 9).T.to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(3, 0).to(dtype),
        'with "quotes" and é': torch.tensor([1]).to(dtype),
    }
    for name, limit in (("one", 10**6), ("many", 20)):
        folder = tmp_path / name
        folder.mkdir()
        shards = write_all(folder, tensors, limit)
        assert (len(shards) == 1) == (name == "one")
        found: dict[str, torch.Tensor] = {}
        for shard in shards:
            file = folder / shard.file_name
            assert file.stat().st_size == shard.num_bytes
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
            found |= load_file(file)
        assert set(found) == set(tensors)
        for key, tensor in tensors.items():
            assert (found[key].dtype, found[key].shape) == (dtype, tensor.shape)
            assert torch.equal(bits(found[key]), bits(tensor))


def test_our_own_index_reads_what_was_written(tmp_path: Path) -> None:
    tensors = {f"layers.{index}.weight": torch.randn(3, 4).bfloat16() for index in range(12)}
    shards = write_all(tmp_path, tensors, 50)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors.index.json").write_text(str(weight_index(shards)))
    checkpoint = open_checkpoint(tmp_path, "out")
    assert {name: info.offset for name, info in checkpoint.tensors.items()} == {
        name: offset for shard in shards for name, offset in shard.offsets.items()
    }


def test_order_of_writing_does_not_matter(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.randn(5, 2) for index in range(6)}
    contents = []
    for number, names in enumerate(itertools.islice(itertools.permutations(tensors), 0, 720, 100)):
        folder = tmp_path / str(number)
        folder.mkdir()
        shards = layout_shards(outline(tensors), 90)
        with ShardWriter(folder, outline(tensors), shards) as writer:
            for name in names:
                writer.write(name, tensors[name])
            assert writer.bytes_written == 240
        contents.append([(folder / shard.file_name).read_bytes() for shard in shards])
    assert len(contents) == 8 and all(content == contents[0] for content in contents)


def test_rows_are_written_alone_and_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(9, 2, 3), "b": torch.arange(9)}
    shards = layout_shards(outline(tensors), 100)
    with ShardWriter(tmp_path, outline(tensors), shards) as writer:
        for name in tensors:
            for start in (6, 0, 3):
                writer.write(name, tensors[name][start : start + 3], first_row=start)
        assert all(torch.equal(writer.read(name), tensor) for name, tensor in tensors.items())
        writer.write("a", torch.zeros(1, 2, 3), first_row=8)
        assert torch.equal(writer.read("a")[:8], tensors["a"][:8]) and not writer.read("a")[8].any()


@pytest.mark.parametrize(
    "wrong", [torch.ones(2, 3).bfloat16(), torch.ones(2, 3).double(), torch.ones(3, 3), torch.ones(3, 2)]
)
def test_a_tensor_of_another_dtype_or_shape_cannot_spoil_its_neighbours(tmp_path: Path, wrong: torch.Tensor) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    shards = layout_shards(outline(tensors), 100)
    with ShardWriter(tmp_path, outline(tensors), shards) as writer:
        with pytest.raises(AssertionError, match="a"):
            writer.write("a", wrong)
        with pytest.raises(AssertionError, match="a"):
            writer.write("a", torch.ones(2, 3), first_row=1)
        assert not writer.read("a").any() and not writer.read("b").any()


def test_opening_again_goes_on_with_what_is_there(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4), "b": torch.randn(4)}
    shards = layout_shards(outline(tensors), 100)
    with ShardWriter(tmp_path, outline(tensors), shards) as writer:
        writer.write("a", tensors["a"])
        writer.flush()
    with ShardWriter(tmp_path, outline(tensors), shards) as writer:
        assert torch.equal(writer.read("a"), tensors["a"])
        writer.write("b", tensors["b"])
    assert all(torch.equal(load_file(tmp_path / "model.safetensors")[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("broken", ["empty", "no header yet", "too long"])
def test_a_shard_whose_beginning_was_interrupted_is_begun_again(tmp_path: Path, broken: str) -> None:
    tensors = {"a": torch.randn(4)}
    (shard,) = shards = layout_shards(outline(tensors), 100)
    left = {"empty": b"", "no header yet": bytes(shard.num_bytes), "too long": bytes(shard.num_bytes + 5)}
    (tmp_path / shard.file_name).write_bytes(left[broken])
    with ShardWriter(tmp_path, outline(tensors), shards) as writer:
        writer.write("a", tensors["a"])
    assert torch.equal(load_file(tmp_path / shard.file_name)["a"], tensors["a"])


def test_small_files_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_atomically(path, "old é")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_file_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = outline({"a": torch.zeros(4)})
    shards = layout_shards(tensors, 1 << 20)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / shards[0].file_name).mkdir()
    with (
        pytest.raises(OutputError, match=r"model\.safetensors: Is a directory$"),
        ShardWriter(tmp_path, tensors, shards),
    ):
        pass
    (tmp_path / shards[0].file_name).rmdir()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(OutputError, match=r"No space left on device; expected room for 4\.0 KiB$"),
        ShardWriter(tmp_path, tensors, shards),
    ):
        pass
