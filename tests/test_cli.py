"""The command line: exit codes, messages, what is printed where."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cases import Case, MakeCase, auto_device, touch, weights_in

from largemerge import __version__
from largemerge.cli import main
from largemerge.config_file import parse_size


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `largemerge ARGUMENTS` with wide lines and no terminal."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def case(make_case: MakeCase) -> Case:
    made = make_case(num_samples=4)
    made.write_yaml()
    return made


@pytest.mark.parametrize("own", ["", "ACTIVE"])
def test_threads_that_wait_sleep_unless_the_user_wants_another_way(own: str) -> None:
    said = "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    code = f"import os, sys; from largemerge import cli; cli.COMMANDS['demo'] = lambda _: {said}; cli.main(['demo'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": own} if own else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [own or "PASSIVE", "False"], "it is read when torch is imported"


def config(case: Case, **changes: Any) -> Path:
    case.config |= changes
    return case.write_yaml()


# Mistakes


def broken(name: str, case: Case) -> list[object]:
    """Arguments with one mistake."""
    path, out = case.folder / "config.yaml", case.folder / "merged"
    if name == "no such config":
        return ["merge", case.folder / "absent.yaml", out]
    if name == "unknown key":
        return ["merge", config(case, merge_metod="regmean"), out]
    if name == "no such checkpoint":
        case.config["models"][0]["model"] = "./absent"
        return ["merge", config(case), out]
    if name == "no such data":
        case.config["models"][1]["calibration"]["data"] = str(case.folder / "absent.jsonl")
        return ["plan", config(case)]
    if name == "no such stack":
        return ["plan", config(case, stacks=["model.blocks"])]
    if name == "no such device":
        return ["plan", path, "--device", "warp"]
    if name == "no size":
        return ["merge", path, out, "--max-shard-size", "5 apples"]
    if name == "output in the way":
        touch(out, "notes.txt")
        return ["merge", path, out]
    assert name == "output is an input"
    return ["merge", path, case.folder / "model0", "--force"]


@pytest.mark.parametrize(
    ("name", "mentions"),
    [
        ("no such config", "absent.yaml: no such configuration file"),
        ("unknown key", "merge_metod: unknown key; did you mean 'merge_method'?"),
        ("no such checkpoint", "./absent does not exist"),
        ("no such data", "absent.jsonl"),
        ("no such stack", "'model.blocks' is no list of modules"),
        ("no such device", "--device warp"),
        ("no size", "--max-shard-size '5 apples'"),
        ("output in the way", "notes.txt"),
        ("output is an input", "holds an input"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(command: Command, case: Case, name: str, mentions: str) -> None:
    outcome = command(*broken(name, case))
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("largemerge: ") and mentions in outcome.err
    assert "Traceback" not in outcome.err and 'File "' not in outcome.err


def test_several_mistakes_are_a_list(command: Command, case: Case) -> None:
    outcome = command("plan", config(case, dtype="half", base_modle="x", stacks="model.layers"))
    assert outcome.code == 2
    assert outcome.err.startswith("largemerge: 3 problems:\n  - ")
    assert outcome.err.count("\n  - ") == 3


@pytest.mark.parametrize("arguments", [[], ["mrege"], ["merge"], ["merge", "config.yaml"], ["plan", "x", "--jsno"]])
def test_wrong_usage_exits_with_2(command: Command, arguments: list[str]) -> None:
    outcome = command(*arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("usage: largemerge")


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["plan", "--help"]])
def test_help(command: Command, arguments: list[str]) -> None:
    outcome = command(*arguments)
    assert outcome.code == 0 and outcome.out.startswith("usage: largemerge") and outcome.err == ""


@pytest.mark.parametrize("device", ["warp", "cuda:99", "cpu:cpu", "", "meta"])
@pytest.mark.parametrize("name", ["plan", "merge"])
def test_unknown_devices(command: Command, case: Case, name: str, device: str) -> None:
    out = [case.folder / "merged"] if name == "merge" else []
    outcome = command(name, case.folder / "config.yaml", *out, "--device", device)
    assert outcome.code == 2
    assert outcome.err.startswith(f"largemerge: --device {device}:") and "expected auto, cpu or cuda:0" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (case.folder / "merged").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1000000", 10**6),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("1.5TB", 15 * 10**11),
        ("500 MB", 5 * 10**8),
        ("2GiB", 2 * 2**30),
        ("1.5KiB", 1536),
        (" 3KB ", 3000),
        ("100MiB", 100 * 2**20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0GB", "-5GB", "4,5GB", "5Gbit", "5iB", "5 apples", "1e9", "inf", "nan", "5GBs", "0.4"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r}: expected a size such as 5GB")):
        parse_size(text)


# Plan


def test_plan_as_text(command: Command, case: Case) -> None:
    outcome = command("plan", config(case, parameters={"exclude": ["norm", "nothing"]}))
    assert outcome.code == 0 and outcome.err == ""
    for text in (
        "regmean_plusplus of 2 × LlamaForCausalLM",
        "model0: 4 samples, ",
        "model.layers (3 blocks)",
        "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: 16 inputs",
        "21 solved",
        "7 averaged: excluded, and there is no base",
        "2 averaged: not in a block",
        f"float32 on {auto_device()}",
        "'nothing' matches no tensor",
    ):
        assert text in outcome.out
    assert not (case.folder / "merged").exists()


def test_plan_as_json_counts_every_tensor_of_the_output(command: Command, case: Case) -> None:
    outcome = command("plan", case.folder / "config.yaml", "--json")
    assert outcome.code == 0 and outcome.err == ""
    plan = json.loads(outcome.out)
    assert plan["merge_method"] == "regmean_plusplus" and plan["class"] == "LlamaForCausalLM"
    assert plan["candidates"] == ["model0", "model1"]
    assert plan["stacks"] == [{"name": "model.layers", "num_blocks": 3}]
    assert plan["problems"] == []
    solved = {f"{entry['block']}.{linear}.weight" for entry in plan["linears"] for linear in entry["linears"]}
    assert len(solved) == plan["tensors"]["solved"] == 21

    merged = command("merge", case.folder / "config.yaml", case.folder / "merged", "--quiet")
    assert merged.code == 0
    tensors = weights_in(case.folder / "merged")
    assert sum(plan["tensors"].values()) == len(tensors)
    assert solved | set(plan["not_solved"]) == set(tensors)
    assert solved.isdisjoint(plan["not_solved"])
    assert plan["bytes_written"] == sum(tensor.nbytes for tensor in tensors.values())
    assert plan["peak_bytes"]["host"] == sum(plan["peak_bytes"]["parts"].values()) > 0


def test_a_plan_with_problems_exits_with_2(command: Command, case: Case) -> None:
    path = config(case, parameters={"include": ["nothing"]})
    as_text, as_json = command("plan", path), command("plan", path, "--json")
    assert as_text.code == as_json.code == 2
    assert "impossible" in as_text.out and "nothing is left to solve" in as_text.out
    (problem,) = json.loads(as_json.out)["problems"]
    assert problem.startswith("nothing is left to solve")


@pytest.mark.parametrize("pattern", ["[a-z]+_nothing", "[/]nothing", "nothing[abc]"])
def test_brackets_are_printed_as_they_are(command: Command, case: Case, pattern: str) -> None:
    """They are no markup."""
    case.config["models"][0]["name"] = "the [bold] one"
    path = config(case, parameters={"exclude": [pattern]})
    outcome = command("plan", path)
    assert outcome.code == 0, outcome.err
    assert f"{pattern!r} matches no tensor" in outcome.out
    assert "the [bold] one: 4 samples" in outcome.out


# Merge


def test_a_merge_prints_its_table_to_stderr(command: Command, case: Case) -> None:
    case.config["models"][0]["name"] = "the [bold] one"
    outcome = command("merge", config(case), case.folder / "merged")
    assert outcome.code == 0 and outcome.out == ""
    for text in ("2 models", "21 solved", "cholesky", "the [bold] one", "model1", "anonymous", "read", "written"):
        assert text in outcome.err, text
    assert "\x1b[" not in outcome.err


def test_max_shard_size_reaches_the_writer(command: Command, case: Case) -> None:
    path = case.folder / "config.yaml"
    assert command("merge", path, case.folder / "merged", "--quiet", "--max-shard-size", "20KB").code == 0
    shards = sorted(file.name for file in (case.folder / "merged").glob("*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus"])
def test_plain_lines_where_there_is_no_terminal(
    command: Command, make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """One for every step here; a line every ten seconds otherwise."""
    monkeypatch.setattr("largemerge.progress._PLAIN_INTERVAL_SECONDS", 0.0)
    case = make_case("t5", method=method, num_samples=4, batch_size=3)
    outcome = command("merge", case.write_yaml(), case.folder / "merged")
    lines = [line for line in outcome.err.splitlines() if "steps/s" in line]
    what = r"(outside|collect|solve|forward) (\S+)( \(\d/4\))?( model[01])?"
    held = rf"[\d.]+ GiB(?: \+ [\d.]+ GiB on {auto_device()})?"
    pattern = rf" *(\d+)% {what}, [\d.]+ steps/s, {held}, \d[\d.]* (s|min|h)( \d+ (s|min))? left"
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert all(matches), lines
    percent = [int(match[1]) for match in matches if match]
    assert percent == sorted(percent) and percent[-1] == 100
    assert percent.count(100) <= len(percent) // 100 + 1, "100% before the end"
    stages = {(match[2], match[4], match[5]) for match in matches if match}
    assert ("collect", " (1/4)", " model0") in stages and ("collect", " (4/4)", " model1") in stages
    assert ("forward", " (1/4)", " model0") in stages or method == "regmean"
    assert "\x1b" not in outcome.err


def test_a_quiet_merge_of_a_real_process_prints_nothing(case: Case) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = ["merge", str(case.folder / "config.yaml"), str(case.folder / "merged"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "largemerge", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    report = json.loads((case.folder / "merged" / "merge_report.json").read_text())
    assert report["resumed_parts"] == 0


def test_the_version_is_that_of_the_package() -> None:
    setup = (Path(__file__).parents[1] / "setup.cfg").read_text()
    assert f"version = {__version__}\n" in setup


def test_lines_of_other_ranks_begin_with_their_number(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    outcome = command("merge", "nowhere.yaml", "out")
    assert outcome.code == 2 and outcome.err.startswith("[rank 2] largemerge: 2 problems:\n[rank 2]   - MASTER_ADDR")
    monkeypatch.delenv("WORLD_SIZE")
    assert command("plan", "nowhere.yaml").err.startswith("largemerge: nowhere.yaml: no such"), "it is alone"
