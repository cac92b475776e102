"""A block that is written while the next one is merged: the same files, noted when they are on the disk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import MakeCase, weights_in
from processes import journal

import largemerge
from largemerge import devices
from largemerge.checkpoint.tensor_info import Tensors
from largemerge.distributed.ranks import Ranks
from largemerge.errors import LargemergeError, OutputError
from largemerge.progress import Clock
from largemerge.regression.engine import BackgroundWriter, Engine
from largemerge.regression.planning.workload import Placement
from largemerge.regression.tensor_plan import BlockPlan
from largemerge.regression.weights import Weights


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes in the background, as on a GPU."""
    monkeypatch.setattr(Placement, "writes_in_background", lambda placement, device: placement.prefetch)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "t5", "clip_vision"])
def test_the_same_bits(make_case: MakeCase, request: pytest.FixtureRequest, architecture: str, method: str) -> None:
    case = make_case(architecture, method=method)
    at_once = largemerge.merge(case.config, case.folder / "at-once", device="cpu").to_json()
    request.getfixturevalue("in_background")
    later = largemerge.merge(case.config, case.folder / "in_background", device="cpu").to_json()
    expected, found = weights_in(case.folder / "at-once"), weights_in(case.folder / "in_background")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(later["blocks"]) == list(at_once["blocks"])
    for name, entry in at_once["blocks"].items():
        assert later["blocks"][name] | {"seconds": 0} == entry | {"seconds": 0}


@pytest.mark.usefixtures("in_background")
def test_a_block_is_written_while_the_next_is_merged(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("llama")
    events: list[str] = []
    write, merge_pass = Weights.write, Engine._merge_pass

    def slow(weights: Weights, on_disk: Tensors) -> int:
        layers = [name for name in on_disk if name.startswith("model.layers.")]
        block = layers[0].split(".")[2] if layers else "outside"
        events.append(f"write {block}")
        time.sleep(0.3)
        written = write(weights, on_disk)
        events.append(f"written {block}")
        return written

    def recorded(engine: Engine, block: BlockPlan, *rest: object) -> object:
        events.append(f"merge {block.index}")
        return merge_pass(engine, block, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Weights, "write", slow)
    monkeypatch.setattr(Engine, "_merge_pass", recorded)
    largemerge.merge(case.config, case.folder / "out", device="cpu")
    assert events.index("write 0") < events.index("merge 1") < events.index("written 0") < events.index("write 1")
    assert events[-1].startswith("written")


class RecordedCuda:
    """In the place of `torch.cuda`: records what is queued on streams."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.Stream = lambda device: SimpleNamespace(wait_event=lambda event: self.calls.append("wait"))
        self.Event = lambda: SimpleNamespace(record=lambda stream: self.calls.append(f"made on {stream}"))
        self.current_stream = lambda device: "computing"

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """As `torch.cuda` has it."""
        yield

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        """As `torch.cuda` has it."""
        self.calls.append("on its own")
        yield
        self.calls.append("no longer")


def test_on_a_gpu_writing_waits_for_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, done = RecordedCuda(), list[Any]()
    monkeypatch.setattr(devices, "_cuda", gpu)

    def write(on_disk: Tensors) -> int:
        gpu.calls.append("written")
        return 4

    weights: Any = SimpleNamespace(device=torch.device("cuda"), to_disk_layout=dict, write=write, writer=object())
    clock = Clock(0.0)
    clock.begin("block")
    with BackgroundWriter(weights, clock, Ranks(), lambda *entry: done.append(entry)) as output:
        output.write({"a": torch.zeros(1)}, in_background=True)
        output.finish_block("block", {"linears": {}})
    assert gpu.calls == ["made on computing", "on its own", "wait", "written", "no longer"]
    ((block, report),) = done
    assert block == "block" and report["bytes_written"] == 4


@pytest.mark.usefixtures("in_background")
def test_what_could_not_be_written_is_merged_again(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("llama")
    out = case.folder / "out"
    largemerge.merge(case.config, case.folder / "unbroken", device="cpu")
    write = Weights.write

    def full(weights: Weights, on_disk: Tensors) -> int:
        if any(name.startswith("model.layers.1.") for name in on_disk):
            raise OutputError("no space left on device")
        return write(weights, on_disk)

    monkeypatch.setattr(Weights, "write", full)
    with pytest.raises(LargemergeError, match="no space left"):
        largemerge.merge(case.config, out, device="cpu")
    assert [line["part"] for line in journal(out)] == ["outside", "model.layers.0"]
    monkeypatch.setattr(Weights, "write", write)
    report = largemerge.merge(case.config, out, device="cpu", resume=True)
    assert report.to_json()["resumed_parts"] == 2
    found = weights_in(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights_in(case.folder / "unbroken").items())
    assert json.loads((out / "merge_report.json").read_text())["blocks"]["model.layers.1"]["bytes_written"] > 0
