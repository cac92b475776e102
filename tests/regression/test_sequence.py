"""Merges in sequence: one expert after the other gives what all at once give."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import reference
import tiny_models
import torch
import transformers as tf
from cases import (
    Case,
    MakeCase,
    assert_close,
    auto_device,
    exit_code,
    files_in,
    load_merged,
    report_of,
    weights_in,
    write_case,
)
from processes import PARTS, assert_agree, device_of_ranks, journal, lasting, merging, run_ranks
from safetensors.torch import load_file, save_file

import largemerge
from largemerge import ConfigError, LargemergeError
from largemerge.regression.config import load_config
from largemerge.regression.gram import Gram
from largemerge.regression.group_sums import GroupSums

WEIGHTS = [1.0, 2.0, 0.5, 1.5]


def make_experts(
    folder: Path, architecture: str = "llama", method: str = "regmean", *, samples: int = 60, **parameters: Any
) -> Case:
    """Four experts with their data, and the configuration that merges all at once."""
    kind = tiny_models.ARCHITECTURES[architecture].kind
    models = [tiny_models.perturbed(architecture, seed) for seed in range(4)]
    inputs = [tiny_models.inputs(kind, samples + 5 * seed, seed) for seed in range(4)]
    return write_case(folder, models, inputs, method=method, weights=WEIGHTS, **parameters)


def step(case: Case, numbers: list[int], previous: Path | None = None, **more: Any) -> dict[str, Any]:
    """The configuration that merges some of the experts, into an earlier merge if there is one."""
    config: dict[str, Any] = copy.deepcopy(case.config)
    config["models"] = [config["models"][number] for number in numbers]
    config["sequence"] = {"keep_sums": True} | ({"previous": str(previous)} if previous is not None else {}) | more
    return config


def merge_in_steps(case: Case, steps: list[list[int]]) -> Path:
    """Merges the experts step by step; returns the folder of the last merge."""
    out: Path | None = None
    for number, numbers in enumerate(steps):
        config, out = step(case, numbers, out), case.folder / f"step{number}"
        largemerge.merge(config, out)
    assert out is not None
    return out


def sums_in(out: Path) -> dict[str, torch.Tensor]:
    """All kept sums, by file and first linear of the group."""
    files = sorted((out / "sums").glob("*.safetensors"))
    return {f"{file.stem} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "sums" / "sequence.json").read_text())
    return record


def assert_sums_agree(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    sums, others = sums_in(found), sums_in(expected)
    assert sums and sums.keys() == others.keys()
    for name, tensor in others.items():
        assert torch.linalg.vector_norm(sums[name] - tensor) <= tolerance * torch.linalg.vector_norm(tensor), name
    groups, as_expected = record_of(found)["groups"], record_of(expected)["groups"]
    assert groups == as_expected, "shapes and numbers of tokens"


# All at once, and one after the other


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [
        ("llama", {}),
        ("llama", {"off_diagonal_scale": 1.0, "solve": ["blocks", "head"]}),
        ("llama_tied", {"solve": ["blocks", "head"]}),
        pytest.param(
            "gpt2", {"solve": ["head", "blocks"]}, marks=pytest.mark.slow
        ),  # whose linears lie the other way round
        ("t5", {}),  # two stacks
        ("clip", {"off_diagonal_scale": 0.5}),
        ("mixtral", {}),
        ("llama", {"normalization": "frobenius"}),
    ],
)
def test_one_after_the_other_is_all_at_once(tmp_path: Path, architecture: str, parameters: dict[str, Any]) -> None:
    case = make_experts(tmp_path, architecture, **parameters)
    largemerge.merge(step(case, [0, 1, 2, 3]), tmp_path / "batch")
    out = merge_in_steps(case, [[0, 1], [2], [3]])
    assert_sums_agree(out, tmp_path / "batch")
    assert_close(load_merged(case, out), load_merged(case, tmp_path / "batch"), 1e-4)
    linears = largemerge_linears(out), largemerge_linears(tmp_path / "batch")
    for name, entry in linears[1].items():
        assert sum(linears[0][name]["tokens"].values()) == sum(entry["tokens"].values()), name


def largemerge_linears(out: Path) -> dict[str, Any]:
    report = report_of(out)
    parts = [*report["blocks"].values(), *([report["head"]] if "head" in report else [])]
    return {name: entry for part in parts for name, entry in part["linears"].items()}


def test_a_step_is_that_of_a_dense_float64_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of RegMean++, which is not that of all at once: the kept sums stand for the data of three experts."""
    case = make_experts(tmp_path, "llama", "regmean_plusplus")
    so_far = merge_in_steps(case, [[0, 1, 2]])
    largemerge.merge(step(case, [3], so_far), tmp_path / "out")
    kept = sums_in(so_far)
    files = {
        name.removesuffix(".weight"): f"{block} {entry['shares_gram_with']}"
        for block, part in report_of(so_far)["blocks"].items()
        for name, entry in part["linears"].items()
    }
    hybrid_grams = reference._hybrid_grams

    def undamped(linear: str) -> torch.Tensor:
        packed = kept[files[linear]].double()
        size = int((2 * len(packed)) ** 0.5)
        lower = torch.zeros(size, size, dtype=torch.float64)
        lower[torch.tril_indices(size, size).unbind()] = packed
        return lower.diagonal().diag() + (lower.tril(-1) + lower.tril(-1).T) / 0.95

    def grams(*arguments: Any) -> dict[str, torch.Tensor]:
        names, inputs = arguments[-2:]
        return hybrid_grams(*arguments) if inputs else {name: undamped(name) for name in names}

    monkeypatch.setattr(reference, "_hybrid_grams", grams)
    models, inputs = [load_merged(case, so_far), case.models[3]], [{}, case.inputs[3]]
    expected = reference.merge("regmean_plusplus", models, inputs, [3.5, 1.5], ridge=1e-6)
    assert_close(load_merged(case, tmp_path / "out"), expected)


def test_without_the_sums_the_result_is_another(tmp_path: Path) -> None:
    """So that the test above can fail: a merge of merges is not the merge of all."""
    case = make_experts(tmp_path, "llama")
    largemerge.merge(case.config, tmp_path / "batch")
    out = merge_in_steps(case, [[0, 1, 2]])
    plain = case.config | {"models": [{"model": str(out)} | {"calibration": case.config["models"][0]["calibration"]}]}
    plain["models"] += [case.config["models"][3]]
    largemerge.merge(plain, tmp_path / "plain")
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(load_merged(case, tmp_path / "plain"), load_merged(case, tmp_path / "batch"), 1e-3)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [("llama", "regmean_plusplus"), ("llama_tied", "calibrated"), ("t5", "chain"), ("llama", "featcal")],
)
def test_the_merge_so_far_as_an_expert_changes_nothing(tmp_path: Path, architecture: str, method: str) -> None:
    """On its own inputs it is held to itself, and so it is on the data of a copy of itself."""
    case = make_experts(tmp_path, architecture, method, samples=30)
    if method == "featcal":  # whose anchor pulls away from the models
        case.config |= {"base_model": case.config["models"][3]["model"]}
        case.config["parameters"] |= {"anchor": "average"}
    so_far = merge_in_steps(case, [[0, 1, 2]])
    shutil.copytree(so_far, tmp_path / "copy")
    case.config["models"][3]["model"] = str(tmp_path / "copy")
    report = largemerge.merge(step(case, [3], so_far), tmp_path / "again")
    assert_close(load_merged(case, tmp_path / "again"), load_merged(case, so_far), 1e-5)
    assert all(tensor.any() for tensor in sums_in(tmp_path / "again").values())
    if report.drift:
        assert set(report.drift["step0"].values()) == {None}


def test_bodies_of_classifiers_one_after_the_other(tmp_path: Path) -> None:
    """The merge so far is a bare body, whose blocks have shorter names than those of a model with a head."""
    models = []
    for seed, labels in enumerate((2, 3, 4)):
        config = tf.BertConfig(**tiny_models.TEXT, intermediate_size=24, max_position_embeddings=64, num_labels=labels)
        torch.manual_seed(seed)
        models.append(tf.BertForSequenceClassification(config))
    inputs = [tiny_models.inputs("text", 60, seed) for seed in range(3)]
    case = write_case(tmp_path, models, inputs, method="regmean", weights=WEIGHTS[:3])
    largemerge.merge(case.config, tmp_path / "batch")
    largemerge.merge(step(case, [0, 1]), tmp_path / "bodies")
    assert "encoder.layer.0" in record_of(tmp_path / "bodies")["groups"]
    report = largemerge.merge(step(case, [2], tmp_path / "bodies"), tmp_path / "with-head")
    assert any("stay in its folder heads/, and are not copied" in note for note in report.plan.notes)
    largemerge.merge(step(case, [2], tmp_path / "bodies") | {"head": "none"}, tmp_path / "bare")
    expected = weights_in(tmp_path / "batch")
    for out in ("bare", "with-head"):
        found = weights_in(tmp_path / out)
        for name, tensor in expected.items():
            difference = torch.linalg.vector_norm(found[name] - tensor)
            assert difference <= 1e-4 * torch.linalg.vector_norm(tensor), (out, name)
    assert "bert.encoder.layer.0" in record_of(tmp_path / "with-head")["groups"]
    (labels,) = tf.BertForSequenceClassification.from_pretrained(tmp_path / "with-head").classifier.bias.shape
    assert labels == 4


def test_ridge_and_anchor_count_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_experts(tmp_path, "llama", samples=8, normalization="frobenius", ridge=0.1)
    out = merge_in_steps(case, [[0, 1], [2, 3]])
    counted: list[int] = []
    solve = GroupSums.solve

    def count(sums: GroupSums, ridge: float, num_merged: int) -> Any:
        counted.append(num_merged)
        return solve(sums, ridge, num_merged)

    monkeypatch.setattr(GroupSums, "solve", count)
    largemerge.merge(step(case, [0], out), tmp_path / "fifth")
    assert set(counted) == {5}
    config = load_config(step(case, [3], out))
    assert config.num_merged == 5
    assert config.method.anchor_step(config.num_merged) == 0.0
    arithmetic = step(case, [3], out) | {"base_model": case.config["models"][0]["model"]}
    arithmetic["parameters"] |= {"anchor": "task_arithmetic", "anchor_scale": 0.25}
    config = load_config(arithmetic)
    assert config.method.anchor_step(config.num_merged) == pytest.approx(1.25)


def test_weights_add_up(tmp_path: Path) -> None:
    case = make_experts(tmp_path, samples=8)
    out = merge_in_steps(case, [[0, 1], [2]])
    config = load_config(step(case, [3], out))
    assert config.names == ("step1", "model3")
    assert config.weights == (3.5, 1.5) and config.shares == (0.7, 0.3)
    assert [(model["name"], model["weight"]) for model in record_of(out)["models"]] == [
        ("model0", 1.0),
        ("model1", 2.0),
        ("model2", 0.5),
    ]
    assert load_config(config) == config
    assert load_config(config.model_dump(mode="json", exclude_none=True)) == config
    report = report_of(out)
    assert [model["name"] for model in report["sequence"]] == ["model0", "model1", "model2"]
    card = (out / "README.md").read_text()
    assert "| 2 | model1 | `model1` | 2 |" in card and "| 3 | model2 | `model2` | 0.5 |" in card
    assert report["calibration"]["step0"]["tokens"] == sum(model["tokens"] for model in record_of(out)["models"][:2])


def test_what_lies_in_the_folder(tmp_path: Path) -> None:
    case = make_experts(tmp_path, samples=8)
    out = merge_in_steps(case, [[0, 1]])
    largemerge.merge(step(case, [2], out, keep_sums=False), tmp_path / "last")
    blocks = [f"sums/model.layers.{number}.safetensors" for number in range(3)]
    assert [name for name in files_in(out) if name.startswith("sums/")] == [*blocks, "sums/sequence.json"]
    assert not (tmp_path / "last" / "sums").exists()
    assert "ends the sequence" in (tmp_path / "last" / "README.md").read_text()
    assert exit_code("verify", out) == 0
    load_merged(case, out)
    largemerge.merge(case.config, out, force=True)
    assert not (out / "sums").exists(), "they would be another merge's"


def test_a_triangle_goes_to_the_disk_and_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 128, 300, 1100):
        x_NI = torch.randn(20, size, generator=generator)
        gram, other = Gram(size, torch.device("cpu")), Gram(size, torch.device("cpu"))
        gram.add_rows(x_NI)
        gram.finish_candidate(0.5, 0.9)
        packed = torch.cat(list(gram.sum_rows()))
        assert packed.shape == (size * (size + 1) // 2,)
        rows, columns = torch.tril_indices(size, size)
        other.add_to_sum(lambda numbers, packed=packed: packed[numbers], 0.25)
        other.add_rows(x_NI)  # does not touch the sum
        expected = gram.full_sum().clone()
        assert torch.equal(packed, expected[rows, columns])
        torch.testing.assert_close(other.full_sum(), 0.25 * expected)


def test_a_plan_knows_it(tmp_path: Path) -> None:
    case = make_experts(tmp_path, samples=8)
    out = merge_in_steps(case, [[0, 1]])
    config = step(case, [2], out)
    plan = largemerge.plan(config, probe=False)
    size = sum(tensor.nbytes for tensor in sums_in(out).values())
    assert plan.problems == ()
    assert plan.to_json()["sums_bytes"] == size
    without = largemerge.plan(step(case, [2], out, keep_sums=False), probe=False)
    assert plan.bytes_written - without.bytes_written == size
    report = largemerge.merge(config, tmp_path / "out")
    assert report.to_json()["bytes_written"] == plan.bytes_written
    assert plan.num_samples["step0"] == 0
    assert plan.num_tokens["step0"] == sum(model["tokens"] for model in record_of(out)["models"])


# Refused


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Case, Path]:
    case = make_experts(tmp_path, samples=8)
    return case, merge_in_steps(case, [[0, 1, 2]])


def refused(config: dict[str, Any], *mentions: str) -> tuple[str, ...]:
    with pytest.raises(LargemergeError) as caught:
        largemerge.merge(config, Path(config["models"][0]["model"]).parent / "refused")
    for mention in mentions:
        assert mention in str(caught.value), str(caught.value)
    return caught.value.problems


def test_sums_of_another_kind_are_refused_all_at_once(merged: tuple[Case, Path]) -> None:
    case, out = merged
    config = step(case, [3], out)
    config |= {"merge_method": "regmean_plusplus"}
    config["parameters"] = {"off_diagonal_scale": 0.5, "normalization": "frobenius", "ridge": 0.1}
    problems = refused(config)
    assert [problem.partition(":")[0] for problem in problems] == [
        "parameters.inputs",
        "parameters.normalization",
        "parameters.off_diagonal_scale",
    ]
    assert all("expected the same in all merges of a sequence" in problem for problem in problems)
    assert (
        "0.5 for regmean_plusplus, but the sums in" in problems[2] and "were made with 0.95, by regmean" in problems[2]
    )


def test_folders_without_sums_are_refused(merged: tuple[Case, Path]) -> None:
    case, out = merged
    expected = "expected the output of a merge with 'sequence: {keep_sums: true}'"
    refused(step(case, [3], case.folder / "nowhere"), "is no folder here", expected)
    refused(step(case, [3], case.folder / "model0"), "has no sums (sums/sequence.json is not there)", expected)
    (out / "sums" / "sequence.json").write_text('{"models": [{"name": 5}], "groups": {}, "extra": 1}')
    problems = refused(
        step(case, [3], out), "sequence.json: models[0].name: expected a text, found 5", "extra: unknown"
    )
    assert len(problems) == 3
    (out / "sums" / "sequence.json").write_text("{")
    refused(step(case, [3], out), "is not readable JSON")


def flip(path: Path, position: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights changed": (lambda out: flip(out / "model.safetensors"), "is not as it was written"),
    "sums changed": (lambda out: flip(out / "sums" / "model.layers.1.safetensors"), "is not as it was written"),
    "sums gone": (lambda out: (out / "sums" / "model.layers.1.safetensors").unlink(), "is not there"),
    "record changed": (
        lambda out: (out / "sums" / "sequence.json").write_text(
            (out / "sums" / "sequence.json").read_text().replace('"weight": 2.0', '"weight": 20.0')
        ),
        "sums/sequence.json is not as it was written",
    ),
    "config changed": (
        lambda out: (out / "config.json").write_text(
            (out / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5')
        ),
        "config.json is not as it was written",
    ),
    "not a number": (
        lambda out: save_file(
            {name: x * torch.nan for name, x in load_file(out / "sums" / "model.layers.0.safetensors").items()},
            out / "sums" / "model.layers.0.safetensors",
        ),
        "model.layers.0.safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_before_the_work(merged: tuple[Case, Path], damage: str) -> None:
    case, out = merged
    spoil, told = DAMAGES[damage]
    spoil(out)
    advice = "what it has kept is good for the weights that were written with it alone"
    refused(step(case, [3], out), f"sequence.previous: {out}: ", told, advice)
    assert exit_code("verify", out) == 2


def test_sums_of_another_merge_are_refused(merged: tuple[Case, Path]) -> None:
    case, out = merged
    largemerge.merge(step(case, [1, 3]), case.folder / "other")
    shutil.rmtree(out / "sums")
    shutil.copytree(case.folder / "other" / "sums", out / "sums")
    refused(step(case, [3], out), "sequence.json is not as it was written", "model.layers.0.safetensors")
    largemerge.merge(case.config, out, force=True)
    shutil.copytree(case.folder / "other" / "sums", out / "sums")
    refused(step(case, [3], out), "does not list sums/sequence.json: it is another merge's")


def test_nan_in_sums_never_gets_into_a_merge(merged: tuple[Case, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the digests hold."""
    case, out = merged
    DAMAGES["not a number"][0](out)
    monkeypatch.setattr("largemerge.regression.merge.check_previous", lambda *_, **__: None)
    refused(step(case, [3], out), "model.layers.0.safetensors: ", "holds NaN; make that merge again")


def test_groups_that_were_not_solved_are_refused(merged: tuple[Case, Path]) -> None:
    case, out = merged
    config = step(case, [3], out)
    config["parameters"] |= {"solve": ["blocks", "head"]}
    refused(
        config, f"{out} has no sums of head (lm_head), which would be solved; expected a merge that solved the same"
    )


def test_groups_that_are_not_solved_any_more_are_told(merged: tuple[Case, Path]) -> None:
    case, out = merged
    config = step(case, [3], out)
    config["parameters"] |= {"include": ["layers.0.*q_proj"]}
    notes = largemerge.plan(config, probe=False).notes
    (note,) = [note for note in notes if "left out" in note]
    assert "has sums of model.layers.0 (self_attn.k_proj)" in note and "model.layers.0 (self_attn.o_proj)" in note


def test_linears_that_an_earlier_step_left_out_are_refused(merged: tuple[Case, Path], tmp_path: Path) -> None:
    """Beside others of their group, whose sums are there: what was averaged is no regression of its rows."""
    case, out = merged
    config = step(case, [3], out)
    config["parameters"] |= {"exclude": ["k_proj"]}
    notes = largemerge.plan(config, probe=False).notes
    assert any("has sums of model.layers.0 (self_attn.k_proj)" in note and "left out" in note for note in notes)
    largemerge.merge(config, tmp_path / "without")
    refused(step(case, [2], tmp_path / "without"), "has no sums of model.layers.0 (self_attn.k_proj)", "which would be")


def test_models_of_other_shapes_are_refused(merged: tuple[Case, Path], tmp_path: Path) -> None:
    case, out = merged
    record = record_of(out)
    record["groups"]["model.layers.0"]["self_attn.q_proj"]["inputs"] = 8
    (out / "sums" / "sequence.json").write_text(json.dumps(record))
    plan = largemerge.plan(step(case, [3], out) | {}, probe=False, from_config=True)
    (problem,) = [each for each in plan.problems if "sequence" in each]
    assert "the sums of model.layers.0 (self_attn.q_proj) have 8 inputs, the models' 16" in problem


@pytest.mark.parametrize(
    ("sequence", "mentions"),
    [
        ({"keep_sums": False}, "sequence: neither goes on from a 'previous' merge nor keeps anything"),
        ({"name": "x"}, "sequence.name: is the name of the 'previous' merge, and there is none"),
        ({"keep_sums": "maybe"}, "sequence.keep_sums: expected true or false"),
        ({"previous": 5}, "sequence.previous: expected a text"),
        ({"previus": "x"}, "sequence.previus: unknown key; did you mean 'previous'?"),
        ({"previous": "+"}, "is no folder here"),
        ({"previous": "x" * 5000}, "is no folder here"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, sequence: dict[str, Any], mentions: str) -> None:
    models = [{"model": "o/a", "calibration": {"data": "a"}}, {"model": "o/b", "calibration": {"data": "b"}}]
    with pytest.raises(ConfigError) as caught:
        load_config({"merge_method": "regmean", "models": models, "sequence": sequence})
    assert mentions in str(caught.value)


def test_one_model_is_enough_with_an_earlier_merge_alone(merged: tuple[Case, Path]) -> None:
    case, out = merged
    refused(step(case, [3]), "models: found 1; expected 2 or more where 'sequence' has no 'previous' merge")
    refused(step(case, []) | {"models": [{"model": str(out)}]}, "needs calibration data")


def test_names_are_unique_and_the_earlier_merge_is_no_model(merged: tuple[Case, Path]) -> None:
    case, out = merged
    config = step(case, [3], out)
    config["models"][0] |= {"name": out.name}
    refused(config, f"2 candidates are called '{out.name}'")
    assert load_config(step(case, [3], out, name="so-far")).names == ("so-far", "model3")
    config["models"][0] |= {"model": str(out), "name": "x"}
    refused(config, "models[0] (x): is the merge that sequence.previous names, which is a candidate already")


def test_a_model_that_is_merged_twice_is_told(merged: tuple[Case, Path]) -> None:
    case, out = merged
    notes = largemerge.plan(step(case, [2], out), probe=False).notes
    assert any("model2" in note and "was merged before, and counts once more" in note for note in notes)


def test_what_was_corrected_before_is_lost_and_that_is_told(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("llama", method="calibrated", num_candidates=3, num_samples=4)
    first = tmp_path / "first"
    largemerge.merge(step(case, [0, 1]), first)
    notes = largemerge.plan(step(case, [2], first), probe=False).notes
    assert any("calibrated corrects what the new models need" in note and str(first) in note for note in notes)
    assert not any("corrects" in note for note in largemerge.plan(step(case, [0, 1]), probe=False).notes)


def test_data_free_methods_have_no_sums(merged: tuple[Case, Path]) -> None:
    case, out = merged
    models = [{"model": each["model"], "parameters": {"weight": 1}} for each in case.config["models"][:2]]
    config = {"merge_method": "linear", "models": models, "sequence": {"previous": str(out)}}
    problems = refused(config, "sequence: is for regression methods (regmean, ", "linear keeps no sums: leave it out")
    assert len(problems) == 1


def test_an_unfinished_merge_is_refused(merged: tuple[Case, Path]) -> None:
    case, out = merged
    (out / ".largemerge").mkdir()
    (out / ".largemerge" / "manifest.json").touch()
    refused(step(case, [3], out), "holds an unfinished merge")


# Killed, and by several ranks


@pytest.fixture(scope="module", params=["regmean_plusplus", pytest.param("calibrated", marks=pytest.mark.slow)])
def long_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The second step of a sequence, with its unbroken merge in `unbroken`."""
    case = processes.make_long_case(tmp_path_factory.mktemp(request.param), request.param)
    case.config["calibration"] |= {"num_samples": 10}
    whole = copy.deepcopy(case.config)
    largemerge.merge(whole | {"sequence": {}}, case.folder / "so-far", device=auto_device())
    case.config |= {"models": whole["models"][1:], "sequence": {"previous": str(case.folder / "so-far")}}
    case.write_yaml()
    log = case.folder / "log"
    assert processes.run(merging(case, case.folder / "unbroken"), log) == 0, log.read_text()
    return case


@pytest.mark.slow
def test_killed_and_resumed(long_case: Case, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert processes.run(merging(long_case, out, "--resume"), log, kill_at=0) == 0, log.read_text()
    operations = processes.operations(log)
    wanted = [number for number, line in enumerate(operations, start=1) if "journal.jsonl" in line or "sums" in line]
    for number in [*wanted[::3], len(operations) - 2]:
        shutil.rmtree(out)
        assert processes.run(merging(long_case, out), log, number) == -signal.SIGKILL
        if not (out / ".largemerge" / "manifest.json").exists():
            continue
        assert processes.run(merging(long_case, out, "--resume"), log) == 0, log.read_text()
        assert lasting(out) == lasting(long_case.folder / "unbroken")


def kill_after(case: Case, out: Path, log: Path, num_parts: int) -> None:
    """Starts a merge, and kills it once so many parts are in its journal."""
    process = processes.start(merging(case, out, "--resume"), log)
    processes.wait_until(lambda: len(journal(out)) >= num_parts, process)
    process.kill()
    processes.finish(process)


def test_spoiled_sums_are_done_again(long_case: Case, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    kill_after(long_case, out, log, 4)
    assert not (out / "config.json").exists()
    flip(out / ".largemerge" / "sums" / "model.layers.1.safetensors")
    assert processes.run(merging(long_case, out, "--resume"), log) == 0, log.read_text()
    assert lasting(out) == lasting(long_case.folder / "unbroken")
    (again,) = report_of(out)["redone_parts"]
    assert again.startswith("model.layers.1 is done again: sums/model.layers.1::mlp.down_proj in ")
    assert list(report_of(out)["blocks"]) == PARTS[1:]


def test_another_earlier_merge_cannot_be_gone_on_with(long_case: Case, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    kill_after(long_case, out, log, 2)
    so_far = long_case.folder / "so-far"
    shutil.copytree(so_far, tmp_path / "kept")
    try:
        whole = json.loads(json.dumps(long_case.config)) | {"sequence": {}}
        whole["models"] = [*whole["models"], {**whole["models"][0], "name": "twice"}]
        largemerge.merge(whole, so_far, force=True)
        assert processes.run(merging(long_case, out, "--resume"), log) == 2
        assert "calibration data → so-far was" in log.read_text()
    finally:
        shutil.rmtree(so_far)
        shutil.copytree(tmp_path / "kept", so_far)


@pytest.mark.parametrize(
    ("architecture", "method", "size", "parameters"),
    [
        ("llama", "regmean_plusplus", 2, {}),
        ("llama_tied", "calibrated", 2, {}),
        pytest.param("llama", "calibrated", 3, {}, marks=pytest.mark.slow),
        ("t5", "regmean", 3, {"normalization": "frobenius"}),
    ],
)
def test_ranks_agree_with_one(
    tmp_path: Path, architecture: str, method: str, size: int, parameters: dict[str, Any]
) -> None:
    case = make_experts(tmp_path, architecture, method, samples=9, **parameters)
    device = device_of_ranks(size)
    largemerge.merge(step(case, [0, 1]), tmp_path / "first", device=device)
    case.config = step(case, [0, 1])
    case.write_yaml()
    run_ranks(merging(case, tmp_path / "first-by-ranks"), tmp_path, size)
    assert_agree(tmp_path / "first-by-ranks", tmp_path / "first", 1e-4)
    assert_sums_agree(tmp_path / "first-by-ranks", tmp_path / "first", 1e-4)
    later = make_experts(tmp_path, architecture, method, samples=9, **parameters)
    later.config = step(later, [2, 3], tmp_path / "first")
    later.write_yaml()
    largemerge.merge(later.config, tmp_path / "alone", device=device)
    run_ranks(merging(later, tmp_path / "out"), tmp_path, size)
    assert_agree(tmp_path / "out", tmp_path / "alone", 1e-4)
    assert_sums_agree(tmp_path / "out", tmp_path / "alone", 1e-4)
    assert exit_code("verify", tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    plan = largemerge.plan(later.config, probe=False, num_ranks=size, device=device)
    if method == "regmean_plusplus":
        for planned, measured in zip(plan.ranks, report["ranks"], strict=True):
            assert planned.bytes_communicated == pytest.approx(measured["bytes_communicated"], rel=0.02)
    assert "first" in report["calibration"]
