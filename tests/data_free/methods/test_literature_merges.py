"""Whole merges by methods of the literature: every tensor, fallbacks, resuming, ranks, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_free_reference as reference
import processes
import psutil
import pytest
import tiny_models
import torch
import transformers as tf
import yaml
from cases import weights_in
from data_free_cases import kill_and_resume

import largemerge
from largemerge.data_free import engine, loader
from largemerge.data_free.methods.table import METHODS

Weights = dict[str, torch.Tensor]
MATRIX_METHODS = sorted(
    name for name, row in METHODS.items() if row.matrix_formula is not None and row.num_models[1] > 2
)
LINEARS = ("_proj.weight", "c_attn.weight", "c_fc.weight", "c_proj.weight")


def write_models(folder: Path, architecture: str = "llama", count: int = 4, dtype: torch.dtype = torch.float32) -> None:
    """Saves `model0`, the base, and other models near it."""
    base = tiny_models.perturbed(architecture, 0).to(dtype)
    base.save_pretrained(folder / "model0")
    for seed in range(1, count):
        model = tiny_models.build(architecture).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        start = base.state_dict()
        state = {
            name: tensor + (seed * 0.02 * torch.randn(tensor.shape, generator=generator)).to(dtype)
            for name, tensor in start.items()
        }
        model.load_state_dict(state)
        model.save_pretrained(folder / f"model{seed}")


def config_of(folder: Path, method: str, models: list[int] | None = None, **more: Any) -> dict[str, Any]:
    entries = [{"model": str(folder / f"model{seed}")} for seed in models or [1, 2, 3]]
    return {"merge_method": method, "base_model": str(folder / "model0"), "models": entries, **more}


def read_deltas(folder: Path, models: list[int]) -> list[Weights]:
    base = weights_in(folder / "model0")
    return [
        {name: tensor.double() - base[name].double() for name, tensor in weights_in(folder / f"model{seed}").items()}
        for seed in models
    ]


def expected_of(method: str, deltas: list[Weights], matrices: set[str], *, turned: bool = False) -> Weights:
    """Computes the merged task vectors, densely."""
    if method == "opcm":
        return reference.opcm(deltas, matrices)
    expected = {}
    for name in deltas[0]:
        of = [delta[name].T if turned else delta[name] for delta in deltas] if name in matrices else []
        merged = getattr(reference, method)(of) if of else sum(delta[name] for delta in deltas) / len(deltas)
        expected[name] = merged.T if of and turned else merged
    return expected


def check_merge(folder: Path, out: Path, expected: Weights, tolerance: float = 1e-4) -> None:
    base, merged = weights_in(folder / "model0"), weights_in(out)
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        error = (tensor.double() - base[name].double() - expected[name]).norm()
        assert error <= tolerance * expected[name].norm() + 1e-6 * base[name].double().norm(), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", MATRIX_METHODS)
def test_every_tensor_is_what_the_paper_says(tmp_path: Path, method: str, architecture: str) -> None:
    write_models(tmp_path, architecture)
    plan = largemerge.merge(config_of(tmp_path, method), tmp_path / "out").to_json()["plan"]
    deltas = read_deltas(tmp_path, [1, 2, 3])
    matrices = {name for name in deltas[0] if name.endswith(LINEARS)}
    gpt2 = architecture == "gpt2"
    check_merge(tmp_path, tmp_path / "out", expected_of(method, deltas, matrices, turned=gpt2))
    assert set(plan["merged_otherwise"]) == set(deltas[0]) - matrices
    told = json.loads((tmp_path / "out" / "merge_report.json").read_text())["tensors"]
    otherwise = {name for name, tensor in told.items() if "merged_otherwise" in tensor}
    assert otherwise == set(deltas[0]) - matrices
    name = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
    what = {"opcm": "sum of task vectors", "knots": "task arithmetic"}.get(method, "mean of task vectors")
    assert told[name]["merged_otherwise"] == f"{what}: an embedding or output head"
    assert {name for name, tensor in told.items() if "stored_as" in tensor} == (matrices if gpt2 else set())
    notes = "\n".join(plan["notes"])
    assert f"{method}: {what}, not its formula, for" in notes and name in notes
    assert ("transformer.h.*.attn.c_proj.weight" in notes) == gpt2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_ip_merging_adds_to_the_first_model(tmp_path: Path, architecture: str) -> None:
    write_models(tmp_path, architecture, 3)
    options = {"parameters": {"threshold": 0.05, "temperature": 2}}
    plan = largemerge.merge(config_of(tmp_path, "ip_merging", [1, 2], **options), tmp_path / "out").to_json()["plan"]
    deltas = read_deltas(tmp_path, [1, 2])
    matrices = {name for name in deltas[0] if name.endswith(LINEARS)}
    first, merged = weights_in(tmp_path / "model1"), weights_in(tmp_path / "out")
    changed = set()
    for name, tensor in merged.items():
        of = [delta[name].T if architecture == "gpt2" else delta[name] for delta in deltas]
        more = reference.ip_merging(of, **options["parameters"]) if name in matrices else torch.zeros_like(of[0])
        more = more.T if architecture == "gpt2" else more
        changed |= {name} if more.any() else set()
        assert (tensor.double() - first[name].double() - more.reshape(tensor.shape)).norm() <= 1e-4 * more.norm() + 1e-6
    assert changed and changed <= matrices, "the formula has something to say of some matrices"
    assert set(plan["merged_otherwise"]) == set(merged) - matrices
    assert "ip_merging: the first model's own, not its formula, for" in "\n".join(plan["notes"])


OTHERS = {
    "mixtral": {"an embedding or output head": "lm_head.weight", "a vector": "model.norm.weight"},
    "vit": {"4 dimensions": "vit.embeddings.patch_embeddings.projection.weight"},
    "clip": {
        "a projection that the papers leave out": "text_projection.weight",
        "a number": "logit_scale",
        "an embedding or output head": "vision_model.embeddings.position_embedding.weight",
    },
    "t5": {
        "as large as the vocabulary": "shared.weight",
        "an embedding or output head": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    },
}


@pytest.mark.parametrize("architecture", sorted(OTHERS))
def test_what_is_no_linear_is_named(tmp_path: Path, architecture: str) -> None:
    for seed in range(3):
        tiny_models.perturbed(architecture, seed).save_pretrained(tmp_path / f"model{seed}")
    plan = largemerge.plan(config_of(tmp_path, "iso_c", [1, 2])).to_json()
    for reason, name in OTHERS[architecture].items():
        assert plan["merged_otherwise"][name] == reason
    for name in set(weights_in(tmp_path / "model0")) - set(plan["merged_otherwise"]):
        assert len(weights_in(tmp_path / "model0")[name].shape) == 2, name
        assert "embed" not in name


def test_matrices_that_have_no_room_for_all_models_are_named(tmp_path: Path) -> None:
    sizes = tiny_models.LLM | {"num_attention_heads": 16, "num_key_value_heads": 2}  # two rows for keys and values
    for seed in range(4):
        torch.manual_seed(seed)
        tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(tmp_path / f"model{seed}")
    plan = largemerge.plan(config_of(tmp_path, "tsv_m")).to_json()
    small = {name for name, reason in plan["merged_otherwise"].items() if reason == "fewer rows or columns than models"}
    assert small == {f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(3) for kind in "kv"}


def test_the_order_counts_for_opcm(tmp_path: Path) -> None:
    write_models(tmp_path)
    for name, order in (("one", [1, 2, 3]), ("other", [3, 2, 1])):
        largemerge.merge(config_of(tmp_path, "opcm", order), tmp_path / name)
        deltas = read_deltas(tmp_path, order)
        matrices = {name for name in deltas[0] if name.endswith(LINEARS)}
        check_merge(tmp_path, tmp_path / name, reference.opcm(deltas, matrices))
    one, other = weights_in(tmp_path / "one"), weights_in(tmp_path / "other")
    name = "model.layers.1.mlp.up_proj.weight"
    assert (one[name] - other[name]).norm() > 0.1 * (one[name] - weights_in(tmp_path / "model0")[name]).norm()


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_alpha_of_opcm(tmp_path: Path, alpha: float) -> None:
    write_models(tmp_path, count=3)
    largemerge.merge(config_of(tmp_path, "opcm", [1, 2], parameters={"alpha": alpha}), tmp_path / "out")
    deltas = read_deltas(tmp_path, [1, 2])
    matrices = {name for name in deltas[0] if name.endswith(LINEARS)}
    if alpha < 1:
        check_merge(tmp_path, tmp_path / "out", reference.opcm(deltas, matrices, alpha))
        return
    # Everything that the first model spans, rows and columns, is closed for the second one: square ones stay.
    merged, base = weights_in(tmp_path / "out"), weights_in(tmp_path / "model0")
    name = "model.layers.0.self_attn.q_proj.weight"
    change = merged[name].double() - base[name].double()
    cosine = (change * deltas[0][name]).sum() / change.norm() / deltas[0][name].norm()
    assert cosine > 1 - 1e-6


@pytest.mark.parametrize("method", MATRIX_METHODS)
def test_checkpoints_in_16_bits(tmp_path: Path, method: str) -> None:
    write_models(tmp_path, dtype=torch.bfloat16)
    largemerge.merge(config_of(tmp_path, method), tmp_path / "out")
    deltas = read_deltas(tmp_path, [1, 2, 3])
    expected = expected_of(method, deltas, {name for name in deltas[0] if name.endswith(LINEARS)})
    base = weights_in(tmp_path / "model0")
    for name, tensor in weights_in(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        rounded = (base[name].double() + expected[name]).bfloat16()
        different = int((tensor != rounded).sum())
        assert different <= 0.01 * tensor.numel(), "rounded once, at the end"


def large_config(folder: Path, method: str) -> Path:
    """Writes the configuration of a merge of several parts and shards."""
    sizes = tiny_models.LLM | {"num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 256}
    for seed in range(3):
        torch.manual_seed(seed)
        tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(folder / f"model{seed}")
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(config_of(folder, method, [1, 2])))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [8, 14, 20, 26, 32])
def test_opcm_goes_on_after_a_kill_in_either_half(
    tmp_path: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_and_resume(large_config(tmp_path, "opcm"), tmp_path, kill_at, 500_000, monkeypatch)


@pytest.mark.parametrize(
    ("method", "size"), [("opcm", 3), ("iso_cts", 2), pytest.param("knots", 2, marks=pytest.mark.slow)]
)
def test_ranks_share_the_tensors(tmp_path: Path, method: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = large_config(tmp_path, method)
    command = ["merge", path, tmp_path / "out", "--quiet"]
    # They may share a GPU: they tell each other nothing from there.
    processes.run_ranks(command, tmp_path, size, {processes.PART_BYTES: "500000", "CUDA_VISIBLE_DEVICES": "0"})
    monkeypatch.setattr(engine, "PART_BYTES", 500_000)
    alone = largemerge.merge(path, tmp_path / "alone")
    assert processes.lasting(tmp_path / "out") == processes.lasting(tmp_path / "alone"), "bit for bit"
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert len(report["ranks"]) == size and report["bytes_read"] == alone.bytes_read


def test_fewer_workers_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = large_config(tmp_path, "tsv_m")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        plan = largemerge.plan(path, device="cpu")
        one = max(loader.worker_bytes("tsv_m", task, loader.KEPT_BYTES) for task in plan.tasks)
        free = psutil.virtual_memory()._replace(available=int(2.5 * one / 0.9))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        short = largemerge.plan(path, device="cpu")
    finally:
        torch.set_num_threads(threads)
    assert plan.num_workers == 4 and not any("workers" in note for note in plan.notes)
    assert short.num_workers == 2 and any("workers at a time: 2" in note for note in short.notes)


@pytest.mark.parametrize("method", ["ace", "iso_cts", "knots"])
def test_small_matrices_are_read_once_by_formulas_that_want_them_twice(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large_config(tmp_path, method)
    kept = largemerge.merge(path, tmp_path / "kept", device="cpu")
    assert kept.bytes_read == kept.plan.bytes_read
    monkeypatch.setattr(loader, "KEPT_BYTES", 0)
    again = largemerge.merge(path, tmp_path / "again", device="cpu")
    assert again.bytes_read > again.plan.bytes_read
    assert processes.lasting(tmp_path / "kept") == processes.lasting(tmp_path / "again")
