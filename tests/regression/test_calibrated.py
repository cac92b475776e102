"""Chain and calibrated merges: what they are with options turned off; limits and interruptions change no bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, MakeCase, load_merged, merge_and_load, report_of, weights_in
from processes import assert_agree, device_of_ranks, journal, make_uneven_case, merging, run_ranks
from torch.utils._pytree import tree_flatten

import largemerge
from largemerge import ConfigError, LargemergeError
from largemerge.model.block_runner import RunningBlock
from largemerge.model.hidden_states import HiddenStates
from largemerge.output import OutputFolder
from largemerge.regression.planning.placement import Limits

OFF: dict[str, Any] = {"granularity": "block", "target": 0.0, "drift": 0.0, "solve": ["blocks"]}


def same(found: Path, expected: Path) -> None:
    """The very same tensors."""
    tensors, wanted = weights_in(found), weights_in(expected)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def both(case: Case, other: dict[str, Any]) -> None:
    """A case and the same with another method and parameters give the same bits."""
    largemerge.merge(case.config, case.folder / "one")
    largemerge.merge({**case.config, **other}, case.folder / "other")
    same(case.folder / "one", case.folder / "other")


@pytest.mark.parametrize(
    ("architecture", "inputs", "method"),
    [
        ("llama_tied", "merged", "regmean_plusplus"),
        ("t5", "candidate", "regmean"),
        ("clip", "candidate", "regmean"),
        ("mixtral", "merged", "regmean_plusplus"),
    ],
)
def test_with_everything_turned_off_it_is_the_named_method(
    make_case: MakeCase, architecture: str, inputs: str, method: str
) -> None:
    sums = {"off_diagonal_scale": 0.9, "ridge": 1e-4}
    case = make_case(architecture, method="calibrated", **OFF, **sums, inputs=inputs)
    both(case, {"merge_method": method, "parameters": sums})


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_chain_is_calibrated_without_targets(make_case: MakeCase, architecture: str) -> None:
    case = make_case(architecture, method="chain", num_samples=8)
    both(case, {"merge_method": "calibrated", "parameters": {"target": 0.0, "drift": 0.0, "solve": ["blocks"]}})


@pytest.mark.parametrize("architecture", ["llama_tied", "bert"])
def test_identical_candidates_give_themselves_back(make_case: MakeCase, architecture: str) -> None:
    case = make_case(architecture, method="calibrated", num_samples=8)
    for entry in case.config["models"][1:]:
        entry["model"], entry["name"] = case.config["models"][0]["model"], "again"
    report = largemerge.merge(case.config, case.folder / "merged")
    merged, own = load_merged(case, case.folder / "merged"), case.models[0]
    for name, tensor in own.state_dict().items():
        assert torch.allclose(merged.state_dict()[name], tensor, rtol=1e-4, atol=1e-5), name
    for by_block in report.drift.values():
        assert max(by_block.values()) < 1e-4  # type: ignore[type-var]


def test_drift_is_told_by_candidate_and_block_and_is_less_than_without_targets(make_case: MakeCase) -> None:
    case = make_case("llama", method="calibrated", target=1.0, drift=1.0, num_samples=16)
    paid = largemerge.merge(case.config, case.folder / "paid")
    written = report_of(case.folder / "paid")["drift"]
    assert list(written) == ["model0", "model1"] and list(written["model0"]) == [f"model.layers.{i}" for i in range(3)]
    assert written == paid.drift
    # The same sum, as the whole models give it.
    merged, own = load_merged(case, case.folder / "paid"), case.models[0]
    inputs = case.inputs[0]
    with torch.no_grad():
        last = [model.model(**inputs, output_hidden_states=True).hidden_states for model in (merged, own)]
    mask = inputs["attention_mask"].bool()
    for index, name in enumerate(written["model0"]):
        if index + 1 == len(merged.model.layers):
            break  # Transformers normalises the last one
        apart, whole = (last[0][index + 1] - last[1][index + 1])[mask].norm(), last[1][index + 1][mask].norm()
        assert written["model0"][name] == pytest.approx(float(apart / whole), rel=1e-3)
    card = (case.folder / "paid" / "README.md").read_text()
    values = [value for value in paid.drift["model1"].values() if value is not None]
    assert re.search(rf"\| model1 \| `.{{3}}` \| {values[-1]:.2%} \| {max(values):.2%} \|", card)
    case.config["parameters"] = {"target": 0.01, "drift": 0.0}
    left = largemerge.merge(case.config, case.folder / "left")
    assert all(list(paid.drift[name].values())[-1] < list(left.drift[name].values())[-1] for name in paid.drift)  # type: ignore[operator]


def test_attention_runs_once_in_each_stream_and_little_is_kept_inside_a_block(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("llama", method="calibrated", solve=["blocks"], num_samples=8)
    attention, calls = torch.nn.functional.scaled_dot_product_attention, list[int]()
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, *args, **kwargs: calls.append(len(query)) or attention(query, *args, **kwargs),
    )
    kept: dict[str, set[tuple[int, ...]]] = {}
    put = HiddenStates.put

    def noted(self: HiddenStates, stream: str, dataset: int, batch: int, stack: int, output: Any) -> None:
        shapes = [tuple(leaf.shape[2:]) for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]
        kept.setdefault(stream, set()).add(tuple(size for shape in shapes for size in shape))
        put(self, stream, dataset, batch, stack, output)

    monkeypatch.setattr(HiddenStates, "put", noted)
    largemerge.plan(case.config)
    in_trial = sum(calls)
    calls.clear()
    largemerge.merge(case.config, case.folder / "merged")
    config = case.models[0].config
    samples = sum(len(inputs["input_ids"][:8]) for inputs in case.inputs)
    assert sum(calls) - in_trial == 2 * samples * config.num_hidden_layers
    assert config.intermediate_size > config.hidden_size
    assert all(widths == {(config.hidden_size,)} for widths in kept.values()) and "inside merged" in kept


@pytest.mark.parametrize("architecture", ["llama_tied", "t5"])
def test_hidden_states_on_disk_and_limits_change_no_bit(make_case: MakeCase, tmp_path: Path, architecture: str) -> None:
    case = make_case(architecture, method="calibrated")
    largemerge.merge(case.config, case.folder / "one")
    scratch = tmp_path / "scratch"
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        from largemerge.regression.planning import placement

        placements = placement._placements
        patch.setattr(
            placement,
            "_placements",
            lambda work, device: (each for each in placements(work, device) if each.hidden_states.value == "disk"),
        )
        case.config["memory"] = {"disk": str(scratch)}
        report = largemerge.merge(case.config, case.folder / "other")
    assert report.hidden_bytes_on_disk > 0
    assert report.hidden_bytes_on_disk <= 1.3 * report.plan.footprint.disk, "one batch more, for what grows"
    same(case.folder / "one", case.folder / "other")
    assert isinstance(report.plan.limits, Limits)


def test_samples_that_do_not_fit_are_run_in_parts(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("opt", method="calibrated", ridge=1e-2)
    expected = merge_and_load(case, "one")
    run = RunningBlock._run_batch

    def short(self: RunningBlock, batch: Any, *rest: Any) -> Any:
        if batch.num_samples > 2:
            raise torch.OutOfMemoryError("no room")
        return run(self, batch, *rest)

    monkeypatch.setattr(RunningBlock, "_run_batch", short)
    found = merge_and_load(case, "other")
    assert report_of(case.folder / "other")["retries"]
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name], tensor, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize(
    ("architecture", "after", "more"),
    [
        ("llama", 2, {}),
        pytest.param("llama", 4, {}, marks=pytest.mark.slow),
        ("llama_tied", 1, {}),
        ("bert", 2, {}),
        ("clip", 5, {}),
        ("gpt2", 2, {"granularity": "average", "normalization": "frobenius", "drift": 0.0}),
    ],
)
def test_an_interrupted_merge_resumes_bit_by_bit(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, architecture: str, after: int, more: dict[str, Any]
) -> None:
    case = make_case(architecture, method="calibrated", num_samples=8, **more)
    largemerge.merge(case.config, case.folder / "one")
    record, count = OutputFolder.record, [0]

    def stop(self: OutputFolder, part: str, entry: Any) -> None:
        if count[0] == after:
            raise LargemergeError("the test stops here")
        count[0] += 1
        record(self, part, entry)

    out = case.folder / "other"
    monkeypatch.setattr(OutputFolder, "record", stop)
    with pytest.raises(LargemergeError, match="the test stops here"):
        largemerge.merge(case.config, out)
    assert len(journal(out)) == after
    monkeypatch.setattr(OutputFolder, "record", record)
    report = largemerge.merge(case.config, out, resume=True)
    assert report.resumed_parts == after
    same(case.folder / "one", out)
    assert not largemerge.verify(out).problems
    assert report.drift == json.loads((case.folder / "one" / "merge_report.json").read_text())["drift"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "method", "size"),
    [
        ("llama_tied", "calibrated", 2),
        ("t5", "calibrated", 3),
        ("llama", "chain", 2),
        ("llama", "featcal", 2),
        ("gpt2", "featcal", 5),
    ],
)
def test_ranks_agree_with_one(tmp_path: Path, architecture: str, method: str, size: int) -> None:
    case = make_uneven_case(tmp_path, architecture, method)
    if method == "featcal":
        case.config["base_model"] = case.config["models"][1]["model"]
        case.config["parameters"]["solve"] = ["blocks", "head"]
        case.write_yaml()
    alone = largemerge.merge(case.config, tmp_path / "alone", device=device_of_ranks(size))
    run_ranks(merging(case, tmp_path / "out"), tmp_path, size)
    assert_agree(tmp_path / "out", tmp_path / "alone", 1e-4)  # linear after linear, rounding adds up
    load_merged(case, tmp_path / "out")
    written = report_of(tmp_path / "out")
    for name, by_block in alone.drift.items():
        for block, value in by_block.items():
            assert written["drift"][name][block] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "tensor"),
    [
        ("calibrated", "model.layers.1.mlp.up_proj.weight"),
        ("featcal", "model.layers.1.mlp.up_proj.weight"),
        ("featcal", "model.embed_tokens.weight"),
        ("regmean", "model.layers.0.self_attn.o_proj.weight"),
        ("calibrated", "lm_head.weight"),
        ("calibrated", "transformer.h.1.mlp.c_fc.weight"),
    ],
)
def test_whose_weights_are_not_finite_is_told(make_case: MakeCase, method: str, tensor: str) -> None:
    """Not the model on whose data it shows first."""
    case = make_case("gpt2" if tensor.startswith("transformer") else "llama", method=method, num_samples=8)
    case.config["base_model"] = case.config["models"][0]["model"]
    model = case.models[1]
    model.get_parameter(tensor).data.view(-1)[3] = torch.nan
    model.save_pretrained(case.config["models"][1]["model"])
    with pytest.raises(LargemergeError, match=rf"model1 holds NaN in {re.escape(tensor)}"):
        largemerge.merge(case.config, case.folder / "out")


def test_weights_far_too_large_blame_nobody(make_case: MakeCase) -> None:
    case = make_case("llama", method="featcal", num_samples=8)
    case.config["base_model"] = case.config["models"][0]["model"]
    case.models[1].model.layers[1].mlp.down_proj.weight.data.mul_(1e30)
    case.models[1].save_pretrained(case.config["models"][1]["model"])
    with pytest.raises(LargemergeError, match=r"all models hold finite numbers there; .*far too large"):
        largemerge.merge(case.config, case.folder / "out")


def test_nan_in_a_base_that_is_only_compared_with_is_told(make_case: MakeCase) -> None:
    case = make_case("llama", method="regmean", num_samples=8)
    base = case.models[0]
    base.model.layers[0].mlp.up_proj.weight.data[:] = torch.nan
    base.save_pretrained(case.folder / "base")
    case.config["base_model"] = str(case.folder / "base")
    report = largemerge.merge(case.config, case.folder / "out")
    assert report.verified is not None and report.verified.num_not_finite == 1
    assert "without 1 tensors in which the base holds NaN" in report.verified.rows()[0][1]
    assert report_of(case.folder / "out")["verified"]["base_tensors_not_finite"] == 1


def test_a_plan_tells_what_patterns_leave_out_from_what_cannot_be_done(make_case: MakeCase) -> None:
    case = make_case("llama_tied", method="calibrated", num_samples=8, include=["q_proj", "lm_head"])
    notes = " ".join(largemerge.plan(case.config, probe=False).notes)
    assert "whose output is added to the hidden states are not solved (include, exclude)" in notes
    assert "that include and exclude leave (a tied head has the embedding's name)" in notes
    assert "normalised, scaled" not in notes


@pytest.mark.parametrize("anchor", [{"anchor": "base"}, {"anchor": "task_arithmetic", "anchor_scale": 0.4}])
@pytest.mark.parametrize("method", ["regmean_plusplus", "calibrated"])
def test_a_strong_ridge_gives_the_anchor(make_case: MakeCase, method: str, anchor: dict[str, Any]) -> None:
    """λ is the mean diagonal here, so that the result lies between the anchor and what the data says."""
    case = make_case("llama", method=method, num_samples=8, ridge=1.0, **anchor, solve=["blocks", "head"])
    case.config["base_model"] = case.config["models"][0]["model"]
    base = case.models[0].state_dict()
    others = [model.state_dict() for model in case.models]
    scale = anchor.get("anchor_scale", 0.0)
    merged, plain = merge_and_load(case, "one").state_dict(), None
    case.config["parameters"] = {"ridge": 1.0, "solve": ["blocks", "head"]}
    plain = merge_and_load(case, "other").state_dict()
    for name in ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        wanted = base[name] + scale * sum(own[name] - base[name] for own in others)
        average = sum(own[name] for own in others) / len(others)
        moved, expected = merged[name] - plain[name], wanted - average
        # The anchor moves every direction that the data does not fix towards itself, none beyond it.
        along = float((moved * expected).sum() / expected.square().sum())
        assert 0.05 < along < 1.0, name


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"drift": 1.0, "granularity": "block"}, r"parameters\.drift: is paid back one linear after the other"),
        ({"inputs": "candidate", "granularity": "block", "drift": 0}, r"parameters\.target: changes nothing"),
        ({"anchor": "base"}, r"parameters\.anchor: 'base' needs a 'base_model'; expected one, or 'anchor: average'"),
        ({"anchor_scale": 0.4}, r"parameters\.anchor_scale: is for 'anchor: task_arithmetic'"),
        ({"solve": []}, r"parameters\.solve"),
        ({"solve": ["blocks", "blocks"]}, r"parameters\.solve: names 'blocks' twice"),
        ({"solve": ["heads"]}, r"parameters\.solve"),
        ({"target": 1.5}, r"parameters\.target"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make_case: MakeCase, parameters: dict[str, Any], message: str) -> None:
    case = make_case("llama", method="calibrated", num_samples=4)
    case.config["parameters"] = parameters
    with pytest.raises(ConfigError, match=message):
        largemerge.plan(case.config, probe=False)


def test_a_plan_says_where_drift_is_not_paid_back(make_case: MakeCase) -> None:
    plan = largemerge.plan(make_case("gemma2", method="calibrated", num_samples=4).config, probe=False)
    assert any(
        note.startswith("drift: in model.layers.0, model.layers.1, model.layers.2 no linear's") for note in plan.notes
    )
    plan = largemerge.plan(make_case("dinov2", method="calibrated", num_samples=4).config, probe=False)
    assert any(note.startswith("solve: head: Dinov2Model has no linear after the blocks") for note in plan.notes)


def test_a_plan_knows_the_second_stream_and_the_head(make_case: MakeCase) -> None:
    case = make_case("llama_tied", method="calibrated", num_samples=8)
    plan = largemerge.plan(case.config, probe=False)
    assert plan.counts()["solved"] == 3 * 7 + 1
    assert plan.to_json()["head"] == [{"solved": "first, with the embedding", "weights": ["model.embed_tokens.weight"]}]
    plain = largemerge.plan({**case.config, "merge_method": "regmean_plusplus", "parameters": {}}, probe=False)
    assert plan.footprint.parts["hidden states"] > 2 * plain.footprint.parts["hidden states"]
    timed = largemerge.plan(case.config)
    assert timed.seconds["head"] > 0


@pytest.mark.parametrize(
    ("architecture", "more"),
    [("llama", {}), ("llama_tied", {}), ("llama", {"granularity": "average", "drift": 0.0})],
)
def test_progress_counts_blocks_and_the_head_is_none(
    make_case: MakeCase, caplog: pytest.LogCaptureFixture, architecture: str, more: dict[str, Any]
) -> None:
    case = make_case(architecture, method="calibrated", num_samples=4, **more)
    with caplog.at_level("DEBUG", "largemerge"):
        largemerge.merge(case.config, case.folder / "out")
    steps = [record.getMessage() for record in caplog.records if " head " in record.getMessage()]
    assert any("collect head model1" in step for step in steps) and not any("(" in step for step in steps)
    counted = [re.findall(r"\((\d+)/(\d+)\)", record.getMessage()) for record in caplog.records]
    numbers = {(int(block), int(blocks)) for found in counted for block, blocks in found}
    assert numbers == {(1, 3), (2, 3), (3, 3)}
    done = [re.match(r"(\d+)/(\d+) ", record.getMessage()) for record in caplog.records]
    last = [match for match in done if match][-1]
    assert last[1] == last[2], "as many steps as were said"


def test_all_of_a_wide_head_is_never_held(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of a few rows give what all rows at once give."""
    case = make_case("llama_tied", method="calibrated", num_samples=8)
    largemerge.merge(case.config, case.folder / "one")
    monkeypatch.setattr("largemerge.regression.group_sums.PANEL_BYTES", 16 * 4 * 10)
    largemerge.merge(case.config, case.folder / "other")
    for name, tensor in weights_in(case.folder / "one").items():
        assert torch.allclose(weights_in(case.folder / "other")[name], tensor, rtol=1e-3, atol=1e-5), name
