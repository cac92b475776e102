"""The output folder: nothing is called finished that is not what was planned."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import touch
from data_free_cases import weighted, write_models

import largemerge
from largemerge.checkpoint import writer as writer_module
from largemerge.checkpoint.tensor_info import OutputTensor
from largemerge.checkpoint.writer import NotFiniteError, ShardWriter, layout_shards, not_finite
from largemerge.errors import MergeError, OutputError
from largemerge.output import open_output


def test_files_that_are_not_as_laid_out_are_not_called_finished(tmp_path: Path) -> None:
    tensors = {name: OutputTensor(torch.float32, (4, 4)) for name in ("a", "b")}
    shards = layout_shards(tensors, 64)
    out, working = tmp_path / "out", tmp_path / "out" / ".largemerge"
    with open_output(out, {}, [], resume=False, force=False) as folder:
        with ShardWriter(working, tensors, shards) as writer:
            for name in tensors:
                writer.write(name, torch.ones(4, 4))
            writer.flush()
            folder.record("all", {"digests": writer.take_digests()})
        file = working / shards[1].file_name
        whole = file.read_bytes()
        for spoiled in (whole[:-8], whole.replace(b'"b"', b'"c"')):
            file.write_bytes(spoiled)
            with pytest.raises(MergeError) as caught:
                folder.finish(shards, lambda path: None, "{}", {})
            assert str(file) in caught.value.problems[0] and "--resume finds out" in caught.value.problems[-1]
            assert not (out / "config.json").exists() and working.is_dir()
        file.write_bytes(whole)
        folder.finish(shards, lambda path: None, "{}", {})
    assert (out / "config.json").exists() and not working.exists()


def unlike(folder: Path) -> dict[str, str]:
    """Files that are nobody's checkpoint, in a folder."""
    names = ("optimizer.bin", "lora.safetensors", "training_args.bin", "voice.model", "notes.txt", "data/x.safetensors")
    touch(folder, *names)
    return {name: (folder / name).read_text() for name in names}


def finished(
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
    names: str = "a",
) -> None:
    """Writes a checkpoint of some tensors by hand, each in a shard."""
    tensors = {name: OutputTensor(torch.float32, (4, 4)) for name in names}
    shards = layout_shards(tensors, 64)
    with open_output(out, {}, [], resume=resume, force=force) as folder:
        with ShardWriter(folder.working, tensors, shards) as writer:
            for name in names:
                writer.write(name, torch.ones(4, 4))
            writer.flush()
            folder.record("all", {"digests": writer.take_digests()})
        meanwhile()
        folder.finish(shards, lambda path: touch(path, "vocab.txt"), "{}", {})


def test_force_takes_away_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    touch(out, "model-00001-of-00002.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "odd.safetensors")
    (out / "model.safetensors.index.json").write_text('{"weight_map": {"x": "odd.safetensors"}}')
    kept = unlike(out)
    finished(out, force=True)
    finished(out, force=True)
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {*kept, "config.json", "vocab.txt", "model.safetensors", "merge_report.json"}
    assert {name: (out / name).read_text() for name in kept} == kept


@pytest.mark.parametrize("place", [".largemerge", ".largemerge/manifest.json", ".largemerge/model.safetensors"])
@pytest.mark.parametrize("options", [{"force": True}, {"resume": True}])
def test_nothing_is_written_through_a_link_in_the_working_folder(
    tmp_path: Path, place: str, options: dict[str, bool]
) -> None:
    target, out = tmp_path / "target", tmp_path / "out"
    if place == ".largemerge":
        touch(target, "keep")
    else:
        target.write_text("keep")
    (out / place).parent.mkdir(parents=True)
    (out / place).symlink_to(target)
    with pytest.raises(OutputError, match=r"is a link; nothing is written through it"):
        finished(out, **options)
    assert (target / "keep").is_file() if target.is_dir() else target.read_text() == "keep"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda out: out.write_text("x"), "is a file"),
        (lambda out: out.symlink_to("nowhere"), "is a link to nowhere, which is not there"),
        (lambda out: out.symlink_to(out.name), "is a link to out, which is not there"),
        (lambda out: touch(out, ".largemerge"), "is a file; a merge keeps a folder of this name"),
    ],
)
def test_what_stands_in_the_way_is_told(tmp_path: Path, make: Callable[[Path], object], expected: str) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputError, match=expected):
        finished(tmp_path / "out")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/proc/nothing/here"])
def test_names_that_no_folder_can_have_are_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="cannot be"):
        finished(tmp_path / name)


def test_a_folder_in_the_place_of_a_file_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(out)
    before = (out / "model.safetensors").read_bytes()
    (out / "vocab.txt").unlink()
    touch(out / "vocab.txt", "mine")
    with pytest.raises(OutputError, match=r"vocab\.txt is a folder"):
        finished(out, force=True)
    assert (out / "model.safetensors").read_bytes() == before and (out / "vocab.txt" / "mine").is_file()


def test_a_folder_in_the_place_of_a_config_is_told_before_the_work(tmp_path: Path) -> None:
    write_models(tmp_path)
    touch(tmp_path / "out" / "config.json", "mine")
    with pytest.raises(OutputError, match=r"out/config.json is a folder"):
        largemerge.merge(weighted(tmp_path), tmp_path / "out", force=True)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_hard_link_in_the_working_folder_is_not_written_through(tmp_path: Path) -> None:
    write_models(tmp_path)
    model = tmp_path / "model0" / "model.safetensors"
    before = model.read_bytes()
    (tmp_path / "out" / ".largemerge").mkdir(parents=True)
    os.link(model, tmp_path / "out" / ".largemerge" / "model.safetensors")
    for options in ({"force": True}, {"resume": True}):
        with pytest.raises(OutputError, match="a hard link"):
            largemerge.merge(weighted(tmp_path), tmp_path / "out", **options)
    assert model.read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "added_tokens.json"])
def test_no_merge_goes_on_beside_what_would_be_loaded_with_its_output(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    with contextlib.suppress(KeyboardInterrupt), open_output(out, {}, [], resume=False, force=False):
        raise KeyboardInterrupt
    shards = layout_shards({f"{letter}": OutputTensor(torch.float32, (4, 4)) for letter in "ab"}, 64)
    assert name not in {shard.file_name for shard in shards}
    touch(out, name, "notes.txt")
    for _ in range(2):
        with pytest.raises(OutputError, match=rf"holds {name}, which this merge has not written"):
            finished(out, resume=True)
    (out / name).unlink()
    with pytest.raises(OutputError, match=rf"holds {name}.*go on with --resume"):
        finished(out, resume=True, meanwhile=lambda: touch(out, name), names="ab")
    assert not (out / "config.json").exists()
    (out / name).unlink()
    finished(out, resume=True, names="ab")
    assert (out / "config.json").exists() and (out / "notes.txt").exists()


def test_a_merge_that_replaces_a_checkpoint_in_folders_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, content in (("config.json", "{}"), ("1_Pooling/config.json", "{}")):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    (out / "modules.json").write_text('[{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]')
    with contextlib.suppress(KeyboardInterrupt), open_output(out, {}, [], resume=False, force=True):
        raise KeyboardInterrupt
    finished(out, resume=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "merge_report.json",
        "model.safetensors",
        "vocab.txt",
    ]


def test_what_a_kill_in_the_clean_up_left_goes_at_the_next_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(out)
    touch(out / ".largemerge", "lock", "side/x")
    with pytest.raises(OutputError, match="holds a finished merge"):
        finished(out, resume=True)
    assert not (out / ".largemerge").exists() and (out / "config.json").exists()


def test_a_shard_that_is_taken_away_meanwhile_is_noticed(tmp_path: Path) -> None:
    tensors = {"a": OutputTensor(torch.float32, (4, 4))}
    with ShardWriter(tmp_path, tensors, layout_shards(tensors, 1 << 20)) as writer:
        (tmp_path / "model.safetensors").unlink()
        writer.write("a", torch.ones(4, 4))
        with pytest.raises(OutputError, match="was deleted or replaced while it was being written"):
            writer.flush()


@pytest.mark.parametrize("name", ["mask", "query.bias"])
def test_a_mask_is_what_it_is(tmp_path: Path, name: str) -> None:
    tensors = {name: OutputTensor(torch.float32, (2, 2))}
    mask = torch.full((2, 2), -float("inf")).triu(1)
    refused = contextlib.nullcontext() if name == "mask" else pytest.raises(NotFiniteError)
    with ShardWriter(tmp_path, tensors, layout_shards(tensors, 1 << 20)) as writer, refused:
        writer.write(name, mask)


@pytest.mark.parametrize(
    ("values", "found"),
    [([1.0, float("nan")], "NaN"), ([1.0, float("inf")], "infinity"), ([0.0, -float("inf")], "infinity")],
)
def test_what_is_no_number_is_not_written(tmp_path: Path, values: list[float], found: str) -> None:
    tensors = {"a": OutputTensor(torch.bfloat16, (2,))}
    refused = pytest.raises(NotFiniteError, match=f"with {found}")
    with ShardWriter(tmp_path, tensors, layout_shards(tensors, 1 << 20)) as writer, refused:
        writer.write("a", torch.tensor(values, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_numbers_are_told_from_what_is_none_in_every_dtype(dtype: torch.dtype) -> None:
    good = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert not_finite(good) is None
    largest = torch.full((3, 1000), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert not_finite(largest) is None, "their sum overflows, and they do not"
    infinite = [] if dtype is torch.float8_e4m3fn else [([float("inf")], "infinity"), ([-float("inf")], "infinity")]
    infinite += [] if dtype is torch.float8_e4m3fn else [([float("inf"), -float("inf")], "infinity")]
    for values, found in [([float("nan")], "NaN"), *infinite]:
        for place in (0, 1234, 3000 - len(values)):
            bad = good.clone().to(torch.float64)
            bad.view(-1)[place : place + len(values)] = torch.tensor(values, dtype=torch.float64)
            assert not_finite(bad.to(dtype)) == found


def test_a_disk_without_room_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: OutputTensor(torch.float32, (1 << 40,)) for name in ("a", "b")}
    shards = layout_shards(tensors, 1 << 20)
    with pytest.raises(OutputError, match=r"free, and .* more are needed"), ShardWriter(tmp_path, tensors, shards):
        pass
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(writer_module, "_check_room", lambda folder, shards: None)
    with pytest.raises(OutputError, match="expected room for"), ShardWriter(tmp_path, tensors, shards):
        pass
    assert list(tmp_path.iterdir()) == []
