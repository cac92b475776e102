"""Tensors read one at a time: the same as the safetensors library reads, in memory of their own."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from largemerge import CheckpointError
from largemerge.checkpoint.index import open_checkpoint
from largemerge.checkpoint.reader import CheckpointReader, prefetched
from largemerge.checkpoint.tensor_files import open_tensor_file
from largemerge.checkpoint.tensor_info import SAFETENSORS_DTYPES

MEBIBYTE = 1 << 20


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: float8 and NaN compare only so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def reader_of(folder: Path) -> CheckpointReader:
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return CheckpointReader(open_checkpoint(folder, "maths"))


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_every_dtype_and_shape_is_read_as_the_safetensors_library_does(tmp_path: Path, dtype: torch.dtype) -> None:
    source = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 40
    tensors = {
        "odd": torch.tensor([1, 0, 1]).to(dtype),  # what follows may start at any byte
        "matrix": source.to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 5).to(dtype),
        "cube": source[:6].reshape(3, 2, 5).to(dtype, copy=True),
    }
    try:
        save_file(tensors, tmp_path / "model.safetensors")
    except KeyError:
        pytest.skip("an older safetensors library does not know it")
    expected = load_file(tmp_path / "model.safetensors")
    file = open_tensor_file(tmp_path / "model.safetensors")
    for name, info in file.tensors().items():
        found = file.read(info)
        assert (found.dtype, found.shape) == (dtype, expected[name].shape)
        assert torch.equal(bits(found), bits(expected[name]))
    assert file.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    file.close()


def test_not_a_number_and_infinity_survive(tmp_path: Path) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    save_file({"a": values, "b": values.bfloat16()}, tmp_path / "model.safetensors")
    with reader_of(tmp_path) as reader:
        assert torch.equal(bits(reader.read("a")), bits(values))
        assert torch.equal(bits(reader.read("b")), bits(values.bfloat16()))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(2, 5), slice(6, 7), slice(0, 7), slice(3, 3)])
def test_rows_are_read_alone(tmp_path: Path, rows: slice, pickled: bool) -> None:
    tensors = {"a": torch.arange(3), "b": torch.randn(7, 2, 3).bfloat16(), "c": torch.arange(7)}
    if pickled:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    with reader_of(tmp_path) as reader:
        for name in ("b", "c"):
            before = reader.bytes_read
            assert torch.equal(reader.read(name, rows), tensors[name][rows])
            assert reader.bytes_read - before == tensors[name][rows].nbytes


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_in_both_formats(tmp_path: Path, zipped: bool) -> None:
    """Checkpoints from before 2020 are in the older one."""
    whole = torch.randn(4, 6)
    tensors = {
        "a": whole,
        "rows": whole[1:3],
        "transposed": whole.T,
        "b": torch.ones(3).bfloat16(),
        "c": torch.tensor(7),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with reader_of(tmp_path) as reader:
        for name, tensor in tensors.items():
            found = reader.read(name)
            assert found.is_contiguous()
            assert found.untyped_storage().nbytes() == tensor.nbytes
            assert torch.equal(found, tensor)


def test_shards_and_sharded_pickles(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3, 2) for name in "abcd"}
    for kind in ("safetensors", "bin"):
        folder = tmp_path / kind
        folder.mkdir()
        for names in ("ab", "cd"):
            part = {name: tensors[name] for name in names}
            (save_file if kind == "safetensors" else torch.save)(part, folder / f"{names}.{kind}")
        index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
        weight_map = {name: f"{'ab' if name in 'ab' else 'cd'}.{kind}" for name in tensors}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
        with reader_of(folder) as reader:
            assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_what_is_read_can_be_written_to(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    with reader_of(tmp_path) as reader:
        first = reader.read("a")
        first.add_(1)
        assert torch.equal(reader.read("a"), torch.zeros(4))
    assert torch.equal(first, torch.ones(4))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.zeros(4))


def test_a_file_that_became_shorter_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(1000)}, path)
    with reader_of(tmp_path) as reader:
        path.write_bytes(path.read_bytes()[:-400])
        assert torch.equal(reader.read("a"), torch.zeros(4))
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ended in the middle of b"):
            reader.read("b")


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.full((64, 65), float(index)) for index in range(16)}
    save_file(tensors, tmp_path / "model.safetensors")
    names = list(tensors) * 8
    with reader_of(tmp_path) as reader, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.read, names))
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in zip(names, found, strict=True))
        assert reader.bytes_read == 8 * sum(tensor.nbytes for tensor in tensors.values())


def mapped_bytes() -> int:
    """What mapped files hold of this process's memory."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssFile:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts mapped pages here")
@pytest.mark.parametrize("pickled", [False, True])
def test_reading_maps_no_pages(tmp_path: Path, pickled: bool) -> None:
    tensors = {f"t{index}": torch.ones(2 * MEBIBYTE) for index in range(8)}
    if pickled:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    with reader_of(tmp_path) as reader:
        reader.read("t0")
        before = mapped_bytes()
        for index in range(1, 8):
            assert reader.read(f"t{index}")[-1] == 1
        assert mapped_bytes() - before < 8 * MEBIBYTE  # of 56


def test_prefetching_keeps_the_order_and_one_item_ahead() -> None:
    started: list[int] = []

    def load(item: int) -> int:
        started.append(item)
        return item * item

    with prefetched(load, range(6)) as loaded:
        for index, value in enumerate(loaded):
            assert value == index * index
            assert len(started) <= index + 2
    assert started == list(range(6))


def test_prefetching_raises_where_the_item_is_asked_for() -> None:
    def load(item: int) -> int:
        if item == 2:
            raise CheckpointError("two")
        return item

    with prefetched(load, range(4)) as loaded:
        assert [next(loaded), next(loaded)] == [0, 1]
        with pytest.raises(CheckpointError, match="two"):
            next(loaded)


def test_prefetching_nothing() -> None:
    with prefetched(lambda item: item, []) as loaded:
        assert list(loaded) == []
