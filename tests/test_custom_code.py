"""Checkpoints that ship their own code: it comes along, so that the output loads, and runs only where it is trusted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from tokenized import CODE, ENGLISH, train, write_model

import largemerge
from largemerge.errors import LargemergeError

MODELING = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from .names_tuned import TYPE

(Path({folder!r}) / "was_run").touch()


class TunedConfig(LlamaConfig):
    model_type = TYPE


class TunedLlama(LlamaForCausalLM):
    config_class = TunedConfig
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models of a class that only their own code knows, which leaves a file where it is run."""
    monkeypatch.setattr(tf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    for seed, texts in ((0, ENGLISH), (1, CODE)):
        model = tmp_path / f"m{seed}"
        write_model(model, seed, train("BPE", texts, 280), num_rows=300)
        (model / "names_tuned.py").write_text('TYPE = "tuned_llama"\n')
        (model / "modeling_tuned.py").write_text(MODELING.format(folder=str(tmp_path)))
        config = json.loads((model / "config.json").read_text())
        auto_map = {"AutoConfig": "modeling_tuned.TunedConfig", "AutoModelForCausalLM": "modeling_tuned.TunedLlama"}
        config |= {"model_type": "tuned_llama", "architectures": ["TunedLlama"], "auto_map": auto_map}
        (model / "config.json").write_text(json.dumps(config))
    save_file({"input_ids": torch.randint(0, 200, (4, 6))}, tmp_path / "data.safetensors")
    return tmp_path


def config_of(folder: Path, method: str, **more: Any) -> dict[str, Any]:
    data = {"calibration": {"data": str(folder / "data.safetensors")}} if method == "regmean" else {}
    models = [{"model": str(folder / f"m{seed}"), "parameters": {"weight": 0.5}, **data} for seed in (0, 1)]
    return {"merge_method": method, "models": models, **more}


def loads(folder: Path) -> bool:
    model, info = tf.AutoModelForCausalLM.from_pretrained(
        folder / "out", trust_remote_code=True, output_loading_info=True
    )
    return type(model).__name__ == "TunedLlama" and not info["missing_keys"] and not info["unexpected_keys"]


def test_a_data_free_merge_copies_code_and_does_not_run_it(folder: Path) -> None:
    report = largemerge.merge(config_of(folder, "linear"), folder / "out", quiet=True)
    assert not (folder / "was_run").exists() and not any("modeling_tuned" in name for name in sys.modules)
    for name in ("modeling_tuned.py", "names_tuned.py"):
        assert (folder / "out" / name).read_bytes() == (folder / "m0" / name).read_bytes()
    assert not any("custom code" in note for note in report.plan.notes)
    assert loads(folder)


def test_another_code_is_told(folder: Path) -> None:
    (folder / "m1" / "names_tuned.py").write_text('TYPE = "other"\n')
    notes = largemerge.plan(config_of(folder, "linear")).notes
    assert any("custom code: names_tuned.py of" in note and "has another one" in note for note in notes)


@pytest.mark.parametrize("method", ["linear", "regmean"])
def test_where_the_class_is_needed_code_is_run_only_if_it_is_trusted(folder: Path, method: str) -> None:
    more = {"tokenizer_source": "union"} if method == "linear" else {}
    with pytest.raises(LargemergeError, match="set trust_remote_code: true if you trust it"):
        largemerge.merge(config_of(folder, method, **more), folder / "out", quiet=True)
    assert not (folder / "was_run").exists() and not (folder / "out").exists()
    largemerge.merge(config_of(folder, method, trust_remote_code=True, **more), folder / "out", quiet=True)
    assert (folder / "was_run").exists() and loads(folder)
