"""Gram matrices on disk in place of data: the merge is the same, and those of other models are refused."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_models
import torch
import transformers as tf
from adapters import shapes_of, write_adapter
from cases import (
    Case,
    MakeCase,
    assert_close,
    exit_code,
    files_in,
    load_merged,
    report_of,
    weights_in,
    write_case,
)
from processes import assert_agree, device_of_ranks, run_ranks
from safetensors.torch import load_file, save_file

import largemerge
from largemerge import ConfigError, LargemergeError
from largemerge.output import OutputFolder
from largemerge.regression import plan as planning
from largemerge.regression.gram import Gram
from largemerge.regression.planning.placement import Choice

WEIGHTS = [1.0, 2.0, 0.5]


def make_experts(folder: Path, architecture: str = "llama", num: int = 2, samples: int = 30, **parameters: Any) -> Case:
    kind = tiny_models.ARCHITECTURES[architecture].kind
    models = [tiny_models.perturbed(architecture, seed) for seed in range(num)]
    inputs = [tiny_models.inputs(kind, samples + 5 * seed, seed) for seed in range(num)]
    return write_case(folder, models, inputs, method="regmean", weights=WEIGHTS[:num], **parameters)


def with_grams(case: Case, *numbers: int) -> dict[str, Any]:
    """The configuration, with Gram matrices in place of the data of some models, by default of all."""
    config: dict[str, Any] = copy.deepcopy(case.config)
    for number in numbers or range(len(config["models"])):
        config["models"][number]["calibration"] = {"grams": str(grams_of(case, number))}
    return config


def grams_of(case: Case, number: int) -> Path:
    return case.folder / "grams" / f"model{number}"


def write_grams(case: Case, **parameters: Any) -> Any:
    """Writes the Gram matrices of all models, by a configuration with other weights and parameters than the merge's."""
    config = copy.deepcopy(case.config)
    config["parameters"] = {"ridge": 0.5, "off_diagonal_scale": 0.1, "normalization": "frobenius"} | parameters
    for model in config["models"]:
        model["parameters"] = {"weight": 9.0}
    return largemerge.gram(config, case.folder / "grams")


def delete_data(case: Case) -> None:
    for path in case.folder.glob("data*.safetensors"):
        path.unlink()


def assert_same(found: Path, expected: Path) -> None:
    """The weights are the same, bit for bit."""
    weights, others = weights_in(found), weights_in(expected)
    assert weights.keys() == others.keys()
    for name, tensor in others.items():
        assert torch.equal(weights[name], tensor), name


# The same merge


@pytest.mark.parametrize(
    ("architecture", "num", "parameters"),
    [
        ("llama", 2, {}),
        ("llama", 3, {"off_diagonal_scale": 1.0, "ridge": 1e-3, "solve": ["blocks", "head"]}),
        ("llama_tied", 3, {"solve": ["blocks", "head"], "normalization": "frobenius"}),
        ("vit", 3, {"off_diagonal_scale": 0.5}),
        ("vit", 2, {"solve": ["head", "blocks"], "normalization": "frobenius", "ridge": 0.1}),
        ("t5", 2, {}),  # two stacks
        ("mixtral", 2, {}),  # rows of a group are some of the tokens
        pytest.param("gpt2", 2, {"solve": ["blocks", "head"]}, marks=pytest.mark.slow),  # linears lie the other way
        pytest.param("clip", 2, {}, marks=pytest.mark.slow),
    ],
)
def test_without_the_data_the_merge_is_the_same(
    tmp_path: Path, architecture: str, num: int, parameters: dict[str, Any]
) -> None:
    case = make_experts(tmp_path, architecture, num, **parameters)
    largemerge.merge(case.config, tmp_path / "from-data")
    write_grams(case, solve=parameters.get("solve", ["blocks"]))
    delete_data(case)
    report = largemerge.merge(with_grams(case), tmp_path / "from-grams")
    assert_same(tmp_path / "from-grams", tmp_path / "from-data")
    load_merged(case, tmp_path / "from-grams")
    before = report_of(tmp_path / "from-data")
    for name, linear in report.linears.items():
        parts = [*before["blocks"].values(), *([before["head"]] if "head" in before else [])]
        (same,) = (part["linears"][name] for part in parts if name in part["linears"])
        assert linear["tokens"] == same["tokens"] and linear["solver"] == same["solver"]
    seen = ("num_samples", "tokens")
    for name, entry in report_of(tmp_path / "from-grams")["calibration"].items():
        assert [entry[key] for key in seen] == [before["calibration"][name][key] for key in seen]
    assert report.plan.bytes_read == report.bytes_read or "head" in before, "the sums are counted"


@pytest.mark.parametrize("numbers", [(1,), (2, 0)])
def test_some_from_grams_and_others_from_data(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    case = make_experts(tmp_path, "llama", 3, solve=["blocks", "head"])
    largemerge.merge(case.config, tmp_path / "from-data")
    write_grams(case, solve=["blocks", "head"])
    for number in numbers:
        (tmp_path / f"data{number}.safetensors").unlink()
    largemerge.merge(with_grams(case, *numbers), tmp_path / "mixed")
    assert_same(tmp_path / "mixed", tmp_path / "from-data")


def test_of_few_tokens_it_is_the_same_up_to_rounding(tmp_path: Path) -> None:
    """Right-hand sides are made row by row there, where there are rows."""
    case = make_experts(tmp_path, "llama", 2, samples=1)
    case.config["calibration"]["num_samples"] = 1
    for number in range(2):
        save_file({"input_ids": torch.tensor([[5, 7 + number]])}, tmp_path / f"data{number}.safetensors")
    largemerge.merge(case.config, tmp_path / "from-data")
    write_grams(case)
    largemerge.merge(with_grams(case), tmp_path / "from-grams")
    assert_close(load_merged(case, tmp_path / "from-grams"), load_merged(case, tmp_path / "from-data"), 1e-5)


def test_several_passes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_experts(tmp_path)
    write_grams(case)
    largemerge.merge(with_grams(case), tmp_path / "one-pass")
    choose = planning.choose_placement

    def in_passes(*arguments: Any, **options: Any) -> Choice:
        choice = choose(*arguments, **options)
        placement = choice.placement.__class__(**vars(choice.placement) | {"passes": 3, "prefetch": False})
        return Choice(placement, choice.footprint, choice.reasons, choice.problems)

    monkeypatch.setattr(planning, "choose_placement", in_passes)
    largemerge.gram(case.config, tmp_path / "again")
    for number in range(2):
        assert sums_in(tmp_path / "again" / f"model{number}") == sums_in(grams_of(case, number))
    largemerge.merge(with_grams(case), tmp_path / "three-passes")
    assert_same(tmp_path / "three-passes", tmp_path / "one-pass")


def test_patterns_may_leave_out_linears_that_were_kept(tmp_path: Path) -> None:
    """Then another linear leads the group, whose Gram matrix is the same."""
    case = make_experts(tmp_path, exclude=["q_proj", "layers.1.*gate_proj"])
    largemerge.merge(case.config, tmp_path / "from-data")
    write_grams(case)
    largemerge.merge(with_grams(case), tmp_path / "from-grams")
    assert_same(tmp_path / "from-grams", tmp_path / "from-data")


def test_bodies_of_classifiers(tmp_path: Path) -> None:
    """Alone, each is a whole classifier, whose blocks have longer names than those of the body that is merged."""
    models = []
    for seed, labels in enumerate((2, 3)):
        config = tf.BertConfig(**tiny_models.TEXT, intermediate_size=24, max_position_embeddings=64, num_labels=labels)
        torch.manual_seed(seed)
        models.append(tf.BertForSequenceClassification(config))
    case = write_case(tmp_path, models, [tiny_models.inputs("text", 30, seed) for seed in range(2)], method="regmean")
    largemerge.merge(case.config, tmp_path / "from-data")
    write_grams(case)
    assert "bert.encoder.layer.0" in record_of(grams_of(case, 0))["groups"]
    largemerge.merge(with_grams(case), tmp_path / "from-grams")
    assert_same(tmp_path / "from-grams", tmp_path / "from-data")


def test_as_an_expert_of_a_sequence(tmp_path: Path) -> None:
    case = make_experts(tmp_path, "llama", 3)
    write_grams(case)
    first, second = copy.deepcopy(case.config) | {"sequence": {}}, with_grams(case) | {"sequence": {}}
    for name, config in (("from-data", first), ("from-grams", second)):
        config["models"], last = config["models"][:2], config["models"][2]
        largemerge.merge(config, tmp_path / f"two-{name}")
        config |= {"models": [last], "sequence": {"previous": str(tmp_path / f"two-{name}"), "name": "two"}}
        largemerge.merge(config, tmp_path / name)
    assert_same(tmp_path / "from-grams", tmp_path / "from-data")
    kept = [files_in(tmp_path / name / "sums") for name in ("from-grams", "from-data")]
    assert {name for name in kept[0] if kept[0][name] != kept[1][name]} == set()


# What is written


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "grams.json").read_text())
    return record


def sums_in(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_in(folder).items() if name.startswith("sums/")}


def test_what_lies_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make_experts(tmp_path, solve=["blocks", "head"])
    case.config["models"] = case.config["models"][:1]
    assert exit_code("gram", case.write_yaml(), tmp_path / "out", "--json", "--device", "cpu") == 0
    blocks = [f"sums/model.layers.{number}.safetensors" for number in range(3)]
    assert list(files_in(tmp_path / "out")) == ["grams.json", "sums/head.safetensors", *blocks]
    printed, record = json.loads(capsys.readouterr().out), record_of(tmp_path / "out")
    assert printed["records"]["model0"] == record | {"check": ""}
    assert (record["model"], record["data"], record["num_samples"]) == ("model0", "data0.safetensors", 30)
    assert str(tmp_path) not in json.dumps(record), "it may be published"
    tokens = int(case.inputs[0]["attention_mask"].sum())
    assert {group["tokens"] for groups in record["groups"].values() for group in groups.values()} == {tokens}
    assert record["groups"]["model.layers.0"]["self_attn.q_proj"]["linears"] == [
        f"self_attn.{name}_proj" for name in "qkv"
    ]
    assert set(record["model_files"]) == {"config.json", "model.safetensors"}


def test_a_matrix_is_the_sum_over_the_rows_of_the_model_itself(tmp_path: Path) -> None:
    case = make_experts(tmp_path)
    write_grams(case)
    rows = []
    model, mask = case.models[0].double(), case.inputs[0]["attention_mask"].bool()
    linear = model.get_submodule("model.layers.1.mlp.down_proj")
    linear.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][mask]))
    with torch.no_grad():
        model(**case.inputs[0])
    expected = rows[0].T @ rows[0]
    found = load_file(grams_of(case, 0) / "sums" / "model.layers.1.safetensors")["mlp.down_proj"]
    lower = torch.tril_indices(*expected.shape)
    torch.testing.assert_close(found.double(), expected[lower[0], lower[1]], rtol=1e-5, atol=1e-6)


def test_a_triangle_of_a_candidate_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 128, 300, 1100):
        x_NI, rows_OI = (torch.randn(count, size, generator=generator) for count in (20, 3))
        gram, other = Gram(size, torch.device("cpu")), Gram(size, torch.device("cpu"))
        for each in (gram, other):  # something of another candidate lies below the diagonal
            each.add_rows(x_NI.flip(0) + 1)
            each.finish_candidate(0.5, 0.9)
        gram.add_rows(x_NI)
        packed = torch.cat(list(gram.candidate_rows()))
        lower = torch.tril_indices(size, size)
        torch.testing.assert_close(packed, (x_NI.T @ x_NI)[lower[0], lower[1]])
        other.set_candidate(lambda numbers, packed=packed: packed[numbers])
        products = [torch.zeros_like(rows_OI) for _ in range(2)]
        for each, product_OI in zip((gram, other), products, strict=True):
            each.add_candidate_product_(product_OI, rows_OI, 0.25, 0.9)
            each.finish_candidate(0.25, 0.9)
        assert products[0].any() and torch.equal(*products)
        assert torch.equal(gram.full_sum(), other.full_sum())
    empty = Gram(3, torch.device("cpu"))
    assert torch.equal(torch.cat(list(empty.candidate_rows())), torch.zeros(6))


def test_a_plan_needs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make_experts(tmp_path, "llama", 3)
    write_grams(case)
    of_data = largemerge.plan(case.config, probe=False)
    delete_data(case)
    case.config = with_grams(case)
    plan = largemerge.plan(case.config)
    size = sum(
        tensor.nbytes
        for k in range(3)
        for path in (grams_of(case, k) / "sums").iterdir()
        for tensor in load_file(path).values()
    )
    assert plan.problems == () and plan.seconds
    assert plan.bytes_read - of_data.bytes_read == size
    assert plan.num_tokens == {
        f"model{k}": record_of(grams_of(case, k))["groups"]["model.layers.0"]["mlp.down_proj"]["tokens"]
        for k in range(3)
    }
    assert plan.footprint.disk == 0 and plan.footprint.parts["hidden states"] == 0
    assert exit_code("plan", case.write_yaml(), "--no-probe", "--num-ranks", "2") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "model1: 35 samples of data1.safetensors" in text and "Gram matrices stand for them" in text
    assert largemerge.plan(case.config, from_config=True).problems == ()


# Refused


@pytest.fixture
def kept(tmp_path: Path) -> Case:
    case = make_experts(tmp_path, "llama", 2, 8)
    write_grams(case)
    return case


def refused(config: dict[str, Any], *mentions: str) -> tuple[str, ...]:
    with pytest.raises(LargemergeError) as caught:
        largemerge.merge(config, Path(config["models"][0]["model"].split("+")[0]).parent / "refused")
    for mention in mentions:
        assert mention in str(caught.value), str(caught.value)
    assert not (Path(config["models"][0]["model"]).parent / "refused").exists()
    return caught.value.problems


@pytest.mark.parametrize("method", ["regmean_plusplus", "chain", "calibrated", "featcal"])
def test_for_methods_that_run_what_is_merged(kept: Case, method: str) -> None:
    config = with_grams(kept, 1) | {"merge_method": method, "parameters": {}, "base_model": str(kept.folder / "model0")}
    (problem,) = refused(config)
    assert problem == (
        f"models[1] (model1).calibration.grams: {method} runs merged blocks on each model's data, so that its Gram "
        "matrices depend on all models; expected 'data' in its place, or 'merge_method: regmean'"
    )


def test_a_chain_on_the_models_own_inputs_is_one_that_can(kept: Case) -> None:
    parameters = {"inputs": "candidate", "granularity": "block"}
    config = with_grams(kept) | {"merge_method": "chain", "parameters": parameters}
    of_data = copy.deepcopy(kept.config) | {"merge_method": "chain", "parameters": parameters}
    largemerge.merge(config, kept.folder / "from-grams")
    largemerge.merge(of_data, kept.folder / "from-data")
    assert_same(kept.folder / "from-grams", kept.folder / "from-data")


def test_mistakes_in_the_configuration_are_told_at_once(kept: Case) -> None:
    config = with_grams(kept)
    config["models"][0]["calibration"] |= {"data": "x.jsonl", "num_samples": 3}
    config["models"][1]["calibration"] = {"grams": str(kept.folder / "nowhere")}
    config["models"].append({"model": str(kept.folder / "model0"), "name": "third", "calibration": {"seed": 1}})
    config["models"].append(
        {"model": str(kept.folder / "model0"), "name": "fourth", "calibration": {"grams": str(kept.folder / "grams")}}
    )
    problems = refused(config)
    assert set(problems) == {
        "models[0] (model0).calibration.grams: stands in place of data, whose samples have been drawn already; leave "
        "out 'data', 'num_samples'",
        f"models[1] (model1).calibration.grams: {kept.folder / 'nowhere'} is no folder here; expected a folder that "
        "'largemerge gram' has written",
        "models[2] (third).calibration.data: missing; expected a file or dataset, or 'grams' in its place",
        f"models[3] (fourth).calibration.grams: {kept.folder / 'grams'} holds those of several models; expected the "
        "folder of one: ['model0', 'model1']",
    }


def test_a_record_that_is_none(kept: Case) -> None:
    config = with_grams(kept, 0)
    config["models"][0]["calibration"]["grams"] = str(kept.folder / "model0")
    refused(config, "has no grams.json; expected a folder that 'largemerge gram' has written, to its end")
    path, config = grams_of(kept, 0) / "grams.json", with_grams(kept, 0)
    whole = path.read_text()
    path.write_text(whole.replace('"num_samples": 8', '"num_samples": 80'))
    refused(config, f"{path} is not as it was written; get the folder again, or make it anew")
    path.write_text('{"model": 5, "more": 1}')
    refused(config, "grams.json: model: expected a text, found 5", "more: unknown")
    path.write_text("{")
    refused(config, "is not readable JSON")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Case], object], tuple[str, ...]]] = {
    "weights of the model": (
        lambda case: flip(case.folder / "model0" / "model.safetensors"),
        ("of another model than", "model.safetensors: is not what model0 had", "or give 'data'"),
    ),
    "config of the model": (
        lambda case: (case.folder / "model0" / "config.json").write_text(
            (case.folder / "model0" / "config.json")
            .read_text()
            .replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
        ),
        ("config.json: is not what model0 had",),
    ),
    "another model": (
        lambda case: shutil.copytree(case.folder / "model1", case.folder / "model0", dirs_exist_ok=True),
        ("model.safetensors: is not what model0 had",),
    ),
    "bytes of a matrix": (
        lambda case: flip(grams_of(case, 0) / "sums" / "model.layers.1.safetensors"),
        ("sums/model.layers.1.safetensors: ", " is not as it was written; get the folder again"),
    ),
    "file cut short": (
        lambda case: (grams_of(case, 0) / "sums" / "model.layers.1.safetensors").write_bytes(b"x"),
        ("sums/model.layers.1.safetensors has 1 bytes", "were written"),
    ),
    "file gone": (
        lambda case: (grams_of(case, 0) / "sums" / "model.layers.1.safetensors").unlink(),
        ("sums/model.layers.1.safetensors is not there",),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_noticed_before_the_work(kept: Case, damage: str) -> None:
    spoil, told = DAMAGES[damage]
    spoil(kept)
    refused(with_grams(kept), f"model0: {grams_of(kept, 0)}: ", *told)


def test_all_that_does_not_fit_is_told_at_once(kept: Case) -> None:
    for damage in ("bytes of a matrix", "file gone", "weights of the model"):
        DAMAGES[damage][0](kept)
        flip(kept.folder / "model1" / "model.safetensors")
    problems = refused(with_grams(kept))
    assert len(problems) == 3 and problems[2].startswith("model1: ")


def test_other_adapters_are_refused(kept: Case) -> None:
    shapes = shapes_of(kept.folder / "model0", "model.layers.0.self_attn.q_proj")
    for number in range(2):
        write_adapter(kept.folder / f"lora{number}", shapes, number)
    kept.config["models"][0] |= {"model": f"{kept.folder / 'model0'}+{kept.folder / 'lora0'}", "name": "adapted"}
    refused(
        with_grams(kept, 0), "model0 had the files config.json, model.safetensors, found adapter/adapter_config.json"
    )
    largemerge.gram(kept.config, kept.folder / "more")
    grams = {"grams": str(kept.folder / "more" / "adapted")}
    assert record_of(kept.folder / "more" / "adapted")["model"] == "model0+lora0"
    largemerge.merge(kept.config, kept.folder / "from-data")
    kept.config["models"][0]["calibration"] = grams
    largemerge.merge(kept.config, kept.folder / "from-grams")
    assert_same(kept.folder / "from-grams", kept.folder / "from-data")
    kept.config["models"][0]["model"] = f"{kept.folder / 'model0'}+{kept.folder / 'lora1'}"
    refused(kept.config, "adapter/adapter_model.safetensors: is not what model0+lora0 had")


def test_a_copy_of_the_model_elsewhere_is_the_same_model(kept: Case) -> None:
    shutil.move(kept.folder / "model0", kept.folder / "moved")
    shutil.move(grams_of(kept, 0), kept.folder / "published")
    config = with_grams(kept)
    config["models"][0] |= {"model": str(kept.folder / "moved"), "calibration": {"grams": "published"}}
    kept.config = config
    assert exit_code("merge", kept.write_yaml(), kept.folder / "merged", "--quiet") == 0
    assert "data0.safetensors, as Gram matrices" in (kept.folder / "merged" / "README.md").read_text()
    entry = report_of(kept.folder / "merged")["calibration"]["moved"]
    assert entry["data_sha256"] == record_of(kept.folder / "published")["data_sha256"]


def test_groups_that_were_not_kept(kept: Case) -> None:
    config = with_grams(kept)
    config["parameters"] = {"solve": ["blocks", "head"]}
    problems = refused(config)
    assert len(problems) == 2 and all("has no Gram matrices of head (lm_head), which would be" in p for p in problems)


def test_nan_never_gets_into_a_merge(kept: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the digests hold."""
    path = grams_of(kept, 0) / "sums" / "model.layers.0.safetensors"
    save_file({name: x * torch.nan for name, x in load_file(path).items()}, path)
    monkeypatch.setattr("largemerge.regression.merge.check_grams", lambda *_, **__: None)
    with pytest.raises(LargemergeError, match=r"model.layers.0.safetensors: \S+ holds NaN; make it anew"):
        largemerge.merge(with_grams(kept), kept.folder / "out")


def test_another_compute_dtype_is_told(kept: Case) -> None:
    notes = largemerge.plan(with_grams(kept, 0) | {"compute_dtype": "bfloat16"}, probe=False).notes
    assert any("model0: its Gram matrices come from forward passes in float32" in note for note in notes)
    assert not any("forward passes in" in note for note in largemerge.plan(with_grams(kept), probe=False).notes)


def test_what_cannot_be_written(kept: Case) -> None:
    def mistakes(config: dict[str, Any], **options: Any) -> str:
        with pytest.raises(LargemergeError) as caught:
            largemerge.gram(config, kept.folder / "out", **options)
        return str(caught.value)

    plusplus = kept.config | {"merge_method": "regmean_plusplus", "sequence": {}}
    assert "there are none to be written for later; expected 'merge_method: regmean'" in mistakes(plusplus)
    assert "sequence: is for merges" in mistakes(plusplus)
    assert "grams: are there already; expected 'data'" in mistakes(with_grams(kept, 0))
    linear = {
        "merge_method": "linear",
        "models": [{"model": m["model"], "parameters": {"weight": 1}} for m in kept.config["models"]],
    }
    assert "merge_method: gram is for 'regmean'" in mistakes(linear)
    named = copy.deepcopy(kept.config)
    named["models"][0]["name"] = "a/b"
    assert "'a/b' would be a folder in OUT; expected a name without '/'" in mistakes(named)
    with pytest.raises(LargemergeError, match="lies in an input"):
        largemerge.gram(kept.config, kept.folder / "model0" / "out")
    with pytest.raises(ConfigError, match="--resume goes on with what --force would replace"):
        largemerge.gram(kept.config, kept.folder / "out", resume=True, force=True)
    with pytest.raises(LargemergeError, match="is not empty"):
        largemerge.gram(kept.config, kept.folder / "grams")


def test_no_checkpoint_is_spoiled(kept: Case) -> None:
    """A merge of a sequence keeps sums of its own under the same names."""
    largemerge.merge(kept.config | {"sequence": {}}, kept.folder / "out")
    before = files_in(kept.folder / "out")
    for force in (False, True):
        with pytest.raises(LargemergeError, match="holds a checkpoint, and --force would not replace it"):
            largemerge.gram(kept.config, kept.folder / "out", force=force)
    assert files_in(kept.folder / "out") == before


def test_under_a_launcher_it_is_refused(kept: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match="gram is for one process; start it without a launcher"):
        largemerge.gram(kept.config, kept.folder / "out")


def test_force_replaces_what_was_there(kept: Case) -> None:
    before = files_in(kept.folder / "grams")
    one = kept.config | {"models": kept.config["models"][:1]}
    largemerge.gram(one, kept.folder / "grams", force=True)
    after = files_in(kept.folder / "grams")
    assert set(after) == {name.removeprefix("model0/") for name in before if name.startswith("model0/")}


# Killed, and by several ranks


def test_writing_goes_on_after_a_kill(tmp_path: Path) -> None:
    case = processes.make_long_case(tmp_path, "regmean")
    case.config["parameters"] = {"solve": ["blocks", "head"]}
    path, log = case.write_yaml(), tmp_path / "log"
    command = ["gram", path, tmp_path / "out", "--quiet", "--device", "cpu"]
    assert processes.run(command, log, kill_at=0) == 0, log.read_text()
    unbroken = files_in(tmp_path / "out")
    operations = processes.operations(log)
    wanted = [number for number, line in enumerate(operations, start=1) if line.endswith("/journal.jsonl")]
    placed = [number for number, line in enumerate(operations, start=1) if "rename" in line]
    shutil.rmtree(tmp_path / "out")
    assert processes.run(command, log, placed[-1]) == -signal.SIGKILL
    assert not (tmp_path / "out" / "model1" / "grams.json").exists()
    largemerge.gram(case.config, tmp_path / "out", resume=True, device="cpu")
    assert files_in(tmp_path / "out") == unbroken
    shutil.rmtree(tmp_path / "out")
    assert processes.run(command, log, wanted[-1]) == -signal.SIGKILL
    flip(tmp_path / "out" / ".largemerge" / "model1" / "sums" / "model.layers.1.safetensors")
    report = largemerge.gram(case.config, tmp_path / "out", resume=True, device="cpu")
    assert [text.partition(":")[0] for text in report.redone_parts] == ["model1/model.layers.1 is done again"]
    assert report.resumed_parts == 10
    assert files_in(tmp_path / "out") == unbroken


def test_a_merge_goes_on_after_a_kill(tmp_path: Path) -> None:
    case = processes.make_long_case(tmp_path, "regmean")
    largemerge.gram(case.config, tmp_path / "grams", device="cpu")
    case.config = with_grams(case, 1)
    case.write_yaml()
    log = tmp_path / "log"
    assert processes.run(processes.merging(case, tmp_path / "out", "--device", "cpu"), log, kill_at=0) == 0
    unbroken = processes.lasting(tmp_path / "out")
    wanted = [n for n, line in enumerate(processes.operations(log), start=1) if "journal.jsonl" in line]
    shutil.rmtree(tmp_path / "out")
    assert (
        processes.run(processes.merging(case, tmp_path / "out", "--device", "cpu"), log, wanted[3]) == -signal.SIGKILL
    )
    case.config = with_grams(case, 0)
    assert processes.run(processes.merging(case, tmp_path / "out", "--device", "cpu", "--resume"), log) == 0
    assert processes.lasting(tmp_path / "out") == unbroken


def test_other_grams_cannot_be_gone_on_with(kept: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    record, config, out = OutputFolder.record, with_grams(kept), kept.folder / "out"

    def stop_after_two(self: OutputFolder, part: str, entry: Mapping[str, Any]) -> None:
        record(self, part, entry)
        if len(self.entries) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OutputFolder, "record", stop_after_two)
        largemerge.merge(config, out)
    kept.config["calibration"]["num_samples"] = 7
    largemerge.gram(kept.config, kept.folder / "grams", force=True)
    with pytest.raises(LargemergeError, match="calibration data → model0 was"):
        largemerge.merge(config, out, resume=True)


@pytest.mark.parametrize(
    ("architecture", "numbers", "parameters"),
    [
        ("llama", (0, 1, 2), {"solve": ["blocks", "head"]}),
        ("llama_tied", (0,), {"solve": ["blocks", "head"]}),
        pytest.param("t5", (2,), {"normalization": "frobenius"}, marks=pytest.mark.slow),
    ],
)
def test_ranks_agree_with_one(
    tmp_path: Path, architecture: str, numbers: tuple[int, ...], parameters: dict[str, Any]
) -> None:
    case = make_experts(tmp_path, architecture, 3, 9, **parameters)
    device = device_of_ranks(2)
    write_grams(case, **parameters)
    case.config = with_grams(case, *numbers)
    case.write_yaml()
    largemerge.merge(case.config, tmp_path / "alone", device=device)
    run_ranks(processes.merging(case, tmp_path / "out"), tmp_path, 2)
    assert_agree(tmp_path / "out", tmp_path / "alone", 1e-4)
    plan = largemerge.plan(case.config, probe=False, num_ranks=2, device=device)
    seen = [
        x.numel()
        for number, tensors in enumerate(case.inputs)
        for name, x in tensors.items()
        if name.endswith("input_ids") and number not in numbers
    ]
    assert sum(rank.num_rows for rank in plan.ranks) == sum(seen)
    assert sum(rank.num_candidates for rank in plan.ranks) >= 3


def test_checkpoints_in_bfloat16(make_case: MakeCase) -> None:
    """bfloat16 checkpoints compute in bfloat16, whose rows are summed in float32."""
    case = make_case("llama", method="regmean", dtype=torch.bfloat16)
    largemerge.merge(case.config, case.folder / "from-data")
    write_grams(case)
    assert record_of(grams_of(case, 0))["compute_dtype"] == "bfloat16"
    largemerge.merge(with_grams(case), case.folder / "from-grams")
    assert_same(case.folder / "from-grams", case.folder / "from-data")
