"""Configurations as people put them into model cards are planned as they are, with a warning for what does nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from adapters import shapes_of, write_adapter
from cases import weights_in
from tokenized import CODE, ENGLISH, train, write_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import largemerge
from largemerge import LargemergeError
from largemerge.cli import main
from largemerge.data_free.plan import DataFreePlan

NAMES = ("Mistral-7B-v0.1", "OpenHermes-2.5", "zephyr-7b-beta", "dolphin-2.6")
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes four models of four layers, two with tokenizers of their own, and an adapter, under names of the Hub."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    config = LlamaConfig(**tiny_models.LLM | {"num_hidden_layers": NUM_LAYERS})
    first = LlamaForCausalLM(config).state_dict()
    for seed, name in enumerate(NAMES):
        model = LlamaForCausalLM(config)
        noise = torch.Generator().manual_seed(seed)
        model.load_state_dict({key: t + 0.1 * torch.randn(t.shape, generator=noise) for key, t in first.items()})
        model.to(torch.bfloat16).save_pretrained(folder / "owner" / name)
        words = train("WordPiece", ENGLISH, tiny_models.VOCAB_SIZE - 4)
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder / "owner" / name)
    write_model(folder / "owner" / "chat", 1, train("BPE", ENGLISH))
    write_model(folder / "owner" / "code", 2, train("BPE", CODE, 320))
    write_adapter(folder / "owner" / "lora", shapes_of(folder / "owner" / NAMES[0], "model.layers.0.self_attn.q_proj"))
    return folder


CARDS: dict[str, tuple[str, list[str]]] = {
    "slerp of layers": (
        """
slices:
  - sources:
      - model: owner/Mistral-7B-v0.1
        layer_range: [0, 4]
      - model: owner/OpenHermes-2.5
        layer_range: [0, 4]
merge_method: slerp
base_model: owner/Mistral-7B-v0.1
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
        [],
    ),
    "slerp with what earlier versions knew": (
        """
models:
  - model: owner/OpenHermes-2.5
  - model: owner/zephyr-7b-beta
merge_method: slerp
base_model: owner/OpenHermes-2.5
parameters:
  t: [0, 0.5, 1, 0.5, 0]
  embed_slerp: true
  int8_mask: true
  normalize: true
dtype: bfloat16
""",
        ["slerp has no embed_slerp", "slerp has no int8_mask", "slerp has no normalize"],
    ),
    "ties with switches at the top": (
        """
models:
  - model: owner/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: owner/OpenHermes-2.5
    parameters:
      density: 0.5
      weight: 0.5
  - model: owner/zephyr-7b-beta
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: owner/Mistral-7B-v0.1
normalize: false
int8_mask: true
dtype: float16
""",
        ["normalize: does nothing here, as in mergekit; it belongs under 'parameters'", "int8_mask: does nothing here"],
    ),
    "ties with gradients": (
        """
models:
  - model: owner/OpenHermes-2.5
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: owner/zephyr-7b-beta
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: owner/Mistral-7B-v0.1
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
        [],
    ),
    "base with weight and density": (
        """
base_model: owner/Mistral-7B-v0.1
models:
  - model: owner/Mistral-7B-v0.1
    parameters: {weight: 1, density: 1}
  - model: owner/OpenHermes-2.5
    parameters: {weight: 1, density: 1}
merge_method: ties
parameters: {weight: 1, density: 1, normalize: true, int8_mask: true}
tokenizer_source: owner/Mistral-7B-v0.1
dtype: bfloat16
""",
        [
            "models[0].parameters.weight, models[0].parameters.density: does nothing: this model is the base",
        ],
    ),
    "dare_ties": (
        """
models:
  - model: owner/Mistral-7B-v0.1
  - model: owner/OpenHermes-2.5
    parameters: {density: 0.53, weight: 0.4}
  - model: owner/zephyr-7b-beta
    parameters: {density: 0.53, weight: 0.3}
  - model: owner/dolphin-2.6
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: owner/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
random_seed: 0
""",
        ["random_seed: does nothing in a file"],
    ),
    "dare_linear with numbers in quotes": (
        """
merge_method: dare_linear
base_model: owner/Mistral-7B-v0.1
models:
  - model: owner/OpenHermes-2.5
    parameters: {density: "0.5", weight: "0.5"}
  - model: owner/zephyr-7b-beta
    parameters: {density: '0.66', weight: '5e-1'}
parameters: {normalize: "false", lambda: "1"}
dtype: "torch.bfloat16"
""",
        [],
    ),
    "linear": (
        """
models:
  - model: owner/OpenHermes-2.5
    parameters:
      weight: 1.0
  - model: owner/zephyr-7b-beta
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
""",
        [],
    ),
    "linear of 0 and 1 by layers": (
        """
merge_method: linear
parameters:
  weight: 1.0
slices:
  - sources:
      - {model: owner/Mistral-7B-v0.1, layer_range: [0, 1], parameters: {weight: 0}}
      - {model: owner/dolphin-2.6, layer_range: [0, 1]}
  - sources:
      - {model: owner/OpenHermes-2.5, layer_range: ["1", "4"]}
dtype: bf16
tokenizer_source: model:owner/Mistral-7B-v0.1
""",
        [],
    ),
    "model_stock with weights": (
        """
models:
  - model: owner/OpenHermes-2.5
    parameters: {weight: 1.0}
  - model: owner/zephyr-7b-beta
    parameters: {weight: 1.0}
  - model: owner/dolphin-2.6
    parameters: {weight: 1.0, density: 0.5}
merge_method: model_stock
base_model: owner/Mistral-7B-v0.1
parameters: {filter_wise: false, normalize: false, int8_mask: true}
dtype: bfloat16
""",
        [
            "model_stock has no weight",
            "model_stock has no density",
            "model_stock has no normalize",
            "model_stock has no int8_mask",
        ],
    ),
    "model_stock": (
        """
models:
  - model: owner/OpenHermes-2.5
  - model: owner/zephyr-7b-beta
base_model: owner/Mistral-7B-v0.1
merge_method: model_stock
""",
        [],
    ),
    "passthrough": (
        """
slices:
- sources:
  - model: owner/Mistral-7B-v0.1
    layer_range: [0, 3]
- sources:
  - model: owner/OpenHermes-2.5
    layer_range: [1, 4]
merge_method: passthrough
dtype: float16
""",
        [],
    ),
    "passthrough of one with scales": (
        """
slices:
  - sources:
      - model: owner/Mistral-7B-v0.1
        layer_range: [0, 4]
  - sources:
      - model: owner/Mistral-7B-v0.1
        layer_range: [2, 3]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.0
            - value: 1.0
merge_method: passthrough
dtype: bfloat16
""",
        [],
    ),
    "passthrough of an adapter": (
        """
base_model: owner/Mistral-7B-v0.1+owner/lora
dtype: bfloat16
merge_method: passthrough
models:
  - model: owner/Mistral-7B-v0.1+owner/lora
""",
        [],
    ),
    "anchors": (
        """
defaults: &defaults
  weight: 0.5
  density: 0.5
x-notes: tried with 0.3, too
base_model: &base owner/Mistral-7B-v0.1
models:
  - model: owner/OpenHermes-2.5
    parameters: *defaults
  - model: owner/zephyr-7b-beta
    parameters: {<<: *defaults, weight: 0.3}
merge_method: ties
tokenizer: {source: *base}
""",
        [],
    ),
    "lists of anchors": (
        """
anchors:
  - &half {weight: 0.5}
  - &switches {normalize: true}
merge_method: linear
models:
  - {model: owner/OpenHermes-2.5, parameters: *half}
  - {model: owner/zephyr-7b-beta, parameters: *half}
parameters: *switches
""",
        [],
    ),
    "revision beside model": (
        """
merge_method: linear
models:
  - model: owner/OpenHermes-2.5
    revision: main
    parameters: {weight: 0.5}
  - model: owner/zephyr-7b-beta
    parameters: {weight: 0.5}
""",
        ["models[0].revision: taken as part of 'model'", "OpenHermes-2.5@main: the revision does nothing: this is a"],
    ),
    "references as mappings": (
        """
merge_method: task_arithmetic
base_model:
  model: {path: owner/Mistral-7B-v0.1}
  override_architecture: MistralForCausalLM
models:
  - model:
      model: {path: owner/OpenHermes-2.5}
    parameters: {weight: 0.3}
  - model:
      model: owner/Mistral-7B-v0.1
      lora: {path: owner/lora}
    parameters: {weight: 0.7}
parameters: {lambda: 1.2}
""",
        ["base_model.override_architecture: does nothing"],
    ),
    "an adapter beside its model": (
        """
merge_method: linear
models:
  - {model: owner/Mistral-7B-v0.1, lora: owner/lora, parameters: {weight: 1}}
  - {model: owner/dolphin-2.6, parameters: {weight: 1}}
""",
        ["models[0].lora: taken as part of 'model'"],
    ),
    "della": (
        """
models:
  - model: owner/OpenHermes-2.5
    parameters: {weight: 0.4, density: 0.5, epsilon: 0.1}
  - model: owner/zephyr-7b-beta
    parameters: {weight: [0.1, 0.5], density: 0.6}
merge_method: della
base_model: owner/Mistral-7B-v0.1
parameters: {epsilon: 0.05, lambda: 1.0, normalize: true, int8_mask: true}
dtype: bfloat16
""",
        [],
    ),
    "della_linear with another's gamma": (
        """
merge_method: della_linear
base_model: owner/Mistral-7B-v0.1
models:
  - model: owner/OpenHermes-2.5
    parameters: {weight: 0.4, density: 0.5, gamma: 0.01}
  - model: owner/zephyr-7b-beta
    parameters: {weight: 0.4, density: 0.5}
""",
        ["models[0].parameters.gamma: does nothing: della_linear has no gamma"],
    ),
    "breadcrumbs": (
        """
merge_method: breadcrumbs
base_model: owner/Mistral-7B-v0.1
models:
  - model: owner/OpenHermes-2.5
    parameters: {weight: 0.5, density: 0.9, gamma: 0.01}
  - model: owner/zephyr-7b-beta
    parameters: {weight: 0.5, density: 0.9, gamma: "0.02"}
out_dtype: bfloat16
dtype: float32
""",
        [],
    ),
    "breadcrumbs_ties, gamma for all": (
        """
merge_method: breadcrumbs_ties
base_model: owner/Mistral-7B-v0.1
models:
  - model: owner/OpenHermes-2.5
  - model: owner/zephyr-7b-beta
parameters: {weight: 0.5, density: 0.9, gamma: 0.01, rescale: yes}
""",
        [],
    ),
    "sce": (
        """
merge_method: sce
models:
  - model: owner/OpenHermes-2.5
  - model: owner/zephyr-7b-beta
base_model: owner/Mistral-7B-v0.1
tokenizer:
  source: owner/Mistral-7B-v0.1
dtype: bfloat16
parameters:
  select_topk: 0.1
  normalize: true
  weight: 1.0
""",
        ["sce has no normalize", "sce has no weight"],
    ),
    "arcee_fusion": (
        """
models:
  - model: owner/Mistral-7B-v0.1
    parameters: {weight: 0.5}
  - model: owner/OpenHermes-2.5
    parameters: {weight: 0.5}
merge_method: arcee_fusion
base_model: owner/Mistral-7B-v0.1
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
""",
        ["arcee_fusion has no weight", "arcee_fusion has no normalize", "arcee_fusion has no int8_mask"],
    ),
    "karcher": (
        """
merge_method: karcher
models:
  - model: owner/OpenHermes-2.5
    parameters: {weight: 0.5}
  - model: owner/zephyr-7b-beta
parameters: {max_iter: 20, tol: 1e-6}
dtype: bfloat16
""",
        ["karcher has no weight"],
    ),
    "nearswap": (
        """
slices:
  - sources:
      - {model: owner/Mistral-7B-v0.1, layer_range: [0, 4]}
      - {model: owner/OpenHermes-2.5, layer_range: [0, 4], parameters: {weight: 1}}
merge_method: nearswap
base_model: owner/Mistral-7B-v0.1
parameters:
  t:
    - value: 0.0001
""",
        ["nearswap has no weight"],
    ),
    "nuslerp": (
        """
models:
  - {model: owner/OpenHermes-2.5, parameters: {weight: 0.5}}
  - {model: owner/zephyr-7b-beta, parameters: {weight: [0, 0.5, 0]}}
merge_method: nuslerp
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true, normalize: true}
dtype: float32
""",
        ["nuslerp has no normalize"],
    ),
    "multislerp of task vectors": (
        """
merge_method: multislerp
base_model: owner/Mistral-7B-v0.1
models:
  - {model: owner/OpenHermes-2.5, parameters: {weight: 0.5}}
  - {model: owner/zephyr-7b-beta, parameters: {weight: 0.3}}
  - {model: owner/dolphin-2.6, parameters: {weight: 0.2, density: 0.5}}
parameters: {normalize_weights: false, eps: 1.0e-9}
""",
        ["multislerp has no density"],
    ),
    "ram": (
        """
merge_method: ram
base_model: owner/Mistral-7B-v0.1
models:
  - model: owner/OpenHermes-2.5
    parameters: {weight: 1}
  - model: owner/zephyr-7b-beta
parameters: {epsilon: 1e-5}
""",
        ["ram has no weight"],
    ),
    "ramplus_tl": (
        """
merge_method: ramplus_tl
base_model: owner/Mistral-7B-v0.1
models:
  - model: owner/OpenHermes-2.5
  - model: owner/zephyr-7b-beta
parameters: {r: 0.2, alpha: 0.3}
""",
        [],
    ),
    "a union of vocabularies": (
        """
merge_method: linear
models:
  - {model: owner/chat, parameters: {weight: 0.5}}
  - {model: owner/code, parameters: {weight: 0.5}}
tokenizer_source: union
dtype: float32
""",
        [],
    ),
    "tokens and templates": (
        """
merge_method: ties
base_model: owner/chat
models:
  - {model: owner/code, parameters: {weight: 0.5, density: 0.5}}
tokenizer:
  source: union
  pad_to_multiple_of: "8"
  tokens:
    <|im_start|>: {source: {kind: zero}}
    <|im_end|>:
      source: {kind: model_token, model: owner/code, token: "</s>"}
      force: "true"
    <|pad|>:
chat_template: chatml
""",
        [],
    ),
    "options of the command line": (
        """
merge_method: linear
models:
  - {model: owner/OpenHermes-2.5, parameters: {weight: 0.5}}
  - {model: owner/zephyr-7b-beta, parameters: {weight: 0.5}}
allow_crimes: true
trust_remote_code: "false"
copy_tokenizer: true
lazy-unpickle: true
out_shard_size: 1B
cuda: true
low_cpu_memory: true
""",
        [
            "copy_tokenizer: does nothing in a file",
            "lazy-unpickle: does nothing in a file",
            "out_shard_size: does nothing in a file: it is an option of mergekit's command line; instead: "
            "--max-shard-size",
            "cuda: does nothing in a file",
            "low_cpu_memory: does nothing in a file",
        ],
    ),
    "words in other places": (
        """
merge_method: passthrough
slices:
  - sources:
      - {model: owner/Mistral-7B-v0.1, layer_range: [0, 4], dtype: float16, density: 0.5}
    residual_weight: 0.5
    merge_method: linear
""",
        [
            "slices[0].residual_weight: does nothing here, as in mergekit",
            "slices[0].merge_method: does nothing here, as in mergekit",
            "slices[0].sources[0].dtype: does nothing here, as in mergekit",
            "slices[0].sources[0].density: does nothing here, as in mergekit; it belongs under 'parameters'",
        ],
    ),
    "switches under a model": (
        """
merge_method: linear
models:
  - {model: owner/OpenHermes-2.5, layer_range: [0, 4], parameters: {weight: 0.5, normalize: false}}
  - {model: owner/zephyr-7b-beta, parameters: {weight: 0.5}}
""",
        [
            "models[0].layer_range: does nothing here",
            "models[0].parameters.normalize: does nothing here: normalize is one for all models",
        ],
    ),
    "the canonical form": (
        """
base_model: owner/Mistral-7B-v0.1
dtype: bfloat16
merge_method: ties
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 4]
        model: owner/OpenHermes-2.5
        parameters: {density: 0.5, weight: 0.5}
      - layer_range: [0, 4]
        model: owner/Mistral-7B-v0.1
parameters:
  int8_mask: 1.0
  normalize: 0.0
""",
        [],
    ),
    "bases of slices": (
        """
merge_method: slerp
slices:
  - base_model: owner/Mistral-7B-v0.1
    parameters: {t: 0.3}
    sources:
      - {model: owner/Mistral-7B-v0.1, layer_range: [0, 2]}
      - {model: owner/OpenHermes-2.5, layer_range: [0, 2]}
  - base_model: owner/zephyr-7b-beta
    parameters: {t: 0.7}
    sources:
      - {model: owner/zephyr-7b-beta, layer_range: [2, 4]}
      - {model: owner/OpenHermes-2.5, layer_range: [2, 4]}
""",
        [],
    ),
    "bases that slices do not have": (
        """
merge_method: multislerp
base_model: owner/Mistral-7B-v0.1
slices:
  - sources:
      - {model: owner/zephyr-7b-beta, layer_range: [0, 4], parameters: {weight: 0.5}}
      - {model: owner/OpenHermes-2.5, layer_range: [0, 4], parameters: {weight: 0.5}}
""",
        ["the base, does nothing here: it is not among them"],
    ),
    "switches by layers": (
        """
merge_method: task_arithmetic
base_model: owner/Mistral-7B-v0.1
models:
  - {model: owner/OpenHermes-2.5, parameters: {weight: -0.5}}
parameters:
  normalize: [true, false]
  rescale: [{filter: mlp, value: "true"}, {value: 0}]
""",
        ["weight: -0.5 add up to less than 0, and 'normalize' divides by it, as in mergekit"],
    ),
}


@pytest.mark.parametrize("card", CARDS)
def test_cards_are_planned_as_they_are(hub: Path, card: str) -> None:
    text, warnings = CARDS[card]
    path = hub / "card.yaml"
    path.write_text(text)
    plan = largemerge.plan(path, probe=False)
    assert not plan.problems
    told = [note for note in plan.notes if note.startswith("warning: ")]
    assert len(told) == len(warnings), told
    for warning in warnings:
        assert sum(warning in note for note in told) == 1, (warning, told)
    if warnings:
        assert len(largemerge.plan(path, probe=False, strict=True).problems) == len(warnings)


def planned(hub: Path, text: str) -> DataFreePlan:
    """Plans a card; what it holds is data-free."""
    (hub / "card.yaml").write_text(text)
    plan = largemerge.plan(hub / "card.yaml", probe=False)
    assert isinstance(plan, DataFreePlan) and not plan.problems
    return plan


def parameters_of(hub: Path, text: str) -> list[tuple[str, object, object]]:
    return [(task.name, dict(task.per_model), dict(task.shared)) for task in planned(hub, text).tasks]


@pytest.mark.parametrize(
    ("card", "plain"),
    [
        ("anchors", [({"weight": 0.5, "density": 0.5}), ({"weight": 0.3, "density": 0.5})]),
        ("dare_linear with numbers in quotes", [({"weight": 0.5, "density": 0.5}), ({"weight": 0.5, "density": 0.66})]),
        ("breadcrumbs_ties, gamma for all", [{"weight": 0.5, "density": 0.9, "gamma": 0.01}] * 2),
    ],
)
def test_values_are_those_of_the_plain_file(hub: Path, card: str, plain: list[dict[str, float]]) -> None:
    raw = yaml.safe_load(CARDS[card][0])
    raw["models"] = [
        {"model": entry["model"], "parameters": values} for entry, values in zip(raw["models"], plain, strict=True)
    ]
    raw.pop("defaults", None)
    switches = {"normalize": False, "lambda": 1.0} if card.startswith("dare") else {}
    raw["parameters"] = switches | ({"rescale": True} if card.startswith("breadcrumbs") else {})
    assert parameters_of(hub, CARDS[card][0]) == parameters_of(hub, yaml.safe_dump(raw))


def test_truth_values_by_layers_are_gradients(hub: Path) -> None:
    found = {name: shared for name, _, shared in parameters_of(hub, CARDS["switches by layers"][0])}
    by_layer = [found[f"model.layers.{number}.mlp.up_proj.weight"] for number in range(NUM_LAYERS)]
    assert [shared["normalize"] for shared in by_layer] == [True, True, True, False], "0 at the last layer alone"
    assert all(shared["rescale"] is True for shared in by_layer)
    assert found["model.norm.weight"]["rescale"] is False


def test_an_adapter_beside_its_model_is_the_adapter(hub: Path, tmp_path: Path) -> None:
    beside = CARDS["an adapter beside its model"][0]
    assert "lora: owner/lora" in beside
    within = beside.replace("owner/Mistral-7B-v0.1, lora: owner/lora", "owner/Mistral-7B-v0.1+owner/lora")
    found = []
    for number, text in enumerate((beside, within)):
        (hub / "card.yaml").write_text(text)
        largemerge.merge(hub / "card.yaml", tmp_path / str(number))
        found.append(weights_in(tmp_path / str(number)))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
    query = "model.layers.0.self_attn.q_proj.weight"
    plain = [weights_in(hub / "owner" / name)[query].double() for name in (NAMES[0], NAMES[3])]
    assert (found[0][query].double() - sum(plain) / 2).norm() > 0.1, "the adapter is in it"


def test_filters_that_fit_nothing_are_told(hub: Path) -> None:
    text = CARDS["slerp of layers"][0].replace("filter: mlp", "filter: mpl")
    assert "parameters.t[1]: the filter 'mpl' is part of no tensor's name" in planned(hub, text).notes


def test_warnings_are_shown_and_are_errors_when_strict(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hub / "card.yaml"
    path.write_text(CARDS["model_stock with weights"][0])
    for arguments in (["plan", path, "--no-probe", "--strict"], ["merge", path, tmp_path / "out", "--strict"]):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        told = " ".join("".join(capsys.readouterr()).split())
        assert done.value.code == 2 and len(re.findall(r"does nothing: model_stock has no", told)) >= 4
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as done:
        main(["merge", str(path), str(tmp_path / "out"), "--quiet"])
    assert done.value.code == 0
    told = capsys.readouterr().err
    assert len(re.findall("^largemerge: warning: ", told, re.MULTILINE)) == 4
    report = (tmp_path / "out" / "merge_report.json").read_text()
    assert report.count("warning: ") == 4
    with pytest.raises(LargemergeError, match="a warning without --strict"):
        largemerge.merge(path, tmp_path / "other", strict=True)


def test_strict_holds_for_every_document_of_a_file(hub: Path, tmp_path: Path) -> None:
    first = "name: stock\n" + CARDS["model_stock"][0].strip() + "\nparameters: {normalize: true}\n"
    second = CARDS["linear"][0].replace("owner/zephyr-7b-beta", "stock")
    path = hub / "series.yaml"
    path.write_text(f"{first}---\n{second}")
    (warning,) = (note for note in largemerge.plan(path, probe=False).notes if note.startswith("warning: "))
    assert "model_stock has no normalize" in warning
    with pytest.raises(LargemergeError, match=r"stock: parameters\.normalize: does nothing"):
        largemerge.merge(path, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    loaded = largemerge.merge(path, tmp_path / "out").plan
    assert not loaded.problems
