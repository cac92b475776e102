"""Adapters read on top of their models: to the last bit what peft's `merge_and_unload` makes of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from adapters import merged_by_peft, read_all, same, shapes_of, train_with_peft, write_adapter
from cases import weights_in
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from largemerge import LargemergeError
from largemerge.checkpoint import adapter_places
from largemerge.checkpoint.adapter_places import places_by_name
from largemerge.checkpoint.lora import open_model

peft = pytest.importorskip("peft")

LINEARS = {"target_modules": ["q_proj", "down_proj"]}
LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}


def lora(**more: Any) -> Any:
    return peft.LoraConfig(**{**LORA, **more})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], tuple[PreTrainedModel, Path]]:
    made: dict[tuple[str, torch.dtype], tuple[PreTrainedModel, Path]] = {}

    def get(architecture: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Path]:
        if (architecture, dtype) not in made:
            folder = tmp_path_factory.mktemp(architecture)
            model = tiny_models.perturbed(architecture, 0).to(dtype)
            model.save_pretrained(folder)
            made[architecture, dtype] = (model, folder)
        return made[architecture, dtype]

    return get


def parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A model's tensors as they lie on disk: those that are tied once."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            found[name] = tensor
    return found


KINDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("llama", lambda: lora(**LINEARS)),
    "rank and alpha by module": (
        "llama",
        lambda: lora(
            use_rslora=True, rank_pattern={"down_proj": 2}, alpha_pattern={"0.self_attn.q_proj": 3}, **LINEARS
        ),
    ),
    "dora": ("llama", lambda: lora(use_dora=True, **LINEARS)),
    "dora on conv1d": ("gpt2", lambda: lora(use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True)),
    "conv1d, and no word of it": ("gpt2", lambda: lora(target_modules=["c_attn", "mlp.c_proj"])),
    "embeddings and head": ("llama", lambda: lora(target_modules=["embed_tokens", "lm_head"])),
    "dora on embeddings": ("llama", lambda: lora(use_dora=True, target_modules=["embed_tokens"])),
    "all biases": ("bert", lambda: lora(bias="all", target_modules=["query"])),
    "biases of its own": ("bert", lambda: lora(lora_bias=True, target_modules=["query", "value"])),
    "modules to save": ("llama", lambda: lora(modules_to_save=["lm_head", "mlp.gate_proj"], **LINEARS)),
    "token indices": ("llama", lambda: lora(trainable_token_indices=[3, 7, 60], **LINEARS)),
    "convolution": ("vit", lambda: lora(use_dora=True, target_modules=["projection"], modules_to_save=["classifier"])),
    "pissa": ("llama", lambda: lora(**LINEARS | {"init_lora_weights": "pissa"})),
    "mica": ("llama", lambda: lora(**LINEARS | {"init_lora_weights": "mica"})),
    "ia3": (
        "bert",
        lambda: peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "loha": ("llama", lambda: peft.LoHaConfig(r=4, **LINEARS)),
    "lokr": ("llama", lambda: peft.LoKrConfig(r=2, decompose_both=True, rank_pattern={"down_proj": 3}, **LINEARS)),
    "oft": ("bert", lambda: peft.OFTConfig(oft_block_size=4, target_modules=["query"], bias="oft_only")),
    "boft": ("llama", lambda: peft.BOFTConfig(boft_block_size=4, **LINEARS)),
    "vera": ("llama", lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "down_proj", "gate_proj"])),
    "vera, projections made anew": ("llama", lambda: peft.VeraConfig(r=8, save_projection=False, **LINEARS)),
    "adalora": ("gpt2", lambda: peft.AdaLoraConfig(total_step=9, target_modules=["c_attn"])),
    "hra": ("llama", lambda: peft.HRAConfig(r=4, **LINEARS)),
    "layer norms": ("llama", lambda: peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "fourier": ("llama", lambda: peft.FourierFTConfig(n_frequency=50, **LINEARS)),
    "vblora": ("llama", lambda: peft.VBLoRAConfig(r=4, num_vectors=20, vector_length=8, topk=2, **LINEARS)),
    "vblora, few weights": (
        "llama",
        lambda: peft.VBLoRAConfig(r=4, num_vectors=20, vector_length=8, topk=2, save_only_topk_weights=True, **LINEARS),
    ),
    "tokens": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"])),
}
ROUNDED = (
    "lora",
    "dora",
    "embeddings and head",
    "all biases",
    "modules to save",
    "token indices",
    "mica",
    "ia3",
    "oft",
)


CASES = [(kind, torch.float32) for kind in KINDS] + [(kind, torch.bfloat16) for kind in ROUNDED]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_every_kind_is_what_peft_merges(tmp_path: Path, models: Any, kind: str, dtype: torch.dtype) -> None:
    architecture, config = KINDS[kind]
    model, folder = models(architecture, dtype)
    train_with_peft(model, config(), tmp_path / "adapter")
    found, _, adapter = read_all(f"{folder}+{tmp_path / 'adapter'}")
    merged_by_peft(model, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    assert same(found, weights_in(tmp_path / "merged")) == []
    assert same(found, weights_in(folder)) and adapter.num_bytes + len(adapter.replaced) > 0, "it must show"


FAN_IN: dict[str, tuple[str, Callable[[], Any]]] = {
    **{
        kind: KINDS[kind] for kind in ("lora", "dora", "embeddings and head", "pissa", "oft", "boft", "vera", "fourier")
    },
    **{kind: KINDS[kind] for kind in ("vblora", "ia3", "dora on conv1d", "conv1d, and no word of it", "adalora")},
    "ia3 on conv1d": ("gpt2", lambda: peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[])),
    "vera on conv1d": ("gpt2", lambda: peft.VeraConfig(r=8, target_modules=["c_attn", "mlp.c_proj"])),
    "fourier on conv1d": ("gpt2", lambda: peft.FourierFTConfig(n_frequency=50, target_modules=["c_attn"])),
    "pissa on conv1d": ("gpt2", lambda: lora(target_modules=["c_attn"], init_lora_weights="pissa")),
}


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("kind", FAN_IN)
def test_modules_say_whether_weights_are_transposed_whatever_the_config_says(
    tmp_path: Path, models: Any, kind: str, value: bool
) -> None:
    architecture, config = FAN_IN[kind]
    model, folder = models(architecture)
    train_with_peft(model, config(), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", fan_in_fan_out=value)
    found, _, adapter = read_all(f"{folder}+{tmp_path / 'adapter'}")
    merged_by_peft(model, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    assert same(found, weights_in(tmp_path / "merged")) == []
    told = any("says fan_in_fan_out, but the model's linears are [out, in]" in note for note in adapter.notes)
    assert told == (value and architecture != "gpt2")


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_the_config_says_whether_weights_are_transposed_where_no_class_is_known(
    tmp_path: Path, models: Any, kind: str
) -> None:
    """Square weights show no difference in their shapes."""
    model, folder = models("gpt2")
    settings = {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}
    config = lora(**settings) if kind == "lora" else peft.IA3Config(feedforward_modules=[], **settings)
    train_with_peft(model, config, tmp_path / "adapter")
    found, _, _ = read_all(f"{folder}+{tmp_path / 'adapter'}", places_by_name)
    merged_by_peft(model, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    assert same(found, weights_in(tmp_path / "merged")) == []
    train_with_peft(model, lora(target_modules=["c_attn"]), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", fan_in_fan_out=False)
    with pytest.raises(LargemergeError, match=r"c_attn\.weight is \[16, 48\]; A \[4, 16\] and B \[48, 4\] do not fit"):
        read_all(f"{folder}+{tmp_path / 'adapter'}", places_by_name)


def rewrite(adapter: Path, **more: Any) -> None:
    """Changes an adapter's config as a person would by hand."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "lora on the head": ({"target_modules": ["q_proj", "lm_head"]}, True),
    "dora on the head": ({"target_modules": ["lm_head"], "use_dora": True}, True),
    "lora on the embeddings": ({"target_modules": ["embed_tokens"]}, True),
    "lora on both": ({"target_modules": ["lm_head", "embed_tokens"]}, True),
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "both saved, tied": ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, True),
    "head saved": ({"modules_to_save": ["lm_head"]}, False),
    "embeddings saved": ({"modules_to_save": ["embed_tokens"]}, False),
    "embeddings saved, lora on the head": ({"modules_to_save": ["embed_tokens"], "target_modules": ["lm_head"]}, False),
    "head saved, lora on the embeddings": ({"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens"]}, False),
    "tokens": ({"trainable_token_indices": [3, 5]}, True),
}


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("case", TIED)
def test_embeddings_and_head_of_a_tied_model(tmp_path: Path, models: Any, case: str, by_class: bool) -> None:
    settings, stays_tied = TIED[case]
    model, folder = models("llama_tied")
    train_with_peft(model, lora(**{"target_modules": ["q_proj"], **settings}), tmp_path / "adapter")
    found, checkpoint, adapter = read_all(f"{folder}+{tmp_path / 'adapter'}", None if by_class else places_by_name)
    merged = merged_by_peft(model, tmp_path / "adapter")
    assert merged.config.tie_word_embeddings == checkpoint.config["tie_word_embeddings"] == stays_tied
    assert same(found, parameters(merged)) == []
    told = any("which is tied to model.embed_tokens.weight: both change" in note for note in adapter.notes)
    assert told == ("lm_head" in settings.get("target_modules", ()))


def test_head_and_embeddings_that_no_model_of_the_kind_has_as_two_tensors(tmp_path: Path, models: Any) -> None:
    model, folder = models("t5")
    train_with_peft(model, lora(target_modules=["q"], modules_to_save=["lm_head"]), tmp_path / "adapter")
    with pytest.raises(
        LargemergeError, match=r"trains lm_head\.weight on its own, which is one tensor with shared\.weight"
    ):
        read_all(f"{folder}+{tmp_path / 'adapter'}")


def test_adapters_on_adapters(tmp_path: Path, models: Any) -> None:
    model, folder = models("llama_tied")
    configs = [
        lora(target_modules=["q_proj", "lm_head"]),
        lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        peft.LoHaConfig(r=4, target_modules=["q_proj", "lm_head"]),
    ]
    folders = [tmp_path / "a+b", tmp_path / "second", tmp_path / "third"]
    below = model
    for config, adapter in zip(configs, folders, strict=True):
        train_with_peft(below, config, adapter)
        below = merged_by_peft(below, adapter)
    found, checkpoint, adapter = read_all("+".join(map(str, [folder, *folders])))
    assert same(found, parameters(below)) == [] and adapter.folders == tuple(folders)
    assert {"adapter/adapter_config.json", "adapter 3/adapter_model.safetensors"} <= checkpoint.fingerprint.keys()


def test_names_as_older_versions_and_deepspeed_leave_them(tmp_path: Path, models: Any) -> None:
    model, folder = models("llama")
    train_with_peft(model, lora(use_dora=True, modules_to_save=["lm_head"], **LINEARS), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            name = name.replace(f"{part}.weight", f"{part}.default.weight")
        if "lm_head" in name:
            renamed["base_model.model.lm_head.original_module.weight"] = torch.zeros_like(tensor)
            name = name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")
        renamed[name.replace("vector", "vector.default") if name.endswith("vector") else name] = tensor
    assert renamed.keys() - tensors.keys()
    save_file(renamed, tmp_path / "adapter" / "adapter_model.safetensors")
    found, _, _ = read_all(f"{folder}+{tmp_path / 'adapter'}")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    assert same(found, parameters(merged_by_peft(model, tmp_path / "adapter"))) == []


def test_resized_embeddings(tmp_path: Path, models: Any) -> None:
    _, folder = models("llama")
    grown = tiny_models.perturbed("llama", 0)
    grown.resize_token_embeddings(70, mean_resizing=False)
    for index, more in enumerate(
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens"]})
    ):
        grown.config._name_or_path = str(folder)
        adapter = tmp_path / f"adapter{index}"
        train_with_peft(grown, lora(**{"target_modules": ["q_proj"], **more}), adapter)
        found, checkpoint, _ = read_all(f"{folder}+{adapter}")
        merged = parameters(merged_by_peft(grown, adapter))
        if index == 1:
            merged["lm_head.weight"] = found["lm_head.weight"]  # the adapter holds the resized embeddings alone
        assert same(found, merged) == [] and checkpoint.config["vocab_size"] == 70


def test_whole_tensors_come_in_the_dtype_of_the_model(tmp_path: Path, models: Any) -> None:
    _, folder = models("llama", torch.bfloat16)
    head = torch.randn(weights_in(folder)["lm_head.weight"].shape)
    write_adapter(
        tmp_path / "adapter", shapes_of(folder, "model.layers.0.self_attn.q_proj"), whole={"lm_head.weight": head}
    )
    found, checkpoint, _ = read_all(f"{folder}+{tmp_path / 'adapter'}")
    assert torch.equal(found["lm_head.weight"], head.to(torch.bfloat16))
    assert checkpoint.tensors["lm_head.weight"].num_bytes == 4 * head.numel(), "as many are read"


def problems(folder: Path, adapter: Path) -> str:
    with pytest.raises(LargemergeError) as error:
        read_all(f"{folder}+{adapter}")
    return str(error.value)


def test_a_head_that_the_base_lacks_is_named(tmp_path: Path, models: Any) -> None:
    _, folder = models("llama")
    shapes = shapes_of(folder, "model.layers.0.self_attn.q_proj")
    more = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    write_adapter(tmp_path / "adapter", shapes, whole={"score.weight": torch.ones(1, 16)}, **more)
    told = problems(folder, tmp_path / "adapter")
    assert "the adapter brings score.weight [1, 16] of its own (task_type SEQ_CLS), which" in told
    assert "merge_and_unload" in told and "1 problem" not in told


def test_what_does_not_fit(tmp_path: Path, models: Any) -> None:
    model, folder = models("llama")
    train_with_peft(model, peft.LoHaConfig(r=4, **LINEARS), tmp_path / "loha")
    file = tmp_path / "loha" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file(tensors | {first: torch.ones(3, 5)}, file)
    assert "peft does not merge this adapter" in problems(folder, tmp_path / "loha")
    save_file({key: value for key, value in tensors.items() if key != first}, file)
    assert f"{first} is missing" in problems(folder, tmp_path / "loha")
    save_file(tensors | {f"{first}_odd": torch.ones(2)}, file)
    assert f"peft knows no {first}_odd" in problems(folder, tmp_path / "loha")
    save_file({}, file)
    assert "holds no tensors" in problems(folder, tmp_path / "loha")
    config = {"trainable_token_indices": [3, 64]}
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}
    write_adapter(tmp_path / "tokens", {}, whole=rows, **config)
    assert "trainable_token_indices names token 64" in problems(folder, tmp_path / "tokens")


def test_without_peft_lora_is_merged_and_other_kinds_name_the_extra(
    tmp_path: Path, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = models("llama")
    train_with_peft(model, lora(use_dora=True, **LINEARS), tmp_path / "lora")
    train_with_peft(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), tmp_path / "ia3")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    found, _, _ = read_all(f"{folder}+{tmp_path / 'lora'}")
    assert same(found, parameters(merged_by_peft(model, tmp_path / "lora"))) == []
    assert "peft_type is 'IA3'" in problems(folder, tmp_path / "ia3")
    assert "pip install 'largemerge[peft]'" in problems(folder, tmp_path / "ia3")


def test_a_setting_that_is_not_known_is_told(tmp_path: Path, models: Any) -> None:
    _, folder = models("llama")
    write_adapter(tmp_path / "adapter", shapes_of(folder, "model.layers.0.self_attn.q_proj"), new_trick=True)
    _, _, adapter = read_all(f"{folder}+{tmp_path / 'adapter'}")
    assert adapter.notes == ("adapter: adapter_config.json has new_trick, which is ignored",)


def test_an_adapter_alone(tmp_path: Path, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = models("llama")
    train_with_peft(model, lora(**LINEARS), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for base in (str(folder), folder.name):
        (tmp_path / "adapter" / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": base})
        )
        monkeypatch.chdir(folder.parent)
        found, _, _ = read_all(str(tmp_path / "adapter"))
        assert same(found, parameters(merged_by_peft(model, tmp_path / "adapter"))) == []
    monkeypatch.chdir("/")
    with pytest.raises(LargemergeError) as error:
        open_model(str(tmp_path / "adapter"))
    assert f"its base_model_name_or_path is {folder.name!r}, which is neither here nor on the Hub" in str(error.value)
    assert f"path/to/model+{tmp_path / 'adapter'}" in str(error.value)


def test_many_small_tensors_are_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, made = 1000, {}
    weights = {f"model.layers.{index}.mlp.up_proj.weight": torch.ones(2, 2) for index in range(count)}
    (tmp_path / "model").mkdir()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    write_adapter(tmp_path / "adapter", {f"layers.{index}.mlp.up_proj": (2, 2) for index in range(count)}, rank=1)
    index_suffixes = adapter_places.index_suffixes

    def counting(names: Mapping[str, Any]) -> dict[str, str | None]:
        made["times"] = made.get("times", 0) + 1
        return index_suffixes(names)

    monkeypatch.setattr(adapter_places, "index_suffixes", counting)
    _, adapter = open_model(f"{tmp_path / 'model'}+{tmp_path / 'adapter'}")
    assert adapter is not None and len(adapter.deltas) == count and made["times"] == 1
    assert adapter.notes == ("adapter is matched by the names on disk: the model's class is not known",)


def test_names_on_disk_are_matched_whole() -> None:
    find = adapter_places.find_by_suffix
    names = ("transformer.h.0.attn.weight", "h.1.attn.weight", "a.norm.weight", "b.norm.weight")
    index = adapter_places.index_suffixes(dict.fromkeys(names))
    assert find("h.0.attn.weight", index) == names[0] and find("transformer.h.1.attn.weight", index) == names[1]
    assert find("norm.weight", index) is None, "two end so"
    assert find("x.1.attn.weight", index) is None, "another tensor's tail is not the tensor"
