"""`largemerge merge-adapters`: held against dense float64 sums of what peft merges each adapter to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_free_reference as reference
import peft
import pytest
import tiny_models
import torch
import yaml
from adapters import merged_by_peft, train_with_peft
from cases import exit_code, names_in
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import largemerge
from largemerge import CheckpointError, ConfigError, OutputError
from largemerge.adapter_tools.factor_methods import METHODS, Scaled, merge_factors, squared_error

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "merge_adapters_report.json"}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5},
        "alpha_pattern": {"v_proj": 1},
    },
    "embeddings": {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
}


def write_adapters(folder: Path, *kinds: str, name: str = "llama") -> PreTrainedModel:
    """Trains adapters of one base with peft, in `0`, `1`, …; each has numbers of its own."""
    base = tiny_models.build(name)
    for index, kind in enumerate(kinds):
        more = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if name == "gpt2" else {}
        train_with_peft(base, peft.LoraConfig(task_type="CAUSAL_LM", **KINDS[kind] | more), folder / str(index))
        path = folder / str(index) / "adapter_model.safetensors"
        torch.manual_seed(10 + index)
        factors = {key: tensor for key, tensor in load_file(path).items() if "lora_" in key}  # not a copy of embeddings
        save_file({key: torch.randn_like(tensor) / 3 for key, tensor in factors.items()}, path)
    return base


def config_of(folder: Path, method: str, weights: list[float], **parameters: Any) -> dict[str, Any]:
    models = [{"model": str(folder / str(i)), "parameters": {"weight": w}} for i, w in enumerate(weights)]
    return {"merge_method": method, "models": models, "parameters": parameters}


def deltas(base: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of an adapter by name of the weight, dense and in float64, as peft merges it."""
    wide = base.double()
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    after = merged_by_peft(wide, folder).state_dict()
    return {name: after[name] - tensor for name, tensor in before.items()}


def weighted(base: PreTrainedModel, folder: Path, weights: list[float]) -> dict[str, torch.Tensor]:
    found = [deltas(base, folder / str(index)) for index in range(len(weights))]
    return {name: sum(w * each[name] for w, each in zip(weights, found, strict=True)) for name in found[0]}  # type: ignore


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        (("plain",), "llama"),
        (("rslora",), "llama"),
        (("plain", "rslora", "wide"), "llama"),
        (("patterns", "wide"), "llama"),
        (("embeddings", "plain"), "llama"),
        (("plain", "rslora"), "gpt2"),
    ],
)
def test_cat_is_the_weighted_sum(kinds: tuple[str, ...], name: str, tmp_path: Path) -> None:
    base = write_adapters(tmp_path, *kinds, name=name)
    weights = [0.7, -0.4, 1.5][: len(kinds)]
    report = largemerge.merge_adapters(config_of(tmp_path, "cat", weights), tmp_path / "out")
    wanted, found = weighted(base, tmp_path, weights), deltas(base, tmp_path / "out")
    assert any(tensor.abs().max() > 0.1 for tensor in wanted.values())
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, atol=2e-6), key
    assert report.relative_error < 1e-6 and names_in(tmp_path / "out") == FILES
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False and config["r"] == config["lora_alpha"] == report.rank


@pytest.mark.parametrize("rank", [1, 3, None])
def test_svd_is_the_best_of_its_rank(rank: int | None, tmp_path: Path) -> None:
    base = write_adapters(tmp_path, "plain", "rslora", "wide")
    weights, more = [0.5, 0.25, 1.0], {"rank": rank} if rank is not None else {}
    report = largemerge.merge_adapters(config_of(tmp_path, "svd", weights, **more), tmp_path / "out")
    wanted, found = weighted(base, tmp_path, weights), deltas(base, tmp_path / "out")
    for key, tensor in wanted.items():
        if not tensor.any():
            assert not found[key].any()
            continue
        own = rank or (6 if "q_proj" in key or "down_proj" in key else 4)
        u, s, vh = torch.linalg.svd(tensor)
        best = (u[:, :own] * s[:own]) @ vh[:own]
        assert torch.allclose(found[key], best, atol=3e-6), key
        error = ((tensor - best).norm() / tensor.norm()).item()
        assert report.errors[key.removesuffix(".weight")] == pytest.approx(error, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("method", "options"), [("linear", {}), ("ties", {"density": 0.6})])
def test_linear_and_ties_are_those_of_peft(method: str, options: dict[str, float], tmp_path: Path) -> None:
    base = write_adapters(tmp_path, "plain", "plain", "plain")
    weights = [0.7, -0.4, 1.5]
    report = largemerge.merge_adapters(config_of(tmp_path, method, weights, **options), tmp_path / "out")
    model: Any = peft.PeftModel.from_pretrained(tiny_models.build("llama"), str(tmp_path / "0"), adapter_name="0")
    for name in ("1", "2"):
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    model.add_weighted_adapter(["0", "1", "2"], weights, "all", combination_type=method, **options)
    model.set_adapter("all")
    wanted = model.merge_and_unload().state_dict()
    before = base.state_dict()
    found = deltas(base, tmp_path / "out")
    for key, tensor in wanted.items():
        assert torch.allclose(found[key].float(), tensor - before[key].float(), atol=5e-6), key
    assert report.relative_error > 0.1  # which is not the weighted sum


def dense_knots(
    base: PreTrainedModel, folder: Path, weights: list[float], options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """KnOTS of the adapters' ΔW, dense and in float64, by name of the weight; zeros where no adapter has one."""
    all_deltas = [deltas(base, folder / str(index)) for index in range(len(weights))]
    settings = {"normalize": options.get("normalize", True), "scale": options.get("lambda", 1.0)}
    found = {}
    for key in all_deltas[0]:
        having = [(each[key], weight) for each, weight in zip(all_deltas, weights, strict=True) if each[key].any()]
        if not having:
            found[key] = torch.zeros_like(all_deltas[0][key])
            continue
        some, own = zip(*having, strict=True)
        turned = [delta.T for delta in some] if base.config.model_type == "gpt2" else list(some)
        merged = reference.knots(turned, list(own), [options.get("density", 1.0)] * len(own), **settings)
        found[key] = merged.T if base.config.model_type == "gpt2" else merged
    return found


@pytest.mark.parametrize(
    ("kinds", "name", "weights", "options"),
    [
        (("plain", "rslora", "wide"), "llama", [0.7, -0.4, 1.5], {"density": 0.3, "normalize": False, "lambda": 0.6}),
        (("patterns", "wide"), "llama", [1.0, 1.0], {"density": 0.2}),
        (("plain", "rslora"), "gpt2", [2.0, 1.0], {}),
    ],
)
def test_knots_is_that_of_whole_models(
    kinds: tuple[str, ...], name: str, weights: list[float], options: dict[str, Any], tmp_path: Path
) -> None:
    base = write_adapters(tmp_path, *kinds, name=name)
    report = largemerge.merge_adapters(config_of(tmp_path, "knots", weights, **options), tmp_path / "out")
    found, wanted = deltas(base, tmp_path / "out"), dense_knots(base, tmp_path, weights, options)
    assert report.kept == pytest.approx(1, abs=1e-12) and report.relative_error > 0.01
    assert sum(bool(tensor.any()) for tensor in wanted.values()) >= 4
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, atol=5e-6), key
    # and of `largemerge merge`, which merges the models that the adapters make
    base.float().save_pretrained(tmp_path / "base")
    models = [
        {"model": f"{tmp_path / 'base'}+{tmp_path / str(index)}", "parameters": {"weight": weight}}
        for index, weight in enumerate(weights)
    ]
    whole = {"merge_method": "knots", "base_model": str(tmp_path / "base"), "models": models, "parameters": options}
    largemerge.merge(whole, tmp_path / "whole")
    merged, before = (type(base).from_pretrained(tmp_path / each).state_dict() for each in ("whole", "base"))
    for key, tensor in merged.items():
        assert torch.allclose(tensor - before[key], found[key].float(), atol=1e-4), key


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_cuts_knots_to_the_best_of_it(rank: int, tmp_path: Path) -> None:
    base, options = write_adapters(tmp_path, "plain", "wide"), {"rank": rank, "density": 0.5}
    report = largemerge.merge_adapters(config_of(tmp_path, "knots", [1, 1], **options), tmp_path / "out")
    found, wanted = deltas(base, tmp_path / "out"), dense_knots(base, tmp_path, [1, 1], options)
    kept, squares = 0.0, 0.0
    for key, tensor in wanted.items():
        if tensor.any():
            u, s, vh = torch.linalg.svd(tensor)
            assert torch.allclose(found[key], (u[:, :rank] * s[:rank]) @ vh[:rank], atol=5e-6), key
            kept, squares = kept + s[:rank].square().sum().item(), squares + s.square().sum().item()
    assert report.kept == pytest.approx(kept / squares) and 0.1 < report.kept < 1
    assert report.rank == rank and f"{report.kept:.2%} of ‖ΔW‖²" in str(report)


def test_knots_where_factors_have_less_than_their_rank() -> None:
    torch.manual_seed(1)
    parameters = METHODS["knots"].parameters
    low = torch.randn(7, 1).double()
    twice = Scaled(torch.randn(3, 5).double(), low.repeat(1, 3), 0.5)
    merged = merge_factors("knots", [twice, twice], 5, parameters)
    assert merged.down.shape == (5, 5) and merged.up.shape == (7, 5)  # more than the outputs and inputs allow is zeros
    assert torch.allclose(merged.up @ merged.down, 0.5 * twice.up @ twice.down)
    row = [Scaled(torch.randn(2, 9).double(), torch.randn(1, 2).double(), 1.0) for _ in range(2)]
    wanted = reference.knots([each.up @ each.down for each in row], density=[0.4, 0.4])
    merged = merge_factors("knots", row, 1, {**parameters, "density": 0.4})
    assert torch.allclose(merged.up @ merged.down, wanted)


def test_a_module_that_an_adapter_lacks_counts_as_zero_and_is_told(tmp_path: Path) -> None:
    write_adapters(tmp_path, "plain", "wide")
    report = largemerge.merge_adapters(config_of(tmp_path, "svd", [1, 1]), tmp_path / "out")
    assert [note.partition(" has no factors of ")[2] for note in report.notes] == [
        "base_model.model.model.layers.*.mlp.down_proj: they count as zero".removeprefix("base_model.model."),
        "model.layers.*.self_attn.v_proj: they count as zero",
    ]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.down_proj" in config["target_modules"]


@pytest.mark.parametrize("method", METHODS)
def test_properties(method: str) -> None:
    torch.manual_seed(0)
    parts = [Scaled(torch.randn(2, 5).double(), torch.randn(7, 2).double(), 0.5, factor) for factor in (1.0, 4.0)]
    parameters = {**METHODS[method].parameters, **({"density": 1.0} if method == "ties" else {})}

    def merge(some: list[Scaled], rank: int) -> torch.Tensor:
        merged = merge_factors(method, some, rank, parameters)
        return merged.up @ merged.down

    alone = 0.5 * parts[0].up @ parts[0].down
    assert torch.allclose(merge(parts[:1], 2), alone)  # one adapter is itself, times its weight
    there = merge(parts, 4)
    assert torch.allclose(there, merge(parts[::-1], 4))  # order does not matter
    wanted = sum(part.factor * part.up @ part.down for part in parts)
    merged = merge_factors(method, parts, 4, parameters)
    error, square = squared_error((merged.down, merged.up), parts)
    assert error == pytest.approx((there - wanted).square().sum().item(), abs=1e-12)
    assert square == pytest.approx(wanted.square().sum().item())  # type: ignore[union-attr]
    assert merged.square == pytest.approx(there.square().sum().item()) == pytest.approx(merged.kept_square)
    zeros = [Scaled(torch.zeros(1, 3).double(), torch.zeros(1, 1).double(), 1.0)]
    assert not merge(zeros, 1).any()


def test_largemerge_itself_reads_the_result(tmp_path: Path) -> None:
    base = write_adapters(tmp_path, "plain", "rslora")
    base.save_pretrained(tmp_path / "base")
    largemerge.merge_adapters(config_of(tmp_path, "cat", [1, 0.5]), tmp_path / "out")
    config = {"merge_method": "passthrough", "models": [{"model": f"{tmp_path / 'base'}+{tmp_path / 'out'}"}]}
    largemerge.merge(config, tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged").state_dict()
    wanted, before = weighted(base, tmp_path, [1, 0.5]), base.state_dict()
    assert all(torch.allclose(merged[key].double() - before[key], tensor, atol=2e-6) for key, tensor in wanted.items())


# What is wrong


def test_kinds_that_factors_do_not_tell_are_refused_by_name(tmp_path: Path) -> None:
    base = tiny_models.build("llama")
    more = {
        "saved": {"modules_to_save": ["norm"]},
        "bias": {"lora_bias": False, "bias": "all"},
        "tokens": {"trainable_token_indices": [1, 2]},
    }
    for name, options in more.items():
        train_with_peft(base, peft.LoraConfig(r=2, target_modules=["q_proj"], **options), tmp_path / name)
    train_with_peft(base, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), tmp_path / "ia3")
    names = [name for name in (*more, "ia3") if name != "bias"]
    config = {"merge_method": "cat", "models": [{"model": str(tmp_path / name)} for name in names]}
    with pytest.raises(CheckpointError) as caught:
        largemerge.merge_adapters(config, tmp_path / "out")
    told = dict(zip(names, caught.value.problems, strict=True))
    assert "norm" in told["saved"]
    assert "embed_tokens" in told["tokens"] and "peft_type is 'IA3'" in told["ia3"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"merge_method": "slerp"}, "expected one of cat, svd, linear, ties, knots, found 'slerp'"),
        ({"merge_method": "cat", "parameters": {"rank": 4}}, "parameters.rank: cat has none; expected with svd, knots"),
        ({"parameters": {"lambda": 2, "normalise": True}}, "did you mean 'normalize'?"),
        ({"parameters": {"lambda": 2}}, "parameters.lambda: svd has none; expected with knots"),
        ({"merge_method": "knots", "parameters": {"lambda": 0}}, "parameters.lambda: 0: nothing of any adapter"),
        ({"models": [{"model": "./0", "parameters": {"weight": 0}}]}, "models: weight: 0 for every adapter"),
        ({"merge_method": "svd", "parameters": {"rank": 0}}, "parameters.rank"),
        ({"merge_method": "ties", "parameters": {"density": 1.5}}, "parameters.density"),
        ({"merge_method": "linear"}, "the adapters have other ranks in"),
        ({"models": []}, "models"),
        ({"models": [{"model": "./nowhere"}]}, "./nowhere does not exist"),
        ({"model": 3}, "did you mean 'models'?"),
        ({"dtype": "int8"}, "dtype"),
        ({"models": [{"model": "./0"}, {"model": "./0"}]}, "is listed 2 times; expected it once"),
        ({"models": [{"model": "base+0"}, {"model": "./1"}]}, "expected '0' alone"),
    ],
)
def test_mistakes(change: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapters(tmp_path, "plain", "wide")
    path = tmp_path / "adapters.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "svd", "models": [{"model": "./0"}, {"model": "./1"}]} | change))
    assert exit_code("merge-adapters", path, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert expected in told and "Traceback" not in told and not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapters(tmp_path, "plain", "rslora")
    path = tmp_path / "adapters.yaml"
    path.write_text("merge_method: svd\nmodels: [{model: ./0}, {model: ./1}]\nparameters: {rank: 3}\n")
    assert exit_code("merge-adapters", path, tmp_path / "out") == 0
    assert "6 modules at rank 3: adapter of" in capsys.readouterr().err
    assert exit_code("merge-adapters", path, tmp_path / "out", "--force", "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 3
    assert exit_code("merge-adapters", path, tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(OutputError, match="holds an input"):
        largemerge.merge_adapters(path, tmp_path / "0", force=True)
    with pytest.raises(ConfigError, match="out"):
        largemerge.merge_adapters(path, "")


def test_a_negative_weight_subtracts_by_knots(tmp_path: Path) -> None:
    base = write_adapters(tmp_path, "plain", "rslora")
    largemerge.merge_adapters(config_of(tmp_path, "knots", [-1, -1]), tmp_path / "less")
    largemerge.merge_adapters(config_of(tmp_path, "knots", [1, 1]), tmp_path / "more")
    less, more = (deltas(base, tmp_path / name) for name in ("less", "more"))
    assert all(torch.allclose(less[key], -tensor, atol=1e-6) for key, tensor in more.items())


def test_adapters_of_other_shapes_are_refused(tmp_path: Path) -> None:
    write_adapters(tmp_path, "plain", "plain")
    path = tmp_path / "1" / "adapter_model.safetensors"
    tensors = {key: torch.cat([t, t], dim=1) if "lora_A" in key else t for key, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="expected adapters of one base"):
        largemerge.merge_adapters(config_of(tmp_path, "cat", [1, 1]), tmp_path / "out")


def changed(folder: Path, config: dict[str, Any] | None = None, **tensors: Any) -> None:
    """Changes the config of an adapter, or all of its tensors by a function, or their names."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    weights = folder / "adapter_model.safetensors"
    rename, change = tensors.get("rename", lambda key: key), tensors.get("change", lambda tensor: tensor)
    save_file({rename(key): change(tensor) for key, tensor in load_file(weights).items() if rename(key)}, weights)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"config": {"target_modules": ["k_proj"]}}, "and target_modules in adapter_config.json leaves it out"),
        ({"config": {"layers_to_transform": [0]}}, "and layers_to_transform in adapter_config.json leaves it out"),
        ({"change": lambda tensor: tensor.to(torch.int8)}, "expected floating-point numbers"),
        ({"rename": lambda key: "" if "layers.0.self_attn.q_proj.lora_B" in key else key}, "without the other factor"),
        ({"rename": lambda key: key.replace("model.model.layers", "model.layers")}, "adapters of other classes"),
    ],
)
def test_adapters_that_peft_would_not_load_as_they_are(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write_adapters(tmp_path, "plain", "plain")
    changed(tmp_path / "1", **change)
    with pytest.raises(CheckpointError) as caught:
        largemerge.merge_adapters(config_of(tmp_path, "cat", [1, 1]), tmp_path / "out")
    assert expected in str(caught.value) and not (tmp_path / "out").exists()


def test_eight_bits_beside_others_and_names_without_factors(tmp_path: Path) -> None:
    base = write_adapters(tmp_path, "plain", "plain")
    changed(tmp_path / "1", change=lambda tensor: tensor.to(torch.float8_e4m3fn))
    config = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
    changed(tmp_path / "0", config={"target_modules": [*config["target_modules"], "k_proj"]})
    report = largemerge.merge_adapters(config_of(tmp_path, "cat", [1, 0]), tmp_path / "out")
    assert any("target_modules names k_proj, of which its file has no factors" in note for note in report.notes)
    found, wanted = deltas(base, tmp_path / "out"), deltas(base, tmp_path / "0")
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    eight = config_of(tmp_path, "cat", [1, 1]) | {"models": [{"model": str(tmp_path / "1")}]}
    largemerge.merge_adapters(eight, tmp_path / "alone")
    assert {t.dtype for t in load_file(tmp_path / "alone" / "adapter_model.safetensors").values()} == {torch.bfloat16}
