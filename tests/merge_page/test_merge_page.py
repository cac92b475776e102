"""`largemerge report`: the page of a finished merge, of either kind, by any version; and what is refused."""

from __future__ import annotations

import html
import json
import math
import random
import re
import subprocess
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_merges import HOSTILE

import largemerge
from largemerge import OutputError
from largemerge.cli import main
from largemerge.merge_page import facts
from largemerge.merge_page.build import build_page
from largemerge.output import PAGE_FILE, REPORT_FILE
from largemerge.pages.page import ChartPart, NotePart, Page, Section, TablePart
from largemerge.regression.methods import METHODS

Changed = Callable[..., Path]


def section(page: Page, title: str) -> Section:
    return next(each for each in page.sections if each.title.startswith(title))


def notes(page: Page) -> dict[str, NotePart]:
    return {part.title: part for part in page.sections[0].parts if isinstance(part, NotePart)}


def table(part_of: Section, number: int = 0) -> TablePart:
    return [part for part in part_of.parts if isinstance(part, TablePart)][number]


def column(found: TablePart, name: str) -> list[Any]:
    place = list(found.columns).index(name)
    return [row[place] for row in found.rows]


def charts_of(page: Page) -> set[str]:
    return {part.chart.title for each in page.sections for part in each.parts if isinstance(part, ChartPart)}


# What the page says is what the report says


def test_a_calibrated_merge_shows_its_drift(merges: dict[str, Path]) -> None:
    report = json.loads((merges["calibrated"] / REPORT_FILE).read_text())
    page = build_page(merges["calibrated"])
    drift = table(section(page, "Drift"))
    assert column(drift, "candidate") == ["model0", "model1", HOSTILE]
    last = {name: list(own.values())[-1] for name, own in report["drift"].items()}
    assert column(drift, "after the last block") == [f"{value:.1%}" for value in last.values()]
    most = max(last, key=lambda name: last[name])
    assert f"farthest from those of {most}: by {last[most]:.1%}" in notes(page)["Drift"].text
    blocks = table(section(page, "Block by block"))
    assert column(blocks, "block") == ["layers.0", "layers.1", "layers.2", "head"]
    linears = report["blocks"]["model.layers.1"]["linears"].values()
    worst = max(linear["condition"] for linear in linears)
    assert column(blocks, "worst condition")[1] == f"{worst:.1e}"
    apart = [value for linear in linears for value in linear["relative_distance_to_candidates"].values()]
    assert column(blocks, "distance")[1] == f"{sum(apart) / len(apart):.1%}"
    data = table(section(page, "Calibration data"))
    assert column(data, "tokens") == [each["tokens"] for each in report["calibration"].values()]
    assert charts_of(page) == {
        "Drift of the merged hidden states from each candidate's own, after each block",
        "Distance of the merged weights from each candidate, by block",
        "Condition of the Gram matrices, by block",
        "Tokens of each candidate",
        "Memory and stages over time",
        "Seconds of each block, by stage",
    }
    assert "Not in this report:" not in notes(page)


@pytest.mark.parametrize(("method", "why"), [("regmean_plusplus", "does not hold"), ("ties", "runs no model")])
def test_methods_that_do_not_know_the_drift_say_so(merges: dict[str, Path], method: str, why: str) -> None:
    page = build_page(merges[method])
    drift = section(page, "Drift")
    assert why in drift.text and not drift.parts and "Drift" not in notes(page)
    told = re.search(r"that know it are (\w+) and (\w+)\.", drift.text)
    assert told is not None and set(told.groups()) == {name for name, each in METHODS.items() if each.compares}


def test_a_merge_without_data_shows_what_applies(merges: dict[str, Path]) -> None:
    report = json.loads((merges["ties"] / REPORT_FILE).read_text())
    page = build_page(merges["ties"])
    candidates = report["verified"]["candidates"]
    blocks = table(section(page, "Block by block"))
    assert column(blocks, "block") == ["layers.0", "layers.1", "layers.2", "outside"]
    cosines = [each["by_block"]["model.layers.2"]["cosine"] for each in candidates.values()]
    assert column(blocks, "lowest cosine")[2] == f"{min(cosines):.2f}"
    text = page.html()
    assert html.escape(HOSTILE, quote=False) in text and "<script" not in text
    assert charts_of(page) == {
        "Distance of the merged weights from each candidate, by block",
        "Cosine of each candidate's task vector and the merge's, by block",
        "Memory and stages over time",
    }
    assert {each.title for each in page.sections}.isdisjoint({"Least-squares problems", "Calibration data"})
    planned = table(section(page, "Time and memory"))
    assert column(planned, "of the plan")[1:3] == ["100%", "100%"]


def test_memory_over_time_is_in_every_report(merges: dict[str, Path]) -> None:
    for out in merges.values():
        report = json.loads((out / REPORT_FILE).read_text())
        points = report["memory_over_time"]
        assert points and all(len(point) == 3 for point in points)
        assert [point[0] for point in points] == sorted(point[0] for point in points)
        assert points[0][0] >= 0 and points[-1][0] <= report["seconds"]["total"]
        assert 0 < max(point[1] for point in points) <= report["peak_bytes"]["host_anonymous"]
        assert [stage for _, stage, _ in report["timeline"]][-1] == "verify_and_finish"


# What stands out


def make_block_bad(report: dict[str, Any]) -> None:
    """Makes block 1 of three bad, in every way that a report can tell."""
    base = {"model.layers.0": 0.01, "model.layers.1": 0.3, "model.layers.2": 0.31}
    report["drift"] = {name: dict(base) for name in report["drift"]}
    for number, block in enumerate(report["blocks"].values()):
        for linear in block["linears"].values():
            linear |= {"condition": 1e7 if number == 1 else 10.0, "residual": 1e-7}
            linear["relative_distance_to_candidates"] = dict.fromkeys(
                report["calibration"], 0.5 if number == 1 else 0.1
            )


def test_a_bad_block_stands_out(changed: Changed) -> None:
    page = build_page(changed("calibrated", make_block_bad))
    blocks = table(section(page, "Block by block"))
    marked = {(blocks.rows[row][0], blocks.columns[place]) for row, place in blocks.highlights}
    assert {("layers.1", "distance"), ("layers.1", "worst condition")} <= marked
    assert all(name == "layers.1" for name, what in marked if what != "time")
    found = notes(page)
    assert "grows most in layers.1: by 29.0 points" in found["Drift by block"].text
    assert "is layers.1: 50.0%" in found["Blocks"].text and found["Blocks"].kind == "bad"
    assert found["Candidates"].kind == "plain" and "Nothing stands out." not in found


def test_a_growing_drift_stands_out_after_the_first_block(changed: Changed) -> None:
    def grow(report: dict[str, Any]) -> None:
        blocks = {f"model.layers.{n}": report["blocks"]["model.layers.0"] for n in range(8)}
        level = [0.2, 0.21, 0.22, 0.23, 0.33, 0.34, 0.35, 0.36]
        report["blocks"], report["verified"] = blocks, None
        report["drift"] = {"model0": dict(zip(blocks, level, strict=True))}

    found = notes(build_page(changed("calibrated", grow)))["Drift by block"]
    assert found.kind == "bad" and "after the first block in layers.4: by 10.0 points" in found.text
    assert "grows most in layers.0: by 20.0 points" in found.text


def test_drift_begins_anew_in_every_stack(changed: Changed) -> None:
    def two_stacks(report: dict[str, Any]) -> None:
        part = report["blocks"]["model.layers.0"]
        names = [f"{stack}.block.{n}" for stack in ("encoder", "decoder") for n in range(3)]
        report["blocks"], report["verified"] = dict.fromkeys(names, part), None
        report["drift"] = {"model0": dict(zip(names, [0.3, 0.31, 0.32, 0.2, 0.21, 0.22], strict=True))}

    page = build_page(changed("calibrated", two_stacks))
    blocks = table(section(page, "Block by block"))
    assert column(blocks, "block")[3] == "decoder.block.0"
    assert column(blocks, "drift grows by")[:6] == ["30.0", "1.0", "1.0", "20.0", "1.0", "1.0"]
    assert notes(page)["Drift by block"].kind == "plain"


def test_ranks_and_earlier_merges_of_a_file_are_shown(changed: Changed) -> None:
    def add(report: dict[str, Any]) -> None:
        report["ranks"] = [{"host_anonymous": 2**30, "seconds_communicating": 1.5, "reads_not_shared": ""}] * 2
        report["before"] = {"first": {}}
        report["plan"]["seconds"] = {"total": 2 * report["seconds"]["total"]}

    page = build_page(changed("ties", add))
    ranks = table(section(page, "Time and memory"), 1)
    assert ranks.rows == [("rank 0", "1.00 GiB", "1.5 s", ""), ("rank 1", "1.00 GiB", "1.5 s", "")]
    assert "The last of 2 merges of one file: first." in page.html()
    assert column(table(section(page, "Time and memory")), "of the plan")[-1] == "50%"


def test_a_bad_candidate_stands_out(changed: Changed) -> None:
    def spoil(report: dict[str, Any]) -> None:
        report["drift"] = {
            name: {block: (0.9 if name == "model1" else 0.1) for block in own} for name, own in report["drift"].items()
        }
        for block in report["blocks"].values():
            for linear in block["linears"].values():
                linear["relative_distance_to_candidates"] = {"model0": 0.1, "model1": 0.6, HOSTILE: 0.1}
        report["calibration"]["model1"]["tokens"] = 10

    page = build_page(changed("calibrated", spoil))
    found = notes(page)
    for title, text in (("Drift", "model1: by 90.0%"), ("Candidates", "model1: 60.0%"), ("Few tokens", "model1 (10)")):
        assert found[title].kind == "bad" and text in found[title].text
    drift = table(section(page, "Drift"))
    assert drift.highlights == {(1, 1): "bad"}
    first = [part.kind for part in page.sections[0].parts if isinstance(part, NotePart)]
    assert first == sorted(first, key=lambda kind: kind != "bad")


def test_fallbacks_retries_and_memory_above_the_plan_are_told(changed: Changed) -> None:
    name = "model.layers.2.mlp.up_proj.weight"

    def spoil(report: dict[str, Any]) -> None:
        linear = report["blocks"]["model.layers.2"]["linears"][name]
        linear |= {"fallbacks": ["float32 is inaccurate"], "solver": "eigh", "condition": None, "num_dead_features": 3}
        report["retries"] = ["block 1 ran out of memory"]
        report["redone_parts"] = ["outside: its digest differs"]
        report["resumed_parts"] = 2
        report["peak_bytes"]["host_anonymous"] = 2 * report["peak_bytes"]["planned_host"]
        report["plan"]["notes"] = ["warning: too little data", "a note"]

    page = build_page(changed("regmean_plusplus", spoil))
    found = notes(page)
    assert {"Fallbacks", "Solves", "Retry", "Done again", "Resumed", "Memory", "Warning", "Dead features"} <= set(found)
    assert "1 linear of 21" in found["Fallbacks"].text and "layers.2.mlp.up_proj" in found["Fallbacks"].text
    assert found["Warning"].text == "too little data" and section(page, "Notes").parts == [NotePart("", "a note")]
    solved = table(section(page, "Least-squares"))
    assert solved.rows[0][0] == "layers.2.mlp.up_proj" and solved.highlights == {(0, 4): "bad"}
    measured = table(section(page, "Time and memory"))
    assert column(measured, "of the plan")[0] == "200%" and measured.highlights == {(0, 2): "bad"}


def test_nothing_stands_out_where_nothing_does() -> None:
    assert facts.stands_out({"a": 1.0, "b": 1.1, "c": 1.2}) is None
    assert facts.stands_out({"a": 1.0, "b": 9.0}) is None  # of two, who is to say
    assert facts.stands_out({"a": 1.0, "b": 1.1, "c": 1.7}) == "c"
    assert facts.stands_out({"a": 0.0, "b": 0.0, "c": 0.0}) is None
    assert facts.stands_out({"a": 0.0, "b": 0.0, "c": 0.1}) == "c"


def test_names_are_as_short_as_they_can_be_told_apart() -> None:
    short = facts.short_names(["m.layers.0", "m.layers.1"], ".", at_least=2)
    assert list(short.values()) == ["layers.0", "layers.1"]
    stacks = facts.short_names(["text.encoder.layers.0", "vision.encoder.layers.0"], ".", at_least=2)
    assert list(stacks.values()) == ["text.encoder.layers.0", "vision.encoder.layers.0"]
    assert facts.short_names(["/a/x", "/b/y", "/b/y"], "/", at_least=1) == {"/a/x": "x", "/b/y": "y"}
    assert facts.short_names(["a//b", "a/b"], "/", at_least=1) == {"a//b": "a//b", "a/b": "a/b"}


# Reports of other versions, and of large merges


@pytest.mark.parametrize("method", ["calibrated", "regmean_plusplus", "ties"])
def test_reports_of_earlier_versions_have_a_page(changed: Changed, method: str) -> None:
    def age(report: dict[str, Any]) -> None:
        for key in (
            "memory_over_time",
            "timeline",
            "verified",
            "digests",
            "redone_parts",
            "drift",
            "before",
            "machine",
        ):
            report.pop(key, None)

    page = build_page(changed(method, age))
    assert "memory over time" in notes(page)["Not in this report:"].text
    assert "how much of each candidate" in notes(page)["Not in this report:"].text
    assert "Memory and stages over time" not in charts_of(page)
    assert f"{method}: 3 models" in page.title or method == "ties"
    assert page.html().endswith("</html>\n")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["calibrated", "regmean_plusplus", "ties"])
def test_every_key_that_may_be_missing_may_be_missing(changed: Changed, merges: dict[str, Path], method: str) -> None:
    report = json.loads((merges[method] / REPORT_FILE).read_text())
    keys = sorted(report.keys() - {"config", "plan", "blocks", "tensors"}) + [f"plan {key}" for key in report["plan"]]

    def without(some: set[str]) -> Callable[[dict[str, Any]], None]:
        def change(each: dict[str, Any]) -> None:
            for key in some:
                del (each["plan"] if key.startswith("plan ") else each)[key.removeprefix("plan ")]

        return change

    for number in range(8):  # every third key is gone, each time others, so that each is there and is not beside others
        some = set(random.Random(number).sample(keys, len(keys) // 3)) | {keys[number]}
        assert build_page(changed(method, without(some))).html().count("<section") >= 4
    assert build_page(changed(method, without(set(keys)))).html().count("<section") >= 4


def test_eighty_blocks_of_eight_models_with_experts_have_a_page(changed: Changed) -> None:
    names = [f"expert-{n}" for n in range(8)]

    def enlarge(report: dict[str, Any]) -> None:
        linear = next(iter(report["blocks"]["model.layers.0"]["linears"].values()))
        linear |= {"tokens": dict.fromkeys(names, 9), "relative_distance_to_candidates": dict.fromkeys(names, 0.1)}
        paths = [f"mlp.experts.{n}.{kind}" for n in range(16) for kind in ("up_proj", "down_proj")]
        report["blocks"] = {
            f"model.layers.{n}": {
                "linears": {f"model.layers.{n}.{path}.weight": {**linear, "shares_gram_with": path} for path in paths},
                "seconds": {f"stage {stage}": 1.0 for stage in range(14)},
                "drift": dict.fromkeys(names, 0.1),
            }
            for n in range(80)
        }
        report["drift"] = {name: {block: 0.1 for block in report["blocks"]} for name in names}
        report["calibration"] = {name: {"num_samples": 1, "tokens": 9} for name in names}
        report["timeline"] = [[n / 100, f"stage {n % 3}", ""] for n in range(20_000)]
        report["seconds"]["total"] = 200.0
        report["verified"] = None

    page = build_page(changed("regmean_plusplus", enlarge))
    text = page.html()
    assert len(text) < 1_500_000
    assert "mlp.experts.*.up_proj" in text and len(table(section(page, "Block by block")).rows) == 80


# Evaluations


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_numbers_that_are_not_finite_are_unknown(changed: Changed, value: float | None) -> None:
    def spoil(report: dict[str, Any]) -> None:
        for own in report["drift"].values():
            own["model.layers.1"] = value
        for block in report["blocks"].values():
            for linear in block["linears"].values():
                linear |= {"condition": value, "residual": value, "shrinkage": value}
                linear["relative_distance_to_candidates"] = dict.fromkeys(report["calibration"], value)

    page = build_page(changed("calibrated", spoil))
    assert "is not known after layers.1" in page.html() and "not finite in 21 linears" in page.html()
    assert "nan" not in "".join(str(part) for part in notes(page).values()).lower()


def test_results_of_an_evaluation_are_shown(changed: Changed) -> None:
    out = changed("ties", lambda report: None)
    scores = {"merged": {"code": 0.5, "law": 0.25}, HOSTILE: {"code": 0.75}}
    deep = {"results": {"accuracy": scores, "time": {"x": {"y": math.nan}}}, "seed": 3, "files": {"code": ["a.jsonl"]}}
    for found in (deep, scores):
        (out / "evaluation.json").write_text(json.dumps(found))
        page = build_page(out)
        evaluation = section(page, "Evaluation")
        assert table(evaluation).rows == [("merged", 0.5, 0.25), (HOSTILE, 0.75, None)]
        shown = [title for title in charts_of(page) if title.endswith("by task and model")]
        assert shown == ["accuracy, by task and model" if found is deep else "scores, by task and model"]
        assert ("a.jsonl" in page.html()) == (found is not scores)
    (out / "evaluation.json").write_text("[1")
    with pytest.raises(OutputError, match=r"evaluation\.json is not readable JSON"):
        build_page(out)


# Mistakes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not readable JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"config": {}, "plan": {}}', "has neither blocks and tensors; expected the report of a merge"),
        ('{"blocks": {}}', r"2 problems:[\s\S]*config: field required[\s\S]*plan: field required"),
        (
            '{"config": {}, "plan": {}, "blocks": {"b": {"linears": 3}}, "drift": [], "retries": "x"}',
            r"3 problems:[\s\S]*drift: [\s\S]*found \[\]",
        ),
    ],
)
def test_what_is_no_report_of_a_merge_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / REPORT_FILE).write_text(text)
    with pytest.raises(OutputError, match=told) as caught:
        largemerge.report(tmp_path)
    assert all(str(tmp_path / REPORT_FILE) in problem for problem in caught.value.problems)
    assert [path.name for path in tmp_path.iterdir()] == [REPORT_FILE]


def test_folders_without_a_finished_merge_are_refused(tmp_path: Path, merges: dict[str, Path]) -> None:
    with pytest.raises(OutputError, match="nothing there; expected a merge's folder"):
        largemerge.report(tmp_path / "absent")
    with pytest.raises(OutputError, match="a file; expected a merge's folder"):
        largemerge.report(merges["ties"] / REPORT_FILE)
    with pytest.raises(OutputError, match=r"has no merge_report\.json; expected the folder of a finished merge"):
        largemerge.report(tmp_path)
    (tmp_path / ".largemerge").mkdir()
    (tmp_path / ".largemerge" / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match=r"holds an unfinished merge; go on with it: merge … --resume"):
        largemerge.report(tmp_path)
    with pytest.raises(
        OutputError, match=r"2 problems:[\s\S]*out: expected the folder[\s\S]*--output: expected a file"
    ):
        largemerge.report(3, output="")  # type: ignore[arg-type]


# Files


def test_the_page_lies_beside_the_merge_and_is_no_stranger(whole: Callable[[str], Path]) -> None:
    out = whole("ties")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert largemerge.report(out) == out / PAGE_FILE
    first = (out / PAGE_FILE).read_bytes()
    assert largemerge.report(out) == out / PAGE_FILE and (out / PAGE_FILE).read_bytes() == first
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before | {PAGE_FILE: first}
    assert (out / PAGE_FILE).stat().st_mode & 0o444 == 0o444
    assert largemerge.verify(out).problems == ()


def test_a_folder_that_cannot_be_written_needs_another_place(changed: Changed, tmp_path: Path) -> None:
    out = changed("ties", lambda report: None)
    (out / PAGE_FILE).mkdir()
    with pytest.raises(OutputError, match=r"merge_report\.html is a folder; expected a file"):
        largemerge.report(out)
    (out / PAGE_FILE).rmdir()
    out.chmod(0o555)
    try:
        assert largemerge.report(out, output=tmp_path / "page.html") == tmp_path / "page.html"
        assert [path.name for path in out.iterdir()] == [REPORT_FILE]
        if not can_write(out):  # root can
            with pytest.raises(OutputError, match=r"cannot be written: .*; --output FILE writes it elsewhere"):
                largemerge.report(out)
    finally:
        out.chmod(0o755)
    with pytest.raises(OutputError, match=r"page\.html cannot be written: .*; choose another file for --output"):
        largemerge.report(out, output=tmp_path / "absent" / "page.html")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "math.jsonl",
            '{"text": "1 + 1"}\n',
            r"math\.jsonl does not end in \.html; expected a file .* such as math\.html",
        ),
        ("mine.html", "<!doctype html>\n<title>My notes</title>\n", r"mine\.html is there, and is no page of a merge"),
    ],
)
def test_a_file_that_is_no_page_is_not_overwritten(
    changed: Changed, tmp_path: Path, name: str, text: str, said: str
) -> None:
    out = changed("ties", lambda report: None)
    (tmp_path / name).write_text(text)
    with pytest.raises(OutputError, match=said):
        largemerge.report(out, output=tmp_path / name)
    assert (tmp_path / name).read_text() == text
    page = largemerge.report(out, output=tmp_path / "page.html")  # which may be replaced, even by another merge's
    assert largemerge.report(changed("regmean_plusplus", lambda report: None), output=page) == page
    assert "regmean_plusplus" in page.read_text()


def can_write(folder: Path) -> bool:
    try:
        (folder / "probe").touch()
    except OSError:
        return False
    (folder / "probe").unlink()
    return True


def test_the_page_of_an_earlier_merge_goes_with_it(tmp_path: Path) -> None:
    from data_free_cases import weighted, write_models

    write_models(tmp_path)
    largemerge.merge(weighted(tmp_path), tmp_path / "out")
    largemerge.report(tmp_path / "out")
    assert "largemerge report ." in (tmp_path / "out" / "README.md").read_text()
    largemerge.merge(weighted(tmp_path), tmp_path / "out", force=True)
    assert not (tmp_path / "out" / PAGE_FILE).exists()


# The command


def test_the_command_says_where_the_page_is(
    changed: Changed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = changed("ties", lambda report: None)
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or len(opened) == 1)
    for arguments, code in (([], 0), (["--open"], 0), (["--open"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(out), *arguments])
        captured = capsys.readouterr()
        assert ended.value.code == code and captured.out == f"{out / PAGE_FILE}\n"
        assert ("there is no browser here to open it" in captured.err) == (code == 2)
    assert opened == [(out / PAGE_FILE).resolve().as_uri()] * 2


def test_a_mistake_ends_with_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "largemerge", "report", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.splitlines()[-1] == f"largemerge: {tmp_path / 'absent'}: nothing there; expected a merge's folder"
    )
    assert "Traceback" not in done.stderr
