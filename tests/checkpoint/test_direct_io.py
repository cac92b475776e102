"""Files past the system's cache: always the same bytes as through it. Memory that is lent and comes back."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import random
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers as tf
import yaml

from largemerge.checkpoint import direct_io
from largemerge.checkpoint.direct_io import PAGE, THROUGH_CACHE, Buffers, DataFile

LENGTH = 3 * (1 << 20) + 12345


def some_bytes(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (number,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def written(path: Path) -> torch.Tensor:
    """By another way."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def forget(path: Path) -> None:
    """Makes the system's cache drop a file."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture(scope="module", autouse=True)
def _writes_are_not_waited_for() -> None:
    """They are: what is in the cache and what is on the disk is told apart here."""


@pytest.fixture
def direct(tmp_path: Path) -> None:
    """For tests that are about going past the cache."""
    with DataFile(tmp_path / "probe", size=1 << 20) as file:
        file.write(0, some_bytes(1 << 20))
        if not file.bytes_past_cache:
            pytest.skip("temporary files lie where nothing goes past the cache")


@pytest.fixture(params=["past the cache", "through it"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "through it":
        monkeypatch.setenv(THROUGH_CACHE, "1")
    return str(request.param)


def test_neighbours_written_by_many_threads_in_any_order(tmp_path: Path, way: str) -> None:
    expected = some_bytes(LENGTH)
    cuts = sorted({0, 1, PAGE, 5000, 200_000, 200_001, 1 << 20, 2_000_000, 2_000_000 + 3 * PAGE, LENGTH})
    places = list(itertools.pairwise(cuts))
    random.Random(0).shuffle(places)
    with DataFile(tmp_path / "data", size=LENGTH) as file:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda place: file.write(place[0], expected[place[0] : place[1]]), places))
        file.sync()
        assert file.bytes_past_cache == 0 or way == "past the cache"
        back = file.read_tensor(777, torch.uint8, (LENGTH - 777,))
    assert torch.equal(back, expected[777:])
    assert torch.equal(written(tmp_path / "data"), expected)


def test_a_tensor_longer_than_the_buffer_and_at_an_odd_place(tmp_path: Path, way: str) -> None:
    expected = some_bytes(11 << 20)
    with DataFile(tmp_path / "data", size=(11 << 20) + 3) as file:
        file.write(3, expected)
    assert torch.equal(written(tmp_path / "data")[3:], expected)


@pytest.mark.parametrize("offset", [0, 8, 4097, PAGE * 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_reads_at_any_place(tmp_path: Path, way: str, offset: int, dtype: torch.dtype) -> None:
    expected = some_bytes(LENGTH)
    (tmp_path / "data").write_bytes(expected.numpy().tobytes())
    size = 300_001
    part = expected[offset : offset + size * dtype.itemsize].clone().view(dtype)
    for _ in range(2):  # first it is cached, for it has just been written
        with DataFile(tmp_path / "data") as file:
            found = file.read_tensor(offset, dtype, (size,))
            assert found.dtype == dtype and torch.equal(found.view(torch.uint8), part.view(torch.uint8))
            kept = file.read_tensor(offset, dtype, (size,), past_cache=False)
            assert torch.equal(kept.view(torch.uint8), part.view(torch.uint8))
        forget(tmp_path / "data")


def test_only_what_the_cache_lacks_goes_past_it(tmp_path: Path, direct: None) -> None:
    (tmp_path / "data").write_bytes(some_bytes(LENGTH).numpy().tobytes())
    with DataFile(tmp_path / "data") as file:
        file.read_tensor(0, torch.uint8, (LENGTH,))
        assert file.bytes_past_cache == 0, "it has just been written"
    forget(tmp_path / "data")
    with DataFile(tmp_path / "data") as file:
        file.read_tensor(10, torch.uint8, (1000,))
        assert file.bytes_past_cache == 0, "short"
        file.read_tensor(0, torch.uint8, (1 << 20,), past_cache=False)
        assert file.bytes_past_cache == 0, "it is to stay there"
    forget(tmp_path / "data")
    with DataFile(tmp_path / "data") as file:
        file.read_tensor(5, torch.uint8, (LENGTH - 5,))
        assert file.bytes_past_cache == LENGTH - 5


def test_a_file_that_ends_too_soon(tmp_path: Path, way: str) -> None:
    (tmp_path / "data").write_bytes(b"x" * LENGTH)
    forget(tmp_path / "data")
    with DataFile(tmp_path / "data") as file:
        assert len(file.read_tensor(LENGTH - 300_000, torch.uint8, (300_000,))) == 300_000
        for offset, size in ((LENGTH - 300_000, 300_001), (LENGTH + PAGE, 200_000), (LENGTH, 1)):
            with pytest.raises(EOFError):
                file.read_tensor(offset, torch.uint8, (size,))
    (tmp_path / "empty").touch()
    with DataFile(tmp_path / "empty") as file, pytest.raises(EOFError):
        file.read_tensor(0, torch.uint8, (1 << 20,))


def test_a_file_system_that_refuses_after_all(tmp_path: Path, direct: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some do where their blocks are larger than a page."""
    expected = some_bytes(LENGTH)
    calls = {"preadv": os.preadv, "pwrite": os.pwrite}
    refused = set()

    def refusing(name: str) -> Any:
        def call(descriptor: int, *arguments: Any) -> int:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("data"):
                flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
                if int(flags, 8) & os.O_DIRECT:
                    refused.add(name)
                    raise OSError(errno.EINVAL, "no")
            return calls[name](descriptor, *arguments)

        return call

    for name in calls:
        monkeypatch.setattr(os, name, refusing(name))
    with DataFile(tmp_path / "data", size=LENGTH) as file:
        file.write(0, expected)
        file.write(0, expected)
    forget(tmp_path / "data")
    with DataFile(tmp_path / "data") as file:
        assert torch.equal(file.read_tensor(0, torch.uint8, (LENGTH,)), expected)
        assert file.bytes_past_cache == 0
    assert refused == set(calls)


def test_the_innermost_place_of_mounting_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mounted:
        def __init__(self, mountpoint: str, fstype: str) -> None:
            self.mountpoint, self.fstype = mountpoint, fstype

    places = [Mounted("/", "ext4"), Mounted("/data", "nfs4"), Mounted("/data/fast", "xfs")]
    monkeypatch.setattr(direct_io.psutil, "disk_partitions", lambda all: places)
    found = {name: direct_io._file_system.__wrapped__(Path(name)) for name in ("/home/a", "/data/b", "/data/fast/c/d")}
    assert found == {"/home/a": "ext4", "/data/b": "nfs4", "/data/fast/c/d": "xfs"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for seed in range(3):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 256, "intermediate_size": 300, "num_hidden_layers": 2, "vocab_size": 3001}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=4)).bfloat16()
        model.save_pretrained(tmp_path / f"model{seed}")
    path = tmp_path / "merge.yml"
    models = [{"model": str(tmp_path / f"model{seed}")} for seed in (1, 2)]
    parameters = {"weight": 0.5, "density": 0.4}
    content = {"merge_method": "ties", "base_model": str(tmp_path / "model0"), "models": models}
    path.write_text(yaml.safe_dump(content | {"parameters": parameters}))
    return path


@pytest.mark.slow
def test_merges_are_the_same_either_way(config: Path, tmp_path: Path, direct: None) -> None:
    command = [sys.executable, "-m", "largemerge", "merge", str(config)]
    moved = {}
    for name, more in (("past", {}), ("through", {THROUGH_CACHE: "1"})):
        for path in tmp_path.glob("model*/*.safetensors"):
            forget(path)
        out = tmp_path / name
        subprocess.run([*command, str(out)], check=True, env=os.environ | more, capture_output=True)
        report = yaml.safe_load((out / "merge_report.json").read_text())
        moved[name] = report["bytes_past_cache"]
    assert moved["past"] > 0 and moved["through"] == 0
    assert (tmp_path / "past" / "model.safetensors").read_bytes() == (
        tmp_path / "through" / "model.safetensors"
    ).read_bytes()


def test_no_room_is_told_before_the_work(config: Path, tmp_path: Path, direct: None) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = [sys.executable, "-m", "largemerge", "merge", str(config), str(tmp_path / "out")]
    done = subprocess.run(command, preexec_fn=small_files, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model.safetensors" in done.stderr and "expected room for" in done.stderr


# Buffers


SIZE = 8 << 20


def private_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_it_comes_back_when_the_last_tensor_is_gone() -> None:
    buffers = Buffers(4 * SIZE)
    lent = buffers.lend(SIZE).fill_(1)
    assert lent.data_ptr() % PAGE == 0 and len(lent) == SIZE
    part = lent[10:20].view(torch.int8)
    place = lent.data_ptr()
    del lent
    other = buffers.lend(SIZE).fill_(2)
    assert other.data_ptr() != place and part.tolist() == [1] * 10, "still in use"
    del part
    assert buffers.lend(SIZE // 2).data_ptr() == place, "a larger one will do"
    assert buffers.lend(SIZE // 8).data_ptr() != place, "not one that is much larger"
    assert other.eq(2).all()


def test_only_so_much_stays_free() -> None:
    buffers = Buffers(2 * SIZE)
    gc.collect()
    before = private_bytes()
    lent = [buffers.lend(SIZE).fill_(number) for number in range(12)]
    assert private_bytes() - before > 10 * SIZE
    del lent
    assert private_bytes() - before < 4 * SIZE


def test_what_waits_makes_room_for_what_is_lent() -> None:
    buffers = Buffers(3 * SIZE)
    first, second = (buffers.lend(SIZE).fill_(0) for _ in range(2))
    place = first.data_ptr()
    del first
    again = buffers.lend(SIZE)
    assert again.data_ptr() == place, "it waited"
    del again
    gc.collect()
    before = private_bytes()
    large = buffers.lend(2 * SIZE).fill_(1)
    assert private_bytes() - before < SIZE + SIZE // 2, "and was given back: 3 are lent"
    assert len(large) == 2 * SIZE and len(second) == SIZE


def test_many_threads_never_share_a_region() -> None:
    buffers = Buffers(4 * SIZE)

    def work(number: int) -> bool:
        for size in (1 << 16, 3 << 16, 1 << 18) * 20:
            lent = buffers.lend(size).fill_(number)
            torch.ones(100).sum()
            if not bool(lent.eq(number).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("through", [False, True])
def test_files_read_into_it(tmp_path: Path, through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if through:
        monkeypatch.setenv(THROUGH_CACHE, "1")
    expected = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    (tmp_path / "data").write_bytes(expected.numpy().tobytes())
    buffers = Buffers(4 << 20)
    with DataFile(tmp_path / "data", buffers=buffers) as file:
        tensors = [file.read_tensor(offset, torch.uint8, (300_000,)) for offset in (0, 5, 4096, 700_000)]
        for tensor, offset in zip(tensors, (0, 5, 4096, 700_000), strict=True):
            assert torch.equal(tensor, expected[offset : offset + 300_000])
