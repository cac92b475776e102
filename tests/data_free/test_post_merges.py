"""Whole merges with steps after them: every tensor, reports, resuming, ranks, memory, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import data_free_reference as reference
import processes
import pytest
import tiny_models
import torch
import transformers as tf
import yaml
from cases import weights_in
from data_free_cases import Config, config_of, kill_and_resume, write_models

import largemerge
from largemerge import ConfigError
from largemerge.cli import main
from largemerge.data_free import engine, loader, resources, tasks
from largemerge.machine import memory_in_use

LINEARS = ("_proj.weight", "c_attn.weight", "c_fc.weight", "c_proj.weight")
STEPS: list[Any] = [{"svc": {"alpha": 0.5}}, {"subspace_boosting": {"beta": 0.2}}, {"rescale": {"factor": 1.1}}]
METHODS: dict[str, Config] = {
    "linear": {"parameters": {"weight": 1}},
    "task_arithmetic": {"parameters": {"weight": 0.4}},
    "dare_linear": {"parameters": {"weight": 0.4, "density": 0.5}},
    "model_stock": {},
    "karcher": {},
    "tsv_m": {},
    "opcm": {},
}
Formula = Callable[[torch.Tensor, reference.Deltas], torch.Tensor]


def all_steps(merged: torch.Tensor, deltas: reference.Deltas) -> torch.Tensor:
    merged = reference.subspace_boosting(reference.svc(merged, deltas, 0.5), 0.2)
    return reference.rescale(merged, deltas, 1.1)


def all_but_boosting(merged: torch.Tensor, deltas: reference.Deltas) -> torch.Tensor:
    return reference.rescale(reference.svc(merged, deltas, 0.5), deltas, 1.1)


def with_base(folder: Path, method: str, models: list[int] | None = None, **more: Any) -> Config:
    return config_of(folder, method, models, base_model=str(folder / "model0"), **{**METHODS.get(method, {}), **more})


def check(
    folder: Path, before: Path, after: Path, formula: Formula, models: list[int], *, turned: bool = False
) -> None:
    """Compares a merge with steps to the same one without them, and the steps' formulas."""
    base, merged, found = weights_in(folder / "model0"), weights_in(before), weights_in(after)
    candidates = [weights_in(folder / f"model{number}") for number in models]
    assert found.keys() == merged.keys()
    for name, tensor in found.items():
        if not name.endswith(LINEARS):
            assert torch.equal(tensor, merged[name]), name
            continue
        delta = merged[name].double() - base[name].double()
        deltas = [each[name].double() - base[name].double() for each in candidates]
        delta, deltas = (delta.T, [each.T for each in deltas]) if turned else (delta, deltas)
        expected = formula(delta, deltas)
        expected = expected.T if turned else expected
        error = (tensor.double() - base[name].double() - expected).norm()
        assert error <= 1e-3 * expected.norm() + 1e-6 * base[name].double().norm(), name


@pytest.mark.parametrize("method", METHODS)
def test_every_matrix_is_what_the_steps_make_of_it(tmp_path: Path, method: str) -> None:
    write_models(tmp_path)
    config = with_base(tmp_path, method)
    without = {key: value for key, value in config.items() if method != "linear" or key != "base_model"}
    largemerge.merge(without, tmp_path / "before")
    # TSV-M leaves a direction to rounding, which the dense formula would boost.
    steps, formula = (STEPS, all_steps) if method != "tsv_m" else ([STEPS[0], STEPS[2]], all_but_boosting)
    largemerge.merge(config | {"post": steps}, tmp_path / "after")
    check(tmp_path, tmp_path / "before", tmp_path / "after", formula, [1, 2, 3])


def test_matrices_that_are_stored_inputs_first(tmp_path: Path) -> None:
    write_models(tmp_path, "gpt2")
    for method in ("linear", "tsv_m"):
        config = with_base(tmp_path, method)
        without = {key: value for key, value in config.items() if method != "linear" or key != "base_model"}
        largemerge.merge(without, tmp_path / method)
        report = largemerge.merge(config | {"post": [{"svc": {"alpha": 0.5}}]}, tmp_path / f"{method}-post")
        formula: Formula = lambda merged, deltas: reference.svc(merged, deltas, 0.5)  # noqa: E731
        check(tmp_path, tmp_path / method, tmp_path / f"{method}-post", formula, [1, 2, 3], turned=True)
        assert any("taken as [inputs, outputs]" in note for note in report.plan.notes)


def test_steps_get_the_merge_before_it_is_rounded(tmp_path: Path) -> None:
    write_models(tmp_path, dtype=torch.bfloat16)
    config = with_base(tmp_path, "task_arithmetic", post=STEPS)
    largemerge.merge(config, tmp_path / "half")
    largemerge.merge(config | {"dtype": "float32"}, tmp_path / "single")
    single = weights_in(tmp_path / "single")
    for name, tensor in weights_in(tmp_path / "half").items():
        assert tensor.dtype == torch.bfloat16
        if name.endswith(LINEARS):
            assert torch.equal(tensor, single[name].to(torch.bfloat16)), name


def test_a_finished_merge_is_held_against_its_models(tmp_path: Path) -> None:
    write_models(tmp_path)
    largemerge.merge(with_base(tmp_path, "linear", post=STEPS), tmp_path / "at-once")
    largemerge.merge(config_of(tmp_path, "linear", **METHODS["linear"]), tmp_path / "merged")
    candidates = [str(tmp_path / f"model{number}") for number in (1, 2, 3)]
    later = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "merged")}], "post": STEPS}
    later |= {"base_model": str(tmp_path / "model0"), "candidates": candidates}
    report = largemerge.merge(later, tmp_path / "later")
    found, expected = weights_in(tmp_path / "later"), weights_in(tmp_path / "at-once")
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in expected.items())
    assert set(report.to_json()["plan"]["models"]) == {str(tmp_path / "merged"), *candidates, later["base_model"]}
    card = (tmp_path / "later" / "README.md").read_text()
    assert "# A merge of 1 models" in card and "| merged | `merged` |" in card and "| model1 |" not in card


def test_a_merge_of_the_same_file_is_a_candidate(tmp_path: Path) -> None:
    write_models(tmp_path)
    first = config_of(tmp_path, "linear", [2, 3], **METHODS["linear"]) | {"name": "first"}
    second = with_base(tmp_path, "linear", [1, 2], post=["svc"], candidates=["first", str(tmp_path / "model1")])
    path = tmp_path / "merges.yml"
    path.write_text(yaml.safe_dump_all([first, second]))
    largemerge.merge(path, tmp_path / "out")
    largemerge.merge(first, tmp_path / "first")
    largemerge.merge(second | {"candidates": [str(tmp_path / "first"), str(tmp_path / "model1")]}, tmp_path / "by-hand")
    found = weights_in(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights_in(tmp_path / "by-hand").items())


def test_the_base_of_a_method_without_one_is_not_merged(tmp_path: Path) -> None:
    write_models(tmp_path)
    nothing: list[Any] = [{"rescale": {"match_norm": False}}]
    plan = largemerge.merge(with_base(tmp_path, "linear", post=nothing), tmp_path / "beside").plan
    assert any("model0 is not merged: linear has no base" in note for note in plan.notes)
    assert any("warning: post: rescale: factor: 1 without match_norm: changes nothing" in note for note in plan.notes)
    listed = with_base(tmp_path, "linear", [1, 2, 3], post=nothing)
    listed["models"].append({"model": listed["base_model"]})
    plan = largemerge.merge(listed, tmp_path / "listed").plan
    assert not any("is not merged" in note for note in plan.notes)
    for out, models in (("beside", [1, 2, 3]), ("listed", [1, 2, 3, 0])):
        plain = config_of(tmp_path, "linear", models, **METHODS["linear"])
        largemerge.merge(plain, tmp_path / f"{out}-plain")
        found = weights_in(tmp_path / out)
        for name, tensor in weights_in(tmp_path / f"{out}-plain").items():
            assert torch.allclose(found[name], tensor, atol=1e-6), name


def test_parameters_by_filter_and_layer(tmp_path: Path) -> None:
    write_models(tmp_path)
    beta = [{"filter": "self_attn", "value": [0.1, 0.5]}, {"filter": "up_proj", "value": 0.9}]
    report = largemerge.merge(
        with_base(tmp_path, "linear", post=[{"subspace_boosting": {"beta": beta}}]), tmp_path / "out"
    )
    tensors = report.to_json()["tensors"]
    betas = {name: told["post"][0]["subspace_boosting"]["beta"] for name, told in tensors.items() if "post" in told}
    assert betas["model.layers.0.self_attn.q_proj.weight"] == 0.1
    assert betas["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(0.3)
    assert betas["model.layers.0.mlp.up_proj.weight"] == 0.9 and betas["model.layers.0.mlp.down_proj.weight"] == 0.01


def test_what_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path)
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(with_base(tmp_path, "task_arithmetic", post=["svc", {"rescale": {"factor": 2}}])))
    with pytest.raises(SystemExit) as done:
        main(["plan", str(path)])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "after the merge" in shown and "svc; rescale (match_norm true, factor 2): 21 matrices" in shown
    report = largemerge.merge(path, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    matrices = {name for name in told["tensors"] if name.endswith(LINEARS)}
    assert told["plan"]["post"]["steps"] == [{"svc": {}}, {"rescale": {"factor": 2}}]
    assert told["plan"]["post"]["matrices"] == len(matrices)
    assert set(told["plan"]["post"]["left"]) == set(told["tensors"]) - matrices
    assert told["plan"]["post"]["left"]["model.norm.weight"] == "a vector"
    assert {name for name, tensor in told["tensors"].items() if "left_by_post" in tensor} == set(
        told["tensors"]
    ) - matrices
    svc, rescale = told["post"]
    assert (svc["step"], svc["matrices"], rescale["parameters"]) == ("svc", len(matrices), {"factor": 2})
    base, found = weights_in(tmp_path / "model0"), weights_in(tmp_path / "out")
    ratios = []
    for name in matrices:
        norms = told["tensors"][name]["post_norms"]
        assert norms[2] == pytest.approx((found[name].double() - base[name].double()).norm().item(), rel=1e-4)
        ratios.append(norms[2] / norms[1])
    assert rescale["norms_times"]["lowest"] == min(ratios) and rescale["norms_times"]["highest"] == max(ratios)
    assert "norms of task vectors ×" in str(report) and "post: svc, rescale: as merged stay" in str(report)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## After the merge" in card and "arXiv 2602.05536" in card and f"on {len(matrices)} weight matrices" in card
    # What the output says it was made of makes it again.
    largemerge.merge(tmp_path / "out" / "largemerge_config.yaml", tmp_path / "again")
    again = weights_in(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_candidates_in_other_shapes_are_named(tmp_path: Path) -> None:
    write_models(tmp_path)
    torch.manual_seed(9)
    sizes = tiny_models.LLM | {"intermediate_size": 40}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(tmp_path / "wide")
    config = with_base(tmp_path, "linear", post=["svc"], candidates=[str(tmp_path / "wide"), str(tmp_path / "model1")])
    notes = "\n".join(largemerge.plan(config | {"allow_crimes": True}, probe=False).notes)
    assert "not held against" in notes and "wide, which lacks them, or has them in another shape" in notes
    assert "mlp.down_proj.weight" in notes
    alone = config | {"allow_crimes": True, "candidates": [str(tmp_path / "wide")]}
    notes = "\n".join(largemerge.plan(alone, probe=False).notes)
    assert "as merged stay" in notes and "no candidate has it, or one in another shape" in notes


def test_svc_after_equal_singular_values_is_told(tmp_path: Path) -> None:
    write_models(tmp_path)
    for method, steps in (("iso_c", ["svc"]), ("linear", ["subspace_boosting", "svc"])):
        notes = largemerge.plan(with_base(tmp_path, method, post=steps), probe=False).notes
        assert any("which makes singular values equal" in note for note in notes)
    notes = largemerge.plan(with_base(tmp_path, "linear", post=["svc", "subspace_boosting"]), probe=False).notes
    assert not any("which makes singular values equal" in note for note in notes)


def large_config(folder: Path, method: str) -> Path:
    """Writes the configuration of a merge of several parts and shards."""
    sizes = tiny_models.LLM | {"num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 256}
    for seed in range(3):
        torch.manual_seed(seed)
        tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(folder / f"model{seed}")
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(with_base(folder, method, [1, 2], post=STEPS)))
    return path


@pytest.mark.parametrize(
    ("method", "kill_at"), [("linear", 9), pytest.param("linear", 14, marks=pytest.mark.slow), ("opcm", 26)]
)
def test_a_killed_merge_goes_on(tmp_path: Path, method: str, kill_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_resume(large_config(tmp_path, method), tmp_path, kill_at, 500_000, monkeypatch)


def test_finished_parts_keep_their_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = large_config(tmp_path, "linear")
    monkeypatch.setattr(engine, "PART_BYTES", 500_000)
    merge_one = engine.Merger.__call__

    def fails(merger: engine.Merger, task: tasks.Task) -> None:
        if task.name.startswith("model.layers.9."):
            raise largemerge.LargemergeError("the power went out")
        merge_one(merger, task)

    monkeypatch.setattr(engine.Merger, "__call__", fails)
    with pytest.raises(largemerge.LargemergeError, match="power"):
        largemerge.merge(path, tmp_path / "out")
    monkeypatch.setattr(engine.Merger, "__call__", merge_one)
    report = largemerge.merge(path, tmp_path / "out", resume=True)
    assert report.resumed_parts > 0
    assert report.norms == largemerge.merge(path, tmp_path / "unbroken").norms
    with pytest.raises(largemerge.LargemergeError, match="config"):
        changed = yaml.safe_load(path.read_text()) | {"post": ["svc"]}
        monkeypatch.setattr(engine.Merger, "__call__", fails)
        with pytest.raises(largemerge.LargemergeError, match="power"):
            largemerge.merge(path, tmp_path / "other")
        largemerge.merge(changed, tmp_path / "other", resume=True)


@pytest.mark.parametrize(("method", "size"), [pytest.param("linear", 3, marks=pytest.mark.slow), ("opcm", 2)])
def test_ranks_share_the_tensors(tmp_path: Path, method: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = large_config(tmp_path, method)
    command = ["merge", path, tmp_path / "out", "--quiet"]
    processes.run_ranks(command, tmp_path, size, {processes.PART_BYTES: "500000", "CUDA_VISIBLE_DEVICES": "0"})
    monkeypatch.setattr(engine, "PART_BYTES", 500_000)
    alone = largemerge.merge(path, tmp_path / "alone")
    assert processes.lasting(tmp_path / "out") == processes.lasting(tmp_path / "alone"), "bit for bit"
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert len(report["ranks"]) == size and report["bytes_read"] == alone.bytes_read
    assert report["post"] == alone.to_json()["post"]


def test_memory_is_planned_for_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory_in_use(torch.device("cpu")).host_anonymous  # after a merge it would be more
    monkeypatch.setattr(resources, "baseline_bytes", lambda *_: before)
    path = large_config(tmp_path, "linear")
    plan = largemerge.plan(path, device="cpu")
    assert plan.seconds["computing"] > 0
    posted = max((task for task in plan.tasks if task.post is not None), key=lambda task: task.num_elements)
    without = replace(posted, post=None)
    assert loader.worker_bytes("linear", posted, 0) > 8 * 4 * posted.num_elements + 7 * 8 * min(posted.shape) ** 2
    for method in ("linear", "tsv_m"):
        assert loader.worker_bytes(method, posted, 0) > loader.worker_bytes(method, without, 0)
    merged = largemerge.merge(path, tmp_path / "free")
    limit = {"memory": {"host": plan.peak_bytes}}
    limited = largemerge.merge(yaml.safe_load(path.read_text()) | limit, tmp_path / "limited")
    found = weights_in(tmp_path / "limited")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights_in(tmp_path / "free").items())
    assert limited.plan.peak_bytes <= plan.peak_bytes and merged.bytes_read > merged.plan.bytes_read, "read again"


MISTAKES: list[tuple[str, list[str]]] = [
    (
        "{merge_method: linear, models: [{model: A}, {model: B}], parameters: {weight: 1}, post: [svc]}",
        ["post: svc: needs a 'base_model', from which the task vectors of the merge and of the models are measured"],
    ),
    (
        """{merge_method: tsv_m, base_model: BASE, models: [{model: A}], post: [svd, {svc: {alpha: 0, beta: 1}},
        {subspace_boosting: {beta: 1.5}}, {rescale: {facto: 1}}, {rescale: {match_norm: 3, factor: [1, x]}},
        {smooth: }, temperature]}""",
        [
            "post[0]: 'svd' is no step that is known; did you mean 'svc'?",
            "post[1].svc.alpha: expected a number above 0 and up to 1e+06, found 0",
            "post[1].svc.beta: unknown parameter; svc has ['alpha']",
            "post[2].subspace_boosting.beta: expected a number from 0 to 1, found 1.5",
            "post[3].rescale.facto: unknown parameter; did you mean 'factor'?",
            "post[4].rescale.match_norm: expected true or false, found 3",
            "post[4].rescale.factor[1]: expected a number above 0 and up to 1e+06, found 'x'",
            "post[5]: 'smooth' is no step that is known; expected one of ['rescale', 'subspace_boosting', 'svc']",
            "post[6]: 'temperature' is no step that is known; it is fitted to samples, after the merge: ",
        ],
    ),
    (
        "{merge_method: tsv_m, base_model: BASE, models: [{model: A}], post: svc}",
        ["post: expected a list of steps, such as [{svc: {alpha: 0.25}}], found 'svc'"],
    ),
    (
        "{merge_method: tsv_m, base_model: BASE, models: [{model: A}], post: [{svc: 0.5}]}",
        ["post: expected parameters of 'svc' by name, found 0.5"],
    ),
    (
        "{merge_method: tsv_m, base_model: BASE, models: [{model: A}], post: [{svc: {}, rescale: {}}]}",
        [
            "post: expected every step to be its name and its parameters, such as svc: {alpha: 0.25}, found "
            "{'rescale': {}, 'svc': {}}"
        ],
    ),
    (
        "{merge_method: passthrough, base_model: BASE, models: [{model: BASE}], post: [svc]}",
        ["post: there is no model beside the base that the merge could be held against; name some in 'candidates'"],
    ),
    (
        "{merge_method: tsv_m, base_model: BASE, models: [{model: A}], post: [svc], candidates: []}",
        ["candidates: an empty list; expected models, or no 'candidates' for all models but the base"],
    ),
    (
        "{merge_method: passthrough, base_model: BASE, models: [{model: A}], candidates: [B]}",
        ["candidates: are for the steps of 'post', which are held against them; there are none: leave it out"],
    ),
    (
        """{merge_method: tsv_m, base_model: BASE, models: [{model: A}], post: [svc], candidates: [BASE],
        tokenizer_source: union}""",
        [
            "candidates: BASE is the base, which has no task vector; leave it out",
            "candidates: cannot go with 'tokenizer_source', whose vocabulary is that of all models; expected one of "
            "both",
        ],
    ),
    (
        """{merge_method: passthrough, base_model: BASE, post: [svc], candidates: [B],
        slices: [{sources: [{model: A, layer_range: [0, 2]}]}]}""",
        [
            "slices[0].sources: post needs the base among them, BASE",
            "candidates: with 'slices', the steps of post hold a merge against its sources; leave it out",
        ],
    ),
    (
        """{merge_method: regmean, base_model: BASE, post: [svc], candidates: [A], ridge: 1, models: [{model: A,
        calibration: {data: d}}, {model: B, calibration: {data: d}}]}""",
        [
            "post: its steps follow data-free merges only; merge without them, then give the output to a file with "
            "merge_method: passthrough, base_model, post, and these models as 'candidates'",
            "ridge: unknown key",
        ],
    ),
]


@pytest.mark.parametrize(("text", "problems"), MISTAKES)
def test_all_mistakes_are_told_together(tmp_path: Path, text: str, problems: list[str]) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        largemerge.plan(path)
    told = list(error.value.problems)
    assert len(told) == len(problems)
    assert all(found.startswith(problem) for found, problem in zip(told, problems, strict=True)), told
    with pytest.raises(SystemExit) as done:
        main(["merge", str(path), str(tmp_path / "out"), "--quiet"])
    assert done.value.code == 2 and not (tmp_path / "out").exists()


def test_candidates_that_have_nothing_in_common_are_refused(tmp_path: Path) -> None:
    write_models(tmp_path)
    tiny_models.perturbed("gpt2", 1).save_pretrained(tmp_path / "other")
    config = with_base(tmp_path, "linear", post=["svc"], candidates=[str(tmp_path / "other"), str(tmp_path / "model1")])
    with pytest.raises(largemerge.LargemergeError):
        largemerge.merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
