"""The benchmarks run, small: that they do, never how fast."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TINY = ("--geometry", "tiny", "--samples", "4", "--length", "32")


def run(script: str, *arguments: str | Path, cwd: Path) -> list[str]:
    """The lines that a script prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(cwd)}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.splitlines()


def result(lines: list[str], benchmark: str) -> dict[str, Any]:
    """The line of JSON at the end."""
    found: dict[str, Any] = json.loads(lines[-1])
    assert found["benchmark"] == benchmark and found["machine"]["torch"]
    return found


@pytest.mark.slow
def test_clip_beside_a_float64_reference(tmp_path: Path) -> None:
    lines = run("clip_vs_fusionbench.py", "--quick", "--no-peer", "--reference", "--work", tmp_path, cwd=tmp_path)
    found = result(lines, "clip_vs_fusionbench")
    assert found["differences"]["float32 from reference"]["overall"] < 1e-4


@pytest.mark.slow
def test_plain_implementations(tmp_path: Path) -> None:
    result(run("smollm2_vs_plain.py", "--quick", "--work", tmp_path, cwd=tmp_path), "smollm2_vs_plain")


@pytest.mark.slow
def test_llamas_of_any_size(tmp_path: Path) -> None:
    lines = run("llama_synthetic.py", *TINY, "--work", tmp_path, cwd=tmp_path)
    found = result(lines, "llama_synthetic")
    assert found["planned_seconds"] > 0
    assert not list(tmp_path.rglob("*.safetensors")), "what it made must be gone"


@pytest.mark.slow
def test_alignment_quality(tmp_path: Path) -> None:
    small = ("--pairs", "1", "--steps", "3", "--width", "16", "--layers", "2", "--work", tmp_path)
    found = result(run("alignment_quality.py", *small, cwd=tmp_path), "alignment_quality")
    assert found["streams"][0]["after"] > found["streams"][0]["before"]


@pytest.mark.slow
def test_quality(tmp_path: Path) -> None:
    small = ("--quick", "--family", "images", "--seeds", "0", "--samples", "2", "8", "--methods", "regmean_plusplus")
    plot = ("--work", tmp_path, "--plot", tmp_path / "quality.svg")
    rows = result(run("quality.py", *small, *plot, cwd=tmp_path), "quality")["rows"]
    shares = {(row["model"], row["samples"]): row["share"] for row in rows}
    assert shares["linear", None] == 0 and shares["experts", None] == 1
    assert {("regmean_plusplus", 2), ("regmean_plusplus", 8)} <= set(shares)
    assert "</svg>" in (tmp_path / "quality.svg").read_text()


@pytest.mark.slow
def test_quality_of_sequences_and_options(tmp_path: Path) -> None:
    small = ("--quick", "--seeds", "0", "--work", tmp_path)
    images = ("--family", "images", "--samples", "4", "--methods", "regmean")
    (row,) = result(run("quality_sequence.py", *small, *images, cwd=tmp_path), "quality_sequence")["rows"]
    assert row["in_sequence"] == pytest.approx(row["at_once"], abs=1e-3)
    assert [step["experts"] for step in row["steps"]] == [2, 3, 4] and row["steps"][-1]["sums_bytes"] > 0
    shares = result(run("quality_options.py", *small, cwd=tmp_path), "quality_options")["shares"]
    assert {"", "biases", "norms", "twice"} <= set(shares)


@pytest.mark.slow
def test_growth(tmp_path: Path) -> None:
    lines = run("growth.py", "--quick", "--work", tmp_path, "--plot", tmp_path / "growth.svg", cwd=tmp_path)
    result(lines, "growth")
    assert "</svg>" in (tmp_path / "growth.svg").read_text()


@pytest.fixture(scope="module")
def merge_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    run("synthetic_llama.py", folder / "llama", *TINY, "--num-models", "2", cwd=folder)
    return folder / "llama" / "merge.yaml"


@pytest.mark.slow
def test_several_ranks(tmp_path: Path, merge_yaml: Path) -> None:
    lines = run("ranks.py", merge_yaml, "--work", tmp_path / "ranks", "--repeats", "1", cwd=tmp_path)
    one, two = result(lines, "ranks")["rows"]
    assert two["ranks"] == 2 and two["bytes_communicated"] > 0 and two["difference"] < 1e-2
    assert two["bytes_read"] == one["bytes_read"]


@pytest.mark.slow
def test_hidden_states_on_disk(tmp_path: Path) -> None:
    found = result(run("hidden_states.py", "--quick", "--work", tmp_path / "hs", cwd=tmp_path), "hidden_states")
    assert found["disk"]["on_disk"]["disk_bytes"] > 0


@pytest.mark.slow
def test_roofline(tmp_path: Path, merge_yaml: Path) -> None:
    found = result(run("roofline.py", merge_yaml, tmp_path / "out", cwd=tmp_path), "roofline")
    assert found["ratio"] > 0


@pytest.mark.slow
def test_timeline(tmp_path: Path, merge_yaml: Path) -> None:
    plot = tmp_path / "timeline.svg"
    found = result(run("timeline.py", merge_yaml, tmp_path / "out", "--plot", plot, cwd=tmp_path), "timeline")
    assert {"collect", "solve", "forward"} <= set(found["seconds_by_stage"])
    assert "</svg>" in plot.read_text()


@pytest.mark.slow
def test_linears(tmp_path: Path) -> None:
    rows = result(run("linears.py", "--quick", cwd=tmp_path), "linears")["rows"]
    assert all(row["own_error"] <= 1.1 * row["torch_error"] for row in rows)


@pytest.mark.slow
def test_many_tensors(tmp_path: Path) -> None:
    lines = run("many_tensors.py", "--quick", "--repeats", "1", "--methods", "linear", "--work", tmp_path, cwd=tmp_path)
    assert [(row["num_many"], row["num_few"]) for row in result(lines, "many_tensors")["rows"]] == [(45, 21), (48, 12)]


@pytest.mark.slow
def test_neighbour(tmp_path: Path) -> None:
    small = ("--geometry", "tiny", "--num-samples", "2", "--length", "16")
    runs = result(run("neighbour.py", *small, "--work", tmp_path / "work", cwd=tmp_path), "neighbour")["runs"]
    assert {(waits, how) for waits in runs for how in runs[waits] if runs[waits][how]} == {
        (waits, how) for waits in ("sleep", "spin") for how in ("alone", "beside")
    }


@pytest.mark.slow
def test_mergekit_yaml(tmp_path: Path) -> None:
    lines = run("mergekit_yaml_parity.py", "--no-peer", "--quick", "--work", tmp_path, cwd=tmp_path)
    assert [row["tokens"] for row in result(lines, "mergekit_yaml_parity")["rows"]] == [311, 344]


@pytest.mark.slow
def test_data_free_methods(tmp_path: Path) -> None:
    small = ("--geometry", "tiny", "--methods", "linear", "ties", "--no-peer")
    found = result(run("data_free_vs_mergekit.py", *small, "--work", tmp_path, cwd=tmp_path), "data_free_vs_mergekit")
    assert [row["method"] for row in found["rows"]] == ["linear", "ties"]
    assert all(row["transfer_seconds"] > 0 for row in found["rows"])


@pytest.mark.slow
def test_whose_rounding(tmp_path: Path) -> None:
    small = ("--geometry", "tiny", "--methods", "multislerp", "karcher", "--no-peer")
    rows = result(run("rounding.py", *small, "--work", tmp_path, cwd=tmp_path), "rounding")["rows"]
    assert [row["method"] for row in rows] == ["multislerp", "karcher"]
    assert all(row["same"]["ours = float64"] > 0.99 for row in rows)
    assert not list(tmp_path.rglob("*.safetensors")), "what it made must be gone"


@pytest.mark.slow
def test_methods_of_the_literature(tmp_path: Path) -> None:
    some = ("--methods", "tsv_m", "opcm")
    lines = run("literature_methods.py", *some, "--no-peer", "--lapack", "--work", tmp_path, cwd=tmp_path)
    rows = {row["method"]: row for row in result(lines, "literature_methods")["rows"]}
    assert set(rows["tsv_m"]["bare_seconds"]) == {"values", "both", "lapack"} and rows["opcm"]["scratch_bytes"] > 0
    assert not list(tmp_path.rglob("*.safetensors")), "what it made must be gone"


@pytest.mark.slow
def test_architectures(tmp_path: Path) -> None:
    small = ("--only", "GPT2LMHeadModel", "ResNetForImageClassification", "--kind", "causal", "vision")
    lines = run("architectures.py", *small, "--json", tmp_path / "rows.json", cwd=tmp_path)
    counts = result(lines, "architectures")["summary"]
    assert counts["causal"]["regmean_plusplus"] == {"clean": 1, "right": 1, "wrong": 0}
    assert counts["vision"]["regmean"]["refused"] == counts["vision"]["ties"]["clean"] == 1
    assert [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())] == [small[1], small[2]]


@pytest.mark.slow
def test_what_checks_cost(tmp_path: Path) -> None:
    small = ("--geometry", "tiny", "--methods", "linear", "--repeats", "1")
    (row,) = result(run("checks.py", *small, "--work", tmp_path, cwd=tmp_path), "checks")["rows"]
    assert row["check_seconds"] > 0 and row["preparation_seconds"] > 0


@pytest.mark.slow
def test_faults_of_the_system_and_kills(tmp_path: Path) -> None:
    some = ("--work", tmp_path, "--cases")
    if shutil.which("cc") or shutil.which("gcc"):
        found = result(run("faults.py", "calls", "--count", "6", *some, "ties", cwd=tmp_path), "faults calls")
        assert found["tried"] == found["passed"] == 6
    found = result(run("faults.py", "kills", "--count", "3", *some, "regmean_plusplus", cwd=tmp_path), "faults kills")
    assert found["tried"] == found["passed"] >= 3


def test_fuzzers(tmp_path: Path) -> None:
    found = json.loads(run("fuzz_configs.py", "--examples", "20", "--step", "60", cwd=tmp_path)[-1])
    for kind in ("places", "values", "files"):
        assert found[kind]["tried"] == found[kind]["passed"] >= 20, kind
    if importlib.util.find_spec("atheris") is not None:
        found = json.loads(run("fuzz_readers.py", "--runs", "200", "--only", "headers", cwd=tmp_path)[-1])
        assert found["targets"]["headers"] == {"tried": 200, "passed": 200}


@pytest.mark.slow
def test_evaluation_beside_transformers(tmp_path: Path) -> None:
    small = ("--geometry", "tiny", "--num-samples", "4", "--length", "16", "--work", tmp_path / "work")
    runs = result(run("streamed_evaluation.py", *small, cwd=tmp_path), "streamed_evaluation")["runs"]
    assert runs["whole"]["loss"] == pytest.approx(runs["transformers"]["loss"], rel=1e-5)
    assert runs["by block"]["loss"] == pytest.approx(runs["transformers"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_settings_compared_together_and_alone(tmp_path: Path) -> None:
    small = ("--geometry", "tiny", "--num-samples", "4", "--length", "16", "--work", tmp_path / "work")
    lines = run("compare_settings.py", *small, cwd=tmp_path)
    assert len(result(lines, "compare_settings")["alone"]) == 21
    (line,) = (line for line in lines if line.startswith("largest relative difference"))
    assert float(line.rsplit(" ", 1)[1]) < 1e-5
