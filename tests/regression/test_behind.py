"""A block that is written while the next one is merged: the same files, noted when they are on the disk."""

from __future__ import annotations

import json
import time

import pytest
import torch
from cases import MakeCase, weights_in
from processes import journal

import largemerge
from largemerge.errors import LargemergeError, OutputError
from largemerge.estimate import Placement
from largemerge.regression.engine import Engine
from largemerge.treatment import BlockPlan
from largemerge.weights import Tensors, Weights


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(Placement, "writes_behind", lambda placement, device: placement.prefetch)


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "t5", "clip_vision"])
def test_the_same_bits(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, architecture: str, method: str) -> None:
    case = make_case(architecture, method=method)
    at_once = largemerge.merge(case.config, case.folder / "at-once", device="cpu").to_json()
    monkeypatch.setattr(Placement, "writes_behind", lambda placement, device: placement.prefetch)
    later = largemerge.merge(case.config, case.folder / "behind", device="cpu").to_json()
    expected, found = weights_in(case.folder / "at-once"), weights_in(case.folder / "behind")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(later["blocks"]) == list(at_once["blocks"])
    for name, entry in at_once["blocks"].items():
        assert later["blocks"][name] | {"seconds": 0} == entry | {"seconds": 0}


@pytest.mark.usefixtures("behind")
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

    def told(engine: Engine, block: BlockPlan, *rest: object) -> object:
        events.append(f"merge {block.index}")
        return merge_pass(engine, block, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Weights, "write", slow)
    monkeypatch.setattr(Engine, "_merge_pass", told)
    largemerge.merge(case.config, case.folder / "out", device="cpu")
    assert events.index("write 0") < events.index("merge 1") < events.index("written 0") < events.index("write 1")
    assert events[-1].startswith("written")


@pytest.mark.usefixtures("behind")
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
