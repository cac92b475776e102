"""Experts merged one after another: their order, the numbers of each step, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from cases import weights_in

import largemerge
from largemerge import ConfigError
from largemerge.cli import main

Config = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(4):
        tiny_models.perturbed("llama", seed).save_pretrained(tmp_path / f"model{seed}")
    return tmp_path


def write(folder: Path, **keys: Any) -> Path:
    path = folder / "curriculum.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "curriculum", **keys}))
    return path


def models(**scores: float | None) -> list[Config]:
    return [
        {"model": model, "parameters": {} if score is None else {"score": score}} for model, score in scores.items()
    ]


def test_the_least_capable_comes_first(folder: Path) -> None:
    path = write(folder, models=models(model1=0.5, model2=0.9, model3=0.1), parameters={"weight": 0.25})
    largemerge.merge(path, folder / "out")
    first, second, third = (weights_in(folder / name) for name in ("model3", "model1", "model2"))
    out = weights_in(folder / "out")
    assert out.keys() == first.keys()
    for name, tensor in out.items():
        so_far = 0.75 * first[name] + 0.25 * second[name]
        torch.testing.assert_close(tensor, 0.75 * so_far + 0.25 * third[name])
    report = json.loads((folder / "out" / "merge_report.json").read_text())
    assert list(report["before"]) == ["curriculum-step-1"]
    assert not (folder / "out" / ".largemerge").exists()


def test_without_scores_the_order_is_that_of_the_file_and_each_has_its_weight(folder: Path) -> None:
    entries = models(model2=None, model0=None, model1=None)
    entries[1]["parameters"]["weight"], entries[2]["parameters"]["weight"] = 0.4, 0.1
    largemerge.merge(write(folder, models=entries), folder / "out")
    first, second, third = (weights_in(folder / name) for name in ("model2", "model0", "model1"))
    for name, tensor in weights_in(folder / "out").items():
        torch.testing.assert_close(tensor, 0.9 * (0.6 * first[name] + 0.4 * second[name]) + 0.1 * third[name])


def test_steps_of_ties_are_the_merges_written_out(folder: Path) -> None:
    parameters = {"step": "ties", "density": 0.5, "order": "descending"}
    shared: Config = {"base_model": "model0", "dtype": "float32"}
    path = write(folder, models=models(model1=1, model2=2, model3=3), parameters=parameters, **shared)
    largemerge.merge(path, folder / "out")

    def step(so_far: str, expert: str, **more: Any) -> Config:
        entries = [{"model": so_far, "parameters": {"weight": 0.5}}, {"model": expert, "parameters": {"weight": 0.5}}]
        return {"merge_method": "ties", "models": entries, "parameters": {"density": 0.5}, **shared, **more}

    written = folder / "written.yaml"
    written.write_text(yaml.safe_dump_all([step("model3", "model2", name="a"), step("a", "model1")]))
    largemerge.merge(written, folder / "expected")
    out, expected = weights_in(folder / "out"), weights_in(folder / "expected")
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())


def test_steps_of_slerp_go_from_the_merge_so_far_to_the_next(folder: Path) -> None:
    parameters = {"step": "slerp", "weight": 0.3}
    largemerge.merge(write(folder, models=models(model1=2, model2=1), parameters=parameters), folder / "out")
    slerp = {"merge_method": "slerp", "base_model": str(folder / "model2"), "parameters": {"t": 0.3}}
    largemerge.merge({**slerp, "models": [{"model": str(folder / "model1")}]}, folder / "expected")
    out, expected = weights_in(folder / "out"), weights_in(folder / "expected")
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("better", "first"), [("higher", "model2"), ("lower", "model1")])
def test_scores_come_from_an_evaluation(folder: Path, better: str, first: str) -> None:
    found = {"model1": 0.8, "model2": 0.2, "model3": 0.5}
    listed = [
        {"name": name, "reference": str(folder / name), "role": "model", "average": mean, "mean": mean}
        for name, mean in found.items()
    ]
    (folder / "scores").mkdir()
    told = {"tasks": [{"better": better}], "models": listed}
    (folder / "scores" / "evaluation.json").write_text(json.dumps(told))
    entries = models(model3=None, model1=None, model2=None)
    path = write(folder, models=entries, parameters={"scores": "scores", "weight": 0.0})
    largemerge.merge(path, folder / "out")  # weights of 0 keep the first
    out, expected = weights_in(folder / "out"), weights_in(folder / first)
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("step", ["linear", "task_arithmetic"])
def test_steps_after_the_last_merge_measure_from_the_base_and_hold_it_against_all_experts(
    folder: Path, step: str
) -> None:
    keys: Config = {"base_model": "model0", "models": models(model1=1, model2=2, model3=3)}
    largemerge.merge(write(folder, **keys, parameters={"step": step}, post=["rescale"]), folder / "out")
    base, *experts = (weights_in(folder / f"model{number}") for number in range(4))
    for name, tensor in weights_in(folder / "out").items():
        first, second, third = (expert[name].double() - base[name].double() for expert in experts)
        expected = ((first + second) / 2 + third) / 2
        if tensor.dim() == 2 and "embed" not in name and "head" not in name:
            mean = sum(delta.norm() for delta in (first, second, third)) / 3
            expected = expected * mean / expected.norm()
        assert (tensor.double() - base[name].double() - expected).norm() <= 1e-4 * expected.norm(), name


def test_one_of_several_documents_may_be_a_curriculum(folder: Path) -> None:
    last = {"merge_method": "linear", "models": [{"model": "built"}, {"model": "model0"}], "parameters": {"weight": 1}}
    path = folder / "documents.yaml"
    built = {"merge_method": "curriculum", "name": "built", "models": models(model1=1, model2=2, model3=3)}
    path.write_text(yaml.safe_dump_all([last, built]))
    largemerge.merge(path, folder / "out", intermediate_dir=folder / "kept")
    assert sorted(each.name for each in (folder / "kept").iterdir()) == ["built", "built-step-1"]
    a, b, c, d = (weights_in(folder / f"model{number}") for number in range(4))
    for name, tensor in weights_in(folder / "out").items():
        expected = (((b[name] + c[name]) / 2 + d[name]) / 2 + a[name]) / 2
        torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"models": models(model1=1)}, "models: "),
        ({"models": models(model1=1, model2=None)}, "score: missing for model2"),
        ({"parameters": {"order": "ascending"}}, "parameters.order: ascending needs scores"),
        ({"parameters": {"order": "upwards"}}, "parameters.order: "),
        ({"parameters": {"weight": 1.5}}, "parameters.weight: "),
        ({"parameters": {"step": "tie"}}, "did you mean 'ties'?"),
        ({"parameters": {"step": "tsv_m"}}, "is no method that weighs two models"),
        ({"parameters": {"step": "ties"}}, "base_model: ties needs one"),
        ({"parameters": {"step": "slerp"}, "base_model": "model0"}, "leave it out"),
        ({"parameters": {"step": "ties"}, "base_model": "model1"}, "models: model1 is the base"),
        ({"parameters": {"density": 0.5}}, "does nothing: linear has no density"),
        ({"parameters": {"density": 7, "step": "ties"}, "base_model": "model0"}, "density: expected"),
        ({"parameters": {"scores": "nowhere"}}, "nowhere"),
        ({"parameters": {"scores": "curriculum.yaml"}}, "parameters.scores: "),
        ({"slices": [], "models": []}, "slices: a curriculum is made of whole models"),
        ({"base_model": "model0"}, "base_model: linear has none, so that it does nothing"),
        ({"parameters": {"step": "slerp"}, "post": ["rescale"]}, "post: a step of slerp begins at the merge so far"),
        ({"parameters": {"step": "ties", "stepp": "x"}, "base_model": "model0"}, "did you mean 'step'?"),
        ({"models": [{"model": "model1", "parameters": {"weight": 0.4}}, {"model": "model2"}]}, "model1 comes first"),
        ({"models": [{"model": "model1", "parameters": {"density": 0.4}}, {"model": "model2"}]}, "belongs under"),
        ({"models": [{"model": "model1"}, {"model": "model9"}]}, "model9"),
        ({"modells": []}, "modells"),
    ],
)
def test_mistakes_are_told_before_anything_is_merged(
    folder: Path, capsys: pytest.CaptureFixture[str], keys: Config, expected: str
) -> None:
    path = write(folder, **{"models": models(model1=None, model2=None), **keys})
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(path), str(folder / "out"), "--strict"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and expected in " ".join(told.split()) and "Traceback" not in told
    assert not (folder / "out").exists()


def test_what_takes_one_merge_says_that_a_curriculum_is_several(folder: Path) -> None:
    path = write(folder, models=models(model1=1, model2=2))
    with pytest.raises(ConfigError, match="curriculum makes several merges"):
        largemerge.compare(path, {"tasks": []}, methods=["curriculum"], out=folder / "out")
