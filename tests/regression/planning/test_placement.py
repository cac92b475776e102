"""Wherever things are held, the merge is the same; limits are kept, or refused before the long work."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from cases import Case, MakeCase, assert_close, merge_and_load, report_of, weights_in, write_case

import largemerge
from largemerge import LargemergeError
from largemerge.model import block_runner
from largemerge.model import forward as block_module
from largemerge.regression import plan
from largemerge.regression.config import MemoryConfig
from largemerge.regression.planning.placement import Choice, find_limits, footprint
from largemerge.regression.planning.workload import OffloadTo, Placement, Workload

METHODS = ("regmean", "regmean_plusplus")


def force(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Makes plans choose another placement than they would."""
    choose = plan.choose_placement

    def chosen(*args: Any, **kwargs: Any) -> Choice:
        choice = choose(*args, **kwargs)
        return replace(choice, placement=replace(choice.placement, **changes))

    monkeypatch.setattr(plan, "choose_placement", chosen)


def assert_same_bits(case: Case, left: str, right: str) -> None:
    expected, found = weights_in(case.folder / left), weights_in(case.folder / right)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "architecture",
    [
        "llama",
        "t5",
        "clip_vision",
        "mixtral",
        pytest.param("bert", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.slow),
    ],
)
def test_the_placement_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, architecture: str
) -> None:
    kind = tiny_models.ARCHITECTURES[architecture].kind
    models = [tiny_models.perturbed(architecture, seed) for seed in range(3)]
    case = write_case(tmp_path, models, [tiny_models.inputs(kind, 9, seed) for seed in range(3)], method=method)
    largemerge.merge(case.config, tmp_path / "plain")
    every: list[dict[str, Any]] = [
        {"hidden_states": OffloadTo.DISK, "prefetch": False},
        {"passes": 2},
        {"passes": 99, "prefetch": False},
    ]
    for number, changes in enumerate(every):
        with monkeypatch.context() as patch:
            force(patch, **changes)
            report = largemerge.merge(case.config, tmp_path / f"other{number}")
        assert_same_bits(case, "plain", f"other{number}")
        assert report.plan.placement == replace(report.plan.placement, **changes)
        on_disk = report.to_json()["peak_bytes"]["disk"]
        assert (on_disk > 0) == ("hidden_states" in changes)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_samples_at_once_change_only_the_rounding(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    case = make_case(num_candidates=3, method=method)
    expected = merge_and_load(case, "plain")
    force(monkeypatch, samples=2)
    assert_close(merge_and_load(case, "other"), expected, tolerance=1e-5)


def test_several_passes_and_an_exclusion(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first linears of a block are not solved, yet the passes for the others need them."""
    case = make_case(num_candidates=2, exclude=["q_proj", "up_proj"], include=["o_proj", "gate_proj", "k_proj"])
    merge_and_load(case, "plain")
    force(monkeypatch, passes=3)
    merge_and_load(case, "other")
    assert_same_bits(case, "plain", "other")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "t5", "opt"])
def test_out_of_memory_halves_the_batch_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, method: str
) -> None:
    """A block that fails on more than some samples at once, in the middle of its linears."""
    kind = tiny_models.ARCHITECTURES[architecture].kind
    models = [tiny_models.perturbed(architecture, seed) for seed in range(2)]
    case = write_case(tmp_path, models, [tiny_models.inputs(kind, 9, seed) for seed in range(2)], method=method)
    expected = merge_and_load(case, "plain")
    run_until = block_module.run_until
    failed: list[int] = []

    def short_of_memory(samples_that_fit: int, block: Any, last: Any, args: Any, kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        output = run_until(block, last, args, kwargs)
        if hidden.shape[0] > samples_that_fit:  # only now: every linear has been visited
            failed.append(hidden.shape[0])
            raise torch.OutOfMemoryError("there is none left")
        return output

    for samples_that_fit in (1, 3):
        failed.clear()
        monkeypatch.setattr(block_runner, "run_until", partial(short_of_memory, samples_that_fit))
        assert_close(merge_and_load(case, f"short{samples_that_fit}"), expected, tolerance=1e-5)
        report = report_of(tmp_path / f"short{samples_that_fit}")
        assert failed and len(report["retries"]) == len(failed)
        assert f"at most {failed[-1] // 2}" in report["retries"][-1]


def test_out_of_memory_with_a_single_sample_is_an_error(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("there is none left\nreally")

    monkeypatch.setattr(block_runner, "run_until", fails)
    case = make_case()
    with pytest.raises(LargemergeError, match=r"layers.0: out of memory with a single sample \(there is none left\)"):
        largemerge.merge(case.config, case.folder / "out")


# Limits


def test_a_limit_that_nothing_fits_is_refused_with_what_would_do(make_case: MakeCase) -> None:
    case = make_case()
    case.config["memory"] = {"host": "100MiB"}
    with pytest.raises(LargemergeError) as error:
        largemerge.merge(case.config, case.folder / "out")
    text = str(error.value)
    assert "even the smallest placement would hold" in text and "the limit is 100.0 MiB" in text
    assert "memory: {host: " in text and not (case.folder / "out").exists()
    wanted = text.split("memory: {host: ")[1].split("}")[0]
    case.config["memory"] = {"host": wanted}
    largemerge.merge(case.config, case.folder / "out")


def wide_case(folder: Path, num_samples: int = 1500) -> Case:
    """Hidden states of about 100 MiB."""
    models = [tiny_models.perturbed("llama", seed) for seed in range(2)]
    inputs = []
    for seed in range(2):
        ids = torch.randint(3, 60, (num_samples, 256), generator=torch.Generator().manual_seed(seed))
        inputs.append({"input_ids": ids})
    case = write_case(folder, models, inputs, batch_size=50)
    case.config["calibration"]["num_samples"] = num_samples
    return case


def test_hidden_states_go_to_disk_where_the_limit_says_so(tmp_path: Path) -> None:
    case = wide_case(tmp_path)
    roomy = largemerge.plan(case.config, device="cpu", probe=False)
    assert roomy.placement.hidden_states is OffloadTo.HOST and roomy.reasons == ("the fastest placement fits",)
    hidden = roomy.footprint.parts["hidden states"]
    limit = roomy.footprint.host - hidden // 2
    case.config["memory"] = {"host": limit, "disk": str(tmp_path / "scratch")}
    plan = largemerge.plan(case.config, device="cpu", probe=False)
    assert plan.placement.hidden_states is OffloadTo.DISK and plan.footprint.host <= limit
    assert plan.footprint.disk == hidden
    assert any("the limit is" in reason for reason in plan.reasons)


def test_what_is_loaded_first_is_no_memory_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[Workload] = []
    choose = plan.choose_placement

    def seen(work: Workload, *args: Any, **kwargs: Any) -> Choice:
        works.append(replace(work, loading_bytes=1 << 40))
        return choose(work, *args, **kwargs)

    monkeypatch.setattr(plan, "choose_placement", seen)
    largemerge.plan(wide_case(tmp_path).config, probe=False)
    placement = Placement(OffloadTo.DEVICE, passes=1, prefetch=True, samples=1)
    on_gpu = footprint(works[0], placement, torch.device("cuda"), 0, eight_bit=False, limited=False)
    assert on_gpu.device < 1 << 40 < on_gpu.host
    assert on_gpu.parts["loading of calibration inputs"] == 1 << 40, "the parts are those of the larger one"
    idle = footprint(
        replace(works[0], loading_bytes=0), placement, torch.device("cuda"), 0, eight_bit=False, limited=False
    )
    assert idle.device == on_gpu.device >= works[0].hidden_bytes


def test_pixels_wait_in_a_mapped_file_where_there_is_a_limit(
    make_case: MakeCase,
) -> None:
    case = make_case("clip_vision", num_candidates=2)
    merge_and_load(case, "plain")
    plain = largemerge.plan(case.config, probe=False)
    case.config["memory"] = {"disk": str(case.folder / "scratch")}
    merge_and_load(case, "other")
    assert_same_bits(case, "plain", "other")
    assert largemerge.plan(case.config, probe=False).footprint.parts["calibration inputs"] == 0
    assert plain.footprint.parts["calibration inputs"] == sum(x["pixel_values"].nbytes for x in case.inputs)
    assert not list((case.folder / "scratch").glob("*")), "nothing may be left behind"


@pytest.mark.parametrize("value", ["8 apples", 0, -5, "0GB", [1]])
def test_a_limit_that_is_no_size(make_case: MakeCase, value: Any) -> None:
    case = make_case()
    case.config["memory"] = {"host": value}
    with pytest.raises(LargemergeError, match=r"memory\.host"):
        largemerge.plan(case.config)


def test_the_plan_estimates_time_from_a_probe(make_case: MakeCase) -> None:
    case = make_case()
    plan = largemerge.plan(case.config)
    assert all(seconds >= 0 for seconds in plan.seconds.values()) and sum(plan.seconds.values()) > 0
    assert not largemerge.plan(case.config, probe=False).seconds


def test_hidden_states_in_eight_bits(make_case: MakeCase) -> None:
    pytest.importorskip("bitsandbytes")
    case = make_case(num_candidates=2)
    exact = merge_and_load(case, "exact")
    case.config["memory"] = {"hidden_states_8bit": True}
    merged = merge_and_load(case, "eight")
    assert_close(merged, exact, tolerance=0.05)
    changed = [not torch.equal(a, b) for a, b in zip(merged.parameters(), exact.parameters(), strict=True)]
    assert any(changed)


def test_a_placement_reads_in_one_line() -> None:
    text = str(Placement(OffloadTo.DISK, 2, False, 4))
    assert text == ("hidden states on disk, a block's linears in 2 passes, no block read ahead, 4 samples at once")


def test_ranks_of_one_machine_divide_what_is_free() -> None:
    alone, one_of_four = (find_limits(MemoryConfig(), torch.device("cpu"), None, ranks) for ranks in (1, 4))
    assert one_of_four.host < 0.5 * alone.host
    limits = find_limits(MemoryConfig(host=1 << 30), torch.device("cpu"), None, 4)
    assert limits.host == 1 << 30, "what the user says is for every process"


def test_a_rank_holds_its_part_of_the_hidden_states(tmp_path: Path) -> None:
    config = wide_case(tmp_path).config
    alone = largemerge.plan(config, device="cpu", probe=False)
    half = largemerge.plan(config, device="cpu", probe=False, num_ranks=2)
    hidden = [plan.footprint.parts["hidden states"] for plan in (alone, half)]
    assert hidden[1] == pytest.approx(hidden[0] / 2, rel=0.1)
    grown = half.footprint.parts["process"] - alone.footprint.parts["process"]  # by what was imported in between
    assert max(rank.host for rank in half.ranks) - grown <= alone.footprint.host
