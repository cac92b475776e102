"""Whole merges of real files: layers, parameters, dtypes, resuming, mistakes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_models
import torch
import transformers as tf
import yaml
from cases import weights_in
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedModel

import largemerge
from largemerge import LargemergeError
from largemerge.arithmetic import layout, pieces, stream
from largemerge.arithmetic.registry import METHODS, merge_tensors

NUM_LAYERS = tiny_models.LLM["num_hidden_layers"]
Config = dict[str, Any]


def write_models(folder: Path, architecture: str = "llama", count: int = 4, dtype: torch.dtype = torch.float32) -> None:
    """`model0`, which serves as the base, and others beside it."""
    for seed in range(count):
        tiny_models.perturbed(architecture, seed).to(dtype).save_pretrained(folder / f"model{seed}")


def config_of(folder: Path, method: str, models: list[int] | None = None, **more: Any) -> Config:
    entries = [{"model": str(folder / f"model{seed}")} for seed in models or [1, 2, 3]]
    return {"merge_method": method, "models": entries, **more}


def weighted(folder: Path, method: str = "linear", **more: Any) -> Config:
    config = config_of(folder, method, **more)
    for entry, weight in zip(config["models"], [0.5, 0.3, 0.2], strict=True):
        entry["parameters"] = {"weight": weight}
    return config


def load(out: Path, build: Callable[..., PreTrainedModel] = LlamaForCausalLM) -> PreTrainedModel:
    model, info = build.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def test_a_merge_loads_and_is_what_its_method_says(tmp_path: Path) -> None:
    write_models(tmp_path)
    report = largemerge.merge(weighted(tmp_path, "ties", base_model=str(tmp_path / "model0")), tmp_path / "out")
    load(tmp_path / "out")
    base, *others = (weights_in(tmp_path / f"model{seed}") for seed in range(4))
    merged = weights_in(tmp_path / "out")
    assert set(merged) == set(base)
    for name, tensor in merged.items():
        each = {"weight": [0.5, 0.3, 0.2]}
        expected = merge_tensors("ties", [other[name] for other in others], base[name], name=name, each=each)
        assert torch.equal(tensor, expected), name
    told = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert told["tensors"]["model.norm.weight"]["each"]["weight"] == [0.5, 0.3, 0.2]
    assert report.to_json()["bytes_written"] == sum(tensor.nbytes for tensor in merged.values())
    assert (tmp_path / "out" / "README.md").exists() and (tmp_path / "out" / "largemerge_config.yaml").exists()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_merges_files(tmp_path: Path, method: str) -> None:
    write_models(tmp_path, dtype=torch.bfloat16)
    row = METHODS[method]
    numbers = [1, 2, 3][: row.num_models[1]]
    config = config_of(tmp_path, method, numbers)
    if row.base.name == "REQUIRED":
        config["base_model"] = str(tmp_path / "model0")
    for entry in config["models"] if row.companion is not None else ():
        diagonals = {name: tensor.abs() for name, tensor in weights_in(Path(entry["model"])).items()}
        save_file(diagonals, f"{entry['model']}.safetensors")
        entry["parameters"] = {row.companion: f"{entry['model']}.safetensors"}
    options = {name: 0.3 for name in row.options if name == "t"}
    config["parameters"] = options | {"weight": 0.4} if "weight" in row.each else options
    largemerge.merge(config, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    assert all(torch.isfinite(parameter).all() for parameter in merged.parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "t5", "clip", "llama_tied", "mixtral", "vit"])
def test_any_architecture(tmp_path: Path, architecture: str) -> None:
    write_models(tmp_path, architecture)
    largemerge.merge(weighted(tmp_path), tmp_path / "out")
    models = [weights_in(tmp_path / f"model{seed}") for seed in (1, 2, 3)]
    for name, tensor in weights_in(tmp_path / "out").items():
        if tensor.is_floating_point():
            expected = sum(w * model[name].double() for w, model in zip([0.5, 0.3, 0.2], models, strict=True))
            assert (tensor.double() - expected).norm() <= 1e-6 * expected.norm() + 1e-9, name
    load(tmp_path / "out", type(tiny_models.ARCHITECTURES[architecture].build()))


def test_task_negation_unlearns(tmp_path: Path) -> None:
    write_models(tmp_path)
    config = config_of(tmp_path, "task_arithmetic", [1], base_model=str(tmp_path / "model0"))
    config["parameters"] = {"weight": -1.0}
    largemerge.merge(config, tmp_path / "out")
    base, task, merged = (weights_in(tmp_path / name) for name in ("model0", "model1", "out"))
    for name, tensor in merged.items():
        assert torch.allclose(tensor, 2 * base[name] - task[name], atol=1e-6), name


def test_layers_are_stacked(tmp_path: Path) -> None:
    write_models(tmp_path)
    slices = [
        {"sources": [{"model": str(tmp_path / "model1"), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(tmp_path / "model2"), "layer_range": [1, 3], "parameters": {"scale": 0.5}}]},
    ]
    largemerge.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert merged.config.num_hidden_layers == 4 and len(merged.model.layers) == 4
    first, second = weights_in(tmp_path / "model1"), weights_in(tmp_path / "model2")
    state = weights_in(tmp_path / "out")
    name = "mlp.up_proj.weight"
    for layer, (source, number, scale) in enumerate([(first, 0, 1), (first, 1, 1), (second, 1, 0.5), (second, 2, 0.5)]):
        expected = scale * source[f"model.layers.{number}.{name}"]
        assert torch.equal(state[f"model.layers.{layer}.{name}"], expected)
    assert torch.equal(state["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(state["lm_head.weight"], 0.5 * second["lm_head.weight"])


def test_gradients_and_filters(tmp_path: Path) -> None:
    write_models(tmp_path)
    config = config_of(tmp_path, "slerp", [1], base_model=str(tmp_path / "model0"))
    config["parameters"] = {"t": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.25}]}
    plan = largemerge.plan(config)
    used = {task.name: task.options["t"] for task in plan.layout.tasks}
    mlp = [used[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(NUM_LAYERS)]
    assert mlp == [0.0, 0.5, 1.0]
    assert {value for name, value in used.items() if "mlp" not in name} == {0.25}


def test_modules_have_layers_of_their_own(tmp_path: Path) -> None:
    write_models(tmp_path, "clip")
    entries = config_of(tmp_path, "linear", [1, 2])["models"]

    def module(first: float) -> Config:
        weights = (first, 1 - first)
        return {"models": [{**entry, "parameters": {"weight": w}} for entry, w in zip(entries, weights, strict=True)]}

    text, vision = "text_model.encoder.layers", "vision_model.encoder.layers"
    config = {"merge_method": "linear", "modules": {text: module(1.0), vision: module(0.0)}}
    largemerge.merge(config, tmp_path / "out")
    one, two, merged = (weights_in(tmp_path / name) for name in ("model1", "model2", "out"))
    for name, tensor in merged.items():
        if name.startswith(text):
            assert torch.equal(tensor, one[name])
        elif name.startswith(vision):
            assert torch.equal(tensor, two[name])
    with pytest.raises(LargemergeError, match=f"expected one for each of .*{vision}"):
        largemerge.merge({**config, "modules": {text: module(1.0)}}, tmp_path / "other")
    with pytest.raises(LargemergeError, match="use 'modules'"):
        slices = [{"sources": [{**entries[0], "layer_range": [0, 1]}]}]
        largemerge.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "other")


@pytest.mark.parametrize(("dtype", "out_dtype"), [("float32", "bfloat16"), ("bfloat16", None), (None, "float16")])
def test_dtypes(tmp_path: Path, dtype: str | None, out_dtype: str | None) -> None:
    write_models(tmp_path, dtype=torch.bfloat16)
    config = weighted(tmp_path) | ({"dtype": dtype} if dtype else {}) | ({"out_dtype": out_dtype} if out_dtype else {})
    largemerge.merge(config, tmp_path / "out")
    expected = out_dtype or dtype
    assert {str(tensor.dtype) for tensor in weights_in(tmp_path / "out").values()} == {f"torch.{expected}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == expected


def test_unlike_dtypes_are_noted(tmp_path: Path) -> None:
    write_models(tmp_path, count=2, dtype=torch.bfloat16)
    tiny_models.perturbed("llama", 2).save_pretrained(tmp_path / "model2")
    config = config_of(tmp_path, "linear", [1, 2], parameters={"weight": 0.5})
    plan = largemerge.plan(config)
    assert any("unlike dtypes; computed in float32" in note for note in plan.layout.notes)


def test_a_tied_head_is_the_embeddings(tmp_path: Path) -> None:
    tied = tiny_models.perturbed("llama_tied", 1)
    tied.save_pretrained(tmp_path / "model1")
    write_models(tmp_path / "more", count=1)
    config = {"merge_method": "linear", "parameters": {"weight": 0.5}}
    config["models"] = [{"model": str(tmp_path / "more" / "model0")}, {"model": str(tmp_path / "model1")}]
    largemerge.merge(config, tmp_path / "out")
    other, merged = weights_in(tmp_path / "more" / "model0"), weights_in(tmp_path / "out")
    mean = (other["lm_head.weight"] + weights_in(tmp_path / "model1")["model.embed_tokens.weight"]) / 2
    assert torch.allclose(merged["lm_head.weight"], mean)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp", "breadcrumbs", "sce"])
def test_workers_and_readings_change_nothing(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    config = config_of(tmp_path, method, [1] if method == "slerp" else None, base_model=str(tmp_path / "model0"))
    config["parameters"] = (
        {"t": 0.3} if method == "slerp" else {} if method == "sce" else {"weight": 0.4, "density": 0.5}
    )
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        largemerge.merge(config, tmp_path / "one")
        torch.set_num_threads(4)
        monkeypatch.setattr(stream, "KEPT_BYTES", 0)
        report = largemerge.merge(config, tmp_path / "four")
    finally:
        torch.set_num_threads(threads)
    assert report.plan.num_workers == 4 and report.bytes_read > report.plan.bytes_read, "read again, not kept"
    one, four = weights_in(tmp_path / "one"), weights_in(tmp_path / "four")
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_the_seed_decides(tmp_path: Path) -> None:
    write_models(tmp_path)
    config = config_of(tmp_path, "dare_linear", base_model=str(tmp_path / "model0"))
    config["parameters"] = {"weight": 0.5, "density": 0.5}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        largemerge.merge({**config, "seed": seed}, tmp_path / name)
    a, b, c = (weights_in(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def long_config(folder: Path) -> Path:
    """A merge of several parts, in shards."""
    for seed in range(3):
        torch.manual_seed(seed)
        sizes = tiny_models.LLM | {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 512}
        LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(folder / f"model{seed}")
    config = config_of(folder, "ties", [1, 2], base_model=str(folder / "model0"))
    config["parameters"] = {"weight": 0.5, "density": 0.3}
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("kill_at", [6, 9, 14, 18])
def test_a_killed_merge_goes_on(tmp_path: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = long_config(tmp_path)
    command = ["merge", path, tmp_path / "out", "--quiet", "--max-shard-size", "1MB"]
    small = {processes.PART_BYTES: str(200_000)}
    assert processes.finish(processes.start(command, tmp_path / "log", kill_at, environment=small)) == -signal.SIGKILL
    assert not (tmp_path / "out" / "config.json").exists()
    process = processes.start([*command, "--resume"], tmp_path / "log2", environment=small)
    assert processes.finish(process) == 0, (tmp_path / "log2").read_text()
    monkeypatch.setattr(stream, "PART_BYTES", 200_000)
    largemerge.merge(path, tmp_path / "unbroken", max_shard_bytes=10**6)
    assert processes.lasting(tmp_path / "out") == processes.lasting(tmp_path / "unbroken")
    load(tmp_path / "out")


def test_finished_parts_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = long_config(tmp_path)
    monkeypatch.setattr(stream, "PART_BYTES", 200_000)
    merge_one = stream.Merger.__call__
    done = 0

    def fails(merger: stream.Merger, task: layout.Task) -> None:
        nonlocal done
        if task.name.startswith("model.layers.20."):
            raise LargemergeError("the power went out")
        done += 1
        merge_one(merger, task)

    monkeypatch.setattr(stream.Merger, "__call__", fails)
    with pytest.raises(LargemergeError, match="power"):
        largemerge.merge(path, tmp_path / "out")
    monkeypatch.setattr(stream.Merger, "__call__", merge_one)
    report = largemerge.merge(path, tmp_path / "out", resume=True)
    assert report.resumed_parts > 3 and report.bytes_read < 2 * report.plan.bytes_read


MISTAKES: list[tuple[str, Config, str]] = [
    ("ties", {}, "base_model: ties needs one"),
    ("tie", {}, "did you mean 'ties'"),
    ("linear", {"parameters": {"wieght": 1.0}}, "did you mean 'weight'"),
    ("linear", {"parameters": {"weight": []}}, "parameters.weight: expected numbers"),
    ("linear", {}, "weight: missing for"),
    ("linear", {"chat_template": "chatlm"}, "chat_template: 'chatlm' is not known; expected 'auto', one of ['alpaca',"),
    ("linear", {"chat_template": "{% for %}"}, "chat_template: not a Jinja template: line 1"),
    ("linear", {"chat_template": "chatml"}, "chat_template: no model has a tokenizer"),
    ("linear", {"out_dype": "float16"}, "out_dype: unknown key; did you mean 'out_dtype'"),
    ("linear", {"models": []}, "expected one of 'models', 'slices' and 'modules', found none"),
    ("passthrough", {}, "passthrough merges 1 models, found 3"),
    ("nearswap", {"base_model": "BASE"}, "parameters.t: nearswap needs it"),
    ("slerp", {"base_model": "BASE", "parameters": {"t": 0.5}}, "slerp merges 1 models beside the base, found 3"),
]


@pytest.mark.parametrize(("method", "more", "text"), MISTAKES)
def test_mistakes_are_told_before_the_work(tmp_path: Path, method: str, more: Config, text: str) -> None:
    write_models(tmp_path)
    more = {key: str(tmp_path / "model0") if value == "BASE" else value for key, value in more.items()}
    with pytest.raises(LargemergeError) as error:
        largemerge.merge(config_of(tmp_path, method) | more, tmp_path / "out")
    assert text in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unlike_models_are_told_all_at_once(tmp_path: Path) -> None:
    write_models(tmp_path)
    sizes = tiny_models.LLM | {"intermediate_size": 32}
    LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(tmp_path / "model3")
    with pytest.raises(LargemergeError) as error:
        largemerge.merge(weighted(tmp_path), tmp_path / "out")
    assert str(error.value).count("shapes differ") == 3 * NUM_LAYERS
    with pytest.raises(LargemergeError, match=r"layer_range \[1, 9\].*expected some of \[0, 3\]"):
        slices = [{"sources": [{"model": str(tmp_path / "model1"), "layer_range": [1, 9]}]}]
        largemerge.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")


def test_paths_are_looked_up_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    config = {"merge_method": "linear", "models": [{"model": "model1"}, {"model": "./model2"}]}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config | {"parameters": {"weight": 1.0}}))
    monkeypatch.chdir("/")
    assert not largemerge.plan(tmp_path / "merge.yml").problems


def test_keys_without_values_are_none(tmp_path: Path) -> None:
    write_models(tmp_path)
    empty = {"base_model": None, "slices": None, "tokenizer": None, "chat_template": None, "dtype": None}
    config = weighted(tmp_path) | empty | {"parameters": None}
    config["models"][0]["parameters"]["weight"] = [{"filter": None, "value": 0.5}]
    plan = largemerge.plan(config)
    assert not plan.problems and plan.layout.tasks[0].each["weight"] == [0.5, 0.3, 0.2]
    with pytest.raises(LargemergeError, match=r"slices\[0\].residual_weight: unknown key"):
        largemerge.plan({"merge_method": "linear", "slices": [{"sources": [], "residual_weight": 0.5}]})


def test_options_of_other_methods_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path)
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(weighted(tmp_path)))
    from largemerge.cli import main

    for arguments, text in (
        (["merge", path, tmp_path / "out", "--memory-disk", tmp_path], "--memory-disk: not for data-free methods"),
        (["merge", path, tmp_path / "out", "--device", "cuda"], "data-free methods run on the CPU"),
        (["plan", path, "--num-ranks", "2"], "are for regression methods"),
    ):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        assert done.value.code == 2 and text in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["plan", str(path)])
    assert done.value.code == 0 and "to write" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "size"), [("ties", 2), ("dare_ties", 3), ("linear", 4)])
def test_ranks_share_the_tensors(tmp_path: Path, method: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    config = weighted(tmp_path, method, **({} if method == "linear" else {"base_model": str(tmp_path / "model0")}))
    config["parameters"] = {} if method == "linear" else {"density": 0.5}
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    command = ["merge", path, tmp_path / "out", "--quiet", "--max-shard-size", "20KB"]
    processes.run_ranks(command, tmp_path, size, {processes.PART_BYTES: "9000"})
    monkeypatch.setattr(stream, "PART_BYTES", 9000)
    alone = largemerge.merge(path, tmp_path / "alone", max_shard_bytes=20_000)
    assert processes.lasting(tmp_path / "out") == processes.lasting(tmp_path / "alone"), "bit for bit"
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert len(report["ranks"]) == size and report["bytes_read"] == alone.bytes_read


def test_a_rank_that_hangs_ends_the_others(tmp_path: Path) -> None:
    path = long_config(tmp_path)
    command = ["merge", path, tmp_path / "out", "--quiet", "--max-shard-size", "1MB"]
    small = {processes.PART_BYTES: "200000", "LARGEMERGE_RANK_TIMEOUT": "3"}
    tensor = "model.layers.12.mlp.up_proj.weight"  # one of them has it
    ranks = processes.start_ranks([command] * 2, tmp_path, small, hanging={0: tensor, 1: tensor})
    assert all(processes.finish(process) != 0 for process in ranks)
    log = "".join((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    assert "hangs: for 3 s it has" in log and "--resume" in log and "Traceback" not in log
    processes.run_ranks([*command, "--resume"], tmp_path, 3, small)
    load(tmp_path / "out")
