"""Feeds the readers of strangers' files with what Atheris makes, and counts what ends in anything but an error of ours.

    python benchmarks/fuzz_readers.py --runs 20000            each target; --only headers for one of them

    json       text_files.read_json
    headers    safetensors headers: tensors(), and what the safetensors library says of the same file
    index      config.json and model.safetensors.index.json in a folder: open_checkpoint
    adapters   adapter_config.json, on top of a model of one matrix: open_model
    pickles    pytorch_model.bin, entries changed byte by byte: read to the end

Each target runs in a process of its own, since a crash or a hang ends it: both count as a failure. The last line is
JSON: for each target how many inputs were tried, and how many passed. Atheris: pip install 'largemerge[benchmarks]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MATRIX = "model.layers.0.self_attn.q_proj.weight"
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
SEEDS = {
    "json": [b'{"model_type": "llama", "list": [1, 2.5, null, true, "\\u00b2"]}', b"[[[]]]", b'{"a": 1e999}'],
    "headers": [
        b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}',
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"I8","shape":[16],"data_offsets":[0,16]}}',
    ],
    "index": [b'{"weight_map": {"a": "one.safetensors"}}', b'{"weight_map": {"a": "../one.safetensors"}}'],
    "adapters": [
        json.dumps(ADAPTER).encode(),
        json.dumps({**ADAPTER, "rank_pattern": {"q_proj": 2}, "use_dora": False, "modules_to_save": None}).encode(),
    ],
    "pickles": [],
}


def targets(folder: Path) -> dict[str, Callable[[bytes], None]]:
    """Makes the functions that take an input, each with its files in a folder."""
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    from largemerge.checkpoint.index import open_checkpoint
    from largemerge.checkpoint.lora import open_model, open_reader
    from largemerge.checkpoint.reader import CheckpointReader
    from largemerge.checkpoint.tensor_files import SafetensorsFile
    from largemerge.errors import CheckpointError
    from largemerge.text_files import read_json

    if importlib.util.find_spec("peft") is not None:
        import peft.mapping  # noqa: F401  (it takes seconds, which are no input's)
    for name in ("model", "adapter", "sharded", "pickle"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
    save_file({MATRIX: torch.ones(4, 4)}, folder / "model" / "model.safetensors")
    save_file({"a": torch.ones(2)}, folder / "sharded" / "one.safetensors")
    prefix = f"base_model.model.{MATRIX.removesuffix('.weight')}"
    factors = {f"{prefix}.lora_A.weight": torch.ones(2, 4), f"{prefix}.lora_B.weight": torch.ones(4, 2)}
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")

    def refused(read: Callable[[], object]) -> bool:
        try:
            read()
        except CheckpointError:
            return True
        return False

    def as_json(data: bytes) -> None:
        (folder / "a.json").write_bytes(data)
        refused(lambda: read_json(folder / "a.json", expected=object))

    def as_header(data: bytes) -> None:
        file = folder / "a.safetensors"
        file.write_bytes(struct.pack("<Q", len(data)) + data + bytes(16))
        ours = refused(SafetensorsFile(file).tensors)
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError:
            assert ours, "read, though the library refuses it"

    def as_index(data: bytes) -> None:
        (folder / "sharded" / "model.safetensors.index.json").write_bytes(data)
        refused(lambda: open_checkpoint(folder / "sharded", "model"))

    def as_adapter(data: bytes) -> None:
        (folder / "adapter" / "adapter_config.json").write_bytes(data)

        def read() -> None:
            checkpoint, adapter = open_model(f"{folder / 'model'}+{folder / 'adapter'}")
            with open_reader(checkpoint, adapter) as reader:
                assert torch.isfinite(reader.read(MATRIX)).all(), "NaN from settings"

        refused(read)

    torch.save({"a": torch.arange(8.0), "b": torch.ones(2, 3).T}, folder / "saved.bin")
    with zipfile.ZipFile(folder / "saved.bin") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}

    def as_pickle(data: bytes) -> None:
        name = sorted(entries)[data[0] % len(entries)] if data else ""
        with zipfile.ZipFile(folder / "pickle" / "pytorch_model.bin", "w") as archive:
            for each, content in entries.items():
                changed = bytearray(content)
                for place, byte in zip(data[1::2], data[2::2], strict=False):
                    if each == name and changed:
                        changed[place % len(changed)] = byte
                archive.writestr(each, bytes(changed))

        def read() -> None:
            checkpoint = open_checkpoint(folder / "pickle", "model")
            with CheckpointReader(checkpoint) as reader:
                for key in checkpoint.tensors:
                    reader.read(key)

        refused(read)

    return {"json": as_json, "headers": as_header, "index": as_index, "adapters": as_adapter, "pickles": as_pickle}


def run_target(name: str, runs: int, seed: int) -> None:
    """Runs one target in this process, and ends it."""
    import atheris

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="largemerge-fuzz-") as work:
        folder, corpus = Path(work), Path(work) / "corpus"
        corpus.mkdir()
        for number, content in enumerate(SEEDS[name] or [bytes(range(9))]):
            (corpus / str(number)).write_bytes(content)
        with atheris.instrument_imports(include=["largemerge.text_files", "largemerge.checkpoint"]):
            target = targets(folder)[name]
        options = [f"-runs={runs}", f"-seed={seed}", "-max_len=4096", "-timeout=20", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(corpus)], target)
        atheris.Fuzz()


def main() -> None:
    """Runs all targets, each in a process of its own, and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=SEEDS, help="one target alone")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.exit("fuzz_readers needs Atheris, which is not installed: pip install 'largemerge[benchmarks]'")
    if arguments.inside:
        run_target(arguments.only, arguments.runs, arguments.seed)
        return
    results: dict[str, Any] = {"benchmark": "fuzz_readers", "seed": arguments.seed, "targets": {}}
    for name in [arguments.only] if arguments.only else SEEDS:
        command = [sys.executable, __file__, "--inside", "--only", name, "--runs", str(arguments.runs)]
        ended = subprocess.run(
            [*command, "--seed", str(arguments.seed)], capture_output=True, text=True, errors="replace", check=False
        )
        done = [line for line in ended.stderr.splitlines() if line.startswith("Done ")]
        tried = int(done[-1].split()[1]) if done else arguments.runs
        passed = tried if done and ended.returncode == 0 else 0
        results["targets"][name] = {"tried": tried, "passed": passed}
        print(f"{name:9} tried {tried}, passed {passed}", flush=True)
        if not passed:
            print("\n".join([*ended.stdout.splitlines()[-15:], *ended.stderr.splitlines()[-15:]]))
    print(json.dumps(results))
    if any(not found["passed"] for found in results["targets"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
