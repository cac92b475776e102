"""Models permuted to another before they are merged: outputs stay, and what was permuted comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_models
import torch
import transformers
from cases import exit_code, names_in, report_of, weights_in, write_case
from permuted_models import assert_same, load, merge_of, outputs, saved, write_permuted
from safetensors.torch import save_file

import largemerge
from largemerge.weight_matching import run

FAST = ["llama", "gpt2", "t5"]
FAMILIES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in tiny_models.ARCHITECTURES]
LEAST_MOVED = {"mixtral": 3, "olmo2": 3}
"""Tensors of a block that are permuted at least; 4 where nothing is said."""


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_permuted_model_is_the_same_model_and_comes_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    original, kind = tmp_path / "original", tiny_models.ARCHITECTURES[architecture].kind
    tiny_models.build(architecture).save_pretrained(original)
    permuted = write_permuted(original, tmp_path / "permuted")
    for a, b in zip(outputs(load(original), kind), outputs(load(permuted), kind), strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    own, others = weights_in(original), weights_in(permuted)
    changed = [name for name, tensor in others.items() if not torch.equal(tensor, own[name])]
    assert len(changed) >= LEAST_MOVED.get(architecture, 4) * tiny_models.ARCHITECTURES[architecture].num_blocks
    largemerge.merge(merge_of(original, permuted), tmp_path / "merged")
    assert_same(original, tmp_path / "merged")


def test_the_command_writes_the_model_in_the_order_of_the_other(tmp_path: Path) -> None:
    original = tmp_path / "original"
    tiny_models.build("gpt2").save_pretrained(original)
    noisy = write_permuted(original, tmp_path / "noisy", noise=0.02)
    (noisy / "tokenizer_config.json").write_text("{}")
    report = largemerge.align(noisy, original, tmp_path / "out", max_shard_bytes="20KB")
    for a, b in zip(outputs(load(noisy), "text"), outputs(load(tmp_path / "out"), "text"), strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    for name, tensor in weights_in(original).items():  # neurons, heads, and what is in them are where they were
        found = weights_in(tmp_path / "out")[name]
        assert (found - tensor).abs().max() < 0.02 * 6, name
    found = report_of(tmp_path / "out")["align"]
    block = found["models"][str(noisy)]["transformer.h.1"]
    assert found["reference"] == str(original) and block["before"] < 0.5 < 0.9 < block["after"] <= 1
    assert block["families"]["neurons before mlp.c_proj"]["moved"] > 50
    assert block["families"]["heads before attn.c_proj"]["inner"].keys() == {"values", "queries and keys"}
    assert "cosine of the weights" in str(report) and "weight matching" in (tmp_path / "out" / "README.md").read_text()
    assert len([name for name in names_in(tmp_path / "out") if name.endswith(".safetensors")]) > 1
    assert exit_code("verify", tmp_path / "out") == 0
    assert exit_code("align", noisy, original, tmp_path / "out", "--quiet") == 2  # it is not empty
    assert exit_code("align", noisy, noisy, tmp_path / "out", "--force", "--quiet") == 2  # with itself
    assert exit_code("align", original, noisy, tmp_path / "out", "--force", "--quiet") == 0
    assert "transformer.h.1" in report_of(tmp_path / "out")["align"]["models"][str(original)]


def test_models_that_are_alike_already_stay_as_they_are(tmp_path: Path) -> None:
    for seed in range(3):
        tiny_models.perturbed("llama", seed, scale=0.02).save_pretrained(tmp_path / f"model{seed}")
    folders = [tmp_path / f"model{seed}" for seed in range(3)]
    more = {"merge_method": "ties", "base_model": str(folders[0]), "parameters": {"density": 0.5}}
    largemerge.merge(merge_of(*folders[1:], **more), tmp_path / "aligned")
    config = merge_of(*folders[1:], **more)
    del config["align"]
    largemerge.merge(config, tmp_path / "plain")
    assert_same(tmp_path / "plain", tmp_path / "aligned")
    models = report_of(tmp_path / "aligned")["align"]["models"]
    assert models.keys() == {str(folder) for folder in folders[1:]}
    for blocks in models.values():
        assert all(family["moved"] == 0 for block in blocks.values() for family in block["families"].values())
        assert all(block["before"] == block["after"] > 0.9 for block in blocks.values())


def test_regression_methods_run_the_models_in_their_new_order(tmp_path: Path) -> None:
    models = [tiny_models.perturbed("llama", seed, scale=0.02) for seed in range(2)]
    inputs = [tiny_models.inputs("text", 4, seed) for seed in range(2)]
    case = write_case(tmp_path, models, inputs, method="regmean")
    largemerge.merge(case.config, tmp_path / "plain")
    permuted = write_permuted(tmp_path / "model1", tmp_path / "permuted")
    case.config["models"][1] |= {"model": str(permuted), "name": "model1"}
    case.config["align"] = "weights"
    report = largemerge.merge(case.config, tmp_path / "aligned")
    expected, found = weights_in(tmp_path / "plain"), weights_in(tmp_path / "aligned")
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name
    assert report.to_json()["align"]["models"]["model1"]["model.layers.2"]["after"] > 0.9
    assert "aligned model1" in str(report) and "weight matching" in (tmp_path / "aligned" / "README.md").read_text()
    plan = largemerge.plan(case.config, probe=False)
    assert any("align: model.layers.0 … 2 (3 blocks): permuted are 2 groups of heads" in note for note in plan.notes)
    for key, value in (("sequence", {"keep_sums": True}), ("align", {"reference": 3}), ("align", "activations")):
        with pytest.raises(largemerge.ConfigError, match="align"):
            largemerge.plan({**case.config, key: value})
    with pytest.raises(largemerge.ConfigError, match="align: is for merges"):
        largemerge.gram(case.config, tmp_path / "grams")


@pytest.mark.parametrize(
    ("family", "config"), [("StableLm", {"qk_layernorm": True}), ("Cohere", {"use_qk_norm": True})], ids=str
)
def test_two_groups_of_heads_with_norms_of_their_own_stay(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    one, other = (
        saved(tmp_path / name, family, "ForCausalLM", num_key_value_heads=2, **config) for name in ("one", "other")
    )
    report = largemerge.align(one, other, tmp_path / "out")
    for a, b in zip(outputs(load(one), "text"), outputs(load(tmp_path / "out"), "text"), strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    assert any("groups of heads before self_attn.o_proj stay: " in note for note in report.plan.notes)
    (blocks,) = report.to_json()["align"]["models"].values()
    assert all(blocks["model.layers.1"]["families"][name]["moved"] == 0 for name in blocks if "heads" in name)


def test_families_that_share_a_matrix_are_matched_in_turn(tmp_path: Path) -> None:
    sizes = {"embedding_size": 16, "intra_bottleneck_size": 32}
    one, other = (saved(tmp_path / name, "MobileBert", "ForMaskedLM", **sizes) for name in ("one", "other"))
    (there,) = largemerge.align(one, other, tmp_path / "there").to_json()["align"]["models"].values()
    (back,) = largemerge.align(tmp_path / "there", one, tmp_path / "back").to_json()["align"]["models"].values()
    assert_same(one, tmp_path / "back")
    prefix = "mobilebert.encoder.layer.1"
    assert there[prefix]["after"] > there[prefix]["before"] and back[prefix]["after"] == pytest.approx(1.0)
    ours, theirs = weights_in(tmp_path / "there"), weights_in(other)
    names = [f"{prefix}.ffn.0.intermediate.dense.weight", f"{prefix}.ffn.0.output.dense.weight"]
    before = sum(float((weights_in(one)[name] * theirs[name]).sum()) for name in names)
    assert sum(float((ours[name] * theirs[name]).sum()) for name in names) > before


def test_a_block_that_cannot_be_run_on_made_up_numbers_stays(tmp_path: Path) -> None:
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    one, other = (saved(tmp_path / name, "Deberta", "ForMaskedLM", **relative) for name in ("one", "other"))
    with pytest.raises(
        largemerge.LargemergeError, match=r"layer\.1 stays as it is: it cannot be run on made-up numbers"
    ):
        largemerge.align(one, other, tmp_path / "out")


def test_the_reference_may_be_the_bare_body(tmp_path: Path) -> None:
    tiny_models.build("qwen3").save_pretrained(tmp_path / "original")
    load(tmp_path / "original").model.save_pretrained(tmp_path / "body")
    permuted = write_permuted(tmp_path / "original", tmp_path / "permuted")
    largemerge.align(permuted, tmp_path / "body", tmp_path / "out")
    assert_same(tmp_path / "original", tmp_path / "out")


def test_what_cannot_be_aligned_is_told_before_anything_is_written(tmp_path: Path) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path / "llama")
    tiny_models.build("gpt2").save_pretrained(tmp_path / "gpt2")
    narrow = transformers.LlamaConfig(**tiny_models.LLM | {"intermediate_size": 20})
    transformers.LlamaForCausalLM(narrow).save_pretrained(tmp_path / "narrow")
    out = tmp_path / "out"
    with pytest.raises(largemerge.LargemergeError, match=r"down_proj.weight is \[16, 24\], and \[16, 20\] in"):
        largemerge.align(tmp_path / "llama", tmp_path / "narrow", out)
    with pytest.raises(largemerge.LargemergeError, match=r"has no .*; expected a model of the same architecture"):
        largemerge.align(tmp_path / "llama", tmp_path / "gpt2", out)
    with pytest.raises(largemerge.ConfigError) as caught:
        largemerge.align(5, "", out, resume=True, force=True, trust_remote_code=1)  # type: ignore[arg-type]
    assert len(caught.value.problems) == 4
    with pytest.raises(largemerge.ConfigError, match="is the only model"):
        largemerge.plan(merge_of(tmp_path / "llama"))
    weights = weights_in(tmp_path / "llama")
    fisher = {"merge_method": "fisher", "base_model": None}
    model = {"model": str(tmp_path / "llama"), "parameters": {"fisher": str(tmp_path / "narrow" / "model.safetensors")}}
    with pytest.raises(largemerge.ConfigError, match="align: the tensors of fisher would have to be permuted"):
        largemerge.plan({**fisher, "models": [model, model], "align": "weights"})
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, tmp_path / "narrow" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "narrow" / "config.json").write_text((tmp_path / "llama" / "config.json").read_text())
    with pytest.raises(largemerge.LargemergeError, match=r"NaN in model\.layers\.1\.mlp\.up_proj\.weight"):
        largemerge.align(tmp_path / "llama", tmp_path / "narrow", out)


def test_a_resumed_alignment_matches_no_block_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tmp_path / "original"
    tiny_models.build("qwen2").save_pretrained(original)
    permuted = write_permuted(original, tmp_path / "permuted")
    matched: list[str] = []
    whole = run.match_block

    def stopping(plan: Any, block: Any, *readers: Any) -> Any:
        if len(matched) == 2:
            raise largemerge.MergeError("stopped")
        matched.append(block.name)
        return whole(plan, block, *readers)

    monkeypatch.setattr(run, "match_block", stopping)
    with pytest.raises(largemerge.MergeError, match="stopped"):
        largemerge.align(permuted, original, tmp_path / "out")
    assert matched == ["model.layers.0", "model.layers.1"] and not (tmp_path / "out" / "config.json").exists()
    matched.clear()
    largemerge.align(permuted, original, tmp_path / "out", resume=True)
    assert matched == ["model.layers.2"]
    assert_same(original, tmp_path / "out")


@pytest.mark.slow
def test_ranks_share_the_blocks(tmp_path: Path) -> None:
    original = tmp_path / "original"
    tiny_models.build("llama").save_pretrained(original)
    permuted = write_permuted(original, tmp_path / "permuted")
    (tmp_path / "merge.yaml").write_text(json.dumps(merge_of(original, permuted)))
    processes.run_ranks(["merge", tmp_path / "merge.yaml", tmp_path / "out", "--quiet"], tmp_path, 2)
    assert_same(original, tmp_path / "out")
