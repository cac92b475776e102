"""Merges in sequence that keep samples: the merge so far is a model like any other, whose data lies beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_models
import torch
from cases import Case, MakeCase, load_merged, report_of, weights_in, write_case
from processes import assert_agree, merging, run_ranks
from safetensors.torch import load_file, save_file
from tokenized import CODE, ENGLISH, train, write_model

import largemerge
from largemerge import LargemergeError
from largemerge.calibration.batches import Batch, CalibrationSet, ForwardSignature
from largemerge.regression.kept_samples import choose_samples, share_out

SAMPLES = Path("sums") / "samples.safetensors"


def step(case: Case, numbers: list[int], previous: Path | None = None, keep: int | None = 12) -> dict[str, Any]:
    """The configuration that merges some of the experts, into an earlier merge if there is one."""
    config: dict[str, Any] = copy.deepcopy(case.config)
    config["models"] = [config["models"][number] for number in numbers]
    config["sequence"] = {"keep_samples": keep} | ({"previous": str(previous)} if previous is not None else {})
    return config


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("llama", "calibrated"),
        ("llama_tied", "calibrated"),
        ("t5", "regmean"),
        ("vit", "calibrated"),
        ("clip", "chain"),
    ],
)
def test_the_merge_so_far_is_a_model_with_these_samples(make_case: MakeCase, architecture: str, method: str) -> None:
    case = make_case(architecture, method=method, num_candidates=3, num_samples=9, weights=[1.0, 2.0, 0.5])
    first, then, plain = (case.folder / name for name in ("first", "then", "plain"))
    largemerge.merge(step(case, [0, 1]), first)
    largemerge.merge(step(case, [2], first), then)
    data = {"data": str(first / SAMPLES), "num_samples": 12}
    before = {"model": str(first), "calibration": data, "parameters": {"weight": 3.0}}
    largemerge.merge({**case.config, "models": [before, case.config["models"][2]]}, plain)
    found, expected = weights_in(then), weights_in(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    load_merged(case, then)
    largemerge.verify(then)


def test_as_many_samples_as_before_lie_beside_every_merge(make_case: MakeCase) -> None:
    case = make_case("llama", method="calibrated", num_candidates=4, num_samples=40, weights=[1.0, 2.0, 1.0, 4.0])
    first, then, last = (case.folder / name for name in ("first", "then", "last"))
    largemerge.merge(step(case, [0, 1]), first)
    largemerge.merge(step(case, [2], first), then)
    report = largemerge.merge(step(case, [3], then), last)
    assert report.calibration["then"]["num_samples"] == 12
    owners = []
    for out in (first, then, last):
        kept = load_file(out / SAMPLES)["input_ids"].tolist()
        rows = [[list(row) for row in inputs["input_ids"].tolist()] for inputs in case.inputs]
        owners.append([sum(row in own for row in kept) for own in rows])
        record = json.loads((out / "sums" / "sequence.json").read_text())
        assert len(kept) == record["samples"] == 12 and record["groups"] == {}
        assert sorted(path.name for path in (out / "sums").iterdir()) == ["samples.safetensors", "sequence.json"]
    assert owners == [[4, 8, 0, 0], [3, 6, 3, 0], [1, 3, 2, 6]]
    card = (last / "README.md").read_text()
    assert "Samples of the calibration data (12 in all)" in card and "the rest of their data" in card
    plan = largemerge.plan(step(case, [3], then), probe=False)
    assert plan.sums_bytes == sum(each.nbytes for each in load_file(last / SAMPLES).values())
    assert not any("corrects what the new models need" in note for note in plan.notes)


def test_texts_of_unlike_length_are_padded_and_masked(tmp_path: Path) -> None:
    tokenizer = train("BPE", [*ENGLISH, *CODE])
    models = []
    for seed, (name, texts) in enumerate([("a", ENGLISH), ("b", CODE), ("c", ENGLISH[::-1])]):
        write_model(tmp_path / name, seed, tokenizer)
        lines = [json.dumps({"text": text[: 8 + 5 * number]}) + "\n" for number, text in enumerate(texts[:8])]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        models.append({"model": str(tmp_path / name), "calibration": {"data": str(tmp_path / f"{name}.jsonl")}})
    config = {"merge_method": "calibrated", "calibration": {"batch_size": 2, "max_length": 24}}
    first, then = tmp_path / "first", tmp_path / "then"
    largemerge.merge({**config, "models": models[:2], "sequence": {"keep_samples": 6}}, first)
    kept = load_file(first / SAMPLES)
    lengths = kept["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1 and int(lengths.max()) == kept["input_ids"].shape[1]
    assert all((mask[:length] == 1).all() for mask, length in zip(kept["attention_mask"], lengths, strict=True))
    sequence = {"previous": str(first), "keep_samples": 6}
    report = largemerge.merge({**config, "models": models[2:], "sequence": sequence}, then)
    assert report.calibration["first"]["tokens"] == int(lengths.sum())
    assert load_file(then / SAMPLES)["input_ids"].shape[0] == 6


@pytest.mark.parametrize(
    ("total", "weights", "available", "expected"),
    [
        (12, [1.0, 2.0], [100, 100], [4, 8]),
        (12, [1.0, 2.0], [100, 5], [7, 5]),
        (3, [1.0, 100.0, 1.0], [9, 9, 9], [1, 1, 1]),
        (50, [1.0, 1.0], [4, 5], [4, 5]),
        (7, [1.0, 1.0, 1.0], [9, 9, 9], [3, 2, 2]),
    ],
)
def test_samples_are_shared_out_by_weight(
    total: int, weights: list[float], available: list[int], expected: list[int]
) -> None:
    assert share_out(total, weights, available) == expected


def test_what_cannot_be_kept_is_told_first(make_case: MakeCase) -> None:
    case = make_case("llama", method="regmean", num_candidates=3, num_samples=5)

    def refused(config: dict[str, Any], *mentions: str) -> None:
        with pytest.raises(LargemergeError) as error:
            largemerge.merge(config, case.folder / "refused")
        assert all(mention in str(error.value) for mention in mentions), error.value
        assert not (case.folder / "refused").exists()

    refused(step(case, [0, 1], keep=1), "1 of 2 models together; expected one of each, or more")
    both = step(case, [0, 1])
    both["sequence"]["keep_sums"] = True
    refused(both, "stands in place of the sums; expected it, or 'keep_sums'")
    none = step(case, [0, 1])
    none["sequence"] = {"keep_sums": False}
    refused(none, "nor keeps anything for a later one")
    sums = step(case, [0, 1])
    sums["sequence"] = {}
    largemerge.merge(sums, case.folder / "sums")
    refused(step(case, [2], case.folder / "sums"), "no samples of sums here, but sums; expected 'keep_sums'")


def test_images_of_unlike_size_cannot_lie_in_one_file() -> None:
    signature = ForwardSignature(frozenset(["pixel_values"]), False, None, None)
    sets = [
        CalibrationSet(name, (Batch({"pixel_values": torch.zeros(2, 3, size, size)}, None),), "known")
        for name, size in (("small", 4), ("large", 8))
    ]
    kept, problems = choose_samples(sets, [1.0, 1.0], 2, signature)
    assert kept is None
    (problem,) = problems
    assert "samples of small and large have 'pixel_values' of unlike shapes, [3, 4, 4] and [3, 8, 8]" in problem
    assert choose_samples(sets[:1], [1.0], 2, signature)[0] is not None


def test_spoiled_samples_are_written_again_and_noticed_later(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("llama", method="calibrated", num_candidates=3, num_samples=9)
    case.config = step(case, [0, 1])
    case.write_yaml()
    out, log = tmp_path / "out", tmp_path / "log"
    largemerge.merge(case.config, tmp_path / "whole")
    process = processes.start(merging(case, out, "--resume"), log)
    processes.wait_until(lambda: len(processes.journal(out)) >= 2, process)
    process.kill()
    processes.finish(process)
    working = out / ".largemerge" / SAMPLES
    if working.exists():
        working.write_bytes(working.read_bytes()[:-8] + b"\1" * 8)
    assert processes.run(merging(case, out, "--resume"), log) == 0, log.read_text()
    assert (out / SAMPLES).read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()
    assert all("samples" in line for line in report_of(out)["redone_parts"])
    (out / SAMPLES).write_bytes((out / SAMPLES).read_bytes()[:-8] + b"\1" * 8)
    with pytest.raises(LargemergeError, match="samples"):
        largemerge.merge(step(case, [0], out), tmp_path / "next")


def test_two_ranks_keep_the_same_samples(tmp_path: Path) -> None:
    models = [tiny_models.perturbed("llama", seed) for seed in range(3)]
    case = write_case(tmp_path, models, [tiny_models.inputs("text", 9, seed) for seed in range(3)], method="calibrated")
    whole = copy.deepcopy(case)
    case.config = step(whole, [0, 1])
    case.write_yaml()
    run_ranks(merging(case, tmp_path / "two"), tmp_path, 2)
    largemerge.merge(case.config, tmp_path / "one")
    assert (tmp_path / "two" / SAMPLES).read_bytes() == (tmp_path / "one" / SAMPLES).read_bytes()
    case.config = step(whole, [2], tmp_path / "one")
    case.write_yaml()
    run_ranks(merging(case, tmp_path / "then-two"), tmp_path, 2)
    largemerge.merge(case.config, tmp_path / "then-one")
    assert_agree(tmp_path / "then-two", tmp_path / "then-one")


def test_samples_are_kept_where_the_merge_before_has_kept_some(make_case: MakeCase) -> None:
    case = make_case("llama", method="calibrated", num_candidates=3, num_samples=9)
    first, then = case.folder / "first", case.folder / "then"
    largemerge.merge(step(case, [0, 1]), first)
    largemerge.merge(step(case, [2], first, keep=None), then)
    assert sorted(path.name for path in (then / "sums").iterdir()) == ["samples.safetensors", "sequence.json"]
    assert load_file(then / SAMPLES)["input_ids"].shape[0] == 12
    sums = step(case, [2], first, keep=None)
    sums["sequence"]["keep_sums"] = True
    assert largemerge.plan(sums, probe=False).config.keeps_sums


def test_samples_that_would_add_nothing_are_passed_over(make_case: MakeCase) -> None:
    case = make_case("llama", method="regmean", num_samples=6)
    for index, inputs in enumerate(case.inputs):
        mask = torch.zeros_like(inputs["input_ids"])
        mask[index] = inputs["attention_mask"][index]  # of all samples one
        save_file({**inputs, "loss_mask": mask}, case.folder / f"data{index}.safetensors")
    largemerge.merge(step(case, [0, 1], keep=4), case.folder / "first")
    kept = load_file(case.folder / "first" / SAMPLES)
    assert (kept["loss_mask"].sum(1) > 0).all()
    rows = [case.inputs[index]["input_ids"][index].tolist() for index in range(2)]
    assert kept["input_ids"].tolist() == rows


def test_masks_and_ids_of_unlike_dtype_lie_in_one_file(make_case: MakeCase) -> None:
    case = make_case("llama", method="regmean", num_samples=6)
    odd = {"input_ids": case.inputs[1]["input_ids"].int(), "attention_mask": case.inputs[1]["attention_mask"].bool()}
    save_file(odd, case.folder / "data1.safetensors")
    whole = {"input_ids": case.inputs[0]["input_ids"][:, :5].contiguous()}  # without a mask, and shorter
    save_file(whole, case.folder / "data0.safetensors")
    largemerge.merge(step(case, [0, 1], keep=4), case.folder / "first")
    kept = load_file(case.folder / "first" / SAMPLES)
    assert kept["attention_mask"].sum(1).tolist()[:2] == [5, 5]
    assert kept["input_ids"].dtype == torch.int64
    assert kept["input_ids"][:2, :5].tolist() == whole["input_ids"][[1, 4]].tolist()


def test_tokens_that_the_output_lacks_are_not_kept(tmp_path: Path) -> None:
    english = train("BPE", ENGLISH)
    models = []
    for seed, (name, texts, tokenizer) in enumerate([("a", ENGLISH, english), ("b", CODE, train("BPE", CODE, 320))]):
        write_model(tmp_path / name, seed, tokenizer)
        lines = [json.dumps({"text": text}) + "\n" for text in texts[:8]]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        models.append({"model": str(tmp_path / name), "calibration": {"data": str(tmp_path / f"{name}.jsonl")}})
    config = {"merge_method": "regmean", "models": models, "tokenizer_source": "a", "calibration": {"max_length": 24}}
    try:
        largemerge.merge({**config, "sequence": {"keep_samples": 4}}, tmp_path / "out")
    except LargemergeError as error:
        assert "no sample of b is of use later" in str(error) and not (tmp_path / "out").exists()
    else:
        assert int(load_file(tmp_path / "out" / SAMPLES)["input_ids"].max()) < english.get_vocab_size()
