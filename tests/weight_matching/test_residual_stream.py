"""Models whose residual streams are permuted, too: outputs stay, full permutations come back, what must not stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import permuted_models
import processes
import pytest
import tiny_models
import torch
import transformers
from adapters import shapes_of, write_adapter
from cases import exit_code, report_of, weights_in, write_case
from permuted_models import assert_same, load, merge_of, plan_of, saved, write_permuted
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

import largemerge
from largemerge.weight_matching import descent, run

FAST = ["llama_tied", "vit"]
BODIES = ["clip_vision", "siglip_vision", "dinov2", "dinov2_swiglu"]
FAMILIES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in tiny_models.ARCHITECTURES
    if name not in BODIES
]
STREAM = {"residual_stream": True}


def permuted_pair(folder: Path, architecture: str, noise: float = 0.0) -> tuple[Path, Path]:
    """A model, and the same with all that may change places in other places."""
    original = folder / "original"
    tiny_models.build(architecture).save_pretrained(original)
    return original, write_permuted(original, folder / "permuted", noise, residual_stream=True)


def assert_same_outputs(one: Path, other: Path, kind: str) -> None:
    """The outputs of two models are the same, but for a hidden state that is returned beside them."""
    found = [
        {name: x for name, x in load(folder)(**tiny_models.inputs(kind, 2, 7)).items() if isinstance(x, torch.Tensor)}
        for folder in (one, other)
    ]
    for name, a in found[0].items():
        if name != "encoder_last_hidden_state":
            assert (a - found[1][name]).abs().max() <= 1e-4 * a.abs().max(), name


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_wholly_permuted_model_comes_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    original, permuted = permuted_pair(tmp_path, architecture)
    assert_same_outputs(original, permuted, tiny_models.ARCHITECTURES[architecture].kind)
    own, others = weights_in(original), weights_in(permuted)
    same = [name for name, tensor in others.items() if torch.equal(tensor, own[name])]
    kept = ("bias", "norm", "logit_scale")  # vectors that are all alike, or no part of anything
    assert all(any(word in name for word in kept) or own[name].dim() < 2 for name in same), same
    largemerge.merge(merge_of(original, permuted, align=STREAM), tmp_path / "merged")
    assert_same(original, tmp_path / "merged")
    for streams in report_of(tmp_path / "merged")["align"]["residual_streams"].values():
        for stream in streams.values():
            assert stream["moved"] > 0 and stream["rounds"] == 2
            assert stream["before"] < 0.7 and stream["after"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("family", "task", "config"),
    [
        ("Bert", "ForSequenceClassification", {"num_labels": 3}),
        ("Albert", "ForSequenceClassification", {"embedding_size": 16, "num_labels": 3}),
        ("Electra", "ForTokenClassification", {"embedding_size": 16, "num_labels": 3}),
    ],
    ids=str,
)
def test_heads_shared_layers_and_narrow_embeddings(family: str, task: str, config: Any, tmp_path: Path) -> None:
    original = saved(tmp_path / "original", family, task, **config)
    permuted = write_permuted(original, tmp_path / "permuted", residual_stream=True)
    assert_same_outputs(original, permuted, "text")
    largemerge.align(permuted, original, tmp_path / "out", residual_stream=True)
    assert_same(original, tmp_path / "out")


def test_the_command_tells_what_it_has_done(tmp_path: Path) -> None:
    original, noisy = permuted_pair(tmp_path, "gpt2", noise=0.02)
    assert exit_code("align", noisy, original, tmp_path / "out", "--residual-stream", "--quiet") == 0
    for name, tensor in weights_in(original).items():
        assert (weights_in(tmp_path / "out")[name] - tensor).abs().max() < 0.02 * 6, name
    assert_same_outputs(noisy, tmp_path / "out", "text")
    report = report_of(tmp_path / "out")
    stream = report["align"]["residual_streams"][str(noisy)]["transformer.h"]
    assert stream["size"] == 16 and stream["before"] < 0.7 < 0.9 < stream["after"] <= 1
    block = report["align"]["models"][str(noisy)]["transformer.h.1"]
    assert block["before"] < 0.5 < 0.9 < block["after"]
    assert "features of the residual stream were put" in (tmp_path / "out" / "README.md").read_text()
    plan = largemerge.plan(merge_of(original, noisy, align=STREAM), probe=False)
    assert any("the residual stream of transformer.h: permuted are 16 features" in note for note in plan.notes)
    assert any("a block or a residual stream of two models takes up to" in note for note in plan.notes)
    table = str(largemerge.align(noisy, original, tmp_path / "again", residual_stream=True))
    assert "features change places" in " ".join(table.replace("│", " ").split())


def test_nothing_of_it_is_told_where_nobody_asks(tmp_path: Path) -> None:
    original, permuted = permuted_pair(tmp_path, "gpt2")
    report = largemerge.align(permuted, original, tmp_path / "out", residual_stream=False).to_json()
    assert "residual_streams" not in report["align"]
    assert "residual_stream" not in (tmp_path / "out" / "largemerge_config.yaml").read_text()
    assert "within blocks" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("architecture", BODIES[:3])
def test_a_stream_that_is_the_output_stays(architecture: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        tiny_models.build(architecture).save_pretrained(tmp_path / name)
    with pytest.raises(largemerge.LargemergeError, match=r"the residual stream of .* stays") as caught:
        largemerge.align(tmp_path / "one", tmp_path / "other", tmp_path / "out", residual_stream=True)
    assert "leave residual_stream out" in str(caught.value)
    plan = largemerge.plan(merge_of(tmp_path / "one", tmp_path / "other", align=STREAM), probe=False)
    assert any("stays" in problem for problem in plan.problems)


def test_a_stream_that_is_not_wholly_known_stays(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**tiny_models.LLM),
        vision_config=transformers.CLIPVisionConfig(**sizes | {"hidden_size": 20}, image_size=12, patch_size=4),
        image_token_index=5,
    )
    for name in ("one", "other"):
        transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / name)
    with pytest.raises(
        largemerge.LargemergeError,
        match=r"multi_modal_projector\.linear_1.*may belong to it, and is not reached by inputs",
    ):
        largemerge.align(tmp_path / "one", tmp_path / "other", tmp_path / "out", residual_stream=True)
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    deberta = [saved(tmp_path / name, "Deberta", "ForMaskedLM", **relative) for name in ("first", "second")]
    with pytest.raises(largemerge.LargemergeError, match=r"rel_embeddings\.weight may belong to it"):
        largemerge.align(*deberta, tmp_path / "out", residual_stream=True)
    original, permuted = permuted_pair(tmp_path, "llama")
    extra = load_file(permuted / "model.safetensors") | {"extra_head.weight": torch.ones(3, 16)}
    permuted_models.save_file(extra, permuted / "model.safetensors", permuted_models.METADATA)
    with pytest.raises(largemerge.LargemergeError, match=r"extra_head\.weight may belong to it"):
        largemerge.align(permuted, original, tmp_path / "out", residual_stream=True)


def test_what_is_no_switch_is_refused(tmp_path: Path) -> None:
    for value in (3, "yes please"):
        with pytest.raises(largemerge.ConfigError, match=r"align.*residual_stream"):
            largemerge.plan(merge_of(tmp_path, tmp_path / "b", align={"residual_stream": value}))
    with pytest.raises(largemerge.ConfigError, match="--residual-stream 1"):
        largemerge.align("a", "b", tmp_path, residual_stream=1)  # type: ignore[arg-type]


def dense_sums(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> np.ndarray:
    """A of a GPT-2, whose tensors have the stream as the dimension of 16; of square ones the layout is known."""
    total = torch.zeros(16, 16, dtype=torch.float64)
    for name, tensor in theirs.items():
        axes = [axis for axis, size in enumerate(tensor.shape) if size == 16]
        if len(axes) == 2:
            axes = [1]  # c_proj of the attention, [in, out]
        if axes and name.rsplit(".", 2)[-2:] not in (["c_attn", "bias"], ["c_fc", "bias"]):
            a, b = (x[name].double().movedim(axes[0], 0).reshape(16, -1) for x in (theirs, ours))
            total += a @ b.T
    return total.numpy()


def test_the_sum_is_that_of_a_dense_reference_and_no_order_is_better(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    tiny_models.build("gpt2", 1).save_pretrained(one)
    tiny_models.build("gpt2", 2).save_pretrained(other)
    plain = largemerge.align(one, other, tmp_path / "blocks").to_json()["align"]["models"][str(one)]
    report = largemerge.align(one, other, tmp_path / "out", residual_stream=True).to_json()["align"]
    ours, theirs = weights_in(tmp_path / "out"), weights_in(other)
    sums = dense_sums(ours, theirs)
    rows, columns = linear_sum_assignment(sums, maximize=True)
    assert sums[rows, columns].sum() == pytest.approx(np.trace(sums), rel=1e-5)  # given the blocks, it is the best
    within = np.trace(dense_sums(weights_in(tmp_path / "blocks"), theirs))
    before = np.trace(dense_sums(weights_in(one), theirs))
    assert np.trace(sums) > within > before
    stream = report["residual_streams"][str(one)]["transformer.h"]
    assert stream["after"] / stream["before"] == pytest.approx(np.trace(sums) / before, rel=1e-4)
    blocks = report["models"][str(one)]
    assert blocks.keys() == plain.keys() and all(blocks[name]["before"] == plain[name]["before"] for name in plain)
    assert_same_outputs(one, tmp_path / "out", "text")


def test_models_that_are_alike_already_stay_as_they_are(tmp_path: Path) -> None:
    for seed in range(2):
        tiny_models.perturbed("llama", seed, scale=0.02).save_pretrained(tmp_path / f"model{seed}")
    folders = [tmp_path / f"model{seed}" for seed in range(2)]
    report = largemerge.merge(merge_of(*folders, align=STREAM), tmp_path / "aligned").to_json()["align"]
    plain = {key: value for key, value in merge_of(*folders).items() if key != "align"}
    largemerge.merge(plain, tmp_path / "plain")
    assert_same(tmp_path / "plain", tmp_path / "aligned")
    stream = report["residual_streams"][str(folders[1])]["model.layers"]
    assert stream["moved"] == 0 and stream["rounds"] == 1 and stream["before"] == stream["after"] > 0.9


@pytest.fixture
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables are read three rows at a time."""
    monkeypatch.setattr(descent, "PIECE_BYTES", 4 * 16 * 3)
    yield


def test_large_tables_are_read_in_pieces(tmp_path: Path, in_small_pieces: None) -> None:
    original, permuted = permuted_pair(tmp_path, "llama")
    largemerge.merge(merge_of(original, permuted, align=STREAM), tmp_path / "merged")
    assert_same(original, tmp_path / "merged")


def test_a_resumed_alignment_goes_on_to_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    tiny_models.build("qwen2", 1).save_pretrained(one)
    tiny_models.build("qwen2", 2).save_pretrained(other)
    matched: list[str] = []
    whole, most = run.match_block, 10**6

    def stopping(plan: Any, block: Any, *readers: Any) -> Any:
        if len(matched) == most:
            raise largemerge.MergeError("stopped")
        matched.append(block.name)
        return whole(plan, block, *readers)

    monkeypatch.setattr(run, "match_block", stopping)
    expected = largemerge.align(one, other, tmp_path / "expected", residual_stream=True).to_json()["align"]
    in_all, matched[:] = list(matched), []
    assert len(in_all) >= 6  # two rounds at least
    most = 4  # in the second round
    with pytest.raises(largemerge.MergeError, match="stopped"):
        largemerge.align(one, other, tmp_path / "out", residual_stream=True)
    matched.clear()
    most = 10**6
    found = largemerge.align(one, other, tmp_path / "out", residual_stream=True, resume=True).to_json()["align"]
    assert matched == in_all[4:] and found == expected
    assert_same(tmp_path / "expected", tmp_path / "out")


@pytest.mark.slow
def test_ranks_share_the_work(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    tiny_models.build("llama", 1).save_pretrained(one)
    tiny_models.build("llama", 2).save_pretrained(other)
    (tmp_path / "merge.yaml").write_text(json.dumps(merge_of(one, other, align=STREAM)))
    for number in (1, 2, 3):
        out = tmp_path / f"out{number}"
        processes.run_ranks(["merge", tmp_path / "merge.yaml", out, "--quiet"], tmp_path, number)
        assert_same(tmp_path / "out1", out)


def test_regression_methods_run_the_models_in_their_new_order(tmp_path: Path) -> None:
    models = [tiny_models.perturbed("llama", seed, scale=0.02) for seed in range(2)]
    inputs = [tiny_models.inputs("text", 4, seed) for seed in range(2)]
    case = write_case(tmp_path, models, inputs, method="regmean")
    largemerge.merge(case.config, tmp_path / "plain")
    permuted = write_permuted(tmp_path / "model1", tmp_path / "permuted", residual_stream=True)
    case.config["models"][1] |= {"model": str(permuted), "name": "model1"}
    case.config["align"] = STREAM
    report = largemerge.merge(case.config, tmp_path / "aligned")
    expected, found = weights_in(tmp_path / "plain"), weights_in(tmp_path / "aligned")
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name
    assert report.to_json()["align"]["residual_streams"]["model1"]["model.layers"]["after"] > 0.9
    assert "features of the residual stream" in (tmp_path / "aligned" / "README.md").read_text()


def test_an_adapter_is_added_before_anything_is_permuted(tmp_path: Path) -> None:
    original, permuted = permuted_pair(tmp_path, "llama")
    names = ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.up_proj"]
    factors = write_adapter(tmp_path / "adapter", shapes_of(permuted, *names))
    largemerge.align(f"{permuted}+{tmp_path / 'adapter'}", original, tmp_path / "out", residual_stream=True)
    whole = weights_in(permuted)
    for name in names:
        delta = factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
        whole[f"{name}.weight"] = whole[f"{name}.weight"] + 6 / 4 * delta
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text((permuted / "config.json").read_text())
    permuted_models.save_file(whole, tmp_path / "whole" / "model.safetensors", permuted_models.METADATA)
    assert_same_outputs(tmp_path / "whole", tmp_path / "out", "text")


@pytest.mark.parametrize("method", ["linear", "regmean"])
def test_heads_that_are_kept_apart_follow_the_stream(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = transformers.ViTForImageClassification(transformers.ViTConfig(**tiny_models.VISION, num_labels=5))
    one.save_pretrained(tmp_path / "model0")
    other = transformers.ViTForImageClassification(transformers.ViTConfig(**tiny_models.VISION, num_labels=3))
    other.load_state_dict({k: v for k, v in one.state_dict().items() if "classifier" not in k}, strict=False)
    other.save_pretrained(tmp_path / "plain")
    permuted = write_permuted(tmp_path / "plain", tmp_path / "permuted", residual_stream=True)
    if method == "linear":
        config = merge_of(tmp_path / "model0", permuted, align=STREAM)
    else:
        inputs = [tiny_models.inputs("vision", 4, seed) for seed in range(2)]
        config = write_case(tmp_path, [one, other], inputs, method=method).config
        config["models"][1] |= {"model": str(permuted), "name": "permuted"}
        config["align"] = STREAM
    largemerge.merge(config, tmp_path / "out")
    head = load_file(tmp_path / "out" / "heads" / "permuted.safetensors")
    assert torch.equal(head["classifier.weight"], other.classifier.weight)
    assert not torch.equal(load(permuted).classifier.weight, other.classifier.weight)


def test_the_reference_may_be_the_bare_body(tmp_path: Path) -> None:
    original, permuted = permuted_pair(tmp_path, "qwen3")
    load(original).model.save_pretrained(tmp_path / "body")
    largemerge.align(permuted, tmp_path / "body", tmp_path / "out", residual_stream=True)
    assert_same(original, tmp_path / "out")
    (model,) = plan_of(tmp_path / "body", permuted, residual_stream=True).models.values()
    assert [tensor.key for stream in model.streams for tensor in stream.tensors if tensor.other is None] == [
        "lm_head.weight"
    ]
