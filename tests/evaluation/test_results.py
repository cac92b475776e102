"""Several models in several tasks: what is shown, what is refused, and what one failure costs."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
import transformers as tf
from task_models import (
    LABELS,
    TEXTS,
    write_bert,
    write_clip,
    write_images,
    write_jsonl,
    write_language_model,
    write_texts,
)

import largemerge
from largemerge.evaluation.harness import runs_code
from largemerge.evaluation.prepare import name_models
from largemerge.evaluation.results import EvaluatedModel, EvaluatedTask, Evaluation, Score


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A base and two experts of it, with texts of two kinds."""
    base = write_language_model(tmp_path / "base")
    for number, name in enumerate(("math", "code")):
        torch.manual_seed(number)
        expert = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        expert.save_pretrained(tmp_path / name)
        tf.AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / name)
        write_texts(tmp_path / f"{name}.jsonl", TEXTS[number * 4 :][:4])
    assert base.config.num_hidden_layers
    return tmp_path


def tasks(folder: Path, **more: Any) -> dict[str, Any]:
    """An evaluation of the family, with experts and base."""
    return {
        "base": str(folder / "base"),
        "tasks": [
            {
                "name": f"{name} texts",
                "kind": "language_model",
                "data": str(folder / f"{name}.jsonl"),
                "expert": str(folder / name),
            }
            for name in ("math", "code")
        ],
        **more,
    }


def test_scores_stand_beside_those_of_experts_and_base(family: Path) -> None:
    found = largemerge.evaluate(tasks(family), [family / "math", family / "code"], out=family / "found")
    assert [(model.name, model.role) for model in found.models] == [
        ("base", "base"),
        ("math", "model"),
        ("code", "model"),
    ]
    assert [task.expert for task in found.tasks] == ["math", "code"]
    for task, expert, other in (("math texts", "math", "code"), ("code texts", "code", "math")):
        base, own, cross = (found.score(name, task) for name in ("base", expert, other))
        assert base is not None and own is not None and cross is not None
        assert own.normalized == 1.0
        assert cross.normalized == pytest.approx(own.value / cross.value)  # less is better
        assert cross.forgetting == pytest.approx(max(0.0, cross.value - base.value))
        assert cross.closed == pytest.approx((cross.value - base.value) / (own.value - base.value))
    mean = sum(found.score("math", task.name).normalized for task in found.tasks) / 2
    assert found.average("math") == pytest.approx(mean)
    written = {path.name for path in (family / "found").iterdir()}
    assert written == {"evaluation.json", "evaluation.csv", "evaluation.html"}
    again = Evaluation.from_json(json.loads((family / "found" / "evaluation.json").read_text()))
    assert again.scores == found.scores and again.models == found.models and again.tasks == found.tasks
    rows = list(csv.DictReader(io.StringIO((family / "found" / "evaluation.csv").read_text())))
    assert len(rows) == 3 * 2 * 3  # models, tasks, metrics
    assert "<script" not in (family / "found" / "evaluation.html").read_text()
    assert "math texts" in found._repr_html_()
    assert all(words in str(found) for words in ("Evaluation", "base (base)", " │ ", "less is better in"))
    assert "\x1b" not in str(found)
    wrongs = (lambda: found.average("nope"), lambda: found.mean("nope"), lambda: found.score("nope", "math texts"))
    for wrong in wrongs:
        with pytest.raises(largemerge.LargemergeError, match="no model 'nope'; the models are base, math, code"):
            wrong()
    with pytest.raises(largemerge.LargemergeError, match=r"no task 'math text'; .*math texts, code texts; did you"):
        found.score("math", "math text")


def test_an_expert_that_is_not_named_among_the_models_is_measured_in_its_own_task(family: Path) -> None:
    found = largemerge.evaluate(tasks(family), {"merged": family / "math"})
    roles = {model.name: model.role for model in found.models}
    assert roles == {"base": "base", "merged": "model", "code": "expert"}
    assert found.score("code", "math texts") is None
    assert found.score("code", "code texts").normalized == 1.0
    assert found.tasks[0].expert == "merged"  # the same folder under another name
    columns, cells = found.rows()
    assert len(columns) == 4 and [row[0] for row in cells] == ["base (base)", "merged", "code (expert)"]
    assert cells[2][1] == ""


def test_the_command_prints_a_table_and_writes_files(family: Path) -> None:
    config = family / "eval.yaml"
    config.write_text(
        "tasks:\n"
        "  - {name: math, kind: language_model, data: math.jsonl, expert: ./math}\n"
        "  - {name: code, kind: language_model, data: code.jsonl, expert: ./code}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "largemerge", "evaluate", str(config), str(family / "math"), "--limit", "2"]
    done = subprocess.run([*command, "--out", str(family / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "math" in done.stdout and "code (expert)" in done.stdout
    found = json.loads((family / "out" / "evaluation.json").read_text())
    assert {score["num_samples"] for score in found["scores"]} == {2}


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({"base": 0.0, "one": 0.0, "merged": 0.0}, ""),
        ({"base": 0.5, "one": 0.4, "merged": 0.5}, "base merged"),
        ({"base": 0.4, "one": 0.5, "merged": 0.50001}, "one merged"),
        ({"base": 0.4, "one": 0.3, "merged": 0.5}, "merged"),
        ({"merged": 0.5}, ""),
        ({"one": None, "merged": None}, ""),
    ],
)
@pytest.mark.parametrize("better", ["higher", "lower"])
def test_all_that_tie_are_marked_or_none(values: dict[str, float | None], best: str, better: Any) -> None:
    sign = 1 if better == "higher" else -1
    roles: dict[str, Any] = {"base": "base", "one": "candidate", "merged": "merge", "own": "expert"}
    found = Evaluation(
        tasks=(EvaluatedTask("names", "text_classification", "accuracy", better, True, "own"),),
        models=tuple(EvaluatedModel(name, name, roles[name]) for name in [*values, "own"]),
        scores=tuple(
            Score("names", name, {} if value is None else {"accuracy": sign * value})
            for name, value in [*values.items(), ("own", 0.9)]
        ),
    )
    marked = [line.split()[1] for line in str(found).splitlines() if "← │" in line]
    assert marked == best.split()
    assert ("← the best" in " ".join(str(found).split())) == bool(best)


LINEAR: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 0.5}}


def test_a_merge_is_evaluated_beside_its_models(family: Path) -> None:
    config = LINEAR | {"models": [{"model": str(family / name)} for name in ("math", "code")]}
    seen: list[Evaluation] = []
    largemerge.merge(config, family / "merged", evaluate=tasks(family), evaluated=seen.append)
    (found,) = seen
    assert {model.name: model.role for model in found.models} == {
        "base": "base",
        "math": "candidate",
        "code": "candidate",
        "merged": "merge",
    }
    assert found.score("merged", "math texts").value > 0
    written = json.loads((family / "merged" / "evaluation.json").read_text())
    assert len(written["scores"]) == 8
    assert largemerge.verify(family / "merged").problems == ()
    page = largemerge.report(family / "merged").read_text(encoding="utf-8")
    assert "math texts" in page and "Beside the experts" in page
    largemerge.merge(config, family / "merged", force=True)  # of which nothing is measured
    assert not [path for path in (family / "merged").iterdir() if path.suffix in (".html", ".csv")]


def test_a_merge_may_be_evaluated_on_a_few_samples(family: Path) -> None:
    config = LINEAR | {"models": [{"model": str(family / name)} for name in ("math", "code")]}
    seen: list[Evaluation] = []
    largemerge.merge(config, family / "merged", evaluate=tasks(family), evaluated=seen.append, limit=2)
    assert {score.num_samples for score in seen[0].scores} == {2}


def test_models_that_cannot_be_merged_are_told_before_what_cannot_be_measured(family: Path) -> None:
    write_bert(family / "bert", 2)
    config = LINEAR | {"models": [{"model": str(family / name)} for name in ("math", "bert")]}
    with pytest.raises(largemerge.LargemergeError) as caught:
        largemerge.merge(config, family / "merged", evaluate=tasks(family))
    assert any("no output embeddings" in problem for problem in caught.value.problems[1:])
    assert "bert" in caught.value.problems[0] and not caught.value.problems[0].startswith("task")
    assert not (family / "merged").exists()


def test_published_averages_stand_below_those_that_are_found(family: Path) -> None:
    answers = [{"text": TEXTS[0], "answer": 0}, {"text": TEXTS[0], "answer": 1}, {"text": TEXTS[5], "answer": 0}]
    choices = {"kind": "multiple_choice", "prompt": "{text}", "choices": ["print", "the"], "answer_field": "answer"}
    config = tasks(family, published={"RegMean": 82.4, "experts": 90})
    for task in config["tasks"]:
        task |= choices | {"data": write_jsonl(family / "choices.jsonl", answers)}
    found = largemerge.evaluate(config, [family / "math", family / "code"], out=family / "found")
    means = {name: sum(found.score(name, task.name).value for task in found.tasks) / 2 for name in ("math", "code")}
    columns, rows = found.rows()
    assert columns[-2:] == ["mean %", "of the experts' %"]
    shown = {row[0]: row[-2] for row in rows}
    own = found.mean(None)
    assert own == sum(found.score(task.expert, task.name).value for task in found.tasks) / 2
    assert shown == {
        "base (base)": f"{100 * found.mean('base'):.1f}",
        "math": f"{100 * means['math']:.1f}",
        "code": f"{100 * means['code']:.1f}",
        "each task's expert": f"{100 * own:.1f}",
        "RegMean (published)": "82.4",
        "experts (published)": "90.0",
    }
    assert rows[-1][1:-2] == ["", ""], "nobody has measured these"
    written = json.loads((family / "found" / "evaluation.json").read_text())
    assert written["published"] == pytest.approx({"RegMean": 0.824, "experts": 0.9})
    assert Evaluation.from_json(written).published == found.published
    lines = list(csv.DictReader(io.StringIO((family / "found" / "evaluation.csv").read_text())))
    cited = {line["model"]: float(line["value"]) for line in lines if line["role"] == "published"}
    assert cited == written["published"]
    assert all(text in (family / "found" / "evaluation.html").read_text() for text in ("RegMean (published)", "82.4"))


def test_published_averages_need_one_metric(family: Path) -> None:
    config = tasks(family, published={"RegMean": 82.4})
    config["tasks"][1] |= {"kind": "generation", "prompt": "{text}", "answer_field": "text"}
    with pytest.raises(largemerge.LargemergeError, match=r"published: .* one metric, found exact_match, loss"):
        largemerge.evaluate(config, [family / "math"])
    with pytest.raises(largemerge.LargemergeError, match=r"published\.RegMean: .*found 'high'"):
        largemerge.evaluate(tasks(family, published={"RegMean": "high"}), [family / "math"])


def test_labels_may_be_true_and_false_for_two_classes(tmp_path: Path) -> None:
    config = {"name": "t", "kind": "text_classification"}
    scores = {}
    for kind in (bool, int):
        rows = [{"text": text, "label": kind(number % 2)} for number, text in enumerate(TEXTS)]
        config["data"] = write_jsonl(tmp_path / f"{kind.__name__}.jsonl", rows)
        write_bert(tmp_path / "two", 2)
        scores[kind] = largemerge.evaluate({"tasks": [config]}, [tmp_path / "two"]).score("two", "t").metrics
    assert scores[bool] == scores[int] and 0 < scores[int]["accuracy"] < 1
    write_bert(tmp_path / "three", 3)
    config["data"] = str(tmp_path / "bool.jsonl")
    with pytest.raises(largemerge.LargemergeError, match=r"'label' is true or false, and three's labels has 3 .* two"):
        largemerge.evaluate({"tasks": [config]}, [tmp_path / "three"])


def test_a_merge_does_not_begin_before_its_evaluation_is_right(family: Path) -> None:
    config = LINEAR | {"models": [{"model": str(family / name)} for name in ("math", "code")]}
    wrong = tasks(family)
    wrong["tasks"][1]["data"] = str(family / "nowhere.jsonl")
    with pytest.raises(largemerge.LargemergeError, match=r"nowhere\.jsonl: no such file"):
        largemerge.merge(config, family / "merged", evaluate=wrong)
    assert not (family / "merged").exists()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({"kind": None}, r"tasks\[1\]\.kind: expected one of language_model"),
    "a slip": ({"kind": "langauge_model"}, "did you mean 'language_model'"),
    "an unknown key": ({"text_filed": "text"}, "text_filed: unknown key; did you mean 'text_field'"),
    "no data": ({"data": "nowhere/at-all.jsonl"}, "task 'second': nowhere/at-all.jsonl: no such file"),
    "a column": ({"text_field": "txt"}, "no column 'txt'.*did you mean 'text'"),
    "both": ({"kind": "multiple_choice", "prompt": "{text}"}, "expected either 'choices' or 'choices_field'"),
    "no classifier": ({"kind": "text_classification"}, "no column 'label'"),
    "no images": ({"kind": "image_classification"}, "no column 'image'"),
    "no encoder": ({"kind": "retrieval", "query_field": "text", "passage_field": "text"}, "has no modules.json"),
    "no harness": ({"kind": "lm_eval", "tasks": ["arc_easy"], "data": ...}, "lm-eval"),
    "the same name": ({"name": "first"}, "2 are called 'first'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_any_weight_is_read(family: Path, mistake: str) -> None:
    changed, said = MISTAKES[mistake]
    good = {"name": "first", "kind": "language_model", "data": str(family / "math.jsonl")}
    bad = good | {"name": "second"} | changed
    bad = {key: value for key, value in bad.items() if value is not ...}
    (family / "math" / "model.safetensors").chmod(0o600)
    with pytest.raises(largemerge.LargemergeError, match=said):
        largemerge.evaluate({"tasks": [good, bad]}, [family / "math"])


def test_models_are_named_by_what_they_lie_in(family: Path) -> None:
    assert [each.name for each in name_models(family / "math")] == ["math"]
    assert [each.name for each in name_models("demo/base")] == ["base"]
    for models in (None, 5, ["math", None], {"math": 5}, [""], ""):
        with pytest.raises(largemerge.LargemergeError, match=r"models: expected (a folder|folders) or Hub id"):
            name_models(models)  # type: ignore[arg-type]


def test_all_mistakes_are_told_at_once(family: Path) -> None:
    config = tasks(family)
    config["tasks"][0]["data"] = str(family / "one.jsonl")
    config["tasks"][1]["data"] = str(family / "two.jsonl")
    with pytest.raises(largemerge.LargemergeError) as raised:
        largemerge.evaluate(config, [family / "math"])
    assert "one.jsonl" in str(raised.value) and "two.jsonl" in str(raised.value)
    with pytest.raises(largemerge.LargemergeError) as raised:
        largemerge.evaluate(tasks(family), [family / "maths", family / "codes"])
    assert "maths" in str(raised.value) and "codes" in str(raised.value)


def test_labels_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert", 2)
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": text, "label": number} for number, text in enumerate(TEXTS)])
    task = {"name": "t", "kind": "text_classification", "data": data}
    with pytest.raises(largemerge.LargemergeError, match=r"'label' is 2; expected 0 to 1, or one of bert's labels"):
        largemerge.evaluate({"tasks": [task]}, [tmp_path / "bert"])
    many = write_jsonl(tmp_path / "m.jsonl", [{"text": "the end", "label": number} for number in range(-1, 1203)])
    with pytest.raises(largemerge.LargemergeError) as raised:
        largemerge.evaluate({"tasks": [task | {"data": many}]}, tmp_path / "bert")
    assert [problem.rpartition("(")[2] for problem in raised.value.problems[4:]] == ["and 1,197 more like it)"]
    with pytest.raises(largemerge.LargemergeError, match="metric 'spearman' does not fit bert, whose head has 2"):
        largemerge.evaluate({"tasks": [task | {"metric": "spearman"}]}, [tmp_path / "bert"])


def test_a_task_that_fails_loses_no_other_ones_result(tmp_path: Path, family: Path) -> None:
    write_clip(tmp_path / "clip")
    good, bad = (Path(write_images(tmp_path / name, ["0", "1"], 3)) for name in ("good", "bad"))
    (bad / "1" / "2.png").write_bytes(b"no image at all")
    classes = tmp_path / "classes.yaml"
    classes.write_text(json.dumps({"class_names": ["the end", "models"], "templates": ["{}"]}), encoding="utf-8")
    config = {
        "tasks": [
            {"name": data.name, "kind": "zero_shot", "data": str(data), "classes": str(classes)} for data in (bad, good)
        ]
    }
    found = largemerge.evaluate(config, [tmp_path / "clip"])
    failed, fine = (found.score("clip", name) for name in ("bad", "good"))
    assert "2.png" in failed.error and failed.value is None
    assert "task 'bad'" not in failed.error, "whose it is stands before it"
    assert fine.num_samples == 6 and not fine.error
    assert len(found.problems) == 1
    assert "failed" in found.rows()[1][0]


def test_classes_of_another_number_than_the_labels_are_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    data = write_images(tmp_path / "images", LABELS, 1)
    classes = tmp_path / "classes.yaml"
    classes.write_text(json.dumps({"class_names": list(LABELS[:4]), "templates": ["{}"]}), encoding="utf-8")
    task = {"name": "t", "kind": "zero_shot", "data": data, "classes": str(classes)}
    with pytest.raises(largemerge.LargemergeError, match="'label' is 'cow'; expected 0 to 3, or one of the classes"):
        largemerge.evaluate({"tasks": [task]}, [tmp_path / "clip"])


@pytest.mark.parametrize("host", [None, "1MiB"])
def test_answers_of_what_is_not_finite_are_no_score(family: Path, host: str | None) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(family / "math")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(family / "math")
    data = write_jsonl(family / "q.jsonl", [{"text": text, "answer": "print"} for text in TEXTS[:3]])
    own = {"data": data, "prompt": "{text}", "answer_field": "answer"}
    kinds = [{"kind": "multiple_choice", "choices": ["print", "the"]}, {"kind": "generation", "max_new_tokens": 2}]
    config: dict[str, Any] = {"tasks": [{"name": each["kind"], **own, **each} for each in kinds]}
    config |= {"memory": {"host": host}} if host is not None else {}
    found = largemerge.evaluate(config, [family / "math", family / "code"])
    assert any("holds more than that" in note for note in found.notes) == (host is not None)
    for each in kinds:
        assert "not finite" in found.score("math", each["kind"]).error, each
        assert found.score("code", each["kind"]).value is not None and not found.score("code", each["kind"]).error


def test_an_earlier_evaluation_is_not_replaced_unasked(family: Path) -> None:
    (family / "found").mkdir()
    (family / "found" / "evaluation.csv").write_text("precious")
    with pytest.raises(largemerge.ConfigError, match="which would be replaced; expected another folder"):
        largemerge.evaluate(tasks(family), family / "math", out=family / "found")
    assert (family / "found" / "evaluation.csv").read_text() == "precious"
    found = largemerge.evaluate(tasks(family), family / "math", out=family / "found", force=True, limit=1)
    assert (family / "found" / "evaluation.csv").read_text() == found.csv()


def test_what_is_not_finite_is_no_score(family: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(family / "math")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(family / "math")
    found = largemerge.evaluate(tasks(family), str(family / "math"))
    assert [model.name for model in found.models] == ["base", "math", "code"], "one model needs no list"
    assert "not finite" in found.score("math", "code texts").error
    assert found.score("code", "code texts").value > 0


def test_two_ranks_find_what_one_finds(family: Path, tmp_path: Path) -> None:
    config = family / "eval.json.yaml"
    config.write_text(json.dumps(tasks(family, batch_size=2)), encoding="utf-8")
    for size in (1, 2):
        processes.run_ranks(["evaluate", config, family / "math", "--out", family / f"by{size}"], tmp_path, size)
    one, two = (json.loads((family / f"by{size}" / "evaluation.json").read_text())["scores"] for size in (1, 2))
    for left, right in zip(one, two, strict=True):
        assert left["metrics"] == pytest.approx(right["metrics"], rel=1e-6)
        assert left["num_samples"] == right["num_samples"] == 4


def test_tasks_that_run_what_models_write_are_known_by_their_files(tmp_path: Path) -> None:
    files = {
        "plain": "task: plain\n",
        "code": "task: code\nunsafe_code: true\n",
        "kin": "include: code.yaml\ntask: kin\n",
        "commented": "task: commented\n# unsafe_code: true\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    index = {name: SimpleNamespace(yaml_path=tmp_path / f"{name}.yaml") for name in files}
    manager = SimpleNamespace(task_index={**index, "group": SimpleNamespace(yaml_path=None)})
    found = {name: runs_code(manager, name) for name in [*files, "group", "nothing"]}
    assert {name for name, runs in found.items() if runs} == {"code", "kin"}
