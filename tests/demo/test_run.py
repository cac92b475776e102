"""`largemerge demo`, in miniature: the folder it leaves, its merges, and what a second run does again."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import LlamaForCausalLM

import largemerge
from largemerge.demo import DemoSettings, run_demo
from largemerge.demo import run as demo_run
from largemerge.demo.corpora import load_corpora
from largemerge.demo.measure import best, losses_svg

SETTINGS = DemoSettings(
    train_chars=6000,
    calibration_chars=3000,
    held_out_chars=1500,
    vocabulary_size=320,
    hidden_size=32,
    num_layers=2,
    sequence_length=32,
    batch_size=4,
    base_steps=3,
    expert_steps=3,
    calibration_samples=8,
)
NOTEBOOK = Path(__file__).parents[2] / "examples" / "compare-two-experts.ipynb"
KINDS = ("code", "prose", "names")
OUTPUTS = {
    "base",
    "calibrated.yaml",
    "calibration",
    "experts",
    "largemerge_demo.json",
    "losses.svg",
    "merged-calibrated",
    "merged-regmean",
    "merged-regmean_plusplus",
    "regmean.yaml",
    "regmean_plusplus.yaml",
}
MODELS = ["base", "code expert", "prose expert", "names expert", "average", "RegMean", "RegMean++", "Calibrated"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    run_demo(out, SETTINGS)
    return out


@pytest.fixture
def demo(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of all trainings from here on."""
    folders: list[Path] = []
    train = demo_run.train_all

    def watched(folder: Path, *rest: object) -> None:
        folders.append(folder)
        train(folder, *rest)

    monkeypatch.setattr(demo_run, "train_all", watched)
    return folders


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_folder_holds_exactly_what_it_should(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == OUTPUTS
    assert {path.name for path in (finished / "experts").iterdir()} == set(KINDS)
    assert {path.name for path in (finished / "calibration").iterdir()} == {f"{kind}.jsonl" for kind in KINDS}


@pytest.mark.parametrize("name", ["base", *(f"experts/{kind}" for kind in KINDS)])
@pytest.mark.parametrize("merged", ["merged-regmean", "merged-regmean_plusplus", "merged-calibrated"])
def test_merges_load_whole_and_differ_from_what_was_merged(finished: Path, merged: str, name: str) -> None:
    model, info = LlamaForCausalLM.from_pretrained(finished / merged, output_loading_info=True)
    assert not any(info.values()), info
    other = LlamaForCausalLM.from_pretrained(finished / name)
    down = "model.layers.0.mlp.down_proj.weight"
    assert not model.state_dict()[down].equal(other.state_dict()[down])


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus", "calibrated"])
def test_its_configs_are_ones_that_a_user_can_run(demo: Path, method: str) -> None:
    assert not largemerge.plan(demo / f"{method}.yaml", device="cpu").problems
    largemerge.merge(demo / f"{method}.yaml", demo / "mine", device="cpu")
    assert weights(demo / "mine") == weights(demo / f"merged-{method}")


def test_the_table_and_the_picture_name_every_model(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_demo(demo, SETTINGS)
    printed = capsys.readouterr().out
    root = ElementTree.parse(demo / "losses.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for label in MODELS:
        assert texts.count(label) == 1, label
        assert label in printed
    for kind in (*KINDS, "mean"):
        assert kind in texts


def test_a_second_run_uses_the_models_again(demo: Path, trainings: list[Path]) -> None:
    before = {kind: weights(demo / "experts" / kind) for kind in KINDS}
    run_demo(demo, SETTINGS)
    assert not trainings
    assert {kind: weights(demo / "experts" / kind) for kind in KINDS} == before


def test_other_settings_train_anew(demo: Path, trainings: list[Path]) -> None:
    before = weights(demo / "base")
    run_demo(demo, dataclasses.replace(SETTINGS, seed=1))
    assert trainings == [demo]
    assert weights(demo / "base") != before


def test_an_interrupted_training_is_done_again(
    demo: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[Path]
) -> None:
    train = demo_run.train_all
    original = weights(demo / "experts" / "names")

    def interrupted(folder: Path, *rest: object) -> None:
        train(folder, *rest)
        raise KeyboardInterrupt

    (demo / "base" / "model.safetensors").unlink()
    monkeypatch.setattr(demo_run, "train_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(demo, SETTINGS)
    monkeypatch.setattr(demo_run, "train_all", train)
    run_demo(demo, SETTINGS)
    assert trainings == [demo, demo]
    assert weights(demo / "experts" / "names") == original, "the same seed gives the same model"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(largemerge.OutputError, match="choose another --out"):
        run_demo(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_python_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(largemerge.LargemergeError, match=r"too little code .* complete Python"):
        run_demo(tmp_path / "out", SETTINGS)


def test_no_text_is_used_twice() -> None:
    corpora = load_corpora(DemoSettings())
    assert corpora == load_corpora(DemoSettings())
    assert tuple(corpora) == KINDS
    for kind in ("prose", "names"):
        corpus = corpora[kind]
        lines = Counter(
            line for text in (*corpus.train, *corpus.calibration, *corpus.held_out) for line in text.splitlines()
        )
        assert not [line for line, count in lines.items() if count > 1]
    parts = [set(getattr(corpora["code"], part)) for part in ("train", "calibration", "held_out")]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_calibration_is_no_training_text(finished: Path) -> None:
    corpora = load_corpora(SETTINGS)
    for kind in KINDS:
        lines = (finished / "calibration" / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = {json.loads(line)["text"] for line in lines}
        assert texts == set(corpora[kind].calibration)
        assert not texts & set(corpora[kind].train)


def test_merges_that_cannot_be_told_apart_are_equally_good() -> None:
    losses = {"a": {"mean": 2.0}, "b": {"mean": 2.001}, "c": {"mean": 2.1}, "expert": {"mean": 1.0}}
    assert best(losses, ["a", "b", "c"], "mean") == {"a", "b"}


def test_a_picture_of_equal_losses_and_strange_names() -> None:
    svg = losses_svg({"a<b": {"x&y": 1.0}, "c": {"x&y": 1.0}}, ["c"])
    assert "a<b" in [element.text for element in ElementTree.fromstring(svg).iter()]


def test_the_notebook_runs_on_the_demos_experts(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "notebook"
    work.mkdir()
    monkeypatch.setenv("LARGEMERGE_DEMO", str(demo))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "kept without outputs"
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(work)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data for output in outputs if output.output_type in ("execute_result", "display_data")]
    assert any("calibrated" in data.get("text/html", "") for data in shown), "the table of trials"
    assert any("<svg" in data.get("image/svg+xml", "") for data in shown), "the picture"
    assert (work / "merged" / "config.json").exists()
    assert (work / "comparison" / "best" / "config.json").exists()
