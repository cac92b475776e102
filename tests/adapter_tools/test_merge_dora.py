"""`largemerge merge-adapters` of DoRA: held against the weights of the models that peft's `merge_and_unload` makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import quantized_models
import tiny_models
import torch
import transformers as tf
import yaml
from adapters import merged_by_peft, read_all, train_with_peft
from cases import exit_code
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import largemerge
from largemerge import CheckpointError, MergeError, OutputError
from largemerge.adapter_tools import dora, merge
from largemerge.adapter_tools.dora import DoraPart, merge_dora
from largemerge.adapter_tools.factor_methods import METHODS, Scaled

QV = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "dora": {**QV, "use_dora": True},
    "lora": QV,
    "rslora dora": {**QV, "use_dora": True, "use_rslora": True},
    "wide dora": {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "wide lora": {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns dora": {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5},
        "alpha_pattern": {"v_proj": 1},
        "use_dora": True,
    },
    "embeddings dora": {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head dora": {"r": 3, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"], "use_dora": True},
}
GPT2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}


def write(folder: Path, *kinds: str, name: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Saves a base, and adapters of it as `0`, `1`, …, whose numbers and magnitudes have moved far."""
    made = tiny_models.build(name)
    made.save_pretrained(folder / "base")
    base: PreTrainedModel = type(made).from_pretrained(folder / "base")
    for index, kind in enumerate(kinds):
        more = GPT2 if name == "gpt2" else {}
        train_with_peft(base, peft.LoraConfig(task_type="CAUSAL_LM", **KINDS[kind] | more), folder / str(index))
        path = folder / str(index) / "adapter_model.safetensors"
        torch.manual_seed(10 + index)
        tensors = {key: tensor for key, tensor in load_file(path).items() if "lora_" in key}
        for key, tensor in tensors.items():
            spread = torch.randn_like(tensor)
            tensors[key] = (tensor * (1 + spread / 5) if "magnitude" in key else spread / 5).to(dtype)
        save_file(tensors, path)
    return base


def files(folder: Path, kinds: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / str(index) / "adapter_model.safetensors") for index in range(len(kinds))]


def config_of(folder: Path, method: str, weights: list[float], **more: Any) -> dict[str, Any]:
    models = [{"model": str(folder / str(i)), "parameters": {"weight": w}} for i, w in enumerate(weights)]
    return {"merge_method": method, "models": models, **more}


def merged_weights(base: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that peft merges an adapter to, in float64."""
    return dict(merged_by_peft(base.double(), folder).state_dict())


def weighted_sum(base: PreTrainedModel, folder: Path, weights: list[float]) -> dict[str, torch.Tensor]:
    """W + Σ w_i (W_i - W), dense and in float64."""
    before = base.double().state_dict()
    total = {key: tensor.clone() for key, tensor in before.items()}
    for index, weight in enumerate(weights):
        for key, tensor in merged_weights(base, folder / str(index)).items():
            total[key] += weight * (tensor - before[key])
    return total


def changed(folder: Path, config: dict[str, Any] | None = None, change: Any = lambda key, tensor: tensor) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    weights = folder / "adapter_model.safetensors"
    tensors = {key: change(key, tensor) for key, tensor in load_file(weights).items()}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, weights)


@pytest.mark.parametrize(
    ("kinds", "weights", "name"),
    [
        (("dora",), [1.0], "llama"),
        (("dora", "dora"), [0.5, 0.5], "llama"),
        (("dora", "lora"), [0.5, 0.5], "llama"),
        (("lora", "wide dora", "rslora dora"), [0.7, -0.4, 1.5], "llama"),
        (("wide lora", "patterns dora"), [1.0, 0.6], "llama"),
        (("embeddings dora", "lora"), [0.5, 0.5], "llama"),
        (("head dora", "dora"), [0.3, 0.4], "llama"),
        (("dora", "rslora dora", "lora"), [0.5, 0.25, 0.25], "gpt2"),
    ],
)
def test_cat_is_the_mean_of_the_merged_models(
    kinds: tuple[str, ...], weights: list[float], name: str, tmp_path: Path
) -> None:
    base = write(tmp_path, *kinds, name=name)
    report = largemerge.merge_adapters(config_of(tmp_path, "cat", weights), tmp_path / "out")
    wanted, found = weighted_sum(base, tmp_path, weights), merged_weights(base, tmp_path / "out")
    before = base.double().state_dict()
    moved = [key for key, tensor in wanted.items() if (tensor - before[key]).abs().max() > 0.05]
    assert len(moved) == len(report.errors) >= 6
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=1e-6, atol=2e-7), key
    assert report.relative_error < 1e-6
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["use_dora"] is True and saved["use_rslora"] is False and saved["lora_alpha"] == saved["r"]
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    told = json.loads((tmp_path / "out" / "merge_adapters_report.json").read_text())
    assert told["base"] == str(tmp_path / "base") and told["use_dora"]
    for path, each in told["modules"].items():
        magnitudes = [f"base_model.model.{path}.lora_magnitude_vector" in file for file in files(tmp_path, kinds)]
        assert each["gains"][0] < each["gains"][1] if any(magnitudes) else each["gains"] == [1, 1]


def test_in_float32_as_a_user_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "_ELEMENTS_AT_ONCE", 40)  # two rows
    base = write(tmp_path, "dora", "wide lora")
    largemerge.merge_adapters(config_of(tmp_path, "cat", [0.5, 0.5]), tmp_path / "out")
    one, two, merged = (merged_by_peft(base.float(), tmp_path / each).state_dict() for each in ("0", "1", "out"))
    for key, tensor in merged.items():
        assert torch.allclose(tensor, (one[key] + two[key]) / 2, rtol=1e-5, atol=1e-6), key
    # not merged, peft computes the same with it
    tokens = torch.arange(3, 12)[None]
    loaded = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), str(tmp_path / "out"))
    model = merged_by_peft(base.float(), tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(tokens).logits, model.eval()(tokens).logits, atol=1e-4)
    # and largemerge itself reads the result as peft does
    read, *_ = read_all(f"{tmp_path / 'base'}+{tmp_path / 'out'}")
    assert all(torch.allclose(read[key], merged[key], atol=1e-6) for key in read)


@pytest.mark.parametrize("rank", [1, 3, None])
def test_svd_cuts_the_low_rank_part_to_its_best(rank: int | None, tmp_path: Path) -> None:
    base, weights = write(tmp_path, "dora", "rslora dora", "lora"), [0.5, 0.25, 0.5]
    more = {"parameters": {"rank": rank}} if rank is not None else {}
    report = largemerge.merge_adapters(config_of(tmp_path, "svd", weights, **more), tmp_path / "out")
    wanted, found = weighted_sum(base, tmp_path, weights), merged_weights(base, tmp_path / "out")
    plain = {key: tensor.double() for key, tensor in base.state_dict().items()}
    kept = squares = errors = changes = 0.0
    for path, error in report.errors.items():
        key = f"{path}.weight"
        gains = torch.zeros(len(plain[key]), dtype=torch.float64)
        low_rank = torch.zeros_like(plain[key])
        for index, weight in enumerate(weights):
            own = merged_weights(base, tmp_path / str(index))[key]
            factors = load_file(tmp_path / str(index) / "adapter_model.safetensors")
            prefix, scale = f"base_model.model.{path}", 6 / 2 if index == 1 else 6 / 4
            product = scale * (factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]).double()
            gain = own.norm(dim=1) / (plain[key] + product).norm(dim=1)
            gains += weight * (gain - 1)
            low_rank += weight * gain[:, None] * product
        u, s, vh = torch.linalg.svd(low_rank)
        own_rank = rank or 4
        best = (1 + gains)[:, None] * plain[key] + (u[:, :own_rank] * s[:own_rank]) @ vh[:own_rank]
        assert torch.allclose(found[key], best, atol=2e-6), key
        distance, change = (wanted[key] - best).norm().item(), (wanted[key] - plain[key]).norm().item()
        assert error == pytest.approx(distance / change, rel=1e-4)
        kept, squares = kept + s[:own_rank].square().sum().item(), squares + s.square().sum().item()
        errors, changes = errors + distance**2, changes + change**2
    assert report.kept == pytest.approx(kept / squares) == pytest.approx(report.kept_by_rank.get(rank or 4))
    assert report.relative_error == pytest.approx((errors / changes) ** 0.5, rel=1e-4)
    assert report.kept_by_rank[12] == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
def test_properties(method: str) -> None:
    torch.manual_seed(0)
    base = torch.randn(7, 5, dtype=torch.float64)
    more = {"density": 1.0} if method == "ties" else {}
    parameters = {**METHODS[method].parameters, **more}

    def part(magnitude: bool, weight: float) -> DoraPart:
        factors = Scaled(torch.randn(2, 5).double(), torch.randn(7, 2).double(), 0.5, weight)
        return DoraPart(factors, base.norm(dim=1) * (1 + torch.rand(7) / 2) if magnitude else None, "own")

    def model(each: DoraPart) -> torch.Tensor:
        total = base + each.factors.scale * each.factors.up @ each.factors.down
        if each.magnitude is None:
            return total
        return (each.magnitude / total.norm(dim=1))[:, None] * total

    def merged(*parts: DoraPart, rank: int = 4) -> torch.Tensor:
        found = merge_dora(method, base, parts, rank, parameters, torch.float64)
        down, up, magnitude = found.tensors
        total = base + up @ down
        written = (magnitude / total.norm(dim=1))[:, None] * total
        wanted = sum(each.factors.weight * (model(each) - base) for each in parts)
        assert isinstance(wanted, torch.Tensor)
        assert found.error == pytest.approx((written - base - wanted).square().sum().item(), abs=1e-12)
        assert found.wanted == pytest.approx(wanted.square().sum().item())
        return written

    one, two, plain = part(True, 0.6), part(True, 0.4), part(False, 0.4)
    alone = DoraPart(Scaled(one.factors.down, one.factors.up, 0.5), one.magnitude, "own")
    assert torch.allclose(merged(alone, rank=2), model(alone))  # one adapter is itself
    assert torch.allclose(merged(one, two), merged(two, one))  # order does not matter
    still = DoraPart(Scaled(torch.zeros(2, 5).double(), torch.zeros(7, 2).double(), 0.5, 0.4), None, "own")
    if method in ("cat", "svd"):
        assert torch.allclose(merged(one, two), base + 0.6 * (model(one) - base) + 0.4 * (model(two) - base))
        assert torch.allclose(merged(one, plain), 0.6 * model(one) + 0.4 * model(plain))
        assert torch.allclose(merged(one, still), 0.6 * model(one) + 0.4 * base)
    # with magnitudes that change nothing, it is the merge of plain adapters
    lengths = (base + 0.5 * plain.factors.up @ plain.factors.down).norm(dim=1)
    same = DoraPart(plain.factors, lengths, "own")
    other = part(False, 0.6)
    assert torch.allclose(merged(same, other), merged(plain, other))


def test_rows_that_no_adapter_wants_and_rows_that_nothing_is_left_of() -> None:
    torch.manual_seed(0)
    base = torch.randn(4, 3, dtype=torch.float64)
    factors = [Scaled(torch.randn(1, 3).double(), torch.randn(4, 1).double(), 1.0) for _ in range(2)]
    lengths = [(base + each.up @ each.down).norm(dim=1) for each in factors]
    zeros = [torch.cat([torch.zeros(1).double(), each[1:]]) for each in lengths]

    def merge(method: str, magnitudes: list[torch.Tensor], weights: list[float], dtype: torch.dtype) -> torch.Tensor:
        parts = [
            DoraPart(Scaled(each.down, each.up, 1.0, weight), magnitude, "own")
            for each, magnitude, weight in zip(factors, magnitudes, weights, strict=True)
        ]
        down, up, magnitude = merge_dora(method, base, parts, 2, METHODS[method].parameters, dtype).tensors
        assert torch.isfinite(up).all() and magnitude.dtype == torch.promote_types(dtype, torch.float32)
        total = base + up.double() @ down.double()
        return (magnitude / total.norm(dim=1))[:, None] * total

    for method in ("cat", "svd"):
        for dtype in (torch.float64, torch.bfloat16):
            found = merge(method, zeros, [0.3, 0.7], dtype)  # the gain is 0, or what rounding leaves of it
            assert found[0].abs().max() < 1e-12 and (found[1:].abs().max(dim=1).values > 0.1).all()
        found = merge(method, lengths, [-1.0, 1.0], torch.float64)
        assert torch.allclose(found, base + factors[1].up @ factors[1].down - factors[0].up @ factors[0].down)
        twice = [lengths[0] * 2, lengths[1]]
        with pytest.raises(MergeError, match=r"nothing of the base's row 0 \(and 3 more\) is left"):
            merge(method, twice, [-1.0, 1.0], torch.float64)
    base[2] = -(factors[0].up @ factors[0].down)[2]
    with pytest.raises(MergeError, match=r"row 2 \(and 0 more\) of base and own together is zeros"):
        merge("cat", lengths, [0.5, 0.5], torch.float64)


@pytest.mark.parametrize(("name", "kind"), [("llama", "nf4"), ("llama", "int8"), ("gpt2", "int8")])
def test_a_quantised_base_is_measured_as_its_dequantised_weights(name: str, kind: str, tmp_path: Path) -> None:
    model = quantized_models.wide(name)
    model.save_pretrained(tmp_path / "quantised")
    quantized_models.quantize_folder(tmp_path / "quantised", kind)
    plain = quantized_models.plain_copy(tmp_path / "quantised", tmp_path / "plain")
    base: PreTrainedModel = type(model).from_pretrained(plain, dtype=torch.float32)
    more = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} if name == "gpt2" else {}
    for index, each in enumerate(("dora", "lora")):
        train_with_peft(base, peft.LoraConfig(task_type="CAUSAL_LM", **KINDS[each] | more), tmp_path / str(index))
    config = config_of(tmp_path, "cat", [0.5, 0.5], base_model=str(tmp_path / "quantised"))
    report = largemerge.merge_adapters(config, tmp_path / "out")
    assert any(note.startswith(f"the base is quantised ({kind}") for note in report.notes)
    wanted, found = weighted_sum(base, tmp_path, [0.5, 0.5]), merged_weights(base, tmp_path / "out")
    assert all(torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-6) for key, tensor in wanted.items())


# The base


def test_a_base_of_another_scale_is_warned_of(tmp_path: Path) -> None:
    base = write(tmp_path, "dora", "lora")
    report = largemerge.merge_adapters(config_of(tmp_path, "cat", [0.5, 0.5]), tmp_path / "out")
    assert not any(note.startswith("warning") for note in report.notes)
    with torch.no_grad():
        for layer in base.model.layers[:2]:
            layer.self_attn.q_proj.weight.mul_(100)
    base.save_pretrained(tmp_path / "base")
    report = largemerge.merge_adapters(config_of(tmp_path, "cat", [0.5, 0.5]), tmp_path / "other")
    (told,) = [note for note in report.notes if note.startswith("warning")]
    assert told.startswith(f"warning: {tmp_path / '0'}: magnitudes are 0.0") and "(and 1 more modules)" in told


def test_the_base_is_looked_for_beside_the_file_and_may_have_an_adapter(tmp_path: Path) -> None:
    base = write(tmp_path, "dora", "lora")
    for index in (0, 1):
        changed(tmp_path / str(index), {"base_model_name_or_path": "./base"})
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(config_of(tmp_path, "cat", [0.5, 0.5])))
    report = largemerge.merge_adapters(path, tmp_path / "out")
    assert report.base == str((tmp_path / "base").resolve())
    text = f"use_dora: {tmp_path / '0'}; the result is a DoRA, too, with magnitudes for every module"
    assert any(note.startswith(text) for note in report.notes)
    # an adapter that was merged before, of which others were trained
    train_with_peft(base, peft.LoraConfig(task_type="CAUSAL_LM", **KINDS["wide lora"]), tmp_path / "below")
    adapted = f"{tmp_path / 'base'}+{tmp_path / 'below'}"
    largemerge.merge_adapters(config_of(tmp_path, "cat", [0.5, 0.5], base_model=adapted), tmp_path / "upon")
    below = merged_by_peft(base.double(), tmp_path / "below")
    wanted, found = weighted_sum(below, tmp_path, [0.5, 0.5]), merged_weights(below, tmp_path / "upon")
    assert all(torch.allclose(found[key], tensor, atol=1e-6) for key, tensor in wanted.items())


def test_without_a_dora_the_base_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "lora", "wide lora")
    report = largemerge.merge_adapters(config_of(tmp_path, "cat", [1, 1], base_model="./nowhere"), tmp_path / "out")
    assert "base_model: ./nowhere is not read, as no adapter is a DoRA" in report.notes and report.base is None
    assert "lora_magnitude_vector" not in "".join(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is False


def drop(part: str) -> Any:
    return lambda key, tensor: None if part in key else tensor


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({}, {"base_model": "./nowhere"}, "base_model: ./nowhere: ./nowhere does not exist"),
        ({}, {"base_model": "./0"}, None),
        ({"config": {"base_model_name_or_path": "./gone"}}, {}, "the adapters name different bases (./gone by"),
        ({"config": {"base_model_name_or_path": "./gone"}}, {"models": [{"model": "./0"}]}, "expected base_model: the"),
        ({"config": {"base_model_name_or_path": None}}, {"models": [{"model": "./0"}]}, "no adapter names its base"),
        ({}, {"base_model": "./other"}, "q_proj.weight is [8, 8] in"),
        ({}, {"base_model": "./bert"}, "has no tensor model.layers.0.self_attn.q_proj.weight (matched through"),
        ({}, {"base_model": 3}, "base_model"),
        ({"change": drop("layers.1.self_attn.v_proj.lora_magnitude")}, {}, "use_dora in adapter_config.json is True"),
        ({"config": {"use_dora": False}}, {}, "the file has a lora_magnitude_vector"),
        ({"change": drop("layers.1.self_attn.v_proj.lora_A")}, {}, "without the other factor"),
        (
            {"change": lambda key, tensor: tensor[:5] if "magnitude" in key else tensor},
            {},
            "lora_magnitude_vector is [5], float32; expected a floating-point number for each of 16 outputs",
        ),
        (
            {"change": lambda key, tensor: tensor / 0 if "magnitude" in key else tensor},
            {},
            "holds numbers that are not finite",
        ),
    ],
)
def test_mistakes(
    change: dict[str, Any],
    options: dict[str, Any],
    expected: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, "dora", "lora")
    smaller = tiny_models.LLM | {"hidden_size": 8}
    tf.LlamaForCausalLM(tf.LlamaConfig(**smaller)).save_pretrained(tmp_path / "other")
    tiny_models.build("bert").save_pretrained(tmp_path / "bert")
    changed(tmp_path / "0", **change)
    path = tmp_path / "adapters.yaml"
    models = [{"model": "./0"}, {"model": "./1"}]
    path.write_text(yaml.safe_dump({"merge_method": "cat", "models": models} | options))
    assert exit_code("merge-adapters", path, tmp_path / "out") == (2 if expected is not None else 0)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    if expected is not None:
        assert expected in " ".join(told.split()) and not (tmp_path / "out").exists()


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, "dora", "lora")
    config = config_of(tmp_path, "cat", [1, 1], base_model="./nowhere")
    config["models"].append({"model": "./missing"})
    with pytest.raises(CheckpointError) as caught:
        largemerge.merge_adapters(config, tmp_path / "out")
    assert [problem.partition(" does not exist")[0] for problem in caught.value.problems] == [
        "./missing: ./missing",
        "base_model: ./nowhere: ./nowhere",
    ]


def test_two_modules_that_are_one_tensor_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "embeddings dora", "head dora", name="llama_tied")
    with pytest.raises(
        CheckpointError, match=r"model\.embed_tokens and lm_head are one tensor in .*embed_tokens\.weight"
    ):
        largemerge.merge_adapters(config_of(tmp_path, "cat", [1, 1]), tmp_path / "out")
    report = largemerge.merge_adapters(config_of(tmp_path, "cat", [1]), tmp_path / "out")
    assert "model.embed_tokens" in report.errors


def test_a_row_of_zeros_is_named(tmp_path: Path) -> None:
    base = write(tmp_path, "dora", "wide lora")
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[3] = 0
    base.save_pretrained(tmp_path / "base")
    changed(
        tmp_path / "1",
        change=lambda key, tensor: torch.zeros_like(tensor) if "layers.1.mlp.down_proj.lora_B" in key else tensor,
    )
    with pytest.raises(
        MergeError, match=r"layers\.1\.mlp\.down_proj: row 3 \(and 0 more\) of base and the merged adapter"
    ):
        largemerge.merge_adapters(config_of(tmp_path, "cat", [1, 1]), tmp_path / "out")


def test_a_merge_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write(tmp_path, "dora", "rslora dora")
    config = config_of(tmp_path, "svd", [0.5, 0.5])
    largemerge.merge_adapters(config, tmp_path / "whole")
    done: list[str] = []

    def break_off(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append("")
        return merge_dora(*arguments)

    monkeypatch.setattr(merge, "merge_dora", break_off)
    with pytest.raises(KeyboardInterrupt):
        largemerge.merge_adapters(config, tmp_path / "out")
    done.clear()

    def count(*arguments: Any) -> Any:
        done.append("")
        return merge_dora(*arguments)

    monkeypatch.setattr(merge, "merge_dora", count)
    report = largemerge.merge_adapters(config, tmp_path / "out", resume=True)
    assert len(done) == len(report.errors) - 2
    both = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("whole", "out")]
    assert both[0].keys() == both[1].keys() and all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    # another base is another merge
    monkeypatch.setattr(merge, "merge_dora", break_off)
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        largemerge.merge_adapters(config, tmp_path / "other")
    with torch.no_grad():
        base.model.norm.weight.add_(1)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(OutputError, match="base"):
        largemerge.merge_adapters(config, tmp_path / "other", resume=True)


def test_sixteen_bits_keep_the_digits_of_magnitudes(tmp_path: Path) -> None:
    base = write(tmp_path, "dora", "dora", dtype=torch.bfloat16)
    report = largemerge.merge_adapters(config_of(tmp_path, "cat", [0.5, 0.5]), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    dtypes = {tensor.dtype for key, tensor in tensors.items() if "magnitude" not in key}
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for key, tensor in tensors.items() if "magnitude" in key} == {torch.float32}
    wanted, found = weighted_sum(base, tmp_path, [0.5, 0.5]), merged_weights(base, tmp_path / "out")
    before = base.double().state_dict()
    errors = [(found[key] - wanted[key]).norm() / (wanted[key] - before[key]).norm() for key in tensors_of(report)]
    assert max(errors) < 0.01
    assert report.errors == pytest.approx(dict(zip(report.errors, map(float, errors), strict=True)), rel=1e-3)


def tensors_of(report: largemerge.AdapterMergeReport) -> list[str]:
    return [f"{path}.weight" for path in report.errors]
