"""The output folder: nothing is called finished that is not what was planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from largemerge.checkpoint.tensor_info import OutputTensor
from largemerge.checkpoint.writer import ShardWriter, layout_shards
from largemerge.errors import MergeError
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
            assert str(file) in caught.value.problems[0] and "--resume finds out" in caught.value.problems[1]
            assert not (out / "config.json").exists() and working.is_dir()
        file.write_bytes(whole)
        folder.finish(shards, lambda path: None, "{}", {})
    assert (out / "config.json").exists() and not working.exists()
