"""What lies beside the weights: config, model card, tokenizer and processor files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import origin, touch
from safetensors.torch import save_file

from largemerge.checkpoint.index import Checkpoint, open_checkpoint
from largemerge.checkpoint.side_files import (
    SideFiles,
    find_processor,
    find_side_files,
    find_tokenizer,
    model_card,
    output_config,
    remove_checkpoint,
)
from largemerge.errors import CheckpointError
from largemerge.tokenizer.chat_templates import template_in
from largemerge.tokenizer.tokenizers import load_tokenizer, tokenizer_files


def checkpoint_with(folder: Path, config: dict[str, Any]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    return open_checkpoint(folder, "reference")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"hidden_size": 4}, {"hidden_size": 4, "dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32", "x": 1}, "vision_config": {"x": 2}},
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "x": 1}, "vision_config": {"x": 2}},
        ),
        ({"_name_or_path": "/home/somebody", "dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
def test_the_config_names_the_dtype_of_the_output(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert json.loads(output_config(config, torch.bfloat16)) == expected


def card(*models: str, base: str | None) -> tuple[dict[str, Any], str]:
    entries = [{"name": f"m{index}", "model": model, "weight": 1.0, "data": "d"} for index, model in enumerate(models)]
    text = model_card(
        method="regmean", class_name="BertModel", models=entries, base=base, config_yaml="a: 1\n", version="9.9"
    )
    _, front, body = text.split("---\n", 2)
    metadata: dict[str, Any] = yaml.safe_load(front)
    return metadata, body


def test_the_model_card_names_models_of_the_hub() -> None:
    metadata, body = card("owner/maths@v1", "/a/folder", "./x/y", "owner/code", "owner/maths@v2", base="owner/base")
    assert metadata["base_model"] == ["owner/maths", "owner/code", "owner/base"]
    assert metadata["tags"] == ["merge", "largemerge"]
    assert "A merge of 5 models" in body and "largemerge 9.9" in body and "`regmean`" in body
    assert "BertModel.from_pretrained" in body and "```yaml\na: 1\n```" in body


def test_the_model_card_tells_no_folders_of_this_machine_in_its_head() -> None:
    metadata, body = card("/a/folder", "./x/y", base=None)
    assert "base_model" not in metadata
    assert "| m0 | `folder` |" in body


def bare(folder: Path, name: str | None = None, **config: Any) -> Checkpoint:
    """A checkpoint without tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(name or folder.name, folder, config, {}, {})


def copied(out: Path, side_files: SideFiles) -> dict[str, str]:
    """Copies, and returns the first word of each file of the output."""
    out.mkdir()
    side_files.copy(out)
    paths = [path for path in out.rglob("*") if path.is_file()]
    assert set(side_files.files) == {str(path.relative_to(out)) for path in paths}
    return {str(path.relative_to(out)): origin(path).split()[0] for path in paths}


def test_files_come_from_where_they_should(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("config", "tokenizer", "processor")]
    for folder in folders:
        touch(folder, "generation_config.json", "tokenizer.json", "merges.txt", "preprocessor_config.json", "code.py")
        touch(folder, "model.safetensors", "training_args.bin", "additional_chat_templates/a.jinja")
        touch(folder, "qformer_tokenizer/vocab.txt", "speaker_embeddings/a.npy", "onnx/tokenizer.json", "spm.model")
        touch(folder, "checkpoint-5/tokenizer.json", "custom_generate/generate.py")
    found = copied(tmp_path / "out", find_side_files(bare(folders[0]), folders[1], folders[2]))
    assert found == {
        "generation_config.json": "config",
        "custom_generate/generate.py": "config",
        "tokenizer.json": "tokenizer",
        "merges.txt": "tokenizer",
        "spm.model": "tokenizer",
        "additional_chat_templates/a.jinja": "tokenizer",
        "qformer_tokenizer/vocab.txt": "tokenizer",
        "preprocessor_config.json": "processor",
        "speaker_embeddings/a.npy": "processor",
    }


CODE = {
    "modeling_my.py": "from .configuration_my import A\nfrom .layers.attention import B\nfrom . import helpers\n",
    "configuration_my.py": "import os\n",
    "helpers.py": "def f():\n    from .late import g\n",
    "late.py": "",
    "layers/__init__.py": "",
    "layers/attention.py": "from ..shared import C\nfrom .kernels import *\n",
    "layers/kernels.py": "this is no Python",
    "shared.py": "from .nowhere import D\n",
    "tokenization_my.py": "",
    "pipeline_my.py": "",
    "train.py": "",
    "setup.py": "",
}  # fmt: skip
AUTO_MAP = {"AutoConfig": "configuration_my.A", "AutoModel": "modeling_my.B", "AutoTokenizer": "owner/name--other.T"}


def write_code(folder: Path, auto_map: dict[str, Any] = AUTO_MAP) -> None:
    for name, text in CODE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_my.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    pipelines = {"mine": {"impl": "pipeline_my.P", "type": "text"}}
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map, "custom_pipelines": pipelines}))


def test_code_comes_along_with_all_that_it_imports_and_no_more(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_code(folder)
    side_files = find_side_files(Checkpoint("m", folder, {}, {}, {}), folder, folder)
    assert set(side_files.files) == {*CODE, "tokenizer_config.json"} - {"train.py", "setup.py"}
    assert side_files.notes == ()


def test_code_that_is_missing_or_unlike_is_told(tmp_path: Path) -> None:
    checkpoints = []
    for name in ("a", "b", "c"):
        write_code(tmp_path / name, {"AutoModel": "modeling_my.B", "AutoConfig": "gone.A", "x": "../../etc/passwd.y"})
        checkpoints.append(Checkpoint(name, tmp_path / name, {}, {}, {}))
    (tmp_path / "b" / "helpers.py").write_text("other = 1\n")
    found = find_side_files(checkpoints[0], tmp_path / "a", tmp_path / "a", checkpoints)
    missing, unlike = found.notes
    assert "names its code gone.py, which is not there" in missing
    assert unlike == "custom code: helpers.py of a is taken; b has another one"


@pytest.mark.parametrize("where", ["file", "folder"])
def test_links_that_lead_out_are_told_and_not_copied(tmp_path: Path, where: str) -> None:
    folder, secret = tmp_path / "m", tmp_path / "secret"
    touch(secret, "vocab.txt")
    touch(folder, "tokenizer.json", "real.txt")
    (folder / "merges.txt").symlink_to("real.txt")  # inside: right
    if where == "file":
        (folder / "vocab.txt").symlink_to(secret / "vocab.txt")
    else:
        (folder / "qformer_tokenizer").symlink_to(secret)
    side_files = find_side_files(bare(folder), folder, folder)
    assert set(side_files.files) == {"tokenizer.json", "merges.txt"}
    (note,) = side_files.notes
    assert "vocab.txt is a link that leads out of its checkpoint: not copied" in note
    assert set(tokenizer_files(folder)) == {"tokenizer.json", "merges.txt"}


PLACES: dict[str, Callable[[Path], object]] = {
    "is a named pipe": os.mkfifo,
    "is a folder": Path.mkdir,
    "is a device": lambda path: path.symlink_to("/dev/zero"),
    "leads in a circle": lambda path: path.symlink_to(path.name),
    "which does not exist": lambda path: path.symlink_to("absent"),
    "is not readable JSON": lambda path: path.write_text("{"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "names",
    [
        ("generation_config.json", "tokenizer_config.json", "preprocessor_config.json"),
        ("1_Pooling/config.json",),
        ("additional_chat_templates/tools.jinja", "qformer_tokenizer/vocab.txt"),
    ],
)
def test_what_is_no_file_in_the_place_of_one_is_told_all_at_once(
    tmp_path: Path, place: str, names: tuple[str, ...]
) -> None:
    if "/" in names[0] and (place == "is a folder" or (names[0].endswith("jinja") and "JSON" in place)):
        pytest.skip("folders may lie in folders, and templates are no JSON")
    checkpoint = bare(tmp_path)
    (tmp_path / "modules.json").write_text('[{"path": "", "type": "a"}, {"path": "1_Pooling", "type": "b"}]')
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PLACES[place](tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        find_side_files(checkpoint, tmp_path, tmp_path)
    assert len(caught.value.problems) == len(names)
    for name, problem in zip(sorted(names), sorted(caught.value.problems), strict=True):
        assert problem.startswith(str(tmp_path / name)) and place in problem


def test_a_linked_model_is_its_own_and_linked_secrets_are_not(tmp_path: Path) -> None:
    """People link all files of a model into a folder of its own; strangers link what lies on other people's disks."""
    model, secret = bare(tmp_path / "model", model_type="llama").folder, tmp_path / "secret"
    touch(model, "vocab.txt", "chat_template.jinja", "generation_config.json")
    touch(secret, "config.json", "merges.txt")
    (tmp_path / "linked").mkdir()
    for file in model.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    (tmp_path / "linked" / "merges.txt").symlink_to(secret / "merges.txt")
    linked = bare_at(tmp_path / "linked")
    side_files = find_side_files(linked, linked.folder, linked.folder)
    assert set(side_files.files) == {"vocab.txt", "chat_template.jinja", "generation_config.json"}
    assert len(side_files.notes) == 1 and "merges.txt is a link that leads out" in side_files.notes[0]
    assert template_in(linked.folder) == "model chat_template.jinja"
    (linked.folder / "config.json").unlink()
    (linked.folder / "config.json").symlink_to(secret / "config.json")
    assert find_side_files(linked, linked.folder, linked.folder).files == {}
    with pytest.raises(CheckpointError, match="which is no model's config"):
        open_checkpoint(linked.folder, "maths")
    with pytest.raises(CheckpointError, match="jinja is a link that leads out"):
        template_in(linked.folder)
    with pytest.raises(CheckpointError, match="is a link that leads out"):
        load_tokenizer(linked.folder, "maths")


def bare_at(folder: Path) -> Checkpoint:
    return Checkpoint(folder.name, folder, json.loads((folder / "config.json").read_text()), {}, {})


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    touch(blobs, "5678")
    touch(snapshot / "0_Transformer", "config.json")
    for folder in (snapshot, snapshot / "0_Transformer"):
        (folder / "vocab.txt").symlink_to(blobs / "5678")
        assert set(tokenizer_files(folder)) == {"vocab.txt"}


def test_the_first_folder_with_such_files(tmp_path: Path) -> None:
    empty, tokenizer, both = (tmp_path / name for name in ("empty", "tokenizer", "both"))
    touch(empty, "config.json")
    touch(tokenizer, "spiece.model")
    touch(both, "tokenizer.json", "processor_config.json")
    assert find_tokenizer(empty, tokenizer, both) == tokenizer
    assert find_processor(empty, tokenizer, both) == both
    assert find_tokenizer(empty) == find_processor(empty) == empty


def sentence_encoder(root: Path, inner: str = "", pooling: str = "mean") -> Checkpoint:
    checkpoint = bare(root / inner, root.name)
    touch(root, "2_Dense/model.safetensors", "README.md")
    (root / "2_Dense" / "config.json").write_text('{"bias": true}')
    (root / "config_sentence_transformers.json").write_text(json.dumps({"__version__": root.name, "prompts": {}}))
    touch(root / inner, "vocab.txt")
    (root / inner / "sentence_bert_config.json").write_text("{}")
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling" / "config.json").write_text(json.dumps({"pooling": pooling}))
    modules = [
        {"path": inner, "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "custom_st.Pooling"},
    ]
    (root / "modules.json").write_text(
        json.dumps([*modules, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    (root / "custom_st.py").write_text("code\n")
    return replace(checkpoint, inner=inner)


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_a_sentence_encoder_keeps_what_comes_after_the_transformer(tmp_path: Path, inner: str) -> None:
    reference = sentence_encoder(tmp_path / "a", inner)
    other = sentence_encoder(tmp_path / "b", inner, pooling="cls")
    side_files = find_side_files(reference, reference.folder, reference.folder, [reference, other])
    inside = f"{inner}/" if inner else ""
    at_root = {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json"}
    beside = {f"{inside}sentence_bert_config.json", f"{inside}vocab.txt"}
    assert set(side_files.files) == {*at_root, *beside, "custom_st.py"} and side_files.inner == inner
    assert side_files.notes == ("modules: 1_Pooling/config.json of a is taken; b has another one",)


def test_modules_come_from_a_candidate_where_the_base_has_none(tmp_path: Path) -> None:
    base, tuned = bare(tmp_path / "base"), sentence_encoder(tmp_path / "tuned", "0_Transformer")
    side_files = find_side_files(base, base.folder, base.folder, [base, tuned])
    assert side_files.inner == "0_Transformer" and "1_Pooling/config.json" in side_files.files
    assert side_files.notes == ("files of sentence-transformers (modules.json, …) come from tuned",)


def test_what_an_earlier_merge_left_is_removed(tmp_path: Path) -> None:
    sentence_encoder(tmp_path / "out", "0_Transformer")
    touch(tmp_path / "out", "spm.model", "qformer_tokenizer/vocab.txt", "notes.md", "generation_config.json")
    kept = tmp_path / "out" / "2_Dense" / "model.safetensors"
    remove_checkpoint(tmp_path / "out", {kept})
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {"2_Dense/model.safetensors", "README.md", "notes.md", "custom_st.py"}
