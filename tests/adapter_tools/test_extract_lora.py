"""`largemerge extract-lora`: held against peft's merge of the adapter, and against a dense float64 SVD."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers as tf
from adapters import merged_by_peft, train_with_peft
from cases import exit_code, files_in, names_in, rewrite_weights, weights_in
from quantized_models import plain_copy, quantize_folder, wide
from safetensors.torch import load_file
from transformers import PreTrainedModel

import largemerge
from largemerge import CheckpointError, ConfigError, LargemergeError, OutputError
from largemerge.adapter_tools.extract import low_rank_factors
from largemerge.adapter_tools.peft_files import names_to_save, rank_pattern, target_names
from largemerge.adapter_tools.report import ranks_shown
from largemerge.output import OutputFolder

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "extract_report.json"}
LINEARS = {"gpt2": ("c_attn", "c_proj", "c_fc"), "llama": ("_proj", "lm_head")}


def write_pair(folder: Path, name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base and a fine-tuned model, in `base` and `tuned`."""
    base, tuned = tiny_models.build(name), tiny_models.perturbed(name, 1)
    base.save_pretrained(folder / "base", **options)
    tuned.save_pretrained(folder / "tuned", **options)
    return base, tuned


def extract(folder: Path, **options: Any) -> largemerge.ExtractReport:
    return largemerge.extract_lora(folder / "tuned", folder / "base", folder / "out", **options)


def applied(folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    """What peft makes of the base, loaded from its folder, and the adapter."""
    loaded = type(base).from_pretrained(folder / "base", dtype=base.dtype)
    return merged_by_peft(loaded, folder / "out")


def unlike(found: PreTrainedModel, wanted: PreTrainedModel, tolerance: float = 3e-6) -> list[str]:
    """Names of the tensors that differ by more than rounding."""
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    return [name for name in theirs if not torch.allclose(ours[name].float(), theirs[name].float(), 0, tolerance)]


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The best matrix of a rank, by a dense SVD in float64."""
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


# What peft makes of it


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bert", "mixtral", "qwen2", "t5", "vit"])
def test_at_full_rank_peft_makes_the_fine_tuned_model(name: str, tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, name)
    report = extract(tmp_path, rank=64, save_others=True)
    assert unlike(applied(tmp_path, base), tuned) == []
    assert report.is_whole and report.left_out == {} and report.kept_of_all == pytest.approx(1)
    assert names_in(tmp_path / "out") == FILES


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bert", "t5"])
def test_what_no_lora_holds_is_left_and_named(name: str, tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, name)
    report = extract(tmp_path, rank=64)
    made = applied(tmp_path, base)
    left = unlike(made, tuned)
    canonical = {each for each in left if each in report.left_out}
    assert canonical == set(report.left_out) and left and not report.is_whole
    assert {each.name for each in report.matrices}.isdisjoint(left)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["bias"] == "none"
    assert all("lora_" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    norms = {each: (tuned.state_dict()[each] - base.state_dict()[each]).norm() for each in canonical}
    for each, found in report.left_out.items():
        assert found.relative_norm == pytest.approx((norms[each] / base.state_dict()[each].norm()).item(), rel=1e-5)
    assert any("--save-others" in note for note in report.notes if note.startswith("warning: "))
    assert "It is not all of the difference" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("save_others", [True, False])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForTokenClassification"])
def test_a_classifier_loads_with_its_head_in_the_file_or_without(name: str, save_others: bool, tmp_path: Path) -> None:
    """peft wants the head of a classifier in every file that is said to be a classifier's."""
    kind = getattr(tf, name)
    start = tiny_models.build("bert" if "Bert" in name else "llama")
    base = kind(kind.config_class(**start.config.to_dict() | {"num_labels": 3}))
    base.save_pretrained(tmp_path / "base")
    tuned = kind.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for key, tensor in tuned.named_parameters():
            if "q_proj" in key or "query.weight" in key:
                tensor.add_(torch.randn_like(tensor))
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path, rank=64, save_others=save_others)
    assert report.is_whole and unlike(applied(tmp_path, base), tuned) == []
    with torch.no_grad():
        (tuned.classifier if "Bert" in name else tuned.score).weight.add_(1)
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path, rank=64, save_others=save_others, force=True)
    left = unlike(applied(tmp_path, base), tuned)
    assert len(left) == (0 if save_others else 1) and report.is_whole == save_others


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_module_that_no_name_means_alone_is_left_and_named(name: str, tmp_path: Path) -> None:
    write_pair(tmp_path, name)
    bare = {"vit": tf.ViTModel, "dinov2": tf.Dinov2Model}[name]
    for folder in ("base", "tuned"):
        bare.from_pretrained(tmp_path / folder).save_pretrained(tmp_path / folder)
    report = extract(tmp_path, rank=64, save_others=True)
    made = merged_by_peft(bare.from_pretrained(tmp_path / "base"), tmp_path / "out")
    left = unlike(made, bare.from_pretrained(tmp_path / "tuned"))
    assert set(left) == set(report.left_out) and report.is_whole == (not left)


@pytest.mark.parametrize("value", [1e-24, 1e-30, 1e18])
def test_differences_whose_squares_leave_float32(value: float, tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path, "llama")
    tuned = type(base).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for model in (base, tuned):
            model.model.layers[0].self_attn.q_proj.weight[0, 0] = 0
        tuned.model.layers[0].self_attn.q_proj.weight[0, 0] = value
        tuned.model.layers[1].self_attn.q_proj.weight.add_(1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path, rank=4)
    assert len(report.matrices) == 2 and all(each.relative_error < 1e-5 for each in report.matrices)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_lower_rank_is_the_truncated_svd(name: str, rank: int, tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, name)
    report = extract(tmp_path, rank=rank)
    made, before, after = applied(tmp_path, base).state_dict(), base.state_dict(), tuned.state_dict()
    assert report.matrices and all(any(end in each.name for end in LINEARS[name]) for each in report.matrices)
    total = kept = 0.0
    for each in report.matrices:
        delta = after[each.name].double() - before[each.name].double()
        best = truncated(delta, rank)
        assert torch.allclose(made[each.name].double() - before[each.name].double(), best, atol=3e-6)
        values = torch.linalg.svdvals(delta).square()
        for own, share in each.kept.items():
            assert share == pytest.approx((values[:own].sum() / values.sum()).item(), rel=1e-5)
        assert each.relative_error == pytest.approx(((delta - best).norm() / delta.norm()).item(), rel=1e-4, abs=1e-6)
        total, kept = total + values.sum().item(), kept + values[:rank].sum().item()
    assert report.kept[rank] == pytest.approx(kept / total, rel=1e-5)
    assert list(report.kept) == ranks_shown(rank)
    written = json.loads((tmp_path / "out" / "extract_report.json").read_text())
    assert written["kept"][str(rank)] == pytest.approx(kept / total, rel=1e-5) and not written["is_whole"]


def test_a_model_with_an_adapter_gives_the_adapter_back(tmp_path: Path) -> None:
    base = tiny_models.build("llama")
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    train_with_peft(base, config, tmp_path / "lora")
    tuned = f"{tmp_path / 'base'}+{tmp_path / 'lora'}"
    report = largemerge.extract_lora(tuned, tmp_path / "base", tmp_path / "out", rank=8)
    assert {each.name.split(".")[-2] for each in report.matrices} == {"q_proj", "down_proj"} and report.is_whole
    assert all(each.kept[4] == pytest.approx(1, abs=1e-6) for each in report.matrices)
    found = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert found["target_modules"] == ["down_proj", "q_proj"] and found["task_type"] == "CAUSAL_LM"
    assert unlike(applied(tmp_path, base), merged_by_peft(base, tmp_path / "lora")) == []


def test_largemerge_itself_reads_the_adapter(tmp_path: Path) -> None:
    _, tuned = write_pair(tmp_path, "llama_tied")
    extract(tmp_path, rank=64, save_others=True)
    config = {"merge_method": "passthrough", "models": [{"model": f"{tmp_path / 'base'}+{tmp_path / 'out'}"}]}
    largemerge.merge(config, tmp_path / "merged")
    merged = type(tuned).from_pretrained(tmp_path / "merged")
    assert unlike(merged, tuned) == []


# Files as users have them


def test_sharded_and_bfloat16(tmp_path: Path) -> None:
    base, tuned = tiny_models.build("llama").bfloat16(), tiny_models.perturbed("llama", 1).bfloat16()
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="8KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    report = extract(tmp_path, rank=64, save_others=True)
    assert unlike(applied(tmp_path, base), tuned, 1e-2) == []
    assert report.relative_error < 1e-6
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "lora_" in name} == {torch.float32}
    assert tensors["base_model.model.model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_in_sixteen_bits(dtype: str, tmp_path: Path) -> None:
    write_pair(tmp_path, "llama")
    report = extract(tmp_path, rank=64, dtype=dtype)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert 1e-5 < report.relative_error < 1e-2
    assert all(each.kept[each.rank] == pytest.approx(1, abs=1e-6) for each in report.matrices)


def test_a_quantised_base(tmp_path: Path) -> None:
    base = wide("llama")
    base.save_pretrained(tmp_path / "base")
    tuned = wide("llama", seed=1).float()
    tuned.save_pretrained(tmp_path / "tuned")
    quantize_folder(tmp_path / "base", "nf4")
    report = extract(tmp_path, rank=64, save_others=True)
    assert any("quantised" in note for note in report.notes)
    plain = plain_copy(tmp_path / "base", tmp_path / "plain")
    stored = tf.LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32)
    assert unlike(merged_by_peft(stored, tmp_path / "out"), tuned, 2e-5) == []


def test_a_base_of_the_hub_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    write_pair(tmp_path, "llama")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "hub" / "models--owner--base"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "v1").write_text("a" * 40)
    (root / "snapshots").mkdir()
    (tmp_path / "base").rename(root / "snapshots" / ("a" * 40))
    report = largemerge.extract_lora(tmp_path / "tuned", "owner/base@v1", tmp_path / "out", rank=2)
    found = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (found["base_model_name_or_path"], found["revision"]) == ("owner/base", "v1") and report.matrices


def test_a_classifier_of_a_bare_encoder(tmp_path: Path) -> None:
    """Its head is not in the base: it is named, or written as a whole; peft saves it in any case."""
    config = tf.BertConfig(**tiny_models.TEXT, intermediate_size=24, max_position_embeddings=64, num_labels=3)
    torch.manual_seed(0)
    base = tf.BertForMaskedLM(config)
    base.save_pretrained(tmp_path / "base")
    tuned = tf.BertForSequenceClassification(config)
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path, rank=64)
    head = {name for name in report.left_out if name.startswith("classifier.")}
    assert head == {"classifier.weight", "classifier.bias"} and not report.is_whole
    report = extract(tmp_path, rank=64, save_others=True, force=True)
    assert report.left_out.keys() <= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    loaded = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert unlike(merged_by_peft(loaded, tmp_path / "out"), tuned) == []


def test_a_head_of_its_own_on_a_tied_base(tmp_path: Path) -> None:
    base = tiny_models.build("llama_tied")
    base.save_pretrained(tmp_path / "base")
    tuned = tiny_models.perturbed("llama", 1)
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path, rank=64)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= report.left_out.keys()
    report = extract(tmp_path, rank=64, save_others=True, force=True)
    assert unlike(applied(tmp_path, base), tuned) == []


def test_more_tokens_than_the_base_are_named(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, "llama")
    tuned.resize_token_embeddings(tiny_models.VOCAB_SIZE + 3)
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path, rank=64, save_others=True)
    assert report.left_out.keys() == {"model.embed_tokens.weight", "lm_head.weight"} and not report.is_whole
    assert "of another shape: [67, 16], in the base [64, 16]" in report.left_out["lm_head.weight"].reason
    left = unlike_but(applied(tmp_path, base), tuned, set(report.left_out))
    assert left == []


def unlike_but(found: PreTrainedModel, wanted: PreTrainedModel, but: set[str]) -> list[str]:
    ours, theirs = found.state_dict(), wanted.state_dict()
    return [name for name in theirs if name not in but and not torch.allclose(ours[name], theirs[name], 0, 3e-6)]


def test_a_weight_that_did_not_change_gets_no_factors(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, "llama")
    same = "model.layers.1.self_attn.q_proj.weight"
    tuned.load_state_dict({**tuned.state_dict(), same: base.state_dict()[same]})
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path, rank=64, save_others=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    assert same not in {each.name for each in report.matrices} and report.is_whole
    assert unlike(applied(tmp_path, base), tuned) == []


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["q_proj"], {"q_proj"}),
        (["q_proj", "self_attn.v_proj"], {"q_proj", "v_proj"}),
        ([r".*\.(up|down)_proj"], {"up_proj", "down_proj"}),
        ("lm_head", {"lm_head"}),
    ],
)
def test_targets(targets: Any, names: set[str], tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, "llama")
    report = extract(tmp_path, rank=64, targets=targets, save_others=True)
    assert {each.name.split(".")[-2] for each in report.matrices} == names
    reasons = {each.reason for each in report.left_out.values()}
    assert reasons == {"left out by --targets"} and not report.is_whole
    assert set(unlike(applied(tmp_path, base), tuned)) == set(report.left_out)


def test_a_config_that_computes_otherwise_is_told(tmp_path: Path) -> None:
    write_pair(tmp_path, "llama")
    path = tmp_path / "tuned" / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 1e-3
    path.write_text(json.dumps(config))
    report = extract(tmp_path, rank=4)
    assert any("rms_norm_eps" in note and note.startswith("warning: ") for note in report.notes)


# The folder


def test_it_is_resumed_and_nothing_half_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path, "llama")
    largemerge.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "unbroken", rank=4, save_others=True)
    record, count = OutputFolder.record, 0

    def stopping(self: OutputFolder, part: str, entry: Any) -> None:
        nonlocal count
        record(self, part, entry)
        count += 1
        if count == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "record", stopping)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, rank=4, save_others=True)
    monkeypatch.setattr(OutputFolder, "record", record)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".largemerge"}
    with pytest.raises(OutputError, match="--resume goes on with it"):
        extract(tmp_path, rank=4, save_others=True)
    with pytest.raises(OutputError, match="rank was 4 and is 5"):
        extract(tmp_path, rank=5, save_others=True, resume=True)
    report = extract(tmp_path, rank=4, save_others=True, resume=True)
    assert report.resumed_parts == 9 and names_in(tmp_path / "out") == FILES
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_force_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, "llama")
    extract(tmp_path, rank=2)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        extract(tmp_path, rank=64)
    extract(tmp_path, rank=64, save_others=True, force=True)
    assert names_in(tmp_path / "out") == {*FILES, "notes.txt"}
    assert unlike(applied(tmp_path, base), tuned) == []


def test_inputs_are_left_alone(tmp_path: Path) -> None:
    write_pair(tmp_path, "llama")
    before = files_in(tmp_path)
    extract(tmp_path, rank=2)
    assert {name: data for name, data in files_in(tmp_path).items() if not name.startswith("out/")} == before


# What is wrong


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path, "llama")
    out = tmp_path / "out"
    command = ("extract-lora", tmp_path / "tuned", tmp_path / "base", out, "--rank", 4)
    assert exit_code(*command, "--targets", "q_proj", "k_proj") == 0
    told = capsys.readouterr().err
    assert "6 matrices at rank 4: adapter of" in told and "warning: the adapter does not hold" in told
    assert "all of these" in told and "of ‖Δ‖² of everything that differs" in told
    assert exit_code(*command, "--force", "--quiet", "--json") == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["rank"] == 4 and "warning: the adapter does not hold" in found.err
    assert exit_code(*command) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--rank", "0"], "--rank 0: expected a whole number from 1 to"),
        (["--dtype", "int8"], "--dtype 'int8': expected one of float32, bfloat16, float16"),
        (["--device", "abacus"], "--device abacus: not known"),
        (["--targets", "q_prj"], "did you mean 'q_proj'?"),
        (["--targets", "("], "neither a name nor a regular expression"),
        (["--targets", "embed_tokens"], "model.embed_tokens is no linear but a Embedding"),
        (["--resume", "--force"], "expected one of them"),
        (["--resume"], "holds nothing to resume"),
    ],
)
def test_options_that_are_none(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path, "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    force = [] if options[0] == "--resume" else ["--force"]
    assert exit_code("extract-lora", tmp_path / "tuned", tmp_path / "base", tmp_path / "out", *force, *options) == 2
    told = capsys.readouterr().err
    assert expected in told and "Traceback" not in told
    assert names_in(tmp_path / "out") == {"notes.txt"}


def test_all_arguments_are_checked_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        largemerge.extract_lora(5, "", "", rank=True, targets=[], dtype="f", device=3, save_others=1)  # type: ignore
    assert len(caught.value.problems) == 8


def test_models_that_give_no_adapter(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path, "llama")
    with pytest.raises(CheckpointError, match="have the same weights"):
        largemerge.extract_lora(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    tiny_models.build("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"is a 'gpt2' model, and .* a 'llama' model"):
        largemerge.extract_lora(tmp_path / "other", tmp_path / "base", tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        largemerge.extract_lora("./nowhere", "./nothing", tmp_path / "out")
    assert len(caught.value.problems) == 2
    norms = copy.deepcopy(base)
    with torch.no_grad():
        norms.model.norm.weight.add_(1)
    norms.save_pretrained(tmp_path / "norms")
    with pytest.raises(CheckpointError, match=r"no linear .* model\.norm\.weight: no weight of a linear"):
        largemerge.extract_lora(tmp_path / "norms", tmp_path / "base", tmp_path / "out", save_others=True)
    with pytest.raises(OutputError, match="holds a checkpoint"):
        largemerge.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "norms", force=True)
    with pytest.raises(OutputError, match="lies in an input"):
        largemerge.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "base" / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite(value: float, tmp_path: Path) -> None:
    write_pair(tmp_path, "llama")

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.0.mlp.up_proj.weight"][1, 1] = value
        tensors["model.norm.weight"][0] = value
        return tensors

    rewrite_weights(tmp_path / "tuned", spoil)
    with pytest.raises(CheckpointError) as caught:
        extract(tmp_path)
    assert len(caught.value.problems) == 2 and "NaN or infinity" in str(caught.value)


def test_factors_too_large_for_float16(tmp_path: Path) -> None:
    write_pair(tmp_path, "llama")
    rewrite_weights(tmp_path / "tuned", lambda tensors: {name: tensor * 1e11 for name, tensor in tensors.items()})
    with pytest.raises(LargemergeError, match="--dtype float32 holds larger numbers"):
        extract(tmp_path, dtype="float16")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".largemerge"}


# Parts


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (5, 9), (9, 5)])
def test_factors_of_small_and_deficient_matrices(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    rank = min(shape)
    factors = low_rank_factors(matrix, rank, torch.float32)
    assert torch.allclose(factors.up @ factors.down, matrix, atol=1e-5)
    assert factors.squares == pytest.approx(torch.linalg.svdvals(matrix.double()).square().tolist(), rel=1e-5)
    single = torch.outer(matrix[:, 0], matrix[0])
    factors = low_rank_factors(single, rank, torch.float32)
    assert torch.allclose(factors.up @ factors.down, single, atol=1e-5) and len(factors.squares) == 1
    nothing = low_rank_factors(torch.zeros(shape), rank, torch.float32)
    assert not nothing.up.any() and not nothing.down.any() and nothing.squares == ()


def test_names_mean_just_the_modules_that_are_meant() -> None:
    modules = ["", "a.0.q", "a.0.norm", "a.1.q", "a.1.norm", "b.q", "norm", "b.final_norm"]
    assert target_names({"a.0.q", "a.1.q", "b.q"}, modules) == ["q"]
    assert target_names({"a.0.q", "a.1.q"}, modules) == ["a.0.q", "a.1.q"]
    assert target_names({"q"}, ["q", "a.q"]) == "q"  # a list would mean both
    assert names_to_save(["a.0.norm", "a.1.norm"], modules) == (["a.0.norm", "a.1.norm"], ["a.0.norm", "a.1.norm"])
    names, taken = names_to_save(["norm"], modules)
    assert names == ["norm"] and taken == ["a.0.norm", "a.1.norm", "norm", "b.final_norm"]
    assert names_to_save(["b", "b.norm"], ["b", "b.norm", "b.q"]) == (["b"], ["b"])
    assert rank_pattern({"a.0.q": 4, "a.1.q": 4, "b.k": 8}, 8) == {"q": 4}
    assert rank_pattern({"a.0.q": 4, "a.1.q": 8}, 8) == {r"a\.0\.q": 4}
    assert [ranks_shown(rank) for rank in (1, 2, 3, 32)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16, 32]]


def test_weights_are_those_of_the_file(tmp_path: Path) -> None:
    """Nothing but factors is written, under peft's names, at the rank of the smaller side."""
    write_pair(tmp_path, "llama")
    extract(tmp_path, rank=12)
    tensors = weights_in(tmp_path / "out")
    layer = "base_model.model.model.layers.0.self_attn"
    assert tensors[f"{layer}.k_proj.lora_A.weight"].shape == (8, 16)
    assert tensors[f"{layer}.k_proj.lora_B.weight"].shape == (8, 8)
    assert tensors[f"{layer}.q_proj.lora_A.weight"].shape == (12, 16)
